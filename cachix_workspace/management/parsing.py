"""How the API reads a request: within limits, nothing unknown, one sentence on what is wrong."""

from __future__ import annotations

from typing import Any, NoReturn

from marshmallow import RAISE, Schema, ValidationError
from webargs import missing
from webargs.flaskparser import FlaskParser

from cachix_protocol import dumps, loads
from cachix_workspace.admission import read_body
from cachix_workspace.browsers import json_wanted
from cachix_workspace.refusal import Refusal

MAX_JSON = 1 << 20  # bytes
MAX_SENTENCE = 500  # characters
SHORT = {
    "Missing data for required field.": "is missing",
    "Unknown field.": "is unknown here",
    "Field may not be null.": "can't be null",
}


class Parser(FlaskParser):
    """webargs' parser for Flask, as strict as the rest of the workspace is."""

    DEFAULT_VALIDATION_STATUS = 400
    # a filter that is misspelled would otherwise match everything
    DEFAULT_UNKNOWN_BY_LOCATION = {**FlaskParser.DEFAULT_UNKNOWN_BY_LOCATION, "query": RAISE}

    def load_json(self, req: Any, schema: Schema) -> Any:
        """The body. Raises Refusal (400, 413 or 415), or Undecodable."""
        json_wanted()
        body = read_body(MAX_JSON)
        value = loads(body) if body else missing
        try:
            dumps(value if body else None).encode()
        except UnicodeEncodeError:
            raise Refusal(400, "the body has half a surrogate pair, which is no text") from None
        return value

    def handle_error(
        self, error: ValidationError, req: Any, schema: Schema, **_others: Any
    ) -> NoReturn:
        """Raises Refusal (400)."""
        raise Refusal(400, problem(error.messages))


def problem(messages: Any) -> str:
    """The first thing that is wrong, in a sentence. `messages` are marshmallow's, by location."""
    where: list[str] = []
    while isinstance(messages, dict) and messages:
        key, messages = next(iter(messages.items()))
        where.append(str(key))
    text = str(messages[0] if isinstance(messages, list) and messages else messages)
    names = [name for name in where[1:] if name != "_schema"]
    if not names:
        return f"the {'query' if where[:1] == ['query'] else 'body'}: {text}"[:MAX_SENTENCE]
    name = f"`{'.'.join(names)[:200]}`"
    return f"{name} {SHORT[text]}" if text in SHORT else f"{name}: {text}"[:MAX_SENTENCE]
