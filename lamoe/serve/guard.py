"""What stands before every route: a request id, limits on headers and body, the Host check, the key, one log line, and a last catch.

Pure ASGI, so that a client's leaving reaches the routes as it is. Never logged: headers, query strings, bodies.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
import uuid
from typing import Any

from lamoe.serve.errors import ApiError
from lamoe.serve.settings import Settings

log = logging.getLogger("lamoe.serve")

BODIES = 16  # of the largest size that may be in memory at once
UNEXPECTED = ApiError(
    500,
    "the server failed at this request; its log says more under this request's id",
    "internal_error",
)
PREFIX = {"/v1/completions": "cmpl", "/v1/chat/completions": "chatcmpl", "/v1/embeddings": "embd"}
POLLED = (
    "/health",
    "/metrics",
    "/lamoe/stats",
    "/lamoe/requests/{id}/experts",
)  # each second, by scrapers and the page: no news


def is_open(method: str, path: str) -> bool:
    """What needs no key: the health of the server, and the page, which carries no data."""
    return method in ("GET", "HEAD") and (
        path in ("/health", "/", "/favicon.ico") or path.startswith("/page/")
    )


class Guard:
    """ASGI middleware. `scope["state"]` gets `id` (the x-request-id of the answer) and `log`, a dict that routes add to."""

    def __init__(self, app, settings: Settings, metrics):
        self.app, self.settings, self.metrics = app, settings, metrics
        self.held, self.most_held = (
            0,
            BODIES * settings.max_body_bytes,
        )  # bytes of all bodies whose answers are not complete
        self.hosts, self.digests = (
            settings.hosts(),
            [hashlib.sha256(k.encode()).digest() for k in settings.keys()],
        )

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send) if scope["type"] == "lifespan" else None
        call = _Call(self, scope, receive, send)
        try:
            self.check(scope)
            await self.app(scope, call.receive, call.send)
        except ApiError as e:
            await call.fail(e)
        except Exception as e:
            if not call.disconnected:
                log.error(
                    "unexpected error",
                    exc_info=e,
                    extra={"fields": {"id": call.id, "path": scope["path"]}},
                )
            await call.fail(UNEXPECTED)
        finally:
            call.report()

    def check(self, scope) -> None:
        """ApiError for what is refused before anything is read."""
        headers = scope["headers"]
        size = (
            sum(len(k) + len(v) + 4 for k, v in headers)
            + len(scope["raw_path"])
            + len(scope["query_string"])
        )
        if size > self.settings.max_header_bytes:
            raise ApiError(
                431,
                f"the headers have {size} bytes; the limit is {self.settings.max_header_bytes} (--max-header-bytes)",
                "headers_too_large",
            )
        fields: dict[bytes, bytes] = dict(headers)
        if self.hosts is not None and _host(fields.get(b"host", b"")) not in self.hosts:
            raise ApiError(
                403,
                "this server does not answer to the name in the Host header; use 127.0.0.1 or localhost, or start it with --allowed-hosts",
                "host_not_allowed",
            )
        if (
            self.digests
            and not is_open(scope["method"], scope["path"])
            and not self.knows(fields.get(b"authorization", b""))
        ):
            raise ApiError(
                401,
                "this server needs an API key: send it as `Authorization: Bearer KEY`",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if scope["method"] in ("POST", "PUT", "PATCH"):
            kind = fields.get(b"content-type", b"").split(b";")[0].strip().lower()
            if (
                kind != b"application/json"
            ):  # also what keeps foreign web pages out: a browser asks before it sends this type elsewhere
                raise ApiError(
                    415,
                    "send JSON, with the header Content-Type: application/json",
                    "unsupported_media_type",
                )
            length = fields.get(b"content-length", b"0")
            if (
                not length.isdigit()
                or len(length) > 18
                or int(length) > self.settings.max_body_bytes
            ):
                raise _too_large(self.settings.max_body_bytes)

    def knows(self, authorization: bytes) -> bool:
        """Whether this is `Bearer` and a valid key; the time it takes says nothing about the keys."""
        scheme, _, key = authorization.partition(b" ")
        given, found = hashlib.sha256(key.strip()).digest(), False
        for digest in self.digests:
            found |= hmac.compare_digest(given, digest)
        return found and scheme.lower() == b"bearer"


class _Call:
    """One request: counts what comes in, notes what goes out."""

    def __init__(self, guard: Guard, scope, receive, send):
        self.guard, self.scope, self._receive, self._send = guard, scope, receive, send
        self.id = f"{PREFIX.get(scope['path'], 'req')}-{uuid.uuid4().hex}"
        self.fields: dict[str, Any] = {}
        self.state = scope["state"] = {**scope.get("state", {}), "id": self.id, "log": self.fields}
        self.started, self.status, self.bytes, self.complete, self.disconnected = (
            time.perf_counter(),
            0,
            0,
            False,
            False,
        )
        self.deadline = time.monotonic() + guard.settings.body_timeout

    async def receive(self):
        if self.complete:
            message = await self._receive()
        else:
            try:
                async with asyncio.timeout(max(self.deadline - time.monotonic(), 0)):
                    message = await self._receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the body did not come within {self.guard.settings.body_timeout:g} seconds (--body-timeout)",
                    "body_timeout",
                    headers={"Connection": "close"},
                ) from None
        self.disconnected |= message["type"] == "http.disconnect"
        if message["type"] == "http.request":
            self.bytes += len(message.get("body", b""))
            self.guard.held += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
            if self.bytes > self.guard.settings.max_body_bytes:
                raise _too_large(self.guard.settings.max_body_bytes)
            if self.guard.held > self.guard.most_held:
                self.guard.metrics.rejected.inc()
                raise ApiError(
                    429,
                    "too many large requests at once; try again later",
                    "queue_full",
                    headers={"Retry-After": "2", "Connection": "close"},
                )
        return message

    async def send(self, message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {
                **message,
                "headers": [
                    *message.get("headers", ()),
                    (b"x-request-id", self.id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ],
            }
        if (
            message["type"] == "http.response.body"
            and not message.get("more_body")
            and self.bytes
            and not self.complete
            and not self.disconnected
        ):
            await self._send({**message, "more_body": True})
            await self._discard()
            message = {"type": "http.response.body"}
        await self._send(message)

    async def _discard(self) -> None:
        """Read on for a moment where a body was cut off: a connection that is closed over unread bytes is reset, and a reset takes the answer with it."""
        try:
            async with asyncio.timeout(1):
                while (message := await self._receive()).get("more_body"):
                    pass
                self.disconnected |= message["type"] == "http.disconnect"
        except TimeoutError:
            pass

    async def fail(self, error: ApiError) -> None:
        if not self.status and not self.disconnected:
            await error.response()(self.scope, self._receive, self.send)

    def report(self) -> None:
        self.guard.held -= self.bytes
        seconds = time.perf_counter() - self.started
        route = getattr(self.scope.get("route"), "path", "other")
        self.guard.metrics.answered(route, self.status or 499, seconds)
        quiet = route in POLLED and self.status < 400
        log.log(
            logging.DEBUG if quiet else logging.INFO,
            "request",
            extra={
                "fields": {
                    "id": self.id,
                    "method": self.scope["method"],
                    "path": self.scope["path"][:200],
                    "status": self.status or 499,
                    "ms": round(seconds * 1e3, 1),
                    "client": (self.scope.get("client") or ("", 0))[0],
                    **self.fields,
                }
            },
        )


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limit} bytes (--max-body-bytes)",
        "body_too_large",
        headers={"Connection": "close"},
    )


def _host(value: bytes) -> str:
    """The name in a Host header, without its port."""
    text = value.decode("latin-1").strip().lower()
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
