"""Run chat templates in a process of their own, because a template is a program from a stranger.

A template can loop for ever or ask for any amount of memory inside one call into C, where no check
of ours would run. So it runs in a child process (`template_worker`), which limits its own memory
and is ended if a request takes too long. The next request then starts a new one. One child serves
all threads, one request at a time. It starts with the first request and ends with this process.
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

from lamoe.text import template_worker
from lamoe.text.template_worker import decode, encode

# Number of seconds that a new process may take to import jinja2, on a busy machine.
START_SECONDS = 60.0
# Number of seconds that a request waits for those of other threads.
WAIT_SECONDS = 60.0
# A character has at most 4 bytes, and JSON writes at most 6 for one.
_MAX_REPLY = 6 * template_worker.MAX_TEXT + 1024
# Isolated mode ignores the environment and the user's own packages. The packages that the child
# needs come last in its path, so that they cannot replace a module of the standard library.
_COMMAND = (
    "import runpy, sys; sys.path += sys.argv[2:]; runpy.run_path(sys.argv[1], None, '__main__')"
)
_KEPT_ENVIRONMENT = ("SYSTEMROOT", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


class TemplateLimit(ValueError):
    """A template exceeded a limit on time or memory, or its process ended."""


class TemplateProcess:
    """The child process, started when it is needed. Thread-safe."""

    def __init__(self):
        self._lock = threading.Lock()
        self._child: subprocess.Popen | None = None

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Return the child's answer to a request (see template_worker).

        Args:
            seconds: time limit, not counting the start of the child.

        Raises:
            TemplateLimit: if the time limit passes, or the child dies.
            ValueError: if no child can be started, or too many requests wait for it.
        """
        message = encode({**request, "seconds": seconds})
        if not self._lock.acquire(timeout=WAIT_SECONDS):
            raise ValueError(
                f"other conversations kept the chat template busy for {WAIT_SECONDS:g} seconds; "
                "send fewer at a time"
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
        folders = dict.fromkeys(map(_folder_of, ("jinja2", "markupsafe")))
        command = [sys.executable, "-I", "-S", "-B", "-c", _COMMAND, template_worker.__file__]
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
        except (OSError, TemplateLimit) as e:
            raise ValueError(
                "chat templates run in a process of their own, and this system could not start "
                f"one ({sys.executable}: {e}); allow it, or send token ids instead of messages"
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
                raise TemplateLimit("the chat template failed: its result is too long")
            return decode(_read(child.stdout, size))
        except (OSError, EOFError):
            if late.is_set():
                error = f"the chat template failed: it takes more than {seconds:g} seconds"
            else:
                error = f"the chat template failed: it ended its process ({child.wait()})"
            raise TemplateLimit(error) from None
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


PROCESS = TemplateProcess()
atexit.register(PROCESS.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=PROCESS.forget)
