"""A real server over a tiny random model, in a thread of the test, and clients for it."""

import asyncio
import contextlib
import functools
import json
import socket
import threading
import time

import httpx2
import torch

from lamoe.engine.llm import LLM
from lamoe.engine.sampler import SamplingParams
from lamoe.serve.run import Serving
from lamoe.serve.settings import Settings
from lamoe.text import tokenizer
from oracles import tiny

CONTEXT = 4096
NAME = "tiny"
WORDS = (
    "the cat sat on a mat and the dog ran to the hill while one bird sang of rain in spring "
    "0123456789 def read(self): return None\n"
)
# a short template with the same tool format as DeepSeek's chat templates
TOOL_TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ m['role'] + ': ' }}{{ m['content'] or '' }}"
    "{% for c in m.get('tool_calls') or [] %}"
    "{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>' + c['function']['name']"
    " + '\\n```json\\n' + c['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' }}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TOOL_TOKENS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)


@functools.cache
def tok(tools: bool = False, fim: bool = True) -> tokenizer.Tokenizer:
    special = (*tokenizer.SPECIAL_TOKENS[: 5 if fim else 2], *(TOOL_TOKENS if tools else ()))
    t = tokenizer.train([WORDS * 3], 300, special)
    if tools:
        t.chat_template = TOOL_TEMPLATE
    return t


@functools.cache
def model(family: str = "deepseek_v2"):
    return tiny.model(
        tiny.config(family, vocab_size=300, max_position_embeddings=CONTEXT), dtype=torch.float32
    )


def llm(family: str = "deepseek_v2", tok=tok, **options) -> LLM:
    options = {
        "cache": "fp32",
        "page_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "count_experts": True,
        **options,
    }
    return LLM(model(family), tok() if callable(tok) else tok, **options)


def direct(prompt="the cat", **params):
    """Return the output of a fresh engine, without a server."""
    [output] = llm().generate([prompt], SamplingParams(**params))
    return output


def paced(**options) -> LLM:
    """Make an engine whose steps take at least a millisecond.

    So tests that act during generation have enough time for it on any machine.
    """
    engine = llm(**options)
    step = engine.step
    engine.step = lambda: time.sleep(0.001) or step()
    return engine


class Running:
    """A running server: `with Running(load, **settings) as server: ...`.

    Attributes:
        url: the address of the server.
        service: the server's `Service`.
        client: an httpx2 client for the address.
        code: the exit code, once the server has ended.
    """

    def __init__(self, load=llm, **settings):
        settings = {"port": 0, "max_num_seqs": 8, "max_num_batched_tokens": 128, **settings}
        self.serving = Serving(load, NAME, Settings(**settings))
        self.service, self.url, self.code = self.serving.service, self.serving.url, None
        self.client = httpx2.Client(base_url=self.url, timeout=60)

    def __enter__(self):
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self):
        self.code = asyncio.run(self.serving.run())

    def wait_ready(self):
        until(lambda: self.client.get("/health").status_code == 200)
        return self

    def signal(self):
        self.serving.loop.call_soon_threadsafe(self.serving.signal)

    def stop(self) -> int:
        """Stop the server and return its exit code. Requests are cut off after a second."""
        if self._thread.is_alive():
            self.signal()
            self._thread.join(1)
            while self._thread.is_alive():
                with contextlib.suppress(RuntimeError):
                    self.signal()
                self._thread.join(0.5)
        return self.code

    def __exit__(self, *_):
        self.client.close()
        self.stop()

    def new_client(self):
        """Make another client, for use while `client` reads a stream."""
        return httpx2.Client(base_url=self.url, timeout=60)

    # ---- requests --------------------------------------------------------------------------------
    def post(self, path: str, **body):
        return self.client.post(path, json=body)

    def complete(self, prompt="the cat", **body) -> dict:
        r = self.post("/v1/completions", prompt=prompt, **body)
        assert r.status_code == 200, r.text
        return r.json()

    def chat(self, text="hello", **body) -> dict:
        r = self.post(
            "/v1/chat/completions",
            messages=[{"role": "user", "content": text}] if isinstance(text, str) else text,
            **body,
        )
        assert r.status_code == 200, r.text
        return r.json()

    def events(self, path: str, **body) -> list[dict]:
        """Return the objects of a stream, which must end with [DONE]."""
        with self.client.stream("POST", path, json=body | {"stream": True}) as r:
            assert r.status_code == 200, r.read()
            assert r.headers["content-type"].startswith("text/event-stream")
            data = [line[6:] for line in r.iter_lines() if line.startswith("data: ")]
        assert data[-1] == "[DONE]"
        return [json.loads(d) for d in data[:-1]]

    def error(self, status: int, path: str = "/v1/completions", **body) -> dict:
        """Return the error object of a request that must fail with `status`."""
        r = self.post(path, **body)
        assert r.status_code == status, r.text
        assert set(r.json()) == {"error"}
        assert set(r.json()["error"]) == {"message", "type", "param", "code"}
        return r.json()["error"]

    def idle(self) -> bool:
        """Check that no request runs or waits, and that no cache page is in use."""
        s = self.client.get("/lamoe/stats").json()
        return (
            not s["running"]
            and not s["waiting"]
            and not s["cache"]["used_bytes"]
            and not self.service.jobs
            and not self.service.admitted
            and not self.service.requests
        )


def until(condition, seconds: float = 20.0):
    """Wait until `condition()` is true. Fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.005)


def connect(url: str, timeout: float = 30.0) -> socket.socket:
    """Open a plain connection to a server."""
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=timeout)


def post_head(length: int, path: str = "/v1/completions") -> bytes:
    """Write the head of a POST request with a JSON body of `length` bytes."""
    lines = (
        f"POST {path} HTTP/1.1",
        "host: 127.0.0.1",
        "content-type: application/json",
        f"content-length: {length}",
    )
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


class Client(threading.Thread):
    """Sends one request over its own connection and collects what comes back."""

    def __init__(self, server, path="/v1/completions", **body):
        super().__init__(daemon=True)
        self.sock = connect(server.url)
        data = json.dumps(body).encode()
        self.sock.sendall(post_head(len(data), path) + data)
        self.received = b""
        self.start()

    def run(self):
        with contextlib.suppress(OSError):  # the connection was closed
            while data := self.sock.recv(65536):
                self.received += data

    def leave(self):
        """Close the connection, whatever state the request is in."""
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        self.join(5)

    @property
    def status(self) -> int:
        """Return the status of the response, or 0 before it has begun."""
        return int(self.received.split()[1]) if self.received else 0
