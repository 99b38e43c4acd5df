"""A real server over a tiny random model, on a free port of loopback, in a thread of the test; and ways to talk to it."""

import asyncio
import contextlib
import functools
import json
import threading
import time

import httpx2
import torch

from lamoe.engine.llm import LLM
from lamoe.serve.run import Serving
from lamoe.serve.settings import Settings
from lamoe.text import tokenizer
from oracles import tiny

CONTEXT = 4096
NAME = "tiny"
WORDS = "the cat sat on a mat and the dog ran to the hill while one bird sang of rain in spring 0123456789 def read(self): return None\n"
# what DeepSeek's chat templates do with tools, in short
TOOL_TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m['role'] + ': ' }}{{ m['content'] or '' }}"
    "{% for c in m.get('tool_calls') or [] %}{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>' + c['function']['name'] + '\\n```json\\n' + "
    "c['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' }}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
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


def paced(**options) -> LLM:
    """One that takes at least a millisecond a step, so that a test about what happens meanwhile has a meanwhile on any machine."""
    engine = llm(**options)
    step = engine.step
    engine.step = lambda: time.sleep(0.001) or step()
    return engine


class Running:
    """`with Running(load, **settings) as server`: server.url, server.service, server.client (an httpx2 client on its URL)."""

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
        """Drain at most a second, then cut off."""
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

    def talk(self):
        """One more client, for while self.client is in a stream."""
        return httpx2.Client(base_url=self.url, timeout=60)

    # ---- talking -------------------------------------------------------------------------------------------------
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
        """The objects of a stream; it must end with [DONE]."""
        with self.client.stream("POST", path, json=body | {"stream": True}) as r:
            assert r.status_code == 200, r.read()
            assert r.headers["content-type"].startswith("text/event-stream")
            data = [line[6:] for line in r.iter_lines() if line.startswith("data: ")]
        assert data[-1] == "[DONE]"
        return [json.loads(d) for d in data[:-1]]

    def error(self, status: int, path: str = "/v1/completions", **body) -> dict:
        """The error object of a request that must fail so."""
        r = self.post(path, **body)
        assert r.status_code == status, r.text
        assert set(r.json()) == {"error"} and set(r.json()["error"]) == {
            "message",
            "type",
            "param",
            "code",
        }
        return r.json()["error"]

    def idle(self) -> bool:
        """Nothing runs, waits, is counted, or holds a page."""
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
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "never came true"
        time.sleep(0.005)
