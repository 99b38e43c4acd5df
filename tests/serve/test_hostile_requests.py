"""Tests of malformed and malicious requests: bytes on the wire, JSON, and field values.

No request may cause a 5xx status, stop the engine, or leave a cache page in use.
"""

import functools
import http.client
import json
import time

import pytest
import requests
import schemathesis.checks
import schemathesis.openapi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tiny_server import Running, connect, llm, until

CONTEXT = 64
KEY = "sk-hostile"
JSON = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def server():
    with Running(
        lambda: llm(max_model_len=CONTEXT), api_key=KEY, max_choices=8, body_timeout=2.0
    ) as s:
        s.client.headers["authorization"] = f"Bearer {KEY}"
        yield s.wait_ready()


@pytest.fixture(autouse=True)
def unharmed(server):
    """Check after each test that the engine answers as before and all cache pages are free."""
    want = answer(server)
    yield
    assert answer(server) == want
    until(server.idle, 2.0)


def answer(server) -> list:
    return server.complete(seed=1, max_tokens=5)["choices"]


# ---- bytes ---------------------------------------------------------------------------------------
def raw(server, data: bytes, more=(), wait=5.0) -> bytes:
    """Send bytes on a new connection. Return all bytes that arrive within `wait` seconds."""
    received = b""
    with connect(server.url, timeout=wait) as sock:
        try:
            for part in (data, *more):
                sock.sendall(part)
            while got := sock.recv(65536):
                received += got
                if b"\r\n\r\n" in received:
                    sock.settimeout(0.2)
        except (TimeoutError, ConnectionError):
            pass
    return received


HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    b"authorization: Bearer %s\r\ncontent-type: application/json\r\n" % KEY.encode()
)


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 100 + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nhost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 200,
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost : a\r\n\r\n",
        HEAD + b"content-length: 5\r\ncontent-length: 50\r\n\r\nhello",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"content-length: 1e3\r\n\r\n",
        HEAD + b"content-length: 99999999999999999999999\r\n\r\n",
        HEAD + b"transfer-encoding: gzip\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST " + b"/a" * 50_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\n"
        + b"".join(b"x%d: y\r\n" % i for i in range(20_000))
        + b"\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 900 + b"x: " + b"a" * 33_000 + b"\r\n\r\n",
        b"CONNECT evil:80 HTTP/1.1\r\nhost: evil:80\r\n\r\n",
        b"GET http://evil/ HTTP/1.1\r\nhost: evil\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET /%ff%fe%00 HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
        b"sec-websocket-key: x\r\nsec-websocket-version: 13\r\n\r\n",
    ],
    ids=lambda d: repr(d[:40]) + f" {len(d)}",
)
def test_invalid_http(server, data):
    got = raw(server, data)
    assert not got or 200 <= int(got.split(b" ")[1]) < 500, got[:200]


def test_large_body_is_refused_by_its_content_length(server):
    started = time.perf_counter()
    got = raw(server, HEAD + b"content-length: 104857600\r\n\r\n", more=[b"a" * 10_000])
    assert b" 413 " in got.split(b"\r\n")[0]
    assert b"body_too_large" in got
    assert time.perf_counter() - started < 2
    chunks = [b"100000\r\n" + b"a" * 0x100000 + b"\r\n"] * 12  # 12 MB without a Content-Length
    got = raw(server, HEAD + b"transfer-encoding: chunked\r\n\r\n", more=chunks)
    assert b" 413 " in got.split(b"\r\n")[0]


def test_client_that_sends_all_before_it_reads_gets_the_refusal(server):
    for _ in range(3):
        client = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
        client.request("POST", "/v1/completions", b" " * (12 << 20), JSON)
        assert client.getresponse().status == 413
        client.close()


def test_smuggled_request_needs_its_own_key(server):
    body = b'{"prompt": "a", "max_tokens": 1}'
    got = raw(
        server,
        HEAD
        + b"content-length: %d\r\n\r\n" % len(body)
        + body
        + b"GET /v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
    )
    heads = [line for line in got.split(b"\r\n") if line.startswith(b"HTTP/1.1")]
    assert [head.split(b" ")[1] for head in heads] in ([b"200", b"401"], [b"200"])
    both = raw(
        server,
        HEAD
        + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n" % len(body)
        + body
        + b"\r\n0\r\n\r\n",
    )
    assert int(both.split(b" ")[1]) < 500


# ---- JSON ----------------------------------------------------------------------------------------
def deep(n: int, open_: str, inner: str, close: str) -> str:
    return open_ * n + inner + close * n


BODIES = [
    "",
    "{",
    "nul",
    "[]",
    '"a"',
    "1",
    "null",
    "\ufeff{}",
    '{"prompt": "a"} x',
    "{'prompt': 'a'}",
    '{"prompt": "a",}',
    '{"prompt": NaN}',
    '{"prompt": "a", "temperature": NaN}',
    '{"prompt": "a", "temperature": Infinity}',
    '{"prompt": "a", "temperature": -Infinity}',
    '{"prompt": "a", "temperature": 1e999}',
    '{"prompt": "a", "top_p": 1e-400}',
    '{"prompt": "a", "n": 1000000000}',
    '{"prompt": "a", "n": -1}',
    '{"prompt": "a", "n": %s}' % ("9" * 4000),
    '{"prompt": "a", "seed": %s}' % ("9" * 400),
    '{"prompt": "a", "temperature": %s}' % ("9" * 400),
    '{"prompt": "a", "max_tokens": %d}' % 2**63,
    '{"prompt": "a", "n": 1.0}',
    '{"prompt": "a", "n": true}',
    '{"prompt": "\\ud800"}',
    '{"prompt": "\\udc00\\ud800"}',
    '{"prompt": "a", "stop": "\\ud83d"}',
    '{"prompt": "a", "user": "\\udfff"}',
    '{"\\ud800": 1}',
    '{"prompt": "a\\u0000b", "max_tokens": 1}',
    '{"prompt": "\\uffff\\ufffe\\ufdd0", "max_tokens": 1}',
    '{"prompt": "a", "prompt": [1]}',
    '{"prompt": [1, "a"]}',
    '{"prompt": [[1], "a"]}',
    '{"prompt": [[[1]]]}',
    '{"prompt": {"a": 1}}',
    '{"prompt": [1e30]}',
    '{"prompt": [%d]}' % 2**70,
    '{"prompt": [true]}',
    '{"prompt": [-1]}',
    '{"prompt": "a", "logit_bias": {"1e3": 1}}',
    '{"prompt": "a", "logit_bias": {"%s": 1}}' % ("1" * 5000),
    '{"prompt": "a", "logit_bias": [1]}',
    '{"prompt": "a", "stop": [%s]}' % ",".join(['"x"'] * 5000),
    '{"prompt": "a", "stop": "%s"}' % ("x" * 100_000),
    '{"prompt": "a", "model": "%s"}' % ("x" * 100_000),
    '{"prompt": %s}' % deep(100_000, "[", "1", "]"),
    deep(100_000, '{"a":', "1", "}"),
    '{"prompt": "a", "response_format": %s}' % deep(200, '{"a":', "1", "}"),
    '{"prompt": "a", %s}' % ",".join(f'"k{i}": 1' for i in range(200_000)),
    '{"prompt": "a", "logit_bias": {%s}}' % ",".join(f'"{i}": 1' for i in range(100_000)),
    '{"prompt": [%s]}' % ",".join(['"x"'] * 100_000),
    '{"prompt": [%s]}' % ",".join(["[]"] * 100_000),
    '{"prompt": [%s]}' % ",".join(["1"] * 1_000_000),
    '{"prompt": [%s]}' % ",".join(["null"] * 1_000_000),
    '{"prompt": "%s"}' % ("a " * 500_000),
    '{"prompt": "%s"}' % ("\\u4e2d" * 100_000),
]


@pytest.mark.parametrize(
    "body", BODIES, ids=lambda b: f"{b[:50]}... {len(b)}" if len(b) > 60 else b
)
def test_json_bodies(server, body):
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize"):
        field = {"/v1/chat/completions": '"messages"', "/v1/embeddings": '"input"'}.get(path)
        sent = body.replace('"prompt"', field) if field else body
        r = server.client.post(path, content=sent.encode("utf-8", "surrogatepass"), headers=JSON)
        assert r.status_code in (200, 400, 413, 415, 404), (path, r.status_code, r.text[:200])
        if r.status_code != 200:
            assert r.json()["error"]["message"] and len(r.text) < 3000


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfe{\x00}\x00",
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "\xff"}',
        b"\x1f\x8b\x08" + b"a" * 50,
        b"\x80\x04K\x01.",
    ],
)
def test_bodies_in_other_encodings(server, data):
    for headers in (JSON, JSON | {"content-encoding": "gzip"}):
        r = server.client.post("/v1/completions", content=data, headers=headers)
        assert r.status_code == 400


# ---- fields --------------------------------------------------------------------------------------
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["auto", "text", "json_object", "\x00", 2**64]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=8)
            | st.sampled_from(["type", "role", "content", "schema", "function", "name", "5"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
# path: (a valid body, fields to change)
TARGETS = {
    "/v1/completions": (
        {"prompt": "a", "max_tokens": 2},
        (
            "prompt model n seed stop stream stream_options temperature top_p top_k min_p "
            "logprobs presence_penalty frequency_penalty repetition_penalty logit_bias "
            "min_tokens ignore_eos response_format regex grammar suffix echo best_of"
        ).split(),
    ),
    "/v1/chat/completions": (
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
        (
            "messages tools tool_choice parallel_tool_calls logprobs top_logprobs "
            "max_completion_tokens response_format stop user"
        ).split(),
    ),
    "/v1/embeddings": ({"input": "a"}, ["input", "encoding_format", "user"]),
    "/tokenize": ({"prompt": "a"}, ["messages", "tools", "prompt", "add_special_tokens"]),
    "/detokenize": ({"tokens": [1]}, ["tokens"]),
}


@pytest.mark.parametrize("path", TARGETS)
def test_any_value_in_any_field(server, path):
    body, fields = TARGETS[path]

    @settings(max_examples=120, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(fields), VALUES, min_size=1, max_size=2))
    def check(changes):
        try:
            sent = json.dumps(body | changes).encode()
        except (ValueError, OverflowError):
            return
        r = server.client.post(path, content=sent, headers=JSON)
        assert r.status_code in (200, 400, 404), (r.status_code, r.text[:300], changes)

    check()


@pytest.mark.parametrize(
    "extra",
    [
        {"logit_bias": {str(i): -100 for i in range(300)}},
        {"temperature": 1e-300},
        {"temperature": 100, "top_p": 1e-300},
        {"min_p": 1},
        {"repetition_penalty": 1e-300},
        {"top_k": 1 << 31},
        {"min_tokens": 5, "max_tokens": 5, "logit_bias": {"1": 100}},
        {"stop": ["\x00", "\ufffd"]},
        {"logit_bias": {"1": 100}, "regex": "a", "min_tokens": 3, "max_tokens": 5},
        {"regex": "", "max_tokens": 3},
        {"seed": -(2**63), "n": 8},
    ],
)
def test_extreme_values(server, extra):
    r = server.post("/v1/completions", prompt="a", **extra)
    assert r.status_code in (200, 400), r.text


@pytest.mark.parametrize(
    "schema",
    [
        functools.reduce(lambda s, _: {"properties": {"a": s}}, range(25), {}),
        {"$ref": "#"},
        {"$ref": "http://127.0.0.1/x"},
        {"$ref": "file:///etc/passwd"},
        {"anyOf": [{"$ref": "#"}] * 200},
        {"pattern": "(a*)*" * 200 + "b"},
        {"type": "string", "maxLength": 10**9},
        {"type": "integer", "multipleOf": 999983},
        {"type": "array", "minItems": 10**9},
        {"enum": ["x" * 1000] * 60},
        {"properties": {f"k{i}": {} for i in range(600)}},
        {"format": "nonsense"},
        {"type": "nonsense"},
    ],
    ids=lambda s: json.dumps(s)[:60],
)
def test_expensive_schemas_are_fast_or_refused(server, schema):
    started = time.perf_counter()
    r = server.post(
        "/v1/completions",
        prompt="a",
        max_tokens=3,
        response_format={"type": "json_schema", "json_schema": {"schema": schema}},
    )
    assert r.status_code in (200, 400) and time.perf_counter() - started < 12, r.text


# ---- /openapi.json -------------------------------------------------------------------------------
schemathesis.checks.load_all_checks()
# schemathesis imports modules on first use. Do that here, before a server thread runs: CPython 3.11
# can fail if two threads compile at once.
list(
    schemathesis.openapi.from_dict(
        {
            "openapi": "3.1.0",
            "info": {"title": "", "version": ""},
            "paths": {"/": {"get": {"responses": {}}}},
        }
    ).get_all_operations()
)
CHECKS = [
    schemathesis.checks.CHECKS.get_one(n)
    for n in (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
        "unsupported_method",
        "allow_header_conformance",
    )
]
# Two checks are left out. ignored_auth: test_serve_security.py covers the key.
# positive_data_acceptance: a schema cannot express the model's name, context or vocabulary.


def operations(server):
    schema = schemathesis.openapi.from_dict(server.client.get("/openapi.json").json())
    return [o.ok() for o in schema.get_all_operations()]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_responses_conform_to_openapi_json(server, mode):
    tried = {}
    for operation in operations(server):
        if mode is GenerationMode.NEGATIVE and operation.method.upper() == "GET":
            continue  # GET requests have no body that could be invalid

        @settings(max_examples=25, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(mode))
        def check(case):
            r = case.call(
                base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, session=session
            )
            tried[operation.label] = tried.get(operation.label, 0) + 1
            case.validate_response(r, checks=CHECKS)

        with requests.Session() as session:
            check()
    assert len(tried) >= (12 if mode is GenerationMode.POSITIVE else 5)
    assert all(n > 1 or "GET" in label for label, n in tried.items())
