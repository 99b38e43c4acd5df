"""A server that speaks what the page needs of `lamoe serve`, with replies a random model would never give: Markdown, hostile HTML, a connection
that breaks, a full queue. test_page.py uses it beside the real server. `python tests/page_server.py` serves it for a look by hand.

The last word of the user decides: "evil", "long", "slow", "busy", "die", "cut", "full", "broken"; anything else gets REPLY.
"""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "lamoe" / "serve" / "page"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; font-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css",
    ".js": "text/javascript",
    ".txt": "text/plain",
}
WINDOW, LAYERS, EXPERTS = 4096, 5, 16
REPLY = """Attention keeps **one latent vector** per token instead of keys and values for every head. Three things follow:

1. The cache shrinks, here to `640` bytes a token.
2. A step reads less memory, so it is *faster*.
3. Keys and values are made again from the latent, or never made at all.

```python
def absorb(q, w_uk, latent):
    \"\"\"Scores without making a single key.\"\"\"
    return (q @ w_uk.T) @ latent.T  # [H, C] x [C, S]
```

| attention | bytes a token | times ours |
|---|---:|---:|
| MHA | 4,096 | 6.4 |
| MQA | 1,024 | 1.6 |
| this model | 640 | 1.0 |

> The released model keeps 576 numbers per token and layer. See [the paper](https://arxiv.org/abs/2405.04434).
"""
EVIL = """<img src=x onerror="window.pwned=1"><script>window.pwned=2</script><iframe src="javascript:parent.pwned=3"></iframe>

<svg onload="window.pwned=4"><style>body{display:none}</style><a href="javascript:window.pwned=5">a</a>

[click](javascript:window.pwned=6) [data](data:text/html,<script>window.pwned=7</script>) ![i](https://example.com/x.png)

<form action="https://example.com"><input name=x autofocus onfocus="window.pwned=8"></form> <div style="position:fixed;inset:0" id="input">over</div>

```html"><script>window.pwned=9</script>
<b onclick="window.pwned=10">bold</b>
```

<math><mtext><table><mglyph><style><img src=x onerror=window.pwned=11></style></mglyph></table></mtext></math>
"""


class Server(ThreadingHTTPServer):
    """state: what tests change and read. key: str | None, loading: bool, down: bool (every connection is cut), bodies: the chats that came,
    dropped: how many streams the reader left, delay: seconds between pieces."""

    daemon_threads = True

    request_queue_size = 128  # the default of 5 drops connections of a browser in a hurry, which then waits seconds before it knocks again

    def __init__(self, port: int = 0, delay: float = 0.001):
        super().__init__(("127.0.0.1", port), Handler)
        (
            self.key,
            self.loading,
            self.down,
            self.bodies,
            self.dropped,
            self.delay,
            self.running,
            self.busy_left,
        ) = None, False, False, [], 0, delay, 0, 0
        self.used, self.generated, self.prompted, self.cached, self.speed = 0, 0, 0, 0, 0.0
        self.model = "deepseek-v2-tiny"

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # browsers hang up when they like
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def begin(self) -> "Server":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        if self.server.down:
            self.close_connection = True
            return
        super().handle_one_request()

    def answer(self, status: int, body, content_type: str = "application/json", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "content-type": content_type,
            "content-length": str(len(data)),
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, message: str, **headers):
        self.answer(
            status,
            {
                "error": {
                    "message": message,
                    "type": "invalid_request_error",
                    "param": None,
                    "code": None,
                }
            },
            **headers,
        )

    def allowed(self) -> bool:
        s = self.server
        if s.down:
            self.close_connection = True
            return False
        if s.key and self.headers.get("authorization") != f"Bearer {s.key}":
            self.refuse(401, "the API key is missing or wrong")
        elif s.loading:
            self.refuse(503, "the model is loading", retry_after="1")
        else:
            return True
        return False

    def do_GET(self):
        s, path = self.server, self.path.split("?")[0]
        if s.down:
            self.close_connection = True
        elif path == "/" or path.startswith("/page/"):
            file = PAGE / (path.removeprefix("/page/") if path != "/" else "index.html")
            if file.parent != PAGE or not file.is_file():
                return self.refuse(404, "no such file")
            self.answer(200, file.read_bytes(), TYPES[file.suffix], content_security_policy=CSP)
        elif path == "/health":
            self.answer(503 if s.loading else 200, {"status": "loading" if s.loading else "ok"})
        elif not self.allowed():
            return
        elif path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": s.model, "object": "model"}]})
        elif path == "/lamoe/stats":
            self.answer(
                200,
                {
                    "model": s.model,
                    "dtype": "bfloat16",
                    "max_model_len": WINDOW,
                    "running": s.running,
                    "waiting": 0,
                    "tokens_per_s": s.speed if s.running else 0.0,
                    "cache": {
                        "format": "6bit",
                        "used_bytes": s.used * 252,
                        "total_bytes": 16384 * 252,
                        "used_tokens": s.used,
                        "total_tokens": 16384,
                        "bytes_per_token": 252,
                        "compare": {"mha": 4096, "gqa": 2048, "mqa": 1024},
                    },
                    "prompt_tokens": s.prompted,
                    "cached_tokens": s.cached,
                    "generated_tokens": s.generated,
                    "drafted": 120,
                    "accepted": 78,
                },
            )
        elif path.startswith("/lamoe/requests/"):
            n = s.generated + 40
            load = [
                [
                    (n * ((7 * e * (layer + 3) + e * e) % 23)) // (40 + 9 * (e % 3))
                    for e in range(EXPERTS)
                ]
                for layer in range(LAYERS)
            ]
            self.answer(
                200, {"layers": list(range(1, LAYERS + 1)), "experts": EXPERTS, "load": load}
            )
        else:
            self.refuse(404, "no such route")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self.allowed():
            return
        if self.path == "/tokenize":
            n = sum(len(m["content"]) for m in body["messages"]) // 4
            return self.answer(200, {"tokens": [0] * n, "count": n, "max_model_len": WINDOW})
        self.server.bodies.append(body)
        said = body["messages"][-1]["content"]
        word = said.split()[-1]
        if word == "busy" and self.server.busy_left:
            self.server.busy_left -= 1
            return self.refuse(429, "the queue is full: 64 requests wait", retry_after="1")
        if word == "broken":
            return self.refuse(400, "temperature is 9; it must be between 0 and 2")
        self.stream(said, word)

    def stream(self, said: str, word: str):
        s = self.server
        text = {
            "evil": EVIL,
            "long": "\n\n".join(f"Paragraph {i}: {'word ' * 40}" for i in range(30)),
            "slow": "word " * 4000,
        }.get(word, REPLY)
        if word == "full":
            text = "and so on " * 20
        pieces = [text[i : i + 5] for i in range(0, len(text), 5)]
        prompt = len(said) // 4 + 20
        s.running, s.used, s.speed = s.running + 1, prompt, 1 / (s.delay + 0.001)
        s.prompted, s.cached = s.prompted + prompt, s.cached + 16
        self.send_response(200)
        for name, value in {
            "content-type": "text/event-stream",
            "x-request-id": f"chatcmpl-{len(s.bodies)}",
            "connection": "close",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        n = 0
        try:
            self.event(
                {
                    "choices": [
                        {
                            "index": 0,
                            "delta": {"role": "assistant", "content": ""},
                            "finish_reason": None,
                        }
                    ]
                }
            )
            for piece in pieces:
                if s.down or (word == "die" and n == 20):
                    return
                time.sleep(s.delay)
                self.event(
                    {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
                )
                n, s.used, s.generated = n + 1, s.used + 1, s.generated + 1
            self.event(
                {
                    "choices": [
                        {
                            "index": 0,
                            "delta": {},
                            "finish_reason": "length" if word in ("cut", "full") else "stop",
                        }
                    ]
                }
            )
            total = WINDOW if word == "full" else prompt + n
            self.event(
                {
                    "choices": [],
                    "usage": {
                        "prompt_tokens": total - n,
                        "completion_tokens": n,
                        "total_tokens": total,
                        "prompt_tokens_details": {"cached_tokens": 16},
                    },
                }
            )
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            s.dropped += 1
        finally:
            s.running -= 1
            s.used = 0

    def event(self, chunk: dict):
        self.wfile.write(
            f"data: {json.dumps({'object': 'chat.completion.chunk', **chunk})}\n\n".encode()
        )
        self.wfile.flush()


if __name__ == "__main__":
    server = Server(int(sys.argv[1]) if len(sys.argv) > 1 else 8765, delay=0.02)
    print(server.url)
    server.serve_forever()
