"""Abuse a server in many ways at once and check that it stays healthy.

    python benchmarks/soak.py [--model MODEL] [--seconds 600] [--threads 1]

Starts `lamoe serve` on MODEL, or on a small random model. Meanwhile other threads send: silent
connections, clients that never read or send byte by byte, texts, JSON, grammars and compressed
bodies made to be expensive, clients that leave, and a few honest requests.

The exit code is 1 if /health once took longer than a second, the memory exceeded 1.5 times that of
the idle server plus the cache, a response had a 5xx status, or the server did not end cleanly.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import http.client
import json
import os
import random
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve import Server, make_model

PATHS = ("/tokenize", "/v1/completions", "/v1/embeddings", "/v1/chat/completions", "/detokenize")
MAX_BODY = 8 << 20
HEALTH_S, MEMORY_FACTOR = 1.0, 1.5


# Runs in a process of its own, so that it measures the server and not the attackers.
WATCH_HEALTH = """
import http.client, sys, time
port, seconds = int(sys.argv[1]), float(sys.argv[2])
end = time.monotonic() + seconds
while time.monotonic() < end:
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException):
        status = 0
    connection.close()
    print(time.perf_counter() - started if status == 200 else 30.0, flush=True)
    time.sleep(0.2)
"""


class Soak:
    """The attackers and what they have seen."""

    def __init__(self, port: int, seconds: float):
        self.port, self.end = port, time.monotonic() + seconds
        self.statuses: Counter[str] = Counter()
        self.lock = threading.Lock()
        letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz 0123456789", k=70_000)
        self.letters = "".join(letters) * 100

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end

    def count(self, what: str) -> None:
        with self.lock:
            self.statuses[what] += 1

    def post(self, path: str, body: Any, **headers: str) -> int:
        """Send a request on a new connection, read the response, and return its status."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {k.replace("_", "-"): v for k, v in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request("POST", path, data, {"content-type": "application/json", **named})
            response = connection.getresponse()
            response.read()
            status = response.status
        except (OSError, http.client.HTTPException):
            status = 0  # the server closed the connection, as it may
        finally:
            connection.close()
        self.count(str(status))
        return status

    def connect(self, receive_buffer: int = 0) -> socket.socket:
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(30)
        sock.connect(("127.0.0.1", self.port))
        return sock

    # ---- attackers -------------------------------------------------------------------------------
    def silent(self, rng: random.Random) -> None:
        """Hold many connections without a request, or with half of one."""
        socks = [self.connect() for _ in range(1100)]
        for sock in socks[::3]:
            with contextlib.suppress(OSError):
                sock.sendall(b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\n")
        self.pause(rng.uniform(2, 10))
        for sock in socks:
            sock.close()

    def deaf(self, rng: random.Random) -> None:
        """Ask for streams and for page files, and read nothing."""
        stream = {"prompt": "a", "n": 96, "max_tokens": 500, "ignore_eos": True, "stream": True}
        files = b"GET /page/vendor-purify.js HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" * 40
        socks = []
        for i in range(24):
            sock = self.connect(4096)
            socks.append(sock)
            with contextlib.suppress(OSError):
                sock.sendall(files if i % 8 else head(stream))
        self.pause(rng.uniform(5, 40))
        for sock in socks:
            sock.close()

    def slow_writers(self, rng: random.Random) -> None:
        """Send large bodies byte by byte."""
        socks = [self.connect() for _ in range(20)]
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.sendall(head(None, MAX_BODY) + b" " * rng.choice([1, 100_000]))
        for _ in range(10):
            for sock in socks:
                with contextlib.suppress(OSError):
                    sock.sendall(b" ")
            self.pause(1)
        for sock in socks:
            sock.close()

    def texts(self, rng: random.Random) -> None:
        """Send texts that take much work or memory."""
        size = rng.choice([100_000, 1_000_000, 7_000_000])
        text = rng.choice(
            [
                lambda: self.letters[:size],
                lambda: " " * size,
                lambda: "a" * size,
                lambda: "\U0001f600" * (size // 12),
                lambda: "a\n" * (size // 3),
            ]
        )()
        messages = [{"role": "user", "content": text[i::4000]} for i in range(4000)]
        tool = {"type": "function", "function": {"name": "f", "description": text}}
        small = [{"role": "user", "content": "a"}]
        path, body = rng.choice(
            [
                ("/tokenize", {"prompt": text}),
                ("/tokenize", {"messages": messages, "return_token_strs": True}),
                ("/v1/completions", {"prompt": text}),
                ("/v1/completions", {"prompt": [text[i::128] for i in range(128)]}),
                ("/v1/completions", {"prompt": "a", "suffix": text}),
                ("/v1/embeddings", {"input": [text[: size // 2], text[size // 2 :]]}),
                ("/v1/chat/completions", {"messages": messages}),
                ("/v1/chat/completions", {"messages": small, "tools": [tool]}),
                ("/detokenize", {"tokens": list(range(256)) * (size // 2048)}),
            ]
        )
        self.post(path, json.dumps(body, ensure_ascii=False).encode()[:MAX_BODY])

    def json_bombs(self, rng: random.Random) -> None:
        """Send JSON of many elements, deep JSON, and compressed bodies that grow."""
        bomb = rng.choice(
            [
                b'{"prompt": [' + b"[1]," * 2_000_000 + b"[1]]}",
                b'{"prompt": [' + b"1," * 4_000_000 + b"1]}",
                b'{"prompt": [' + b"1," * 1_000_000 + b"1]}",
                b'{"prompt": ' + b"[" * 4_000_000,
                b"{" + b'"a":{' * 1_000_000,
                b"{" + b",".join(b'"k%d":1' % i for i in range(500_000)) + b"}",
                b'{"prompt": "' + b'\\"' * 4_000_000,
                b'"' * MAX_BODY,
                b'{"prompt": "' + b"\\u4e2d" * 1_300_000 + b'"}',
                b'{"messages": [' + b'{"role":"user"},' * 60_000 + b"1]}",
            ]
        )
        headers = {}
        if rng.random() < 0.3:
            bomb, headers = gzip.compress(b" " * 200_000_000, 1), {"content_encoding": "gzip"}
        self.post(rng.choice(PATHS), bomb[:MAX_BODY], **headers)

    def grammars(self, rng: random.Random) -> None:
        """Send grammars that are expensive to check, to compile, or to follow."""
        schema: Any = {"type": "object", "properties": {f"k{i}": {} for i in range(400)}}
        nested: Any = {}
        for _ in range(25):
            nested = {"properties": {"a": nested}}
        extra = rng.choice(
            [
                {"regex": "{" + " " * 4000},
                {"regex": "(a*)*" * 200 + "b"},
                {"regex": "(" * 500 + ")" * 500},
                {"regex": "[a-z]{1,9999}" * 5},
                {"grammar": "start: " + "a " * 20_000},
                {"grammar": "start: /{" + " " * 4000 + "/"},
                {"grammar": "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(2000))},
                {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
                {"response_format": {"type": "json_schema", "json_schema": {"schema": nested}}},
                {
                    "response_format": {
                        "type": "json_schema",
                        "json_schema": {"schema": {"pattern": "{" + " " * 4000}},
                    }
                },
            ]
        )
        self.post("/v1/completions", {"prompt": "a", "max_tokens": 5, **extra})

    def leavers(self, rng: random.Random) -> None:
        """Begin requests and leave."""
        for _ in range(10):
            with contextlib.suppress(OSError), self.connect() as sock:
                body = {"prompt": "the cat", "max_tokens": 500, "stream": rng.random() < 0.5}
                sock.sendall(head(body)[: rng.choice([20, 150, 100_000])])
                self.pause(rng.uniform(0, 0.2))

    def honest(self, rng: random.Random) -> None:
        """Send ordinary requests."""
        status = self.post("/v1/completions", {"prompt": "the cat sat", "max_tokens": 16})
        self.count(f"honest {status}")
        self.pause(0.5)

    # ---- the threads -----------------------------------------------------------------------------
    def pause(self, seconds: float) -> None:
        time.sleep(max(min(seconds, self.end - time.monotonic()), 0))

    def attack(self, attacker: Callable[[random.Random], None], seed: int) -> None:
        rng = random.Random(seed)
        while not self.over:
            try:
                attacker(rng)
            except OSError as e:
                self.count(type(e).__name__)
                self.pause(0.5)


def head(body: Any, length: int | None = None) -> bytes:
    """Write a request with a JSON body, or only its head for a body of `length` bytes."""
    data = b"" if body is None else json.dumps(body).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % (length or len(data))
    ) + data


def memory(process: int) -> int:
    """Return the resident bytes of a process and its children."""
    kilobytes, children = 0, []
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{process}/status").read_text()
        kilobytes = next(int(s.split()[1]) for s in status.splitlines() if s[:6] == "VmRSS:")
        for task in Path(f"/proc/{process}/task").iterdir():
            children += (task / "children").read_text().split()
    return kilobytes * 1024 + sum(memory(int(child)) for child in children)


def soak(server: Server, seconds: float) -> bool:
    """Abuse a server. Return whether it stayed within all bounds."""
    run = Soak(server.port, seconds)
    for path, body in (
        ("/v1/completions", {"prompt": "the cat", "max_tokens": 4}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4}),
        ("/v1/completions", {"prompt": "the cat", "max_tokens": 4, "regex": "[a-z]*"}),
    ):
        run.post(path, body)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", "/lamoe/stats")
    cache = json.loads(connection.getresponse().read())["cache"]["total_bytes"]
    connection.close()
    idle = highest = memory(server.process.pid)
    attackers = [
        run.silent, run.deaf, run.slow_writers, run.texts, run.texts, run.json_bombs,
        run.json_bombs, run.grammars, run.grammars, run.leavers, run.honest, run.honest,
    ]  # fmt: skip
    threads = [
        threading.Thread(target=run.attack, args=(attacker, i))
        for i, attacker in enumerate(attackers)
    ]
    watch = subprocess.Popen(
        [sys.executable, "-c", WATCH_HEALTH, str(server.port), str(seconds)], stdout=subprocess.PIPE
    )
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        highest = max(highest, memory(server.process.pid))
        time.sleep(0.05)
    health = [float(line) for line in watch.communicate()[0].split()]
    end = memory(server.process.pid)
    log_bytes = os.fstat(server.log.fileno()).st_size
    code = server.stop()
    bound = MEMORY_FACTOR * idle + cache
    failures = sum(n for status, n in run.statuses.items() if status.startswith("5"))
    print(
        f"/health: {len(health)} answers, median {statistics.median(health):.3f} s, "
        f"longest {max(health):.3f} s (bound {HEALTH_S:g})\n"
        f"memory: idle {idle >> 20} MiB, highest {highest >> 20}, at the end {end >> 20} "
        f"(bound {int(bound) >> 20}; cache {cache >> 20})\n"
        f"responses: {dict(sorted(run.statuses.items()))} (0: connection closed)\n"
        f"log: {log_bytes >> 10} KiB; exit code {code}"
    )
    return max(health) <= HEALTH_S and highest <= bound and not failures and code in (0, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="default: a small random model")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / (args.model.name if args.model else "model")
        if args.model:
            model.symlink_to(args.model.resolve())
        else:
            make_model(model)
        return 0 if soak(Server(model, args.threads), args.seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
