"""The error that becomes the answer to a request."""

from __future__ import annotations

from cachix_protocol import Error


class Refusal(Error):
    """A request is answered with the HTTP status `code` and this sentence."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class UnknownToken(Refusal):
    """A request has a token that was never made here."""
