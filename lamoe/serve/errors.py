"""Error objects in OpenAI's format, and the JSON encoding of all responses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}
MAX_MESSAGE = 1000  # characters; limits messages that quote the request
BRANCH = "branch:"  # begins the names of union branches in the request models


class ApiError(HTTPException):
    """An error response.

    Args:
        status: HTTP status.
        message: what is wrong and how to fix it, for people.
        code: short identifier of the error, for programs.
        param: name of the request field that is wrong.
        headers: additional response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.code, self.param = code, param

    @property
    def body(self) -> dict[str, Any]:
        """The response body, an OpenAI error object."""
        default = "invalid_request_error" if self.status_code < 500 else "server_error"
        return {
            "error": {
                "message": self.detail,
                "type": ERROR_TYPES.get(self.status_code, default),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        return json_response(self.body, self.status_code, self.headers)


def invalid_value(message: str, param: str | None = None) -> ApiError:
    """Make the 400 error for a field whose value cannot be used."""
    return ApiError(400, message, "invalid_value", param)


def queue_full(
    message: str, wait: float = 2.0, headers: Mapping[str, str] | None = None
) -> ApiError:
    """Make the 429 error for a request that may be sent again after `wait` seconds."""
    seconds = min(max(math.ceil(wait), 1), 60)
    return ApiError(
        429, message, "queue_full", headers={"Retry-After": str(seconds), **(headers or {})}
    )


def timed_out(seconds: float) -> ApiError:
    """Make the 408 error for a response that took longer than --request-timeout."""
    return ApiError(
        408,
        f"the answer was not complete within {seconds:g} seconds (--request-timeout)",
        "timeout",
        headers={"X-Should-Retry": "false"},
    )


def to_json(value: Any) -> bytes:
    """Encode a value as compact UTF-8 JSON.

    A lone surrogate is escaped. It can only come from a request that the response quotes.

    Raises:
        ValueError: if the value contains NaN or infinity.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Make an HTTP response with a JSON body."""
    return Response(to_json(value), status, headers, media_type="application/json")


def from_validation(errors: Sequence[Any]) -> ApiError:
    """Convert pydantic's list of validation errors to one error, about the first of them.

    Errors about wrong values are preferred to those about unknown fields. An unknown field is often
    the consequence of a wrong value elsewhere, such as a wrong type of a tool.
    """
    error = min(errors, key=lambda e: e["type"] == "extra_forbidden")
    kind, context = error["type"], error.get("ctx", {})
    param = _field_name([*error["loc"], *([context["field"]] if "field" in context else [])])
    more = f" ({len(errors) - 1} more problems in this request)" if len(errors) > 1 else ""
    if kind == "extra_forbidden":
        message = f"unknown field {param!r}: this server does not support it; leave it out{more}"
        return ApiError(400, message[:MAX_MESSAGE], "unknown_field", param)
    if kind == "missing" and param is None:
        return ApiError(400, "the request has no body; send a JSON object", "invalid_json")
    message = _MESSAGES[kind].format(**context) if kind in _MESSAGES else error["msg"]
    if kind not in _WITHOUT_VALUE:
        message += f", found {quoted(error.get('input'))}"
    colon = "" if message.startswith(("is ", "has ", "must ")) else ":"
    message = f"{param or 'the body'}{colon} {message}{more}"[:MAX_MESSAGE]
    if kind == "unsupported":
        return ApiError(400, message, "unsupported", param)
    return invalid_value(message, param)


# Messages of pydantic that speak of Python, in the words of the API.
_MESSAGES = {
    "missing": "is required",
    "too_short": "is empty; give at least {min_length}",
    "too_long": "has {actual_length} entries; at most {max_length} are allowed",
    "string_too_short": "is empty; give at least {min_length} character",
    "string_too_long": "is longer than the limit of {max_length} characters; shorten it",
    "model_type": "must be an object",
    "dict_type": "must be an object",
    "list_type": "must be a list",
    "string_type": "must be a text",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_pattern_mismatch": "must match {pattern}",
}
_WITHOUT_VALUE = {"missing", "too_short", "too_long", "string_too_short", "unsupported"}


def _field_name(path: Sequence[Any]) -> str | None:
    """Write a path as clients know it, such as messages[0].content[1].text."""
    # pydantic adds "body", the names of union branches and a mark for a wrong key. None is a field.
    parts = [p for p in path if p not in ("body", "[key]") and not str(p).startswith(BRANCH)]
    name = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts[:10])
    return name.removeprefix(".")[:100] or None


def quoted(value: Any) -> str:
    """Format a value of a request for a message, in at most 80 characters."""
    try:
        text = json.dumps(value) if not isinstance(value, bytes) else repr(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
