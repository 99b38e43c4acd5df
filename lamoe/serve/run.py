"""The process: listens at once, loads the model beside, drains at the first SIGTERM or Ctrl-C and stops at the second."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

import uvicorn

from lamoe.accounting import human_bytes
from lamoe.engine.llm import LLM
from lamoe.serve.app import build
from lamoe.serve.logs import configure
from lamoe.serve.service import Service
from lamoe.serve.settings import LOOPBACK, Settings

log = logging.getLogger("lamoe.serve")


class Server(uvicorn.Server):
    """uvicorn, which otherwise would close its socket as soon as it should end: /health is to say 503 while the rest is answered."""

    @contextmanager
    def capture_signals(self):
        yield  # `serve` below has its own


def run(model: str, name: str, settings: Settings) -> int:
    """Serve the model at a folder or hub id until a signal; the exit code: 0 after draining, 1 when requests were cut off or something failed."""
    configure(settings.log_level)
    settings.keys()  # a key file that cannot be read is said before anything starts
    options = dict(cache=settings.kv_cache_dtype, cache_memory=settings.kv_cache_memory, max_model_len=settings.max_model_len, max_num_seqs=settings.max_num_seqs,
                   max_num_batched_tokens=settings.max_num_batched_tokens, dtype=settings.dtype, threads=settings.threads, count_experts=True)
    return asyncio.run(serve(lambda: LLM(model, **options), name, settings))


async def serve(load: Callable[[], LLM], name: str, settings: Settings) -> int:
    """Listen, load, answer, drain. OSError when the address cannot be listened on."""
    service = Service(settings, name)
    config = uvicorn.Config(build(service), http="h11", ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
                            h11_max_incomplete_event_size=2 * settings.max_header_bytes, limit_concurrency=settings.max_connections, timeout_keep_alive=30,
                            timeout_graceful_shutdown=5)
    server, stop = Server(config), _Stop(service)
    listener = _listen(settings.host, settings.port)
    url = f"http://{settings.host if ':' not in settings.host else f'[{settings.host}]'}:{listener.getsockname()[1]}"
    if settings.host not in LOOPBACK and not settings.keys():
        log.warning("listening beyond this machine without a key: anybody who reaches the port can use the model; give --api-key-file")
    loop = asyncio.get_running_loop()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.signal)
    serving = asyncio.ensure_future(server.serve([listener]))
    log.info("listening", extra={"fields": {"url": url, "model": service.name, "key": bool(settings.keys())}})
    threading.Thread(target=_load, args=(load, service, loop, stop), name="lamoe-load", daemon=True).start()
    code = await stop.watch()
    server.should_exit = True
    await serving
    if service.engine is not None:
        await asyncio.to_thread(service.engine.close, 10)
    log.info("stopped", extra={"fields": {"code": code}})
    return code


def _load(load: Callable[[], LLM], service: Service, loop: asyncio.AbstractEventLoop, stop: _Stop) -> None:
    started = time.perf_counter()
    try:
        llm = load()
    except Exception as e:
        log.error("the model could not be loaded", extra={"fields": {"error": " ".join(str(e).splitlines())}}, exc_info=None if isinstance(e, (ValueError, OSError)) else e)
        loop.call_soon_threadsafe(stop.failed)
        return
    plan = llm.plan()
    log.info("ready", extra={"fields": {"seconds": round(time.perf_counter() - started, 2), "model": service.name, "weights": human_bytes(plan["weights"]),
                                        "cache": human_bytes(plan["cache"]), "cache_tokens": plan["tokens"], "max_model_len": plan["max_model_len"]}})
    loop.call_soon_threadsafe(service.begin, llm)


class _Stop:
    """When and how to end. The first signal: no new requests, the running ones go on for --shutdown-timeout. The second: they are cut off."""

    def __init__(self, service: Service):
        self.service, self.code, self.cut, self.until = service, 0, False, float("inf")

    def signal(self) -> None:
        if self.service.state == "draining":
            self._cut_off("a second signal")
            return
        log.info("draining", extra={"fields": {"requests": self.service.requests, "seconds": self.service.settings.shutdown_timeout}})
        self.service.state, self.until = "draining", time.monotonic() + self.service.settings.shutdown_timeout

    def failed(self) -> None:
        self.service.state, self.code, self.until = "failed", 1, 0.0

    def _cut_off(self, why: str) -> None:
        if not self.cut and self.service.requests:
            log.warning("requests are cut off", extra={"fields": {"why": why, "requests": self.service.requests}})
            self.code = 1
        self.cut = True

    async def watch(self) -> int:
        """Until it is time to end; the exit code."""
        while True:
            await asyncio.sleep(0.05)
            engine = self.service.engine
            if engine is not None and not engine.alive:
                log.critical("the engine ended", exc_info=engine.error)
                self.service.state = "failed"
                await asyncio.sleep(0.2)  # those who wait hear of it
                return 1
            if self.service.state not in ("draining", "failed"):
                continue
            if self.service.state == "draining" and time.monotonic() > self.until:
                self._cut_off("--shutdown-timeout")
            if self.cut and engine is not None:
                await asyncio.to_thread(engine.close, 10)  # everybody gets an error, at once
                await asyncio.sleep(0.1)
            if self.cut or not self.service.requests:
                return self.code


def _listen(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as e:
        listener.close()
        raise OSError(f"cannot listen on {host} port {port}: {e.strerror}; choose another --port, or 0 for a free one") from None
    return listener
