"""ASGI middleware in front of every route: limits, checks, request ids and the access log.

It is plain ASGI instead of Starlette's middleware classes, so that the routes see a client's
disconnect as it arrives. Headers, query strings and bodies are never logged.
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
from lamoe.serve.metrics import Metrics
from lamoe.serve.settings import Settings

log = logging.getLogger("lamoe.serve")

MAX_HELD_BODIES = 16  # limit on memory for request bodies, in bodies of the largest size
CLIENT_DISCONNECTED = 499  # status in logs and metrics when no response was sent
INTERNAL_ERROR = ApiError(
    500,
    "the server failed at this request; its log says more under this request's id",
    "internal_error",
)
ID_PREFIXES = {
    "/v1/completions": "cmpl",
    "/v1/chat/completions": "chatcmpl",
    "/v1/embeddings": "embd",
}
# The page and Prometheus poll these routes, so their successes are logged at DEBUG only.
POLLED_ROUTES = ("/health", "/metrics", "/lamoe/stats", "/lamoe/requests/{id}/experts")


def is_open(method: str, path: str) -> bool:
    """Return whether a route needs no key. These are the health check and the static page."""
    return method in ("GET", "HEAD") and (
        path in ("/health", "/", "/favicon.ico") or path.startswith("/page/")
    )


class Guard:
    """ASGI middleware. One instance handles all requests of a server.

    It adds entries to `scope["state"]`: `id`, which is also the x-request-id of the response,
    `log`, a dict of fields that routes may add to the request's log line, and `cache_salt`.
    """

    def __init__(self, app, settings: Settings, metrics: Metrics):
        self.app, self.settings, self.metrics = app, settings, metrics
        self.held_bytes = 0  # total size of the bodies of running requests
        self.max_held_bytes = MAX_HELD_BODIES * settings.max_body_bytes
        self.hosts = settings.host_names()
        self.key_digests = [hashlib.sha256(k.encode()).digest() for k in settings.api_keys()]

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        call = _Call(self, scope, receive, send)
        try:
            self.check(scope)
            await self.app(scope, call.receive, call.send)
        except ApiError as e:
            await call.fail(e)
        except Exception as e:
            if not call.disconnected:
                fields = {"id": call.id, "path": scope["path"]}
                log.error("unexpected error", exc_info=e, extra={"fields": fields})
            await call.fail(INTERNAL_ERROR)
        finally:
            call.finish()

    def check(self, scope) -> None:
        """Check everything that can be checked before the body is read.

        Raises:
            ApiError: 401, 403, 413, 415 or 431.
        """
        headers = scope["headers"]
        size = sum(len(name) + len(value) + 4 for name, value in headers)
        size += len(scope["raw_path"]) + len(scope["query_string"])
        limit = self.settings.max_header_bytes
        if size > limit:
            raise ApiError(
                431,
                f"the headers have {size} bytes; the limit is {limit} (--max-header-bytes)",
                "headers_too_large",
            )
        fields: dict[bytes, bytes] = dict(headers)
        if self.hosts is not None and _host_name(fields.get(b"host", b"")) not in self.hosts:
            raise ApiError(
                403,
                "this server does not answer to the name in the Host header; use 127.0.0.1 or "
                "localhost, or start it with --allowed-hosts",
                "host_not_allowed",
            )
        needs_key = self.key_digests and not is_open(scope["method"], scope["path"])
        if needs_key and not self.has_valid_key(fields.get(b"authorization", b"")):
            raise ApiError(
                401,
                "this server needs an API key: send it as `Authorization: Bearer KEY`",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if scope["method"] in ("POST", "PUT", "PATCH"):
            self._check_body_headers(fields)

    def _check_body_headers(self, fields: dict[bytes, bytes]) -> None:
        # This also protects against other web pages: a browser sends this content type to a
        # foreign server only after a CORS preflight, which no route here answers.
        content_type = fields.get(b"content-type", b"").split(b";")[0].strip().lower()
        if content_type != b"application/json":
            raise ApiError(
                415,
                "send JSON, with the header Content-Type: application/json",
                "unsupported_media_type",
            )
        length = fields.get(b"content-length", b"0")
        limit = self.settings.max_body_bytes
        if not length.isdigit() or len(length) > 18 or int(length) > limit:
            raise _body_too_large(limit)

    def cache_salt(self, scope) -> str:
        """Return the salt that keeps cached prefixes of different keys apart, or "" for none."""
        if len(set(self.key_digests)) < 2 or self.settings.prefix_cache_scope == "server":
            return ""
        _, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return hashlib.sha256(key.strip()).hexdigest()

    def has_valid_key(self, authorization: bytes) -> bool:
        """Check an Authorization header in constant time, so that the duration reveals nothing."""
        scheme, _, key = authorization.partition(b" ")
        digest, valid = hashlib.sha256(key.strip()).digest(), False
        for key_digest in self.key_digests:
            valid |= hmac.compare_digest(digest, key_digest)
        return valid and scheme.lower() == b"bearer"


class _Call:
    """State of one request. It limits the received body and records the sent response."""

    def __init__(self, guard: Guard, scope, receive, send):
        self.guard, self.scope, self._receive, self._send = guard, scope, receive, send
        self.id = f"{ID_PREFIXES.get(scope['path'], 'req')}-{uuid.uuid4().hex}"
        self.log_fields: dict[str, Any] = {}
        scope["state"] = {
            **scope.get("state", {}),
            "id": self.id,
            "log": self.log_fields,
            "cache_salt": guard.cache_salt(scope),
        }
        self.started = time.perf_counter()
        self.body_deadline = time.monotonic() + guard.settings.body_timeout
        self.status = 0  # HTTP status; 0 before the response begins
        self.body_bytes = 0
        self.body_complete = False
        self.disconnected = False

    async def receive(self):
        """Receive an ASGI message, within the time and size limits of request bodies."""
        if self.body_complete:
            message = await self._receive()
        else:
            message = await self._receive_body()
        self.disconnected |= message["type"] == "http.disconnect"
        if message["type"] == "http.request":
            self._count_body(message)
        return message

    async def _receive_body(self):
        try:
            async with asyncio.timeout(max(self.body_deadline - time.monotonic(), 0)):
                return await self._receive()
        except TimeoutError:
            seconds = self.guard.settings.body_timeout
            raise ApiError(
                408,
                f"the body did not arrive within {seconds:g} seconds (--body-timeout)",
                "body_timeout",
                headers={"Connection": "close"},
            ) from None

    def _count_body(self, message) -> None:
        size = len(message.get("body", b""))
        self.body_bytes += size
        self.guard.held_bytes += size
        self.body_complete = not message.get("more_body", False)
        limit = self.guard.settings.max_body_bytes
        if self.body_bytes > limit:
            raise _body_too_large(limit)
        if self.guard.held_bytes > self.guard.max_held_bytes:
            self.guard.metrics.rejected.inc()
            raise ApiError(
                429,
                "too many large requests at once; try again later",
                "queue_full",
                headers={"Retry-After": "2", "Connection": "close"},
            )

    async def send(self, message) -> None:
        """Send an ASGI message, with the server's own headers added to the response."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own_headers = [
                (b"x-request-id", self.id.encode()),
                (b"x-content-type-options", b"nosniff"),
            ]
            message = {**message, "headers": [*message.get("headers", ()), *own_headers]}
        is_last = message["type"] == "http.response.body" and not message.get("more_body")
        body_unread = self.body_bytes and not self.body_complete and not self.disconnected
        if is_last and body_unread:
            await self._send({**message, "more_body": True})
            await self._discard_body()
            message = {"type": "http.response.body"}
        await self._send(message)

    async def _discard_body(self) -> None:
        """Read the rest of a refused body for at most a second.

        Closing a connection with unread bytes resets it, and the reset can destroy the response
        before the client has read it.
        """
        try:
            async with asyncio.timeout(1):
                while (message := await self._receive()).get("more_body"):
                    pass
                self.disconnected |= message["type"] == "http.disconnect"
        except TimeoutError:
            pass

    async def fail(self, error: ApiError) -> None:
        """Send an error response, unless a response has begun or the client has gone."""
        if not self.status and not self.disconnected:
            await error.response()(self.scope, self._receive, self.send)

    def finish(self) -> None:
        """Release the body's bytes, count the response and log the request."""
        self.guard.held_bytes -= self.body_bytes
        seconds = time.perf_counter() - self.started
        route = getattr(self.scope.get("route"), "path", "other")
        status = self.status or CLIENT_DISCONNECTED
        self.guard.metrics.answered(route, status, seconds)
        fields = {
            "id": self.id,
            "method": self.scope["method"],
            "path": self.scope["path"][:200],
            "status": status,
            "ms": round(seconds * 1e3, 1),
            "client": (self.scope.get("client") or ("", 0))[0],
            **self.log_fields,
        }
        quiet = route in POLLED_ROUTES and self.status < 400
        log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})


def _body_too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limit} bytes (--max-body-bytes)",
        "body_too_large",
        headers={"Connection": "close"},
    )


def _host_name(host: bytes) -> str:
    """Return the name in a Host header, without the port."""
    text = host.decode("latin-1").strip().lower()
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
