"""Tests of connections: clients that never read or never send cannot keep others out."""

import json
import logging
import os
import resource
import socket
import subprocess
import sys
import time

import pytest

from lamoe.serve import connections
from lamoe.serve.connections import max_connections
from lamoe.serve.logs import MAX_REPEATS, RateLimit
from lamoe.serve.service import Service
from lamoe.serve.settings import Settings
from tiny_server import CONTEXT, Client, Running, connect, llm, paced, post_head, until

FILE = "/page/vendor-purify.js"


def get(path: str, *headers: str) -> bytes:
    lines = (f"GET {path} HTTP/1.1", "host: 127.0.0.1", *headers, "", "")
    return "\r\n".join(lines).encode()


def closed(server, reason: str) -> float:
    return server.service.metrics.closed.labels(reason)._value.get()


def answers(server, path="/health", **headers) -> int:
    """Return the status of a request on a new connection."""
    with connect(server.url, timeout=5) as sock:
        sock.sendall(get(path, *(f"{k}: {v}" for k, v in headers.items())))
        return int(sock.recv(4096).split()[1])


def deaf(server, requests: bytes) -> socket.socket:
    """Open a connection that sends requests and reads no response."""
    host, port = server.url.removeprefix("http://").split(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((host, int(port)))
    sock.sendall(requests)
    return sock


def is_closed(sock: socket.socket) -> bool:
    """Read what is left. Return whether the server has closed the connection."""
    sock.settimeout(5)
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


# ---- clients that do not read --------------------------------------------------------------------
def test_client_that_never_reads_is_cut_off():
    """Pipelined page files, a stream, and a large answer end after --write-timeout."""
    with Running(paced, write_timeout=0.5) as server:
        server.wait_ready()
        text = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "n": 8, "stream": True}
        data = json.dumps(text).encode()
        socks = [
            deaf(server, get(FILE) * 50),
            deaf(server, post_head(len(data)) + data),
        ]
        until(lambda: closed(server, "write timeout") == len(socks), 10)
        assert all(is_closed(sock) for sock in socks)
        until(server.idle, 2.0)
        # a client that reads slowly, but reads, gets everything
        with deaf(server, get(FILE, "connection: close")) as sock:
            got = b""
            while data := sock.recv(40_000):
                got += data
                time.sleep(0.1 if len(got) < 200_000 else 0)
        length = int(got.split(b"content-length: ")[1].split(b"\r\n")[0])
        assert len(got.split(b"\r\n\r\n", 1)[1]) == length
        assert closed(server, "write timeout") == len(socks)


def test_admission_ends_with_the_generation_not_with_the_reading(monkeypatch):
    monkeypatch.setattr("lamoe.serve.run.SEND_BUFFER", 8192)
    with Running(lambda: llm(max_num_seqs=4), max_num_seqs=4, max_queued_requests=0) as server:
        server.wait_ready()
        # more than the buffers on the way hold
        text = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "n": 4, "stream": True}
        data = json.dumps(text).encode()
        sock = deaf(server, post_head(len(data)) + data)
        until(lambda: server.service.admitted == 4)
        assert server.error(429, prompt="b")["code"] == "queue_full"
        until(lambda: server.service.admitted == 0)
        assert server.service.requests == 1 and server.service.unread > 100
        assert server.complete(max_tokens=1)
        # what was generated is still there for the client
        got = b""
        while not got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            got += sock.recv(1 << 20)
        assert got.count(b'"finish_reason":"length"') == 4
        sock.close()
        until(lambda: server.idle() and not server.service.unread)


def test_unread_deltas_are_bounded(monkeypatch):
    monkeypatch.setattr("lamoe.serve.run.SEND_BUFFER", 8192)
    monkeypatch.setattr("lamoe.serve.service.MAX_UNREAD", 500)
    with Running(paced) as server:
        server.wait_ready()
        text = {"prompt": "a", "max_tokens": CONTEXT, "ignore_eos": True, "n": 8, "stream": True}
        data = json.dumps(text).encode()
        with deaf(server, post_head(len(data)) + data) as sock:
            until(lambda: server.service.generated_tokens and not server.service.admitted)
            assert server.service.unread <= 500
            assert server.service.generated_tokens < 8 * CONTEXT
            got = b""
            while b"[DONE]" not in got:
                got += sock.recv(1 << 20)
            assert b"reads too slowly" in got
        until(server.idle)


# ---- more connections than allowed ---------------------------------------------------------------
def test_silent_connections_are_replaced_oldest_first():
    with Running(paced, max_connections=8) as server:
        server.wait_ready()
        silent = [connect(server.url) for _ in range(30)]
        until(lambda: closed(server, "replaced") >= 22)
        assert answers(server) == 200
        assert server.complete(max_tokens=1)
        assert all(is_closed(sock) for sock in silent[:20])
        # incomplete heads and bodies, and responses that nobody reads, are no better
        half = [connect(server.url) for _ in range(10)]
        for sock in half:
            sock.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n")
        bodies = [connect(server.url) for _ in range(10)]
        for sock in bodies:
            sock.sendall(post_head(100) + b"{")
        assert answers(server) == 200
        for sock in (*silent, *half, *bodies):
            sock.close()


def test_streams_are_not_replaced():
    with Running(paced, max_connections=2) as server:
        server.wait_ready()
        server.client.close()
        body = {"prompt": "the cat", "max_tokens": CONTEXT, "ignore_eos": True, "stream": True}
        streams = [Client(server, **body) for _ in range(2)]
        until(lambda: all(c.received for c in streams))
        assert answers(server) == 200  # by one of the spare connections
        assert answers(server, "/v1/models") == 503
        with connect(server.url, timeout=5) as sock:
            sock.sendall(get("/v1/models"))
            got = b""
            while data := sock.recv(4096):
                got += data
            assert b"too_many_connections" in got and b"retry-after" in got
        for client in streams:
            assert client.is_alive()
            client.leave()
        until(lambda: answers(server, "/v1/models") == 200)


def test_clients_without_a_key_hold_at_most_half(monkeypatch):
    monkeypatch.setattr(connections, "STALL_S", 0.2)
    with Running(paced, max_connections=8, api_key="k") as server:
        until(lambda: answers(server) == 200)
        with server.new_client() as client:
            key = {"authorization": "Bearer k"}
            assert client.get("/v1/models", headers=key).status_code == 200
            pipelined = [deaf(server, get(FILE) * 50) for _ in range(24)]
            until(lambda: closed(server, "replaced") >= 20)
            assert sum(not c.has_key for c in server.serving._connections.open) <= 4
            assert answers(server) == 200
            assert answers(server, "/v1/models", authorization="Bearer k") == 200
            # the connection that showed the key was not replaced
            assert sum(c.has_key for c in server.serving._connections.open) >= 1
            assert client.get("/v1/models", headers=key).status_code == 200
        for sock in pipelined:
            sock.close()


# ---- open files ----------------------------------------------------------------------------------
def test_default_limit_follows_the_limit_on_open_files(monkeypatch):
    for files, wanted, want in ((None, None, 1024), (100_000, None, 1024), (1024, None, 832)):
        monkeypatch.setattr(connections, "raise_file_limit", lambda files=files: files)
        assert max_connections(wanted) == want
    assert max_connections(50) == 50
    with pytest.raises(ValueError, match="may open 1024 files"):
        max_connections(1000)


def test_file_limit_is_raised_to_the_hard_limit():
    code = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))\n"
        "from lamoe.serve.connections import raise_file_limit\n"
        "assert raise_file_limit() == 512\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (512, 512)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.slow
def test_health_answers_beside_1100_silent_connections():
    """With `ulimit -n 1024`, in a process of its own, and with a log that stays small."""
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
import tiny_server
from lamoe.serve.logs import configure
configure("info")
with tiny_server.Running(tiny_server.paced) as server:
    server.wait_ready()
    print(server.url, flush=True)
    sys.stdin.read()
"""
    here = os.pathsep.join(sys.path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": here},
    )
    try:
        url = process.stdout.readline().decode().strip()
        host, port = url.removeprefix("http://").split(":")
        silent = [socket.create_connection((host, int(port))) for _ in range(1100)]
        for _ in range(5):
            started = time.monotonic()
            with socket.create_connection((host, int(port)), timeout=5) as sock:
                sock.sendall(get("/health"))
                assert b" 200 " in sock.recv(4096)
            assert time.monotonic() - started < 1
        for sock in silent:
            sock.close()
    finally:
        process.stdin.close()
        log = process.stderr.read()
        process.wait(20)
        process.stdout.close(), process.stderr.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(log) < 100_000


# ---- the log -------------------------------------------------------------------------------------
def record(event: str, level=logging.INFO, **fields) -> logging.LogRecord:
    made = logging.LogRecord("lamoe.serve", level, "", 0, event, (), None)
    made.fields = fields
    return made


def test_repeated_log_lines_are_counted_instead_of_written(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lamoe.serve.logs.time.monotonic", lambda: now[0])
    limit = RateLimit()
    for _ in range(2):
        kept = [limit.filter(record("request", status=401)) for _ in range(5 * MAX_REPEATS)]
        assert sum(kept) == MAX_REPEATS
        # other kinds are not affected, and answers without an error are all kept
        assert limit.filter(record("request", status=403))
        assert limit.filter(record("unexpected error", logging.ERROR))
        assert all(limit.filter(record("request", status=200)) for _ in range(5 * MAX_REPEATS))
        now[0] += 11
        first = record("request", status=401)
        assert limit.filter(first) and first.fields["suppressed"] == 4 * MAX_REPEATS
        now[0] += 11
    after = record("request", status=401)
    assert limit.filter(after) and "suppressed" not in after.fields


def test_generated_tokens_are_forgotten_without_a_reader_of_metrics(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lamoe.serve.service.time.monotonic", lambda: now[0])
    service = Service(Settings(), "tiny")
    for _ in range(1000):
        service.count_token()
        now[0] += 1.0
    assert len(service._recent_tokens) < 10
