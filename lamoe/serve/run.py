"""The process: listens at once, loads the model beside, drains at the first SIGTERM or Ctrl-C and stops at the second."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

import uvicorn

from lamoe.engine.llm import LLM
from lamoe.model.accounting import human_bytes
from lamoe.serve.app import build
from lamoe.serve.logs import configure
from lamoe.serve.service import Service
from lamoe.serve.settings import LOOPBACK, Settings

log = logging.getLogger("lamoe.serve")


def run(model: str, name: str, settings: Settings) -> int:
    """Serve the model at a folder or hub id until a signal; the exit code: 0 after draining, 1 when requests were cut off or something failed."""
    configure(settings.log_level)
    options = dict(
        cache=settings.kv_cache_dtype,
        cache_memory=settings.kv_cache_memory,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        dtype=settings.dtype,
        threads=settings.threads,
        weights=settings.quantization,
        count_experts=True,
    )
    code = asyncio.run(Serving(lambda: LLM(model, **options), name, settings).run())
    if any(
        t.name in ("lamoe-load", "lamoe-engine") for t in threading.enumerate()
    ):  # still loading, or in a step of many seconds
        sys.stderr.flush()
        os._exit(
            code
        )  # an ordinary exit would take the ground from under their C++ code, which ends in abort()
    return code


class Serving:
    """One server from its socket to its end. It listens once it is made (OSError when it cannot; ValueError for a key file without keys). `url` is where.
    `signal` says stop, of the event loop's thread: the first time no new requests, while the running ones go on for --shutdown-timeout; the second
    time those are cut off."""

    def __init__(self, load: Callable[[], LLM], name: str, settings: Settings):
        self.settings, self.service, self._load_model = settings, Service(settings, name), load
        self._app, self._code, self._cut, self._until = build(self.service), 0, False, float("inf")
        self._listener = _listen(settings.host, settings.port)
        self.url = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{self._listener.getsockname()[1]}"

    async def run(self) -> int:
        """Load, answer, drain; the exit code. In the main thread SIGTERM and Ctrl-C call `signal`."""
        s = self.settings
        config = uvicorn.Config(
            self._app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            h11_max_incomplete_event_size=2 * s.max_header_bytes,
            limit_concurrency=s.max_connections,
            timeout_graceful_shutdown=5,
        )
        logging.getLogger("uvicorn.access").disabled = True  # it would log query strings
        self.loop, server = asyncio.get_running_loop(), _Uvicorn(config, s.body_timeout)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.loop.add_signal_handler(number, self.signal)
        serving = asyncio.ensure_future(server.serve([self._listener]))
        log.info(
            "listening",
            extra={"fields": {"url": self.url, "model": self.service.name, "key": bool(s.keys())}},
        )
        if s.host not in LOOPBACK and not s.keys():
            log.warning(
                "listening beyond this machine without a key: anybody who reaches the port can use the model; give --api-key-file"
            )
        threading.Thread(target=self._load, name="lamoe-load", daemon=True).start()
        code = await self._watch()
        server.should_exit = True
        await serving
        if self.service.engine is not None:
            await asyncio.to_thread(self.service.engine.close, 10)
        log.info("stopped", extra={"fields": {"code": code}})
        return code

    def signal(self) -> None:
        if self.service.state == "draining":
            self._cut_off("a second signal")
            return
        log.info(
            "draining",
            extra={
                "fields": {
                    "requests": self.service.requests,
                    "seconds": self.settings.shutdown_timeout,
                }
            },
        )
        self.service.state, self._until = (
            "draining",
            time.monotonic() + self.settings.shutdown_timeout,
        )

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
            self.loop.call_soon_threadsafe(self._failed)
            return
        plan = llm.plan()
        log.info(
            "ready",
            extra={
                "fields": {
                    "seconds": round(time.perf_counter() - started, 2),
                    "model": self.service.name,
                    "weights": human_bytes(plan.weights),
                    "cache": human_bytes(plan.cache),
                    "cache_tokens": plan.tokens,
                    "max_model_len": plan.max_model_len,
                }
            },
        )
        self.loop.call_soon_threadsafe(self.service.begin, llm)

    def _failed(self) -> None:
        self.service.state, self._code = "failed", 1

    def _cut_off(self, why: str) -> None:
        if not self._cut and self.service.requests:
            log.warning(
                "requests are cut off",
                extra={"fields": {"why": why, "requests": self.service.requests}},
            )
            self._code = 1
        self._cut = True

    async def _watch(self) -> int:
        """Until it is time to end; the exit code."""
        service = self.service
        while True:
            await asyncio.sleep(0.05)
            engine = service.engine
            if engine is not None and not engine.alive:
                log.critical("the engine ended", exc_info=engine.error)
                service.state = "failed"
                await asyncio.sleep(0.2)  # those who wait hear of it
                return 1
            if service.state not in ("draining", "failed"):
                continue
            if time.monotonic() > self._until:
                self._cut_off("--shutdown-timeout")
            if self._cut and engine is not None:
                await asyncio.to_thread(engine.close, 10)  # everybody gets an error, at once
                await asyncio.sleep(0.1)
            if self._cut or not service.requests:
                return self._code


class _Uvicorn(uvicorn.Server):
    """uvicorn, except: it would close its socket at the first signal, but /health is to say 503 while the rest is answered; and it would wait for ever
    for the headers of a request, but connections are limited, so whoever holds one without asking anything has `patience` seconds."""

    def __init__(self, config: uvicorn.Config, patience: float):
        super().__init__(config)
        self._patience, self._since = patience, {}

    @contextmanager
    def capture_signals(self):
        yield  # Serving has its own

    async def on_tick(self, counter: int) -> bool:
        now, before = time.monotonic(), self._since
        silent = [
            c
            for c in self.server_state.connections
            if c.timeout_keep_alive_task is None and (c.cycle is None or c.cycle.response_complete)
        ]
        self._since = {c: before.get(c, now) for c in silent}
        for connection, since in self._since.items():
            if now - since > self._patience:
                connection.transport.close()
        return await super().on_tick(counter)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as e:
        raise OSError(f"--host {host} is no address of this machine: {e.strerror}") from None
    listener = socket.socket(
        family, kind, protocol
    )  # with its protocol: asyncio sets TCP_NODELAY only where it sees that it is TCP
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as e:
        listener.close()
        raise OSError(
            f"cannot listen on {host} port {port}: {e.strerror}; choose another --port, or 0 for a free one"
        ) from None
    return listener
