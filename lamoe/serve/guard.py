"""ASGI middleware in front of every route: limits, checks, request ids and the access log.

It is plain ASGI instead of Starlette's middleware classes, so that the routes see a client's
disconnect as it arrives. Headers, query strings and bodies are never logged.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.responses import Response

from lamoe.serve import bodies
from lamoe.serve.errors import ApiError, queue_full
from lamoe.serve.metrics import Metrics
from lamoe.serve.settings import Settings

log = logging.getLogger("lamoe.serve")

MAX_HELD_BODIES = 4  # limit on memory for request bodies, in bodies of the largest size
BEGIN_AT_ONCE = 4  # requests
SMALL_BODY = 1 << 16  # smaller bodies are always accepted; connections limit their number
CLIENT_DISCONNECTED = 499  # status in logs and metrics when no response was sent
PREFLIGHT_SECONDS = 600  # how long a browser may remember the answer to a preflight
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
    `log`, a dict of fields that routes may add to the request's log line, `cache_salt`, and
    `release_body`, to be called when the body is no longer in memory.

    The application sees every path without a trailing slash and without empty parts, and GET
    instead of HEAD. uvicorn leaves the body out of the response to HEAD.

    Args:
        app: the ASGI application.
        settings: the options of the server.
        metrics: counts responses.
        check_route: called with (method, path); raises the 404 and 405 errors.
    """

    def __init__(
        self,
        app,
        settings: Settings,
        metrics: Metrics,
        check_route: Callable[[str, str], None] = lambda method, path: None,
    ):
        self.app, self.settings, self.metrics = app, settings, metrics
        self.check_route = check_route
        self._beginning = asyncio.Semaphore(BEGIN_AT_ONCE)
        self.held_bytes = 0  # total size of the bodies of running requests
        self.max_held_bytes = MAX_HELD_BODIES * settings.max_body_bytes
        self.hosts, self.origins = settings.host_names(), settings.origins()
        self.key_digests = [hashlib.sha256(k.encode()).digest() for k in settings.api_keys()]
        self.has_salts = len({*self.key_digests}) > 1 and settings.prefix_cache_scope == "key"

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        call = _Call(self, scope, receive, send)
        scope = call.scope
        try:
            if scope["path"] != "/health":
                # Begin few requests in each round of the event loop, so that /health comes soon.
                async with self._beginning:
                    await asyncio.sleep(0)
            self.check_headers(scope, call.fields)
            if (preflight := self.preflight(scope, call.fields)) is not None:
                await preflight(scope, call.receive, call.send)
                return
            self.check(scope, call.fields)
            if scope["method"] == "POST":
                call.inflater = bodies.inflater(scope["headers"], self.settings.max_body_bytes)
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

    def check_headers(self, scope, fields: dict[bytes, bytes]) -> None:
        """Check the size of the headers and the Host header. `fields` are the headers by name.

        Raises:
            ApiError: 403 or 431.
        """
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        size += len(scope["raw_path"]) + len(scope["query_string"])
        limit = self.settings.max_header_bytes
        if size > limit:
            raise ApiError(
                431,
                f"the headers have {size} bytes; the limit is {limit} (--max-header-bytes)",
                "headers_too_large",
            )
        if self.hosts is not None and _host_name(fields.get(b"host", b"")) not in self.hosts:
            raise ApiError(
                403,
                "this server does not answer to the name in the Host header; use 127.0.0.1 or "
                "localhost, or start it with --allowed-hosts",
                "host_not_allowed",
            )

    def check(self, scope, fields: dict[bytes, bytes]) -> None:
        """Check everything else that can be checked before the body is read.

        Raises:
            ApiError: 401, 404, 405, 413, 415 or 503.
        """
        method, path = scope["method"], scope["path"]
        connection = scope.get("lamoe.connection")
        if connection is not None and connection.spare and path != "/health":
            raise ApiError(
                503,
                f"{connection.table.limit} connections are in use (--max-connections); "
                "try again later",
                "too_many_connections",
                headers={"Retry-After": "5", "Connection": "close"},
            )
        key = _key(fields)
        has_key = bool(self.key_digests) and self.is_valid_key(key)
        if has_key and connection is not None:
            connection.show_key()
        if self.key_digests and not has_key and not is_open(method, path):
            raise ApiError(
                401,
                f"{'the API key is not valid' if key else 'this server needs an API key'}: "
                "send it as `Authorization: Bearer KEY`",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        self.check_route(method, path)
        if method == "POST":
            bodies.check_content_type(scope["headers"])
            length = fields.get(b"content-length", b"0")
            limit = self.settings.max_body_bytes
            if not length.isdigit() or len(length) > 18 or int(length) > limit:
                raise _body_too_large(limit)

    # ---- CORS ------------------------------------------------------------------------------------
    def preflight(self, scope, fields: dict[bytes, bytes]) -> Response | None:
        """Answer a browser's question whether a page may send a request, or return None.

        Such a question carries no key.

        Raises:
            ApiError: 403 if the page's origin is not allowed.
        """
        origin = fields.get(b"origin")
        if (
            scope["method"] != "OPTIONS"
            or origin is None
            or b"access-control-request-method" not in fields
        ):
            return None
        if not self.allows(origin):
            shown = origin[:100].decode("latin-1")
            raise ApiError(
                403,
                f"pages of {shown!r} may not call this server; its operator can allow them with "
                "--allowed-origins",
                "origin_not_allowed",
            )
        headers = {
            "Access-Control-Allow-Methods": "GET, HEAD, POST",
            "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
        }
        if requested := fields.get(b"access-control-request-headers"):
            headers["Access-Control-Allow-Headers"] = requested.decode("latin-1")
        if fields.get(b"access-control-request-private-network") == b"true":
            headers["Access-Control-Allow-Private-Network"] = "true"
        return Response(None, 204, headers)

    def cors_headers(self, origin: bytes | None) -> list[tuple[bytes, bytes]]:
        """Return the headers that let a page of an allowed origin read the response."""
        if not self.origins:
            return []
        headers = [(b"vary", b"Origin")]
        if origin is not None and self.allows(origin):
            headers += [
                (b"access-control-allow-origin", origin),
                (b"access-control-expose-headers", b"x-request-id, retry-after"),
            ]
        return headers

    def allows(self, origin: bytes) -> bool:
        """Return whether pages of an origin may call this server."""
        return b"*" in self.origins or origin.lower() in self.origins

    # ---- keys ------------------------------------------------------------------------------------
    def cache_salt(self, fields: dict[bytes, bytes]) -> str:
        """Return the salt that keeps cached prefixes of different keys apart, or "" for none."""
        return hashlib.sha256(_key(fields)).hexdigest() if self.has_salts else ""

    def is_valid_key(self, key: bytes) -> bool:
        """Check a key in constant time, so that the duration reveals nothing."""
        digest, valid = hashlib.sha256(key).digest(), False
        for key_digest in self.key_digests:
            valid |= hmac.compare_digest(digest, key_digest)
        return valid


class _Call:
    """State of one request. It limits the received body and records the sent response."""

    def __init__(self, guard: Guard, scope, receive, send):
        self.guard, self._receive, self._send = guard, receive, send
        self.method, path = scope["method"], _plain_path(scope["path"])
        self.id = f"{ID_PREFIXES.get(path, 'req')}-{uuid.uuid4().hex}"
        self.log_fields: dict[str, Any] = {}
        self.fields: dict[bytes, bytes] = dict(scope["headers"])
        # A copy, because uvicorn must still see HEAD.
        self.scope = {
            **scope,
            "method": "GET" if self.method == "HEAD" else self.method,
            "path": path,
            "state": {
                **scope.get("state", {}),
                "id": self.id,
                "log": self.log_fields,
                "cache_salt": guard.cache_salt(self.fields),
                "release_body": self.release_body,
            },
        }
        self.inflater: bodies.Inflater | None = None
        self.started = time.perf_counter()
        self.body_deadline = time.monotonic() + guard.settings.body_timeout
        self.status = 0  # HTTP status; 0 before the response begins
        self.body_bytes = 0
        self.held_bytes = 0  # those of its body that are in memory
        self.body_complete = False
        self.has_body = any(
            name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0"))
            for name, value in scope["headers"]
        )
        self.closes = False  # whether the response announces the end of the connection
        self.disconnected = False

    async def receive(self):
        """Receive an ASGI message, within the time and size limits of request bodies."""
        if self.body_complete:
            message = await self._receive()
        else:
            message = await self._receive_body()
        self.disconnected |= message["type"] == "http.disconnect"
        if message["type"] == "http.request":
            message = self._count_body(message)
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

    def _count_body(self, message):
        body = message.get("body", b"")
        self.body_complete = not message.get("more_body", False)
        size = len(body)
        if self.inflater is not None:
            body = self.inflater.feed(body, self.body_complete)
            message = {**message, "body": body}
            size = max(size, len(body))
        self.body_bytes += size
        limit = self.guard.settings.max_body_bytes
        if self.body_bytes > limit:
            raise _body_too_large(limit)
        if self.body_bytes > SMALL_BODY:
            held = self.body_bytes - self.held_bytes
            if self.guard.held_bytes + held > self.guard.max_held_bytes:
                self.guard.metrics.rejected.inc()
                raise queue_full(
                    "too many large requests at once; try again later",
                    headers={"Connection": "close"},
                )
            self.guard.held_bytes += held
            self.held_bytes += held
        return message

    def release_body(self) -> None:
        """Note that the body is no longer in memory."""
        self.guard.held_bytes -= self.held_bytes
        self.held_bytes = 0

    async def send(self, message) -> None:
        """Send an ASGI message, with the server's own headers added to the response."""
        if message["type"] == "http.response.start":
            if not self.disconnected:
                self.status = message["status"]
            own_headers = [
                (b"x-request-id", self.id.encode()),
                (b"x-content-type-options", b"nosniff"),
                *self.guard.cors_headers(self.fields.get(b"origin")),
            ]
            message = {**message, "headers": [*message.get("headers", ()), *own_headers]}
            names = {name.lower(): value for name, value in message["headers"]}
            self.closes = names.get(b"connection") == b"close"
        is_last = message["type"] == "http.response.body" and not message.get("more_body")
        body_unread = self.has_body and not self.body_complete and not self.disconnected
        if is_last and body_unread and (self.body_bytes or self.closes):
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
        self.release_body()
        seconds = time.perf_counter() - self.started
        route = getattr(self.scope.get("route"), "path", "other")
        status = self.status or CLIENT_DISCONNECTED
        self.guard.metrics.answered(route, status, seconds)
        fields = {
            "id": self.id,
            "method": self.method,
            "path": self.scope["path"][:200],
            "status": status,
            "ms": round(seconds * 1e3, 1),
            "client": (self.scope.get("client") or ("", 0))[0],
            **self.log_fields,
        }
        quiet = route in POLLED_ROUTES and self.status < 400
        log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})


def _key(headers: dict[bytes, bytes]) -> bytes:
    """Return the key of a request, or nothing. Azure's and Anthropic's clients have own headers."""
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer":
        key = headers.get(b"api-key") or headers.get(b"x-api-key", b"")
    return key.strip()


def _plain_path(path: str) -> str:
    """Return a path without empty parts: `/v1//models/` is `/v1/models`.

    Clients that believe in a proxy send a whole URL, which servers must accept (RFC 9112, 3.2.2).
    """
    if not path.startswith("/"):
        path = re.sub("^https?://[^/]*", "", path, flags=re.IGNORECASE)
    return re.sub("/+", "/", path).rstrip("/") or "/"


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
