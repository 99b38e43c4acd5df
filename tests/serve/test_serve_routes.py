"""Tests of all other routes: embeddings, tokens, models, statistics, metrics, the page."""

import base64
import logging
import math
import struct

import pytest
import torch

from lamoe.serve.app import PAGE
from tiny_server import CONTEXT, NAME, Running, direct, model, tok, until

LONG = "def read(self): return None\n" * 3


@pytest.fixture(scope="module")
def server():
    with Running() as s:
        yield s.wait_ready()


@pytest.fixture(autouse=True)
def idle_afterwards(server):
    yield
    assert server.idle()


def test_embedding_is_the_mean_final_state(server):
    texts = ["the cat sat", LONG * 4]
    r = server.post("/v1/embeddings", input=texts, model=NAME).json()
    for text, got in zip(texts, r["data"]):
        ids = tok().encode(text, bos=True)
        with torch.no_grad():
            want = model().hidden(torch.tensor([ids]))[0].mean(0)
        assert torch.allclose(torch.tensor(got["embedding"]), want, atol=1e-5)
    coded = server.post("/v1/embeddings", input=texts[0], encoding_format="base64").json()
    data = base64.b64decode(coded["data"][0]["embedding"])
    decoded = list(struct.unpack(f"<{len(data) // 4}f", data))
    assert decoded == pytest.approx(r["data"][0]["embedding"])
    num_tokens = sum(len(tok().encode(t, bos=True)) for t in texts)
    assert r["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    assert server.error(400, "/v1/embeddings", input="a", dimensions=8)["code"] == "unsupported"


def test_tokenize_and_detokenize(server):
    r = server.post("/tokenize", prompt="the cat", return_token_strs=True).json()
    assert r["tokens"] == tok().encode("the cat", bos=True)
    assert r["count"] == len(r["tokens"])
    assert r["max_model_len"] == CONTEXT
    assert "".join(r["token_strs"][1:]) == "the cat"
    without_bos = server.post("/tokenize", prompt="the cat", add_special_tokens=False).json()
    assert without_bos["tokens"] == r["tokens"][1:]
    assert server.post("/detokenize", tokens=r["tokens"][1:]).json() == {"prompt": "the cat"}
    chat = [{"role": "user", "content": "hi"}]
    assert server.post("/tokenize", messages=chat).json()["tokens"] == tok().apply_chat(chat)
    assert server.error(400, "/tokenize")["param"] == "prompt"
    assert server.client.get("/tokenizer_info").json()["eos_token"] == "<｜end▁of▁sentence｜>"


def test_model_card_and_wrong_names(server):
    [card] = server.client.get("/v1/models").json()["data"]
    assert card["id"] == NAME and card["max_model_len"] == CONTEXT
    assert server.client.get(f"/v1/models/{NAME}").json() == card
    assert server.client.get("/v1/models/another/one").status_code == 404
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/embeddings", {"input": "a"}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [5]}),
    ):
        error = server.error(404, path, model="gpt", **body)
        assert error["code"] == "model_not_found" and repr(NAME) in error["message"]


def test_stats_during_and_after_a_request(server):
    assert server.idle()
    before = server.client.get("/lamoe/stats").json()
    with server.client.stream(
        "POST",
        "/v1/completions",
        json={"prompt": LONG, "max_tokens": 3000, "ignore_eos": True, "stream": True},
    ) as r:
        lines = r.iter_lines()
        next(lines)
        now = server.client.get("/lamoe/stats").json()
        assert now["running"] == 1
        assert now["cache"]["used_bytes"] > 0
        assert now["cache"]["used_tokens"] > len(tok().encode(LONG))
        cache = now["cache"]
        assert cache["used_bytes"] == cache["used_tokens"] * cache["bytes_per_token"]
    c = model().config
    bytes_per_value = 4  # the cache is fp32
    want = c.num_hidden_layers * bytes_per_value * sum(c.cache_row)
    assert now["cache"]["bytes_per_token"] == want
    heads = c.num_attention_heads
    assert now["cache"]["compare"] == {
        "mha": 2 * 2 * heads * c.v_head_dim * c.num_hidden_layers,
        "gqa": 2 * 2 * (heads // 2) * c.v_head_dim * c.num_hidden_layers,
        "mqa": 2 * 2 * c.v_head_dim * c.num_hidden_layers,
    }
    after = server.client.get("/lamoe/stats").json()
    assert after["generated_tokens"] > before["generated_tokens"] and after["tokens_per_s"] > 0
    assert set(after) == {
        "model",
        "dtype",
        "max_model_len",
        "cache",
        "running",
        "waiting",
        "tokens_per_s",
        "prompt_tokens",
        "cached_tokens",
        "generated_tokens",
        "drafted",
        "accepted",
    }


def test_expert_load_of_a_request(server):
    r = server.post(
        "/v1/completions", prompt=[9, 8, 7, 6, 5], max_tokens=4, ignore_eos=True, temperature=0
    )
    id, c = r.json()["id"], model().config
    assert id == r.headers["x-request-id"]
    got = server.client.get(f"/lamoe/requests/{id}/experts").json()
    assert got["layers"] == list(c.moe_layers) and got["experts"] == c.n_routed_experts
    want = direct([9, 8, 7, 6, 5], max_tokens=4, ignore_eos=True, temperature=0.0)
    assert got["load"] == want.experts.tolist()
    assert server.client.get("/lamoe/requests/cmpl-none/experts").status_code == 404


def test_metrics_count_a_request(server):
    server.complete(max_tokens=2)
    text = server.client.get("/metrics").text
    assert 'lamoe_requests_total{route="/v1/completions",status="200"}' in text
    for name in (
        "lamoe_running 0.0",
        "lamoe_cache_used_bytes 0.0",
        "lamoe_time_to_first_token_seconds_bucket",
        "lamoe_generated_tokens_total",
    ):
        assert name in text
    counter = "lamoe_generated_tokens_total "
    [line] = [line for line in text.splitlines() if line.startswith(counter)]
    generated = float(line.split()[1])
    assert math.isfinite(generated)
    assert generated == server.client.get("/lamoe/stats").json()["generated_tokens"]


def test_polled_routes_are_logged_at_debug(server, caplog):
    with caplog.at_level(logging.DEBUG, "lamoe.serve"):
        id = server.complete(max_tokens=1)["id"]
        polled = ["/health", "/metrics", "/lamoe/stats", f"/lamoe/requests/{id}/experts"]
        for path in [*polled, "/v1/models", "/lamoe/requests/cmpl-none/experts"]:
            server.client.get(path)

        def paths() -> list[str]:
            return [getattr(r, "fields", {}).get("path", "") for r in caplog.records]

        until(lambda: "/lamoe/requests/cmpl-none/experts" in paths())
    level = {r.fields["path"]: r.levelname for r in caplog.records if r.getMessage() == "request"}
    assert [level[p] for p in polled] == ["DEBUG"] * 4
    assert level["/v1/models"] == level["/v1/completions"] == "INFO"
    assert level["/lamoe/requests/cmpl-none/experts"] == "INFO"  # a polled route that failed


def test_page_files(server, tmp_path, monkeypatch):
    monkeypatch.setattr("lamoe.serve.app.PAGE", tmp_path)
    (tmp_path / "index.html").write_text("<!doctype html>hello")
    (tmp_path / "app.js").write_text("1")
    (tmp_path / "secret.pem").write_text("x")
    r = server.client.get("/")
    assert r.text == "<!doctype html>hello"
    assert r.headers["content-type"] == "text/html; charset=utf-8"
    policy = r.headers["content-security-policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "frame-ancestors 'none'" in policy
    r = server.client.get("/page/app.js")
    assert r.headers["content-type"] == "text/javascript; charset=utf-8"
    for path in (
        "/page/secret.pem",
        "/page/nothing.js",
        "/page/..%2f..%2fapp.py",
        "/page/%2e%2e/app.py",
        "/page/",
        "/page/.hidden.js",
        "/page/app.js%00.html",
    ):
        assert server.client.get(path).status_code == 404, path
    assert PAGE.name == "page"
