"""Send mutated requests to a server and check that every one gets an answer below 500.

    python benchmarks/fuzz.py [--url http://127.0.0.1:8000] [--count 3000] [--seed 0]

Without --url it starts `lamoe serve` on a small random model. Every request begins as a valid one
and is then changed one to four times: another value, a key removed, renamed or doubled, values
nested or repeated, bytes flipped, inserted or cut, another path, method or header. The seed decides
every change, so a failure can be repeated with `--only N`.

A failure is a 5xx status, an error without OpenAI's error object, no answer within --timeout, or a
/health that does not answer within a second. The exit code is 1 if there was one.
"""

from __future__ import annotations

import argparse
import copy
import http.client
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serve import Server, make_model

TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
SEEDS: list[tuple[str, str, Any]] = [  # method, path, body
    (
        "POST",
        "/v1/completions",
        {"prompt": "the cat", "max_tokens": 3, "stop": ["."], "logprobs": 1, "echo": True},
    ),
    ("POST", "/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "n": 2, "seed": 1}),
    ("POST", "/v1/completions", {"prompt": "a", "max_tokens": 4, "regex": "[a-z]{1,3}(x|y)*"}),
    ("POST", "/v1/completions", {"prompt": "a", "max_tokens": 4, "grammar": 'start: "a" | /b+/'}),
    (
        "POST",
        "/v1/completions",
        {"prompt": "a", "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}},
    ),
    (
        "POST",
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            ],
            "max_tokens": 3,
            "temperature": 0.5,
            "top_p": 0.9,
            "logit_bias": {"5": 1},
        },
    ),
    (
        "POST",
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 8,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": SCHEMA},
            },
        },
    ),
    (
        "POST",
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 8,
            "tools": [TOOL],
            "tool_choice": "required",
            "stream": True,
        },
    ),
    ("POST", "/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}),
    ("POST", "/tokenize", {"prompt": "the cat"}),
    ("POST", "/detokenize", {"tokens": [1, 2, 3]}),
    ("GET", "/v1/models", None),
    ("GET", "/lamoe/stats", None),
    ("GET", "/page/app.js", None),
]
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 5.0, 0.5, -0.0, 1e308, 1e-320, 2**31, 2**63, -(2**63) - 1, 10**40,
    "", " ", "\x00", "\ud800", "\ufdd0", "a" * 300, "a" * 70_000, "null", "true", "5", "-1", "NaN",
    "{" + " " * 3000, "(a*)*" * 20, "[" * 200, "\\" * 99, "x{0,99999}", "<｜User｜>", "</s>", "🎉",
    [], {}, [[]], [None], [{}], {"": ""}, [0] * 2000, ["a"] * 40, [[[[[[[[[[]]]]]]]]]],
    {"type": "object"}, {"$ref": "#"}, {"type": "array", "items": {"$ref": "#"}},
    {"pattern": "^(a+)+$", "type": "string"}, {"type": "image_url", "image_url": {"url": "x"}},
    {"role": "tool", "content": "x"}, {"role": "assistant", "content": None},
]  # fmt: skip
NAMES = [
    "prompt", "messages", "max_tokens", "n", "stop", "regex", "grammar", "tools", "tool_choice",
    "logprobs", "top_logprobs", "response_format", "metadata", "store", "suffix", "cache_salt",
    "best_of", "input", "tokens", "seed", "stream", "min_tokens", "user", "\x00", "__proto__", "",
]  # fmt: skip
HEADERS = [
    ("Content-Type", "text/plain"), ("Content-Type", ""), ("Content-Encoding", "gzip"),
    ("Content-Type", "application/json; charset=utf-16"), ("Accept", "text/event-stream"),
    ("Authorization", "Bearer " + "x" * 500), ("Origin", "http://evil.example"), ("Host", "evil"),
    ("X-Request-Id", "\xff" * 50), ("Expect", "100-continue"), ("Range", "bytes=0-1"),
]  # fmt: skip
PATHS = ["/", "/v1", "/v1/", "//", "/v1/models/x", "/models", "/metrics", "/openapi.json", "/%00"]
METHODS = ["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "POST"]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Return the paths of all values inside a JSON value."""
    inside = (
        value.items() if isinstance(value, dict)
        else enumerate(value) if isinstance(value, list) else ()
    )  # fmt: skip
    return [path, *(p for k, v in inside for p in places(v, (*path, k)))]


def mutate_json(body: Any, rng: random.Random) -> Any:
    """Return a copy of a JSON value with one change."""
    body = copy.deepcopy(body)
    path = rng.choice(places(body))
    if not path:
        more = {**(body if isinstance(body, dict) else {}), rng.choice(NAMES): rng.choice(NASTY)}
        return rng.choice([[body], {"body": body}, more])
    holder = body
    for key in path[:-1]:
        holder = holder[key]
    key, kind = path[-1], rng.randrange(6)
    if kind == 0 and isinstance(holder, dict):
        holder[rng.choice(NAMES)] = holder.pop(key)
    elif kind == 1:
        del holder[key]
    elif kind == 2:
        holder[key] = [holder[key]] * rng.choice([1, 2, 100])
    elif kind == 3 and isinstance(holder, dict):
        holder[rng.choice(NAMES)] = rng.choice(NASTY)
    else:
        holder[key] = rng.choice(NASTY)
    return body


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with one byte flipped, a piece cut, doubled, or a stray byte inserted."""
    if not data:
        return data
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    return rng.choice(
        [
            data[:a] + bytes([data[a] ^ 1 << rng.randrange(8)]) + data[a + 1 :],
            data[:a],
            data[:a] + data[b:],
            data[:b] + data[a:],
            data[:a] + bytes([rng.randrange(256)]) + data[a:],
            b"\xef\xbb\xbf" + data,
        ]
    )


def request(seed: int, n: int) -> tuple[str, str, bytes | None, dict[str, str]]:
    """Make request number n: its method, path, body and headers."""
    rng = random.Random(f"{seed} {n}")
    method, path, body = rng.choice(SEEDS)
    headers = {"Content-Type": "application/json"} if body is not None else {}
    changes = rng.choice([1, 1, 1, 2, 3, 4])
    if body is not None:
        for _ in range(changes):
            if isinstance(body, (dict, list)):
                body = mutate_json(body, rng) if body else body
    data = None if body is None else json.dumps(body).encode()
    if rng.random() < 0.2 and data is not None:
        data = mutate_bytes(data, rng)
    if rng.random() < 0.1:
        name, value = rng.choice(HEADERS)
        headers[name] = value
    if rng.random() < 0.05:
        method = rng.choice(METHODS)
    if rng.random() < 0.05:
        path = rng.choice([*PATHS, path + "/", path + "?x=1", path.upper(), "/v1" + path])
    return method, path, data, headers


def send(url: str, parts: tuple, timeout: float) -> tuple[int, bytes, float]:
    """Send one request. Returns status, body and seconds."""
    method, path, data, headers = parts
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=timeout)
    start = time.perf_counter()
    try:
        connection.request(method, path, data, headers)
        reply = connection.getresponse()
        return reply.status, reply.read(), time.perf_counter() - start
    finally:
        connection.close()


def fault(status: int, body: bytes, method: str) -> str | None:
    """Say what is wrong with an answer, or return None."""
    if status >= 500:
        return f"status {status}: {body[:200]!r}"
    if status >= 400 and method != "HEAD":
        try:
            message = json.loads(body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            return f"status {status} without an error object: {body[:200]!r}"
        if not message or re.search(r"constrained|\bfunction-|Traceback|pydantic", message):
            return f"status {status} with a message in the code's words: {message[:200]}"
    return None


def fuzz(url: str, seed: int, numbers: range, timeout: float) -> int:
    """Send the requests. Returns the number of failures."""
    failures, statuses, health = 0, Counter[int](), []
    for n in numbers:
        parts = request(seed, n)
        try:
            status, body, seconds = send(url, parts, timeout)
            problem = fault(status, body, parts[0])
            statuses[status] += 1
        except (OSError, http.client.HTTPException) as e:
            problem = f"{type(e).__name__}: {e}"
        if problem:
            failures += 1
            print(f"request {n}: {parts[0]} {parts[1]} {(parts[2] or b'')[:300]!r}: {problem}")
        if n % 20 == 0:
            health.append(send(url, ("GET", "/health", None, {}), timeout)[2])
    print("statuses", dict(sorted(statuses.items())))
    print(f"/health: median {statistics.median(health):.4f} s, longest {max(health):.4f} s")
    print(f"{len(numbers)} requests, {failures} failures")
    return failures + (max(health) > 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", help="address of a running server")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="send only this request")
    parser.add_argument("--timeout", type=float, default=30)
    args = parser.parse_args()
    numbers = range(args.count) if args.only is None else range(args.only, args.only + 1)
    if args.url:
        return 1 if fuzz(args.url, args.seed, numbers, args.timeout) else 0
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model")
        server = Server(Path(folder) / "model", threads=1)
        try:
            url = f"http://127.0.0.1:{server.port}"
            return 1 if fuzz(url, args.seed, numbers, args.timeout) else 0
        finally:
            server.stop()


if __name__ == "__main__":
    sys.exit(main())
