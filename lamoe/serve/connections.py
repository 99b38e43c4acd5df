"""The open connections of the server: their number, their time limits, and who may hold them.

uvicorn parses HTTP. It limits neither the time to write a response nor who holds the connections,
so a few clients that never read, or never send, could hold all of them. This module adds:

- A response whose client reads nothing for --write-timeout seconds ends with its connection.
- When all connections are in use, a new one replaces the one that has waited longest for its
  client: for a request, for the rest of a body, or for the client to read.
- If the server has API keys, clients that have not shown one hold at most half of the connections.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import time
from collections import OrderedDict
from contextlib import contextmanager, suppress
from http import HTTPStatus
from types import ModuleType
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lamoe.serve.errors import ApiError
from lamoe.serve.metrics import Metrics
from lamoe.serve.settings import Settings

fcntl: ModuleType | None
try:
    import fcntl
    import termios
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger("lamoe.serve")

ACCEPT_AT_ONCE = 16  # new connections, before those that were replaced are closed
# Connections that wait in the system, which drops further ones: their clients try again after a
# second. The system lowers this to its own limit.
BACKLOG = 4096
# Open files besides connections: the model, logs, and connections being opened.
FILES_RESERVED = 192
DEFAULT_CONNECTIONS = 1024
SPARE_CONNECTIONS = 16  # above the limit: they get 503, or the answer of /health
STALL_S = 5.0  # a client that reads nothing for so long may lose its connection to a new one
KEEP_ALIVE_S = 30  # how long a connection may wait for its next request
GRACE_S = 15.0  # after --request-timeout, for the rest of a response
SEND_BUFFER = 256 << 10  # bytes that the system buffers for a client


def raise_file_limit() -> int | None:
    """Raise the limit on open files as far as allowed, and return it (None: there is no limit)."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit on sockets
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # macOS reports no limit, but refuses more than OPEN_MAX.
        for limit in (hard, 65536, 10240):
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
                break
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def max_connections(wanted: int | None) -> int:
    """Return the number of connections that may be open.

    Args:
        wanted: the value of --max-connections, or None for the default.

    Raises:
        ValueError: if the process may not open so many files.
    """
    files = raise_file_limit()
    if files is None:
        return wanted or DEFAULT_CONNECTIONS
    available = max(files - FILES_RESERVED, files // 4, 1)
    if wanted is not None and wanted > available:
        raise ValueError(
            f"--max-connections is {wanted}, but this process may open {files} files, which leaves "
            f"{available} for connections; raise the limit (ulimit -n, or LimitNOFILE= of "
            "systemd), or set --max-connections lower"
        )
    return wanted or min(DEFAULT_CONNECTIONS, available)


class Connections:
    """All open connections.

    Args:
        settings: the options of the server.
        metrics: counts the connections that the server closes.
    """

    def __init__(self, settings: Settings, metrics: Metrics):
        self.settings, self.metrics = settings, metrics
        self.limit = max_connections(settings.max_connections)
        self.has_keys = bool(settings.api_keys())
        self.open: set[Connection] = set()
        self.without_key: set[Connection] = set()
        # Connections that wait for their client, longest first. `waits` tells if one still does.
        self.waiting: OrderedDict[Connection, None] = OrderedDict()
        # Connections whose client has not read for STALL_S seconds, the longest stall last.
        self._stalled: list[Connection] = []
        self._checked = 0.0
        self._num_replaced = 0  # since the last line about it in the log

    def admit(self, new: Connection) -> bool:
        """Add a connection, if need be in place of another one. Return whether there was space."""
        if self.has_keys and len(self.without_key) >= max(self.limit // 2, 1):
            oldest = min(self.without_key, key=lambda c: c.opened)
            self.close(self._longest_waiting(only_without_key=True) or oldest, "replaced")
        elif len(self.open) >= self.limit and (longest := self._longest_waiting()):
            self.close(longest, "replaced")
        if len(self.open) >= self.limit + SPARE_CONNECTIONS:
            self.metrics.closed.labels("refused").inc()
            return False
        new.spare = len(self.open) >= self.limit
        self.open.add(new)
        self.without_key.add(new)
        self.begin_to_wait(new)
        return True

    def begin_to_wait(self, connection: Connection) -> None:
        """Note that a connection begins to wait for its client."""
        if connection in self.open:
            self.waiting[connection] = None
            self.waiting.move_to_end(connection)

    def forget(self, connection: Connection) -> None:
        """Remove a connection that is closed."""
        self.open.discard(connection)
        self.without_key.discard(connection)
        self.waiting.pop(connection, None)

    def _longest_waiting(self, only_without_key: bool = False) -> Connection | None:
        while self.waiting and not (first := next(iter(self.waiting))).waits:
            del self.waiting[first]  # it has received the rest of its body
        for c in itertools.chain(self.waiting, reversed(self._stalled)):
            waits = c in self.open and (c.waits or c in self._stalled)
            if waits and not (only_without_key and c.has_key):
                return c
        return None

    def close(self, connection: Connection, reason: str) -> None:
        """End a connection at once, and count the reason."""
        self.forget(connection)
        self.metrics.closed.labels(reason).inc()
        connection.transport.abort()
        if reason == "replaced":
            self._num_replaced += 1  # there may be thousands a second
        else:
            fields = {"why": reason, "client": (connection.client or ("", 0))[0]}
            log.info("connection closed", extra={"fields": fields})

    def check(self) -> None:
        """Close the connections that have exceeded a time limit."""
        s, now = self.settings, time.monotonic()
        # Reading the send queues costs a system call each.
        if now - self._checked < min(1.0, s.write_timeout / 4, s.body_timeout / 4):
            return
        self._checked = now
        if self._num_replaced:
            fields = {"count": self._num_replaced, "limit": self.limit}
            log.warning("connections that waited were replaced", extra={"fields": fields})
            self._num_replaced = 0
        progress = {c: c.last_progress(now) for c in self.open}
        for c, last in progress.items():
            if now - last > s.write_timeout:
                self.close(c, "write timeout")
            elif c.idle and c.timeout_keep_alive_task is None and now - c.since > s.body_timeout:
                self.close(c, "headers timeout")
            elif not c.idle and now - c.since > s.request_timeout + GRACE_S:
                self.close(c, "request timeout")
        stalled = [c for c, last in progress.items() if now - last > STALL_S and not c.idle]
        self._stalled = sorted(stalled, key=lambda c: progress[c], reverse=True)


class Connection(H11Protocol):
    """A connection to one client.

    The application finds it in its scope as `lamoe.connection`.

    Attributes:
        opened: when it was opened.
        spare: whether it was opened above the limit. The guard refuses its requests.
        has_key: whether it has shown a valid API key.
        since: when the current request began, or when the connection began to wait for one.
    """

    def __init__(self, table: Connections, **options: Any):
        super().__init__(**options)
        self.table = table
        self.opened = self.since = self._progress = time.monotonic()
        self.has_key = self.spare = False
        self._acknowledged = 0
        app = self.app

        async def run(scope, receive, send):
            self.since = time.monotonic()
            table.waiting.pop(self, None)
            if self.waits:  # for the rest of the body
                table.begin_to_wait(self)
            scope["lamoe.connection"] = self
            await app(scope, receive, send)

        self.app = run

    def connection_made(self, transport: Any) -> None:
        self._counted = _CountingTransport(transport)
        super().connection_made(cast(asyncio.Transport, self._counted))
        if not self.table.admit(self):
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.table.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.timeout_keep_alive_task is not None:
            self._wait()  # the next request has begun to arrive
        super().data_received(data)

    def _should_upgrade(self) -> bool:
        """Answer as HTTP/1.1. Java's client offers HTTP/2 at first; uvicorn would log warnings."""
        return False

    def on_response_complete(self) -> None:
        self._wait()
        super().on_response_complete()

    def _wait(self) -> None:
        self.since = time.monotonic()
        self.table.begin_to_wait(self)

    def show_key(self) -> None:
        """Note that the client has shown a valid API key."""
        self.has_key = True
        self.table.without_key.discard(self)

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not HTTP/1.1, in the form of all errors."""
        if not self.idle and self.cycle.response_started:
            self.transport.abort()
            return
        error = ApiError(400, "the request is not valid HTTP/1.1", "invalid_http")
        if getattr(sys.exc_info()[1], "error_status_hint", 400) == 431:
            error = ApiError(431, "the headers are too large", "headers_too_large")
        body = bytes(error.response().body)
        head = (
            f"HTTP/1.1 {error.status_code} {HTTPStatus(error.status_code).phrase}\r\n"
            "content-type: application/json\r\nconnection: close\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def waits(self) -> bool:
        """Whether the connection waits for a request, or for the rest of a body."""
        return self.idle or (self.cycle.more_body and not self.cycle.response_started)

    def last_progress(self, now: float) -> float:
        """Return when the client last read something, or `now` if there is nothing to read."""
        unread = self.transport.get_write_buffer_size()
        if unread or not self.idle:
            unread += _unsent_bytes(self.transport)
        acknowledged = self._counted.written - unread
        if unread <= 0 or acknowledged > self._acknowledged:
            self._progress, self._acknowledged = now, acknowledged
        return self._progress


class _CountingTransport:
    """A transport that counts the bytes written to it."""

    def __init__(self, transport: Any):
        self._transport, self.written = transport, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self.written += len(data)
        self._transport.write(data)


def _unsent_bytes(transport: Any) -> int:
    """Return how many bytes of a connection the system still holds (0 if it does not tell)."""
    if fcntl is None:
        return 0
    try:
        number = transport.get_extra_info("socket").fileno()
        return int.from_bytes(fcntl.ioctl(number, termios.TIOCOUTQ, b"\0" * 4), sys.byteorder)
    except (OSError, AttributeError, ValueError):
        return 0


class HttpServer(uvicorn.Server):
    """uvicorn with the limits of this module.

    It also keeps its socket open at the first signal, so that /health can answer 503 while running
    requests finish.
    """

    def __init__(self, app: Any, table: Connections, settings: Settings):
        config = uvicorn.Config(
            app,
            http=cast(Any, lambda **options: Connection(table, **options)),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=ACCEPT_AT_ONCE,
            timeout_keep_alive=KEEP_ALIVE_S,
            h11_max_incomplete_event_size=2 * settings.max_header_bytes,
            timeout_graceful_shutdown=5,
        )
        logging.getLogger("uvicorn.access").disabled = True  # it would log query strings
        super().__init__(config)
        self._table = table

    async def startup(self, sockets=None) -> None:
        """Begin to accept connections."""
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(BACKLOG)  # asyncio has set it to the number that it accepts at once

    @contextmanager
    def capture_signals(self):
        yield  # Serving handles the signals

    async def on_tick(self, counter: int) -> bool:
        self._table.check()
        return await super().on_tick(counter)
