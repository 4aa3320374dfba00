"""The errors of talking to a workspace and to a user, with their exit statuses."""

from __future__ import annotations

from activate.process import Error as Error


class UsageError(Error):
    """The command line, or a value on it, is wrong."""

    status = 64


class Unreachable(Error):
    """The workspace gives no usable answer.

    `retry_after` is how many seconds it asks to be left alone. `overloaded` is set if it did
    answer, but with a status that means: try again later. `sent`: the request may have had its
    effect.
    """

    status = 69

    def __init__(
        self, message: str, retry_after: float = 0.0, overloaded: bool = False, sent: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after, self.overloaded, self.sent = retry_after, overloaded, sent


class Refused(Error):
    """The workspace refuses the token. `is_unknown`: it does not know it, or no more."""

    status = 77

    def __init__(self, message: str, is_unknown: bool = False) -> None:
        super().__init__(message)
        self.is_unknown = is_unknown


class AlreadyRunning(Error):
    """An agent of this name is running on this machine."""

    status = 75


class Gone(Error):
    """The workspace does not know a deployment, so there is nobody to report it to."""


class Undecodable(ValueError):
    """A message or a deploy.json that breaks the protocol. Messages are then logged and skipped."""
