"""Tests of HTTP itself: methods, paths, origins of pages, encodings of bodies, and their limits."""

import gzip
import json
import random
import zlib

import pytest

from lamoe.serve import bodies, wire
from lamoe.serve.errors import ApiError
from lamoe.serve.settings import Settings
from tiny_server import CONTEXT, NAME, Running, llm, paced, until

ORIGIN = "http://localhost:3000"
BODY = {"prompt": "the cat", "max_tokens": 1}


@pytest.fixture(scope="module")
def server():
    with Running(paced, max_body_bytes=200_000) as s:
        yield s.wait_ready()


@pytest.fixture(autouse=True)
def idle_afterwards(server):
    yield
    until(lambda: server.idle() and not server.serving._app.held_bytes)


# ---- methods -------------------------------------------------------------------------------------
def test_head_answers_as_get_without_a_body(server):
    for path in (
        "/health",
        "/",
        "/page/app.js",
        "/v1/models",
        f"/v1/models/{NAME}",
        "/openapi.json",
        "/tokenizer_info",
        "/v1/models/",
        "/nothing",
        "/v1/models/another",
    ):
        get, head = server.client.get(path), server.client.head(path)
        assert head.status_code == get.status_code and head.content == b"", path
        for name in ("content-type", "content-length", "content-security-policy"):
            assert head.headers.get(name) == get.headers.get(name), (path, name)
    for path in ("/metrics", "/lamoe/stats"):  # their lengths change
        assert server.client.head(path).status_code == 200
    refused = server.client.head("/v1/completions")
    assert refused.status_code == 405 and refused.headers["allow"] == "POST"


def test_wrong_method_is_named_before_the_body_is_checked(server):
    for method, path, allow in (
        ("PUT", "/v1/completions", "POST"),
        ("PATCH", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("PUT", "/page/app.js", "GET, HEAD"),
        ("OPTIONS", "/v1/models", "GET, HEAD"),
        ("BREW", "/", "GET, HEAD"),
        ("PUT", "/openapi.json", "GET, HEAD"),
    ):
        r = server.client.request(method, path, content=b"x")
        assert r.status_code == 405, (method, path, r.text)
        assert r.headers["allow"] == allow and allow in r.json()["error"]["message"]


# ---- paths ---------------------------------------------------------------------------------------
def test_trailing_and_double_slashes_answer_as_without(server):
    for path in ("/v1/models", "/health", f"/v1/models/{NAME}", "/openapi.json", "/page/app.js"):
        want = server.client.get(path)
        for other in (path + "/", path + "///", "//" + path[1:], path.replace("/v1/", "/v1//")):
            r = server.client.get(f"{server.url}{other}", follow_redirects=False)
            assert (r.status_code, r.content) == (want.status_code, want.content), other
    for path in ("/v1/completions/", "/v1//completions"):
        r = server.client.post(path, json=BODY, headers={"host": "localhost"})
        assert r.status_code == 200 and r.json()["id"].startswith("cmpl-")


@pytest.mark.parametrize(
    "path, says",
    [
        ("/models", "send to /v1/models"),
        ("/models/x", "send to /v1/models/x"),
        ("/v1/responses", "Responses API is not supported; use /v1/chat/completions"),
        ("/api/chat", "Ollama's API is not supported"),
        ("/chat/completions", "under /v1, send to /v1/chat/completions"),
        ("/chat/completions/", "send to /v1/chat/completions"),
        ("/completions", "send to /v1/completions"),
        ("/embeddings", "send to /v1/embeddings"),
        ("/api/v1/chat/completions", "send to /v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1 twice, send to /v1/chat/completions"),
        ("/v1/v1/models", "/v1 twice"),
        ("/v1/chat/completions/chat/completions", "must end with /v1, without /chat/completions"),
        ("/v1/chat/completion", "did you mean /v1/chat/completions"),
        ("/v1/nothing/of/the/kind", "/openapi.json"),
    ],
)
def test_unknown_paths_get_a_hint(server, path, says):
    for r in (server.client.get(path), server.client.post(path, json=BODY)):
        assert r.status_code == 404 and r.json()["error"]["code"] == "not_found"
        assert says in r.json()["error"]["message"]


# ---- pages of other origins ----------------------------------------------------------------------
def preflight(server, origin, path="/v1/chat/completions", **headers):
    asked = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,authorization,x-stainless-os",
    }
    return server.client.options(path, headers=asked | headers)


def test_allowed_origins():
    key = {"authorization": "Bearer k"}
    with Running(api_key="k", allowed_origins=f"{ORIGIN}/, app://obsidian.md") as server:
        server.wait_ready()
        for origin in (ORIGIN, "app://obsidian.md"):
            r = preflight(server, origin)  # without the key, as browsers send it
            assert r.status_code == 204 and r.content == b""
            assert r.headers["access-control-allow-origin"] == origin
            assert "POST" in r.headers["access-control-allow-methods"]
            allowed = r.headers["access-control-allow-headers"]
            assert {"authorization", "content-type", "x-stainless-os"} <= set(allowed.split(","))
            assert "access-control-allow-credentials" not in r.headers
        private = {"access-control-request-private-network": "true"}
        r = preflight(server, ORIGIN, **private)
        assert r.headers["access-control-allow-private-network"] == "true"
        # answers, errors of routes and errors of the guard can all be read by the page
        for r in (
            server.client.get("/v1/models", headers={"origin": ORIGIN} | key),
            server.client.post("/v1/completions", json={}, headers={"origin": ORIGIN} | key),
            server.client.get("/v1/models", headers={"origin": ORIGIN}),
            server.client.get("/nothing", headers={"origin": ORIGIN} | key),
        ):
            assert r.headers["access-control-allow-origin"] == ORIGIN, r.status_code
            assert "x-request-id" in r.headers["access-control-expose-headers"]
            assert r.headers["vary"] == "Origin"
        body = BODY | {"stream": True}
        r = server.client.post("/v1/completions", json=body, headers={"origin": ORIGIN} | key)
        assert r.status_code == 200 and r.headers["access-control-allow-origin"] == ORIGIN
        for origin in ("http://localhost:3001", "https://localhost:3000", ORIGIN + ".evil", "null"):
            r = preflight(server, origin)
            assert r.status_code == 403 and r.json()["error"]["code"] == "origin_not_allowed"
            assert "--allowed-origins" in r.json()["error"]["message"]
            r = server.client.get("/v1/models", headers={"origin": origin} | key)
            assert "access-control-allow-origin" not in r.headers and r.headers["vary"] == "Origin"
        # OPTIONS that is no preflight still needs the key
        assert server.client.options("/v1/models").status_code == 401


def test_no_origin_is_allowed_by_default(server):
    r = preflight(server, ORIGIN)
    assert r.status_code == 403 and "access-control-allow-origin" not in r.headers
    r = server.client.get("/v1/models", headers={"origin": ORIGIN})
    assert r.status_code == 200 and "vary" not in r.headers


def test_settings_of_origins(tmp_path):
    with pytest.raises(ValueError, match="--allowed-origins \\*"):
        Settings(allowed_origins="*")
    assert Settings(allowed_origins="*", api_key="k").origins() == {b"*"}
    for wrong in ("localhost:3000", "http://a/path", "null", "https://", "http://a b"):
        with pytest.raises(ValueError, match="is not an origin"):
            Settings(allowed_origins=wrong)
    with Running(api_key="k", allowed_origins="*") as server:
        assert preflight(server, "https://any.example").status_code == 204


# ---- encodings of bodies -------------------------------------------------------------------------
def send(server, data: bytes, path="/v1/completions", **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.client.post(path, content=data, headers={"content-type": JSON} | named)


JSON = "application/json"
RAW = json.dumps(BODY).encode()


def test_compressed_bodies(server):
    bare = zlib.compressobj(wbits=-15)
    for encoding, data in (
        ("gzip", gzip.compress(RAW)),
        ("GZIP", gzip.compress(RAW)),
        ("x-gzip", gzip.compress(RAW)),
        ("deflate", zlib.compress(RAW)),
        ("deflate", bare.compress(RAW) + bare.flush()),
        ("identity", RAW),
        ("", RAW),
    ):
        assert send(server, data, content_encoding=encoding).status_code == 200, encoding
    large = gzip.compress(json.dumps(BODY | {"prompt": "a " * 2000}).encode())
    r = server.client.post(
        "/v1/completions",
        content=iter([large[:9], large[9:20], large[20:]]),  # chunked
        headers={"content-type": JSON, "content-encoding": "gzip"},
    )
    assert r.status_code == 200
    for encoding in ("br", "zstd", "gzip, gzip", "gzip, br", "nonsense"):
        r = send(server, RAW, content_encoding=encoding)
        assert r.status_code == 415 and "Content-Encoding" in r.json()["error"]["message"]
        assert r.headers["accept-encoding"] == "gzip, deflate"
    for data in (RAW, gzip.compress(RAW)[:-9], gzip.compress(RAW) + b"x", b""):
        r = send(server, data, content_encoding="gzip")
        assert r.status_code == 400 and "gzip" in r.json()["error"]["message"], data
    assert "gzip" in send(server, gzip.compress(RAW)).json()["error"]["message"]


def test_bomb_of_zeros_is_refused_at_the_limit(server):
    bomb = gzip.compress(b" " * 50_000_000)
    assert len(bomb) < 100_000
    r = send(server, bomb, content_encoding="gzip")
    assert r.status_code == 413 and r.json()["error"]["code"] == "body_too_large"


def test_other_encodings_of_text_are_named(server):
    text = json.dumps(BODY | {"prompt": "é"}, ensure_ascii=False)
    assert send(server, b"\xef\xbb\xbf" + text.encode()).status_code == 200
    for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
        r = send(server, text.encode(name))
        assert r.status_code == 400 and name[:6].upper() in r.json()["error"]["message"], name
    assert send(server, text.encode("latin-1")).status_code == 400
    for kind in (
        "application/json; charset=utf-8",
        "application/json;charset=UTF8",
        'Application/JSON; charset="utf-8"',
        "application/vnd.api+json",
        "application/json; version=1",
    ):
        assert send(server, RAW, content_type=kind).status_code == 200, kind
    for kind, says in (
        ("application/json; charset=utf-16", "utf-16"),
        ("application/json; charset=latin-1", "latin-1"),
        ("text/plain", "'text/plain'"),
        ("application/x-www-form-urlencoded", "x-www-form-urlencoded"),
        ("", "application/json"),
    ):
        r = send(server, RAW, content_type=kind)
        assert r.status_code == 415 and says in r.json()["error"]["message"], kind
    r = server.client.post("/v1/completions", content=RAW)
    assert r.status_code == 415 and "found none" in r.json()["error"]["message"]
    twice = [("content-type", JSON), ("content-type", "text/plain")]
    r = server.client.post("/v1/completions", content=RAW, headers=twice)
    assert r.status_code == 415 and "2 Content-Type headers" in r.json()["error"]["message"]


# ---- size of the JSON ----------------------------------------------------------------------------
def refused(data: bytes) -> str:
    with pytest.raises(ApiError) as e:
        bodies.parse(data, wire.CompletionRequest)
    return e.value.detail


def test_elements_are_counted_before_they_are_parsed(monkeypatch):
    monkeypatch.setattr(bodies, "from_json", lambda *args, **options: pytest.fail("parsed"))
    for data, what in (
        (b"[" + b"[1]," * (bodies.MAX_CONTAINERS + 1) + b"1]", "lists and objects"),
        (b"[" * (bodies.MAX_CONTAINERS + 1), "lists and objects"),
        (b"[" + b"{}," * (bodies.MAX_CONTAINERS + 1), "lists and objects"),
        (b'{"prompt": [' + b"1," * (bodies.MAX_ELEMENTS + 1) + b"1]}", "elements"),
        (b"{" + b'"a":1,' * (bodies.MAX_ALL_KEYS + 1), "keys"),
        (b'["\\\\",' + b'"",' * (bodies.MAX_ELEMENTS + 1), "elements"),
    ):
        assert what in refused(data)


def test_characters_in_texts_are_not_counted():
    rng = random.Random(1)
    parts = ["[{,", '"', "\\", "a", "\n", "é"]
    text = "".join(rng.choices(parts, k=3 * bodies.MAX_CONTAINERS))
    assert text.count("[") > bodies.MAX_CONTAINERS / 3
    data = json.dumps({"prompt": text * 4}).encode()
    assert bodies.parse(data, wire.CompletionRequest).prompt == text * 4
    commas = "," * (bodies.MAX_ELEMENTS + 1)
    data = json.dumps({"prompt": commas}).encode()
    assert bodies.parse(data, wire.CompletionRequest).prompt == commas
    # an open string, and quotes only
    assert "not valid JSON" in refused(b'{"prompt": "' + b'[\\"' * 100_000)
    assert "not valid JSON" in refused(b"[" * 60 + b'"' * 100_001 + b"{" * 70_000)


# ---- text ----------------------------------------------------------------------------------------
def test_sum_of_all_texts_decides():
    long = "x y" * (CONTEXT * 2)
    with Running(lambda: llm(max_model_len=256)) as server:
        server.wait_ready()
        limit = server.service.max_text_bytes
        part = {"role": "user", "content": "a" * (limit // 50)}
        schema = {
            "type": "object",
            "properties": {f"k{i}": {"title": "t" * 500} for i in range(99)},
        }
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        calls = {"id": "1", "function": {"name": "f", "arguments": json.dumps({"a": long})}}
        for path, body in (
            ("/v1/completions", {"prompt": ["a", "b" * (limit + 1)]}),
            ("/v1/completions", {"prompt": "a", "suffix": "b" * (limit + 1)}),
            ("/v1/embeddings", {"input": "b" * (limit + 1)}),
            ("/v1/chat/completions", {"messages": [part] * 60}),
            ("/tokenize", {"messages": [part] * 60}),
            ("/tokenize", {"messages": [part], "tools": [tool] * 9}),
            (
                "/tokenize",
                {"messages": [part, {"role": "assistant", "tool_calls": [calls] * 9}]},
            ),
            ("/tokenize", {"prompt": "b" * (limit + 1)}),
            ("/detokenize", {"tokens": [5] * 257}),
        ):
            error = server.error(400, path, **body)
            assert error["code"] == "context_length_exceeded", (path, error)


def test_long_text_is_counted_in_pieces_and_refused_early(monkeypatch):
    with Running(lambda: llm(max_model_len=256)) as server:
        server.wait_ready()
        server.service.max_text_bytes = 8 << 20
        tokenizer = server.service.tokenizer
        encode_batch, lengths = tokenizer.encode_batch, []

        def record(texts, **options):
            lengths.extend(map(len, texts))
            return encode_batch(texts, **options)

        monkeypatch.setattr(tokenizer, "encode_batch", record)
        text = "xyz" * 100_000
        for path, body in (
            ("/tokenize", {"prompt": text}),
            ("/tokenize", {"messages": [{"role": "user", "content": text}]}),
            ("/v1/completions", {"prompt": ["a", text]}),
            ("/v1/embeddings", {"input": text}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ):
            lengths.clear()
            error = server.error(400, path, **body)
            assert (
                error["code"] == "context_length_exceeded" and "more than 512" in error["message"]
            )
            assert sum(lengths) < len(text) / 10
        # a long text of few tokens is tokenized as a whole, and exactly
        words = " " * 40_000 + "the cat"
        monkeypatch.undo()
        ids = tokenizer.encode(words, bos=True)
        server.service.max_model_len = len(ids)
        assert server.post("/tokenize", prompt=words).json()["tokens"] == ids


def test_text_work_has_a_bounded_queue(monkeypatch):
    import threading

    go = threading.Event()
    with Running(max_queued_requests=1) as server:
        server.wait_ready()
        tokenizer = server.service.tokenizer
        monkeypatch.setattr(tokenizer, "decode", lambda *args, **options: go.wait(20) and "text")

        def ask():
            with server.new_client() as client:
                statuses.append(client.post("/detokenize", json={"tokens": [5]}).status_code)

        statuses: list[int] = []
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: server.service.text_work.pending == 3)
        assert server.client.get("/health").status_code == 200
        for path, body in (
            ("/detokenize", {"tokens": [5]}),
            ("/tokenize", {"prompt": "a"}),
            ("/v1/completions", BODY),
            ("/v1/embeddings", {"input": "a"}),
        ):
            r = server.post(path, **body)
            assert r.status_code == 429 and r.headers["retry-after"] and "texts" in r.text
        go.set()
        for thread in threads:
            thread.join(20)
        assert statuses == [200] * 3
        until(lambda: server.service.text_work.pending == 0)
        assert server.post("/tokenize", prompt="a").status_code == 200


def test_echoed_offsets_of_several_prompts_begin_at_zero(server):
    for max_tokens in (0, 1):
        r = server.complete(["the cat", "a dog"], echo=True, logprobs=1, max_tokens=max_tokens)
        for choice in r["choices"]:
            assert choice["logprobs"]["text_offset"][0] == 0
