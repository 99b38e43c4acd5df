"""Sending an answer, whole or as server-sent events, while listening for the client to leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from starlette.responses import Response

from lamoe.serve.errors import ApiError, answer, to_json

GRACE = 5.0  # seconds beyond the time-out that a client gets to read the rest


class Reply(Response):
    """ASGI: `whole()` is awaited and sent as JSON, or the objects of `events()` are sent as they come and [DONE] after them. When the client
    leaves, or `seconds` have passed, what was running is cancelled; `close()` is called in any case."""

    def __init__(
        self,
        *,
        whole: Callable[[], Coroutine[Any, Any, dict]] | None = None,
        events: Callable[[], AsyncIterator[dict]] | None = None,
        close: Callable[[], None] = lambda: None,
        left: Callable[[], None] = lambda: None,
        seconds: float = 1e6,
        heavy: bool = False,
    ):
        """heavy: the JSON may take long to write, so a thread does."""
        self.heavy = heavy
        self.whole, self.events, self.close, self.left, self.seconds = (
            whole,
            events,
            close,
            left,
            seconds,
        )
        self.status_code, self.background = 200, None

    async def __call__(self, scope, receive, send) -> None:
        sending = asyncio.ensure_future(
            self._stream(send) if self.events else self._send_whole(scope, receive, send)
        )
        watching = asyncio.ensure_future(_gone(receive))
        try:
            done, _ = await asyncio.wait(
                {sending, watching},
                timeout=self.seconds + GRACE,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if sending in done:
                sending.result()
            else:
                self.left()
        finally:
            for task in (sending, watching):
                task.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
            self.close()

    async def _send_whole(self, scope, receive, send) -> None:
        try:
            async with asyncio.timeout(self.seconds):
                value = await self.whole()
                response = await asyncio.to_thread(answer, value) if self.heavy else answer(value)
        except ApiError as e:
            response = e.response()
        except TimeoutError:
            response = ApiError(
                408,
                f"the answer was not complete within {self.seconds:g} seconds (--request-timeout)",
                "timeout",
                headers={"X-Should-Retry": "false"},
            ).response()
        await response(scope, receive, send)

    async def _stream(self, send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        started = False

        async def line(data: bytes) -> None:
            nonlocal started
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send(
                {
                    "type": "http.response.body",
                    "body": b"data: " + data + b"\n\n",
                    "more_body": True,
                }
            )

        try:
            async for event in self.events():
                await line(to_json(event))
        except ApiError as e:
            if not started:  # nothing has been said yet: a status says more
                response = e.response()
                await send(
                    {
                        "type": "http.response.start",
                        "status": e.status_code,
                        "headers": response.raw_headers,
                    }
                )
                await send({"type": "http.response.body", "body": response.body})
                return
            await line(to_json(e.body))
        await line(b"[DONE]")
        await send({"type": "http.response.body", "body": b""})


async def _gone(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
