"""The engine for asyncio programs.

One thread steps the model. Coroutines add requests and read the deltas of their sequences.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from lamoe.engine.llm import LLM, Delta
from lamoe.engine.request import Output
from lamoe.engine.sampler import SamplingParams

IDLE_CHECK_S = 1.0  # how often an idle engine checks that its weights have not changed


class EngineDead(RuntimeError):
    """The engine's thread has ended, or this process is a child of fork() and does not have it.

    If the thread ended with an error, this error is the `__cause__`. No more deltas will follow.
    """


class _Queue(asyncio.Queue):
    """A queue that reports each item when it is put in."""

    _report: Callable[[Delta | Exception], None] | None = None
    _queue: deque[Delta | Exception]  # the items, an attribute of asyncio.Queue

    def watch(self, report: Callable[[Delta | Exception], None]) -> None:
        """Report all items to `report`, beginning with those that are in the queue."""
        self._report = report
        for item in list(self._queue):
            report(item)

    def _put(self, item: Delta | Exception) -> None:
        if self._report is not None:
            self._report(item)
        super()._put(item)


class Run:
    """An open request: `async for index, delta in run`.

    `index` is the position of the sequence in the request. The n samples of a prompt have
    consecutive positions. The code that opens a run must call `close`, which frees the pages of
    unfinished sequences.
    """

    def __init__(self, engine: AsyncLLM, ids: list[int], queue: _Queue):
        self.ids, self._engine, self._queue, self._open = ids, engine, queue, set(ids)
        self._running = set(ids)
        self._listener: Callable[[Delta | Exception], None] = lambda item: None
        queue.watch(self._arrived)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        while self._open:
            if self._engine._forked:
                raise self._engine._dead_error()
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            if item.output is not None:
                self._open.discard(item.id)
            yield item.id - self.ids[0], item  # the ids of one request are consecutive

    def fail(self, error: Exception) -> None:
        """Make the reader raise `error` after it has read the deltas that are already queued."""
        self._queue.put_nowait(error)

    def watch(self, listener: Callable[[Delta | Exception], None]) -> None:
        """Call `listener` in the event loop with each delta or error when it arrives.

        A delta that is never read is reported too. Deltas that are already queued are reported at
        once.
        """
        self._listener = listener
        self._queue.watch(self._arrived)

    def _arrived(self, item: Delta | Exception) -> None:
        if not isinstance(item, Exception) and item.output is not None:
            self._running.discard(item.id)
        self._listener(item)

    def discard(self) -> None:
        """Forget the deltas that have arrived but are not read."""
        while not self._queue.empty():
            self._queue.get_nowait()

    def close(self, last: Callable[[LLM], None] = lambda llm: None) -> None:
        """Cancel the unfinished sequences and end the reading. See `cancel`."""
        self._open = set()
        self.cancel(last)

    def cancel(self, last: Callable[[LLM], None] = lambda llm: None) -> None:
        """Cancel the unfinished sequences. What has arrived can still be read.

        Args:
            last: function that the engine's thread calls before it cancels the sequences. It is not
                called if all sequences have finished. It must not raise.
        """
        if not self._running:
            return
        unfinished, self._running = self._running, set()

        def cancel(llm: LLM) -> None:
            last(llm)
            self._engine._cancel(unfinished)

        self._engine._post(cancel)


class AsyncLLM:
    """An LLM that many coroutines share: `async for delta in engine.stream(prompt, params)`.

    Leaving that loop or cancelling its task frees the pages of the request. From construction on,
    only the engine's thread may use the LLM; other code reaches it through `call`. A child of
    fork() does not have this thread, so every request there raises EngineDead.
    """

    def __init__(self, llm: LLM):
        self._llm = llm
        self._wake = threading.Condition()
        # Actions for the engine's thread, each with a function to call if it will not run.
        self._inbox: deque[tuple[Callable[[LLM], None], Callable[[Exception], None] | None]]
        self._inbox = deque()
        self._readers: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Queue]] = {}
        self._closed = False
        self._error: BaseException | None = None
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="lamoe-engine", daemon=True)
        self._thread.start()

    async def open(self, requests: list[tuple[str | list[int], SamplingParams]]) -> Run:
        """Queue several requests together.

        Raises:
            ValueError: if a request is invalid. Then none is queued.
            EngineDead: if the engine has ended.
        """
        loop = asyncio.get_running_loop()
        queue = _Queue()
        for _, params in requests:
            if params.grammar is not None and self._llm.tokenizer is not None:
                # Compile in a worker thread, so that neither this loop nor the engine waits.
                await asyncio.to_thread(params.grammar.prepare, self._llm.tokenizer)

        def add(llm: LLM) -> list[int]:
            ids = llm.add_all(requests)
            self._readers.update(dict.fromkeys(ids, (loop, queue)))
            return ids

        def cancel_added(adding: asyncio.Future) -> None:
            if not adding.cancelled() and not adding.exception():
                self._post(lambda llm: self._cancel(adding.result()))

        adding = asyncio.ensure_future(self.call(add))
        try:
            return Run(self, await asyncio.shield(adding), queue)
        except asyncio.CancelledError:
            # The engine may still add the request, or has already done so.
            adding.add_done_callback(cancel_added)
            raise

    async def stream(
        self, prompt: str | list[int], params: SamplingParams = SamplingParams()
    ) -> AsyncIterator[Delta]:
        """Yield the deltas of one request as soon as they are generated.

        `Delta.id` distinguishes the n samples.

        Raises:
            ValueError: if the request is invalid.
            EngineDead: if the engine has ended.
        """
        run = await self.open([(prompt, params)])
        try:
            async for _, delta in run:
                yield delta
        finally:
            run.close()

    async def generate(
        self, prompt: str | list[int], params: SamplingParams = SamplingParams()
    ) -> list[Output]:
        """Return the finished outputs of one request, one per sample."""
        done = {d.id: d.output async for d in self.stream(prompt, params) if d.output is not None}
        return [done[i] for i in sorted(done)]

    async def call(self, action: Callable[[LLM], object]):
        """Run `action(llm)` in the engine's thread between two steps, and return its result."""
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

        def refuse(error: Exception) -> None:
            loop.call_soon_threadsafe(settle, "set_exception", error)

        self._post(run, refuse)
        return await future

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests. False after `close`, an error, or fork()."""
        return not self._closed and self._error is None and not self._forked

    @property
    def error(self) -> BaseException | None:
        """The error that ended the engine's thread, or None."""
        return self._error

    def close(self, timeout: float | None = None) -> None:
        """End the thread after its current step. Readers of open requests get EngineDead.

        In a child of fork() this does nothing.

        Args:
            timeout: seconds to wait for the thread; None waits until it ends.
        """
        if self._forked:
            return
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout)

    # ---- the thread ------------------------------------------------------------------------------
    @property
    def _forked(self) -> bool:
        return os.getpid() != self._process

    def _post(
        self, action: Callable[[LLM], None], refuse: Callable[[Exception], None] | None = None
    ) -> None:
        """Queue `action` for the engine's thread, or call `refuse` if it can never run."""
        if self._forked:  # the thread may have held the lock during fork(): do not touch it
            if refuse is not None:
                refuse(self._dead_error())
            return
        with self._wake:
            if self._closed or self._error:
                if refuse is not None:
                    refuse(self._dead_error())
                return
            self._inbox.append((action, refuse))
            self._wake.notify()

    def _cancel(self, ids: Iterable[int]) -> None:
        for i in ids:
            self._readers.pop(i, None)
            self._llm.cancel(i)

    def _dead_error(self) -> EngineDead:
        if self._forked:
            return EngineDead(
                f"process {os.getpid()} asked an AsyncLLM made in process {self._process}, whose "
                "thread is not here: a child of fork() has only the thread that forked. Make the "
                "AsyncLLM in the process that uses it, after the fork (or start that process by "
                "multiprocessing's 'spawn')"
            )
        error = EngineDead(
            "the engine was closed" if self._error is None else f"the engine ended: {self._error}"
        )
        error.__cause__ = self._error
        return error

    def _run(self) -> None:
        try:
            while self._serve_inbox():
                if not self._llm.busy:
                    self._llm.backend.check()
                else:
                    deltas = self._llm.step()
                    _send([(*self._readers[d.id], d) for d in deltas if d.id in self._readers])
                    for d in deltas:
                        if d.output is not None:
                            self._readers.pop(d.id, None)
        except BaseException as e:  # also SystemExit: waiting readers must be told
            self._error = e
        with self._wake:
            self._closed = True
            unserved, self._inbox = self._inbox, deque()
        _send([(*reader, self._dead_error()) for reader in dict.fromkeys(self._readers.values())])
        self._readers.clear()
        for _, refuse in unserved:
            if refuse is not None:
                refuse(self._dead_error())

    def _serve_inbox(self) -> bool:
        """Run the queued actions, and wait a moment for one if the LLM is idle.

        Returns False if the engine was closed.
        """
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._inbox or self._llm.busy, IDLE_CHECK_S)
            if self._closed:
                return False
            ready = len(self._inbox)
        for _ in range(ready):
            self._inbox[0][0](self._llm)
            # Remove an action only after it has run. If it raises, `_run` refuses this action and
            # all later ones.
            self._inbox.popleft()
        return True


def _send(items: list[tuple[asyncio.AbstractEventLoop, asyncio.Queue, Delta | Exception]]) -> None:
    """Put every item into its queue, waking each event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list] = {}
    for loop, queue, item in items:
        by_loop.setdefault(loop, []).append((queue, item))
    for loop, queued in by_loop.items():
        with contextlib.suppress(RuntimeError):  # a closed event loop has no reader any more
            loop.call_soon_threadsafe(_put, queued)


def _put(items: list[tuple[asyncio.Queue, Delta | Exception]]) -> None:
    for queue, item in items:
        queue.put_nowait(item)
