"""Run work on untrusted programs (chat templates, grammars) in a child process with limits.

Such a program can loop for ever or ask for any amount of memory inside one call into C, where no
check of ours would run. So it runs in a child process, which limits its own memory and is ended if
a request takes too long. The next request then starts a new one. A child serves all threads, one
request at a time. It starts with the first request and ends with this process.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from lamoe.text import child_worker
from lamoe.text.child_worker import decode, encode

# Number of seconds that a new process may take to import its packages, on a busy machine.
START_SECONDS = 60.0
# Number of seconds that a request waits for those of other threads.
WAIT_SECONDS = 60.0
_MAX_REPLY = 128 << 20
# Isolated mode ignores the environment and the user's own packages. The packages that the child
# needs come last in its path, so that they cannot replace a module of the standard library.
_COMMAND = (
    "import runpy, sys; sys.path += sys.argv[3:]; worker = runpy.run_path(sys.argv[2]); "
    "runpy.run_path(sys.argv[1])['main'](worker)"
)
_KEPT_ENVIRONMENT = ("SYSTEMROOT", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


class ChildLimit(ValueError):
    """The work exceeded a limit on time, or ended its process."""


class Child:
    """A child process, started when it is needed. Thread-safe.

    Args:
        worker: path of a Python file. It imports no module of lamoe, and defines `answer`, a
            function from a request to an answer, `prepare` and MEMORY_BYTES (see child_worker).
        packages: the packages that it imports.
        work: what it does, for messages: "WORK failed: ...".
    """

    def __init__(self, worker: str, packages: tuple[str, ...], work: str):
        self._worker, self._packages, self._work = worker, packages, work
        self._lock = threading.Lock()
        self._child: subprocess.Popen | None = None
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forget)

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Return the child's answer to a request.

        Args:
            seconds: time limit, not counting the start of the child.

        Raises:
            ChildLimit: if the time limit passes, or the child dies.
            ValueError: if no child can be started, or too many requests wait for it.
        """
        message = encode({**request, "seconds": seconds})
        if not self._lock.acquire(timeout=WAIT_SECONDS):
            raise ValueError(
                f"{self._work} failed: other requests kept its process busy for "
                f"{WAIT_SECONDS:g} seconds; send fewer at a time"
            )
        try:
            if self._child is None or self._child.poll() is not None:
                self._start()
            reply = self._exchange(message, seconds)
            if reply.get("ends"):
                self.close()
            return reply
        except BaseException:
            # The child may be in the middle of an answer, which the next request must not get.
            self.close()
            raise
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the child. A later request starts a new one."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            _close_pipes(child)

    def forget(self) -> None:
        """Leave the child to the process that started it. Called in a forked process."""
        child, self._child, self._lock = self._child, None, threading.Lock()
        if child is not None:
            _close_pipes(child)
            child.returncode = 0  # so that nothing here waits for it

    def _start(self) -> None:
        self.close()
        folders = dict.fromkeys(map(_folder_of, self._packages))
        files = [child_worker.__file__, self._worker]
        command = [sys.executable, "-I", "-S", "-B", "-c", _COMMAND, *files]
        try:
            self._child = subprocess.Popen(
                [*command, *folders],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={k: os.environ[k] for k in _KEPT_ENVIRONMENT if k in os.environ},
                start_new_session=True,  # Ctrl-C in a terminal is for us
            )
            self._exchange(b"", START_SECONDS)
        except (OSError, ChildLimit) as e:
            raise ValueError(
                f"{self._work} needs a process of its own, and this system could not start one "
                f"({sys.executable}: {e}); let lamoe start processes"
            ) from None

    def _exchange(self, message: bytes, seconds: float) -> dict[str, Any]:
        """Send a message and return the answer, with a time limit for both together."""
        child, late = self._child, threading.Event()
        assert child is not None and child.stdin is not None and child.stdout is not None

        def end() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            view = memoryview(message)
            while view:
                view = view[child.stdin.write(view) :]
            size = int.from_bytes(_read(child.stdout, 4), "big")
            if size > _MAX_REPLY:
                raise ChildLimit(f"{self._work} failed: its result is too long")
            return decode(_read(child.stdout, size))
        except (OSError, EOFError):
            if late.is_set():
                error = f"it takes more than {seconds:g} seconds"
            else:
                error = f"it ended its process ({child.wait()})"
            raise ChildLimit(f"{self._work} failed: {error}") from None
        finally:
            timer.cancel()


def _read(pipe, size: int) -> bytes:
    parts = []
    while size:
        part = pipe.read(min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _folder_of(package: str) -> str:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent.parent)


def _close_pipes(child: subprocess.Popen) -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
