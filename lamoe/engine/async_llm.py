"""The engine for asyncio programs: one thread steps the model, coroutines add requests and read their deltas."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable

from lamoe.engine.llm import LLM, Delta
from lamoe.engine.request import Output
from lamoe.engine.sampler import SamplingParams


class EngineDead(RuntimeError):
    """The engine's thread ended with an error (its cause), or is not in this process (a child of fork()); nothing more will come."""


class Run:
    """An open request: `async for index, delta in run`, with the place of the sequence among all of the request (the n samples of a prompt lie side
    by side). `close` frees the pages of what has not finished; whoever opens closes."""

    def __init__(self, engine: AsyncLLM, ids: list[int], queue: asyncio.Queue):
        self.ids, self._engine, self._queue, self._open = ids, engine, queue, set(ids)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        while self._open:
            if self._engine._forked:
                raise self._engine._ended()
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            if item.output is not None:
                self._open.discard(item.id)
            yield item.id - self.ids[0], item  # ids of one request follow each other

    def fail(self, error: Exception) -> None:
        """The reader gets this error next, after what has come already."""
        self._queue.put_nowait(error)

    def close(self, last: Callable[[LLM], None] = lambda llm: None) -> None:
        """`last` is called first, in the engine's thread, when there is something left to free. It must not raise."""
        if self._open:
            left, self._open = self._open, set()
            self._engine._post(lambda llm: (last(llm), self._engine._drop(left)))


class AsyncLLM:
    """`async for delta in engine.stream(prompt, params)`; leaving the loop, or cancelling the task, frees the pages. The LLM belongs to the
    thread from now on: use it only through `call`. A child of fork() has no such thread: there every request gets EngineDead."""

    def __init__(self, llm: LLM):
        self._llm, self._inbox, self._wake = llm, deque(), threading.Condition()
        self._readers: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Queue]] = {}
        self._closed, self._dead, self._process = False, None, os.getpid()
        self._thread = threading.Thread(target=self._run, name="lamoe-engine", daemon=True)
        self._thread.start()

    async def open(self, requests: list[tuple[str | list[int], SamplingParams]]) -> Run:
        """Queue several requests together: all, or none when one is not valid (ValueError). EngineDead when the engine ended."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        for _, params in requests:
            if params.grammar is not None and self._llm.tokenizer is not None:
                await asyncio.to_thread(
                    params.grammar.prepare, self._llm.tokenizer
                )  # neither this loop nor the engine waits while it compiles

        def add(llm: LLM) -> list[int]:
            ids = llm.add_all(requests)
            self._readers.update(dict.fromkeys(ids, (loop, queue)))
            return ids

        adding = asyncio.ensure_future(self.call(add))
        try:
            return Run(self, await asyncio.shield(adding), queue)
        except (
            asyncio.CancelledError
        ):  # the request may have been added already: take it out again when it is
            adding.add_done_callback(
                lambda done: (
                    None
                    if done.cancelled() or done.exception()
                    else self._post(lambda llm: self._drop(done.result()))
                )
            )
            raise

    async def stream(
        self, prompt: str | list[int], params: SamplingParams = SamplingParams()
    ) -> AsyncIterator[Delta]:
        """Deltas of the n sequences of one request as they come. ValueError when it is not valid, EngineDead when the engine ended."""
        run = await self.open([(prompt, params)])
        try:
            async for _, delta in run:
                yield delta
        finally:
            run.close()

    async def generate(
        self, prompt: str | list[int], params: SamplingParams = SamplingParams()
    ) -> list[Output]:
        """The finished outputs of one request, one per sample."""
        done = {d.id: d.output async for d in self.stream(prompt, params) if d.output is not None}
        return [done[i] for i in sorted(done)]

    async def call(self, action: Callable[[LLM], object]):
        """Run `action(llm)` between two steps, in the engine's thread; its result."""
        loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def settle(method, value):
            if not future.done():
                getattr(future, method)(value)

        def run(llm: LLM) -> None:
            try:
                method, value = "set_result", action(llm)
            except Exception as e:
                method, value = "set_exception", e
            loop.call_soon_threadsafe(settle, method, value)

        self._post(run, lambda error: loop.call_soon_threadsafe(settle, "set_exception", error))
        return await future

    @property
    def alive(self) -> bool:
        """False once the thread ended, by `close` or by an error, and in a child of fork()."""
        return not self._closed and self._dead is None and not self._forked

    @property
    def error(self) -> BaseException | None:
        """What the thread died of, if it did."""
        return self._dead

    def close(self, timeout: float | None = None) -> None:
        """End the thread after its current step; open requests get EngineDead. Nothing to do in a child of fork()."""
        if self._forked:
            return
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout)

    # ---- the thread ----------------------------------------------------------------------------------------------
    @property
    def _forked(self) -> bool:
        return os.getpid() != self._process

    def _post(
        self, action: Callable[[LLM], None], refuse: Callable[[Exception], None] | None = None
    ) -> None:
        if self._forked:  # the thread is not there, and may have held the lock
            if refuse is not None:
                refuse(self._ended())
            return
        with self._wake:
            if self._closed or self._dead:
                if refuse is not None:
                    refuse(self._ended())
                return
            self._inbox.append((action, refuse))
            self._wake.notify()

    def _drop(self, ids) -> None:
        for i in ids:
            self._readers.pop(i, None)
            self._llm.cancel(i)

    def _ended(self) -> EngineDead:
        if self._forked:
            return EngineDead(
                f"process {os.getpid()} asked an AsyncLLM made in process {self._process}, whose thread is not here: a child of fork() has the thread that forked and "
                "no other. Make the AsyncLLM in the process that uses it, after the fork (or start that process by multiprocessing's 'spawn')"
            )
        error = EngineDead(
            "the engine was closed" if self._dead is None else f"the engine ended: {self._dead}"
        )
        error.__cause__ = self._dead
        return error

    def _run(self) -> None:
        try:
            while self._serve_inbox():
                if self._llm.busy:
                    deltas = self._llm.step()
                    _tell([(*self._readers[d.id], d) for d in deltas if d.id in self._readers])
                    for d in deltas:
                        if d.output is not None:
                            self._readers.pop(d.id, None)
        except BaseException as e:  # whatever it is: those who wait must hear of it
            self._dead = e
        with self._wake:
            self._closed = True
            left, self._inbox = self._inbox, deque()
        _tell([(*reader, self._ended()) for reader in dict.fromkeys(self._readers.values())])
        self._readers.clear()
        for _, refuse in left:
            if refuse is not None:
                refuse(self._ended())

    def _serve_inbox(self) -> bool:
        """Do what was posted, waiting for it when there is nothing to compute. False when the engine was closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._inbox or self._llm.busy)
            if self._closed:
                return False
            ready = len(self._inbox)
        for _ in range(ready):
            self._inbox[0][0](self._llm)
            self._inbox.popleft()  # not before: who posted one that raises, or what lies behind it, is refused
        return True


def _tell(items: list[tuple[asyncio.AbstractEventLoop, asyncio.Queue, Delta | Exception]]) -> None:
    """Put every item into its queue, waking each event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list] = {}
    for loop, queue, item in items:
        by_loop.setdefault(loop, []).append((queue, item))
    for loop, mine in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, mine)
        except RuntimeError:
            pass  # the event loop is closed: nobody is listening any more


def _put(items: list[tuple[asyncio.Queue, Delta | Exception]]) -> None:
    for queue, item in items:
        queue.put_nowait(item)
