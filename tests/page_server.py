"""A fake server for the tests of the web page.

It implements the part of `lamoe serve` that the page uses. But it sends replies that a random model
would never generate (Markdown, hostile HTML), and it fails on demand. For manual tests, run
`python tests/page_server.py`.

The last word of the user's message selects the behaviour:

- "evil": a reply full of attacks.
- "long", "slow": long replies.
- "busy": 429 while `busy_left` lasts.
- "broken": a 400 error.
- "die": the connection breaks after 20 pieces.
- "cut", "full": the reply ends at the token limit, or at the end of the context.
- anything else: REPLY.
"""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "lamoe" / "serve" / "page"
CSP = (
    "default-src 'none'; script-src 'self'; worker-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; font-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".js": "text/javascript",
    ".txt": "text/plain",
}
WINDOW, LAYERS, EXPERTS = 4096, 5, 16
REPLY = """\
Attention keeps **one latent vector** per token instead of keys and values for every head. \
Three things follow:

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

> The released model keeps 576 numbers per token and layer. \
See [the paper](https://arxiv.org/abs/2405.04434).
"""
EVIL = """\
<img src=x onerror="window.pwned=1"><script>window.pwned=2</script>\
<iframe src="javascript:parent.pwned=3"></iframe>

<svg onload="window.pwned=4"><style>body{display:none}</style>\
<a href="javascript:window.pwned=5">a</a>

[click](javascript:window.pwned=6) [data](data:text/html,<script>window.pwned=7</script>) \
![i](https://example.com/x.png)

<form action="https://example.com"><input name=x autofocus onfocus="window.pwned=8"></form> \
<div style="position:fixed;inset:0" id="input">over</div>

```html"><script>window.pwned=9</script>
<b onclick="window.pwned=10">bold</b>
```

<math><mtext><table><mglyph><style><img src=x onerror=window.pwned=11></style></mglyph></table>\
</mtext></math>
"""
REPLIES = {
    "evil": EVIL,
    "long": "\n\n".join(f"Paragraph {i}: {'word ' * 40}" for i in range(30)),
    "slow": "word " * 4000,
    "full": "and so on " * 20,
}


class Server(ThreadingHTTPServer):
    """The server and its state, which tests change and read.

    Attributes:
        key: the API key that requests must have, or None.
        loading: answer 503.
        down: cut every connection.
        busy_left: number of "busy" messages that still get 429.
        delay: seconds between the pieces of a reply.
        bodies: the chat requests so far.
        dropped: number of streams that the client closed early.
    """

    daemon_threads = True
    # With the default of 5, a browser that opens many connections at once waits seconds to retry.
    request_queue_size = 128

    def __init__(self, port: int = 0, delay: float = 0.001):
        super().__init__(("127.0.0.1", port), Handler)
        self.key, self.loading, self.down, self.delay = None, False, False, delay
        self.bodies, self.dropped, self.busy_left = [], 0, 0
        # figures that /lamoe/stats reports
        self.running, self.used, self.speed = 0, 0, 0.0
        self.generated, self.prompted, self.cached = 0, 0, 0
        self.model = "deepseek-v2-tiny"

    def handle_error(self, request, client_address):
        if not isinstance(
            sys.exc_info()[1], ConnectionError
        ):  # a browser may disconnect at any time
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def stats(self) -> dict:
        """Build the response of /lamoe/stats."""
        return {
            "model": self.model,
            "dtype": "bfloat16",
            "max_model_len": WINDOW,
            "running": self.running,
            "waiting": 0,
            "tokens_per_s": self.speed if self.running else 0.0,
            "cache": {
                "format": "6bit",
                "used_bytes": self.used * 252,
                "total_bytes": 16384 * 252,
                "used_tokens": self.used,
                "total_tokens": 16384,
                "bytes_per_token": 252,
                "compare": {"mha": 4096, "gqa": 2048, "mqa": 1024},
            },
            "prompt_tokens": self.prompted,
            "cached_tokens": self.cached,
            "generated_tokens": self.generated,
            "drafted": 120,
            "accepted": 78,
        }

    def experts(self) -> dict:
        """Build the response of /lamoe/requests/{id}/experts, with an uneven load."""
        n = self.generated + 40

        def load(layer: int, expert: int) -> int:
            mixed = n * ((7 * expert * (layer + 3) + expert * expert) % 23)
            return mixed // (40 + 9 * (expert % 3))

        return {
            "layers": list(range(1, LAYERS + 1)),
            "experts": EXPERTS,
            "load": [[load(layer, e) for e in range(EXPERTS)] for layer in range(LAYERS)],
        }

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
        headers = {"content-type": content_type, "content-length": str(len(data)), **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, message: str, **headers):
        error = {
            "message": message,
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        }
        self.answer(status, {"error": error}, **headers)

    def check_access(self) -> bool:
        """Send an error response if the state demands one.

        Return whether the request may continue.
        """
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
        elif not self.check_access():
            return
        elif path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": s.model, "object": "model"}]})
        elif path == "/lamoe/stats":
            self.answer(200, s.stats())
        elif path.startswith("/lamoe/requests/"):
            self.answer(200, s.experts())
        else:
            self.refuse(404, "no such route")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self.check_access():
            return
        if self.path == "/tokenize":
            n = sum(len(m["content"]) for m in body["messages"]) // 4
            return self.answer(200, {"tokens": [0] * n, "count": n, "max_model_len": WINDOW})
        self.server.bodies.append(body)
        message = body["messages"][-1]["content"]
        word = message.split()[-1]
        if word == "busy" and self.server.busy_left:
            self.server.busy_left -= 1
            return self.refuse(429, "the queue is full: 64 requests wait", retry_after="1")
        if word == "broken":
            return self.refuse(400, "temperature is 9; it must be between 0 and 2")
        self.stream(message, word)

    def stream(self, message: str, word: str):
        """Stream the reply that `word` selects, and update the statistics meanwhile."""
        s = self.server
        text = REPLIES.get(word, REPLY)
        prompt = len(message) // 4 + 20  # tokens
        s.running, s.used, s.speed = s.running + 1, prompt, 1 / (s.delay + 0.001)
        s.prompted, s.cached = s.prompted + prompt, s.cached + 16
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("x-request-id", f"chatcmpl-{len(s.bodies)}")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        n = 0
        try:
            self.send_delta({"role": "assistant", "content": ""})
            for start in range(0, len(text), 5):
                if s.down or (word == "die" and n == 20):
                    return
                time.sleep(s.delay)
                self.send_delta({"content": text[start : start + 5]})
                n, s.used, s.generated = n + 1, s.used + 1, s.generated + 1
            self.send_delta({}, "length" if word in ("cut", "full") else "stop")
            total = WINDOW if word == "full" else prompt + n
            usage = {
                "prompt_tokens": total - n,
                "completion_tokens": n,
                "total_tokens": total,
                "prompt_tokens_details": {"cached_tokens": 16},
            }
            self.send_event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            s.dropped += 1
        finally:
            s.running -= 1
            s.used = 0

    def send_delta(self, delta: dict, finish_reason: str | None = None):
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        self.send_event({"choices": [choice]})

    def send_event(self, chunk: dict):
        data = json.dumps({"object": "chat.completion.chunk", **chunk})
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()


if __name__ == "__main__":
    server = Server(int(sys.argv[1]) if len(sys.argv) > 1 else 8765, delay=0.02)
    print(server.url)
    server.serve_forever()
