"""Sends a response, whole or as server-sent events, and stops when the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from starlette.responses import Response

from lamoe.serve.errors import ApiError, json_response, timed_out, to_json

GRACE_S = 5.0  # after the time limit, the client gets this long to read the rest
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx must not buffer the events
]


class Reply(Response):
    """An ASGI response that is computed while it is sent.

    Exactly one of `whole` and `events` is given. If the client disconnects or the time limit
    passes, the computation is cancelled.

    Args:
        whole: computes one object, which is sent as JSON.
        events: yields objects, which are sent as server-sent events, followed by [DONE].
        close: called in every case, after the last byte.
        disconnected: called if the client disconnects or stops reading before the end.
        seconds: time limit for the response.
        heavy: encode the JSON in a thread, because it may be large.
    """

    def __init__(
        self,
        *,
        whole: Callable[[], Coroutine[Any, Any, dict]] | None = None,
        events: Callable[[], AsyncIterator[dict]] | None = None,
        close: Callable[[], None] = lambda: None,
        disconnected: Callable[[], None] = lambda: None,
        seconds: float = 1e6,
        heavy: bool = False,
    ):
        self.whole, self.events = whole, events
        self.close, self.disconnected = close, disconnected
        self.seconds, self.heavy = seconds, heavy
        self.status_code, self.background = 200, None

    async def __call__(self, scope, receive, send) -> None:
        if self.events is not None:
            sending = asyncio.ensure_future(self._send_events(self.events, send))
        else:
            sending = asyncio.ensure_future(self._send_whole(scope, receive, send))
        watching = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            done, _ = await asyncio.wait(
                {sending, watching},
                timeout=self.seconds + GRACE_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if sending in done:
                sending.result()
            else:
                self.disconnected()
        finally:
            for task in (sending, watching):
                task.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
            self.close()

    async def _send_whole(self, scope, receive, send) -> None:
        assert self.whole is not None
        try:
            async with asyncio.timeout(self.seconds):
                value = await self.whole()
                if self.heavy:
                    response = await asyncio.to_thread(json_response, value)
                else:
                    response = json_response(value)
        except ApiError as e:
            response = e.response()
        except TimeoutError:
            response = timed_out(self.seconds).response()
        await response(scope, receive, send)

    async def _send_events(self, events: Callable[[], AsyncIterator[dict]], send) -> None:
        started = False

        async def send_event(data: bytes) -> None:
            nonlocal started
            if not started:
                started = True
                await _send_start(send, 200, STREAM_HEADERS)
            await _send_body(send, b"data: " + data + b"\n\n", more=True)

        try:
            async for event in events():
                await send_event(to_json(event))
        except ApiError as e:
            if not started:  # no status is sent yet, so the response can have the error's status
                response = e.response()
                await _send_start(send, e.status_code, response.raw_headers)
                await _send_body(send, bytes(response.body), more=False)
                return
            await send_event(to_json(e.body))
        await send_event(b"[DONE]")
        await _send_body(send, b"", more=False)


async def _send_start(send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _send_body(send, body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _wait_for_disconnect(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
