"""The server process.

It listens at once and loads the model in a thread. The first SIGTERM or Ctrl-C lets running
requests finish, the second one ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lamoe.backends import cache_codec
from lamoe.backends.base import Formats
from lamoe.backends.cpu import native
from lamoe.backends.load import prepare
from lamoe.engine.llm import LLM
from lamoe.model.accounting import human_bytes
from lamoe.model.config import did_you_mean
from lamoe.serve.app import build
from lamoe.serve.connections import BACKLOG, SEND_BUFFER, Connections, HttpServer
from lamoe.serve.logs import configure
from lamoe.serve.service import Service
from lamoe.serve.settings import LOOPBACK, Settings

log = logging.getLogger("lamoe.serve")

M_ARENA_MAX = -8  # of glibc's malloc.h
LOAD_THREAD = "lamoe-load"
# After each system call the event loop may wait so long for a thread that computes. Python's
# default of 5 ms adds up to most of a second when many connections come at once.
SWITCH_S = 0.0005
ENGINE_CLOSE_S = 10  # longest wait for the engine's current step at shutdown


def run(model: str, name: str, settings: Settings) -> int:
    """Serve a model until a signal stops the server.

    Args:
        model: a model folder or hub id.
        name: name of the model in the API, unless --served-model-name is set.
        settings: the options of the server.

    Returns:
        The exit code: 0 after all requests have finished, 1 if requests were cut off or
        something failed.

    Raises:
        ValueError: if the options are invalid, or cannot work with the model folder.
        OSError: if a file cannot be read, or the server cannot listen.
    """
    configure(settings.log_level)
    _limit_arenas()
    sys.setswitchinterval(SWITCH_S)
    options: dict[str, Any] = dict(
        cache=settings.cache,
        cache_memory=settings.kv_cache_memory,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        dtype=settings.dtype,
        device=settings.device,
        threads=settings.threads,
        weights=settings.weights,
        head=settings.head,
        count_experts=True,
    )

    def load() -> LLM:
        llm = LLM(folder or model, **options)
        # A full collection visits over 200,000 objects of the imported packages, and stops all
        # threads for 0.14 s on idle cores. They live as long as the server, so leave them out.
        gc.collect()
        gc.freeze()
        return llm

    serving = Serving(load, name, settings)
    try:
        folder = _check_model(model, settings)
    except BaseException:
        serving.close()
        raise
    code = asyncio.run(serving.run())
    if any(t.name in (LOAD_THREAD, "lamoe-engine") for t in threading.enumerate()):
        # A thread is still loading or in a long step. A normal exit would destroy objects that
        # its C++ code uses, which ends in abort().
        sys.stderr.flush()
        os._exit(code)
    return code


class Serving:
    """One server: it listens, loads a model, answers requests, and ends with an exit code.

    The constructor already listens, at the address `url`.

    Args:
        load: loads the model; called in a thread of its own.
        name: name of the model in the API, unless the settings have one.
        settings: the options of the server.

    Raises:
        OSError: if the server cannot listen on the address and port.
        ValueError: if the key file has no valid keys, or --max-connections is too large.
    """

    def __init__(self, load: Callable[[], LLM], name: str, settings: Settings):
        self.settings, self.service, self._load_model = settings, Service(settings, name), load
        self._app = build(self.service)
        self._connections = Connections(settings, self.service.metrics)
        self._exit_code = 0
        self._cutting_off = False
        self._drain_deadline = float("inf")
        self._listener = _listen(settings.host, settings.port)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.url = f"http://{host}:{self._listener.getsockname()[1]}"

    async def run(self) -> int:
        """Load the model, answer requests until a signal, and return the exit code.

        In the main thread, SIGTERM and Ctrl-C call `signal`.
        """
        self.loop = asyncio.get_running_loop()
        server = HttpServer(self._app, self._connections, self.settings)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.loop.add_signal_handler(number, self.signal)
        serving = asyncio.ensure_future(server.serve([self._listener]))
        needs_key = bool(self.settings.api_keys())
        _info("listening", url=self.url, model=self.service.name, key=needs_key)
        if self.settings.host not in LOOPBACK and not needs_key:
            log.warning(
                "the server listens beyond this machine without a key: anybody who reaches the "
                "port can use the model; set --api-key-file"
            )
        threading.Thread(target=self._load, name=LOAD_THREAD, daemon=True).start()
        code = await self._wait_for_end()
        server.should_exit = True
        await serving
        if self.service.engine is not None:
            await asyncio.to_thread(self.service.engine.close, ENGINE_CLOSE_S)
        _info("stopped", code=code)
        return code

    def close(self) -> None:
        """Stop listening, if `run` has not been called."""
        self._listener.close()

    def signal(self) -> None:
        """Stop the server; call this in the event loop's thread.

        The first call refuses new requests and gives the running ones --shutdown-timeout to
        finish. The second call cuts them off.
        """
        if self.service.state == "draining":
            self._cut_off("a second signal")
            return
        timeout = self.settings.shutdown_timeout
        _info("draining", requests=self.service.requests, seconds=timeout)
        self.service.state = "draining"
        self._drain_deadline = time.monotonic() + timeout

    def _load(self) -> None:
        started = time.perf_counter()
        try:
            llm = self._load_model()
        except Exception as e:
            log.error(
                "the model could not be loaded",
                extra={"fields": {"error": " ".join(str(e).splitlines())}},
                exc_info=None if isinstance(e, (ValueError, OSError)) else e,
            )
            self.loop.call_soon_threadsafe(self._load_failed)
            return
        plan = llm.plan()
        _info(
            "ready",
            seconds=round(time.perf_counter() - started, 2),
            model=self.service.name,
            weights=human_bytes(plan.weights),
            cache=human_bytes(plan.cache),
            cache_tokens=plan.tokens,
            max_model_len=plan.max_model_len,
        )
        self.loop.call_soon_threadsafe(self.service.begin, llm)

    def _load_failed(self) -> None:
        self.service.state, self._exit_code = "failed", 1

    def _cut_off(self, reason: str) -> None:
        if not self._cutting_off and self.service.requests:
            fields = {"why": reason, "requests": self.service.requests}
            log.warning("requests are cut off", extra={"fields": fields})
            self._exit_code = 1
        self._cutting_off = True

    async def _wait_for_end(self) -> int:
        """Wait until the server can end, and return its exit code."""
        service = self.service
        while True:
            await asyncio.sleep(0.05)
            engine = service.engine
            if engine is not None and not engine.alive:
                fields = {"error": str(engine.error)}
                log.critical("the engine ended", exc_info=engine.error, extra={"fields": fields})
                service.state = "failed"
                await asyncio.sleep(0.2)  # time to send the error to waiting clients
                return 1
            if service.state not in ("draining", "failed"):
                continue
            if time.monotonic() > self._drain_deadline:
                self._cut_off("--shutdown-timeout")
            if self._cutting_off and engine is not None:
                # closing the engine ends every running request with an error
                await asyncio.to_thread(engine.close, ENGINE_CLOSE_S)
                await asyncio.sleep(0.1)
            if self._cutting_off or not service.requests:
                return self._exit_code


def _check_model(model: str, settings: Settings) -> Path | None:
    """Check what is quick to check before the server answers.

    Returns:
        The model folder. To find that of a run, all of a checkpoint is read, so this happens once.
        None if the model is on the hub.
    """
    cache_codec.check_format(settings.cache)
    for format in (settings.weights, settings.head):
        if format not in (None, *native.FORMATS):
            raise ValueError(
                f"unknown weight format {format!r}{did_you_mean(format, native.FORMATS)}; "
                f"known: {', '.join(native.FORMATS)}"
            )
    if Path(model).expanduser().exists() or model.count("/") != 1:
        formats = Formats(settings.weights, settings.head, settings.cache)
        return prepare(model, formats, dtype=settings.dtype, device=settings.device).folder
    return None


def _limit_arenas() -> None:
    """Let glibc return the memory of large requests to the system.

    By default each thread allocates from an arena of its own, which seldom shrinks.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def _info(event: str, **fields) -> None:
    log.info(event, extra={"fields": fields})


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as e:
        raise OSError(f"--host {host} is not an address of this machine: {e.strerror}") from None
    # asyncio sets TCP_NODELAY only on sockets whose protocol is given explicitly
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit this. Without it the system buffers megabytes for each.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as e:
        listener.close()
        raise OSError(
            f"cannot listen on {host} port {port}: {e.strerror}; "
            "choose another --port, or 0 for a free one"
        ) from None
    return listener
