"""The main loop and the limits of a child process. `child_process` starts it.

It needs only the standard library. Before it reads the first request, the process gives up files
and limits its memory. Messages on both pipes are JSON in UTF-8 behind 4 bytes of length. An answer
with `ends` is the last one of the process.
"""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import suppress
from typing import Any, BinaryIO


def encode(message: dict[str, Any]) -> bytes:
    """Return a message as it is sent. Lone surrogates survive."""
    body = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return len(body).to_bytes(4, "big") + body


def decode(body: bytes) -> dict[str, Any]:
    return json.loads(body.decode("utf-8", "surrogatepass"))


def _limit(memory_bytes: int) -> None:
    """Set the limits that last. Where the system has none, the parent's time limit remains."""
    with suppress(ImportError):
        import resource

        for kind, most in (
            ("RLIMIT_CORE", 0),
            ("RLIMIT_FSIZE", 0),
            ("RLIMIT_NOFILE", 3),
            ("RLIMIT_AS", memory_bytes),
        ):
            with suppress(AttributeError, ValueError, OSError):
                resource.setrlimit(getattr(resource, kind), (most, most))


def _limit_cpu(seconds: float) -> None:
    """End this process after some CPU time. The parent may die before it can end a template."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        soft = math.ceil(time.process_time() + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (soft, most))


def _read(pipe: BinaryIO) -> dict[str, Any] | None:
    head = pipe.read(4)
    body = pipe.read(int.from_bytes(head, "big")) if len(head) == 4 else b""
    return decode(body) if body else None


def main(worker: dict[str, Any]) -> None:
    """Answer the requests on stdin until it closes.

    Args:
        worker: the names that the file of the worker defines.
    """
    import signal

    with suppress(ValueError, OSError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    worker["prepare"]()
    _limit(worker["MEMORY_BYTES"])
    pipe = sys.stdout.buffer
    reply: dict[str, Any] = {"ready": True}
    while True:
        pipe.write(encode(reply))
        pipe.flush()
        request = None if reply.get("ends") else _read(sys.stdin.buffer)
        if request is None:
            return
        _limit_cpu(request["seconds"])
        reply = worker["answer"](request)
        del request
