"""Errors as OpenAI's API words them, and JSON bytes for everything we send."""

from __future__ import annotations

import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}


class ApiError(HTTPException):
    """An answer with an error body. code: a short word for programs; param: the field it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.code, self.param = code, param

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(
            self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error"
        )
        return {
            "error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        }

    def response(self) -> Response:
        return answer(self.body, self.status_code, self.headers)


def to_json(value: Any) -> bytes:
    """Compact UTF-8. A lone surrogate (only ever an echo of what came in) is escaped; nan and inf are a ValueError."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(
        "utf-8", "backslashreplace"
    )


def answer(value: Any, status: int = 200, headers: Any = None) -> Response:
    """A JSON response."""
    return Response(to_json(value), status, headers, media_type="application/json")


def from_validation(errors: list[dict[str, Any]]) -> ApiError:
    """The first complaint of the request models, in one line."""
    e = (
        min(errors, key=lambda e: e.get("type") in ("extra_forbidden",))
        if len(errors) > 1
        else errors[0]
    )
    where = [
        str(p)
        for p in e["loc"]
        if p != "body" and not str(p).startswith(("function-", "list[", "union"))
    ]
    param = ".".join(where[:6])[:100] or None
    more = f" ({len(errors) - 1} more problems in this request)" if len(errors) > 1 else ""
    if e["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"unknown field {param!r}: this server neither implements nor ignores it; leave it out{more}"[
                :1000
            ],
            "unknown_field",
            param,
        )
    if e["type"] == "missing" and param is None:
        return ApiError(400, "the request has no body; send a JSON object", "invalid_json")
    found = "" if e["type"] == "missing" else f", found {_short(e.get('input'))}"
    return ApiError(
        400, f"{param or 'the body'}: {e['msg']}{found}{more}"[:1000], "invalid_value", param
    )


def _short(value: Any) -> str:
    try:
        text = json.dumps(value) if not isinstance(value, bytes) else repr(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
