"""Put load on `lamoe serve`: a server process with a small random model, over HTTP on loopback.

    python benchmarks/serve.py [--seconds 120] [--clients 64] [--rounds 7] [--threads 1]

Part one measures HTTP overhead: 16 streaming clients, interleaved with the same 16 requests given
to the engine directly. Part two runs many clients at once: they stream, disconnect early, send
garbage, and ask for more than the queue holds.

The exit code is 1 unless all of these hold: no 5xx status; no stream ends early; the cache is empty
afterwards; the 99th percentile of the time to first token is within the bound that follows from the
queue's limit; the overhead per token is below 1 ms. The last line is JSON.
"""

import argparse
import asyncio
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import lamoe
from lamoe.engine.llm import LLM
from lamoe.engine.sampler import SamplingParams
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer
from lamoe.text import tokenizer

SEATS, QUEUE = 16, 40  # sequences that may run at once, and sequences that may wait
BATCH = 16  # clients of part one
WORDS = (
    "the cat sat on a mat and the dog ran to the hill while one bird sang of rain in spring".split()
)
DEEP = '{"type":"array","items":' * 300 + "{}" + "}" * 300
GARBAGE: list[tuple[str, str, bytes, dict[str, str]]] = [  # method, path, body, headers
    ("POST", "/v1/completions", b"{", {}),
    ("POST", "/v1/completions", b"", {}),
    ("POST", "/v1/completions", b"\xff\xfe\x00", {}),
    ("POST", "/v1/completions", b"[]", {}),
    ("POST", "/v1/completions", b'{"prompt": "a", "max_tokens": 1e999}', {}),
    ("POST", "/v1/completions", b'{"prompt": "a", "temperature": NaN}', {}),
    ("POST", "/v1/completions", b'{"prompt": "a", "n": 1000000000}', {}),
    ("POST", "/v1/completions", b'{"prompt": [-1, 99999999999999999999]}', {}),
    ("POST", "/v1/completions", b'{"prompt": "\\ud800"}', {}),
    ("POST", "/v1/completions", b'{"prompt": "a", "max_tokns": 3}', {}),
    ("POST", "/v1/completions", b'{"prompt": ""}', {}),
    ("POST", "/v1/completions", b"[" * 100_000, {}),
    ("POST", "/v1/completions", b'{"prompt": "a", "regex": "((a*)*)*("}', {}),
    ("POST", "/v1/completions", json.dumps({"prompt": "word " * 100_000}).encode(), {}),
    ("POST", "/v1/completions", b'{"prompt": "a", "stop": ["", ""]}', {}),
    (
        "POST",
        "/v1/completions",
        b'{"prompt": "a", "response_format": {"type": "json_schema", '
        b'"json_schema": {"name": "x", "schema": %s}}}' % DEEP.encode(),
        {},
    ),
    ("POST", "/v1/chat/completions", b'{"messages": []}', {}),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "root", "content": null}]}', {}),
    (
        "POST",
        "/v1/chat/completions",
        b'{"messages": [{"role": "user", "content": "a"}], "logit_bias": {"x": 1}}',
        {},
    ),
    ("POST", "/v1/embeddings", b'{"input": [[]]}', {}),
    ("POST", "/tokenize", b'{"prompt": 3}', {}),
    ("POST", "/detokenize", b'{"tokens": [-3]}', {}),
    ("POST", "/v1/completions", b'{"prompt": "a"}', {"Content-Type": "text/plain"}),
    ("GET", "/v1/nothing", b"", {}),
    ("DELETE", "/v1/completions", b"", {}),
    ("GET", "/page/..%2f..%2fapp.py", b"", {}),
    ("GET", "/lamoe/requests/%00/experts", b"", {}),
    ("GET", "/v1/models", b"", {"X-Long": "x" * 50_000}),
    ("GET", "/v1/models", b"", {"Host": "evil.example"}),
    ("\x16\x03\x01", "\x00", b"\x00" * 64, {}),
]


# ---- a model and a server ----
def make_model(folder: Path) -> None:
    """Save the preset tiny with random weights and a vocabulary of 512."""
    tok = tokenizer.train([Path(__file__).read_text(encoding="utf-8"), " ".join(WORDS)], 512)
    config = ModelConfig.preset("tiny").replace(vocab_size=tok.vocab_size, torch_dtype="bfloat16")
    lamoe.save(Transformer(config).init_weights(0).to(torch.bfloat16).eval(), folder)
    tok.save(folder)


class Server:
    """A `lamoe serve` process and its log."""

    def __init__(self, folder: Path, threads: int):
        env = {k: v for k, v in os.environ.items() if not k.startswith("LAMOE_")} | {
            "HF_HUB_OFFLINE": "1"
        }
        self.log = open(folder.parent / "log.jsonl", "w+")
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "lamoe",
                "serve",
                str(folder),
                "--port",
                "0",
                "--threads",
                str(threads),
                "--max-num-seqs",
                str(SEATS),
                "--max-queued-requests",
                str(QUEUE),
            ],
            env=env,
            stderr=self.log,
            cwd=folder.parent,
        )
        end = time.monotonic() + 120
        while not self.event("ready"):
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(f"the server did not start: {self.lines()[-3:]}")
            time.sleep(0.1)
        self.port = int(self.event("listening")["url"].rsplit(":", 1)[1])

    def lines(self) -> list[dict]:
        self.log.seek(0)
        return [
            json.loads(line) for line in self.log if line.startswith("{") and line.endswith("\n")
        ]

    def event(self, name: str) -> dict | None:
        return next((line for line in self.lines() if line["event"] == name), None)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


# ---- client that uses little CPU time ----
async def ask(
    port: int,
    method: str,
    path: str,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    leave_after: float = math.inf,
) -> dict:
    """Send one request on a new connection.

    Args:
        leave_after: disconnect after this many events; 0 disconnects right after sending.

    Returns:
        status; retry (seconds of Retry-After); sent and times (when it was sent, and when each
        event came); last (the last event that is not [DONE]).
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    out = {"status": 0, "retry": 1, "times": [], "last": None, "sent": time.perf_counter()}
    try:
        fields = {
            "Host": "127.0.0.1",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            **(headers or {}),
        }
        writer.write(
            f"{method} {path} HTTP/1.1\r\n".encode()
            + "".join(f"{k}: {v}\r\n" for k, v in fields.items()).encode()
            + b"\r\n"
            + body
        )
        await writer.drain()
        if leave_after == 0:
            await asyncio.sleep(random.random() * 0.2)
            return out
        line = await reader.readline()
        out["status"] = int(line.split()[1]) if line.startswith(b"HTTP/") else -1
        while (line := await reader.readline()).strip():
            if line.lower().startswith(b"retry-after:"):
                out["retry"] = int(line.split(b":")[1])
        if out["status"] != 200:
            await reader.read()
            return out
        while line := await reader.readline():
            if line.startswith(b"data: "):
                out["times"].append(time.perf_counter())
                if line != b"data: [DONE]\n":
                    out["last"] = line[6:]
                if len(out["times"]) >= leave_after:
                    return out
        return out
    except ConnectionError:
        return out
    finally:
        writer.close()


def streamed(prompt: str, tokens: int, **more) -> bytes:
    return json.dumps(
        {
            "prompt": prompt,
            "max_tokens": tokens,
            "stream": True,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
            **more,
        }
    ).encode()


async def gauges(port: int) -> dict[str, float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return {name: float(value) for name, value in re.findall(r"^(lamoe_\w+) (\S+)$", text, re.M)}


# ---- part one: overhead ----
def overhead(
    port: int, folder: Path, threads: int, rounds: int, tokens: int = 128
) -> dict[str, float]:
    """Measure milliseconds per token at batch 16, over HTTP and from the engine directly.

    The rounds are interleaved. The results are medians.
    """
    llm = LLM(folder, threads=threads, max_num_seqs=SEATS, count_experts=True)
    prompts = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(BATCH)]
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=tokens, ignore_eos=True)

    async def http() -> float:
        begin = time.perf_counter()
        done = await asyncio.gather(
            *(ask(port, "POST", "/v1/completions", streamed(p, tokens, seed=1)) for p in prompts)
        )
        seconds = time.perf_counter() - begin
        assert all(json.loads(d["last"])["usage"]["completion_tokens"] == tokens for d in done)
        return seconds / tokens

    def direct() -> float:
        begin = time.perf_counter()
        outs = llm.generate(prompts, params)
        assert all(len(o.token_ids) == tokens for o in outs)
        return (time.perf_counter() - begin) / tokens

    asyncio.run(http()), direct()
    pairs = [(asyncio.run(http()), direct()) for _ in range(rounds)]
    return {
        "http_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "engine_ms": 1e3 * statistics.median(b for _, b in pairs),
        "overhead_ms": 1e3 * statistics.median(a - b for a, b in pairs),
    }


# ---- part two: load ----
class Load:
    """Many clients at once, and their results.

    `places` has the seconds from first to last token of each stream that ran to its end.
    """

    def __init__(self, port: int, seconds: float):
        self.port, self.until, self.seconds = port, time.monotonic() + seconds, seconds
        self.status: dict[str, Counter] = {
            kind: Counter() for kind in ("stream", "leaves", "garbage", "too many")
        }
        self.first, self.places, self.tokens = [], [], 0

    async def client(self, number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < self.until:
            draw = rng.random()
            kind = (
                "garbage"
                if draw < 0.15
                else "leaves"
                if draw < 0.3
                else "too many"
                if draw < 0.33
                else "stream"
            )
            retry = await getattr(self, kind.replace(" ", "_"))(rng)
            if retry and time.monotonic() < self.until:
                await asyncio.sleep(min(retry, 2) * (0.5 + rng.random() / 2))

    async def _generate(
        self, rng: random.Random, kind: str, leave_after: float = math.inf, **more
    ) -> int:
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))
        if rng.random() < 0.5:
            path, body = "/v1/completions", streamed(prompt, rng.randint(16, 96), **more)
        else:
            path, body = (
                "/v1/chat/completions",
                {
                    "messages": [{"role": "user", "content": prompt}],
                    "max_tokens": rng.randint(16, 96),
                    "stream": True,
                    "ignore_eos": True,
                    "stream_options": {"include_usage": True},
                    **more,
                },
            )
            body = json.dumps(body).encode()
        got = await ask(self.port, "POST", path, body, leave_after=leave_after)
        cut = leave_after is not math.inf and got["status"] in (0, 200)
        complete = got["last"] is not None and b'"usage":{' in got["last"]
        self.status[kind][
            "left" if cut else got["status"] if got["status"] != 200 or complete else "not complete"
        ] += 1
        # The first event of a chat comes before the first token and only names the role.
        skip = 1 if path.endswith("chat/completions") else 0
        if got["status"] == 200 and len(got["times"]) > skip and "n" not in more:
            self.first.append(got["times"][skip] - got["sent"])
            if complete:
                self.places.append(got["times"][-1] - got["times"][skip])
        if complete:
            self.tokens += json.loads(got["last"])["usage"]["completion_tokens"]
        return got["retry"] if got["status"] == 429 else 0

    async def stream(self, rng) -> int:
        return await self._generate(rng, "stream")

    async def leaves(self, rng) -> int:
        return await self._generate(rng, "leaves", rng.choice((0, 1, 2, 5, 15)))

    async def too_many(self, rng) -> int:
        return await self._generate(
            rng, "too many", n=rng.choice((8, SEATS + QUEUE, SEATS + QUEUE + 1))
        )

    async def garbage(self, rng) -> int:
        got = await ask(self.port, *rng.choice(GARBAGE))
        self.status["garbage"][got["status"]] += 1
        return 0

    async def run(self, clients: int) -> dict:
        """Run all clients, then wait up to two seconds for the cache to become empty."""
        await asyncio.gather(*(self.client(i) for i in range(clients)))
        end = time.monotonic() + 2
        while True:
            now = await gauges(self.port)
            left = {k: int(now[f"lamoe_{k}"]) for k in ("cache_used_bytes", "running", "waiting")}
            if not any(left.values()) or time.monotonic() > end:
                break
            await asyncio.sleep(0.05)
        first = sorted(self.first)
        all_status = sum(self.status.values(), Counter())
        return {
            "requests": all_status.total(),
            "status": {
                kind: {str(k): v for k, v in sorted(c.items(), key=str)}
                for kind, c in self.status.items()
            },
            "errors_5xx": sum(v for k, v in all_status.items() if isinstance(k, int) and k >= 500),
            "incomplete": all_status["not complete"],
            "left_at_end": left,
            "streams": len(first),
            "ttft_s": {
                "p50": first[len(first) // 2],
                "p99": first[int(len(first) * 0.99)],
                "max": first[-1],
            },
            # The longest possible wait: the running sequences, then the queue ahead, SEATS at a
            # time, each as slow as the slowest sequence that was measured.
            "ttft_bound_s": (math.ceil(QUEUE / SEATS) + 1) * max(self.places),
            "tokens_per_s": now["lamoe_generated_tokens_total"] / self.seconds,
        }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="seconds of load in part two")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument(
        "--rounds", type=int, default=7, help="rounds of the HTTP overhead measurement (part one)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of the engine")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp) / "tiny"
        make_model(folder)
        server = Server(folder, args.threads)
        try:
            cost = overhead(server.port, folder, args.threads, args.rounds)
            before = asyncio.run(gauges(server.port))["lamoe_generated_tokens_total"]
            load = asyncio.run(Load(server.port, args.seconds).run(args.clients))
            load["tokens_per_s"] -= before / args.seconds
        finally:
            code = server.stop()
        errors = [line for line in server.lines() if line["level"] in ("error", "critical")]
    wanted = {
        "no 5xx": load["errors_5xx"] == 0 and not errors,
        "no stream without its end": load["incomplete"] == 0,
        "nothing left in the cache": not any(load["left_at_end"].values()),
        "p99 of the first token within the queue's bound": load["ttft_s"]["p99"]
        <= load["ttft_bound_s"],
        "less than 1 ms of overhead per token": cost["overhead_ms"] < 1.0,
        "ends with code 0": code == 0,
    }
    print(
        f"{args.clients} clients, {args.seconds:g} s, {SEATS} sequences run, {QUEUE} may wait, "
        f"{args.threads} thread(s) for the engine\n"
    )
    print("| clients that | requests | answers |\n|---|---|---|")
    for kind, seen in load["status"].items():
        print(
            f"| {kind} | {sum(seen.values()):,} "
            f"| {', '.join(f'{v:,} x {k}' for k, v in seen.items())} |"
        )
    ttft = load["ttft_s"]
    print(
        f"\ntime to first token of {load['streams']:,} streams: p50 {ttft['p50']:.2f} s, "
        f"p99 {ttft['p99']:.2f} s, longest {ttft['max']:.2f} s; "
        f"the queue allows {load['ttft_bound_s']:.2f} s"
    )
    print(f"{load['tokens_per_s']:,.0f} tokens/s; left at the end: {load['left_at_end']}")
    print(
        f"batch {BATCH}: {cost['http_ms']:.2f} ms per token over HTTP, "
        f"{cost['engine_ms']:.2f} ms from the engine, "
        f"overhead {cost['overhead_ms']:.2f} ms (median of pairs)\n"
    )
    for name, kept in wanted.items():
        print(f"{'yes' if kept else 'NO '} {name}")
    for line in errors[:5]:
        print(line)
    print(
        json.dumps(
            {
                **load,
                **cost,
                "wanted": wanted,
                "seconds": args.seconds,
                "clients": args.clients,
                "threads": args.threads,
            }
        )
    )
    return 0 if all(wanted.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
