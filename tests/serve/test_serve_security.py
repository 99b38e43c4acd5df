"""Tests of the security of the server: API keys, Host header, content types, secrets in the log."""

import hmac
import json
import logging

import pytest

from lamoe.serve import guard
from lamoe.serve.app import router
from lamoe.serve.logs import JsonLines
from lamoe.serve.metrics import Metrics
from lamoe.serve.settings import Settings
from tiny_server import Running, paced, until

KEY, OTHER = "sk-0123456789abcdef", "sk-second"


# ---- keys ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"{KEY}\n\n{OTHER}\n")
    with Running(paced, api_key_file=str(file)) as server:
        yield server


def every_route() -> list[tuple[str, str]]:
    """List (method, path) of all routes, with values for the variables in the paths."""
    values = {"{model:path}": "x", "{id}": "x", "{name}": "app.js"}
    routes = [("GET", "/openapi.json")]
    for route in router.routes:
        path = route.path
        for variable, value in values.items():
            path = path.replace(variable, value)
        routes += [(method, path) for method in route.methods]
    return routes


def test_every_route_except_health_and_page_needs_the_key(locked):
    routes = every_route()
    assert len(routes) >= 15
    for method, path in [
        *routes,
        ("GET", "/nothing"),
        ("OPTIONS", "/v1/models"),
        ("POST", "/health"),
        ("POST", "/page/app.js"),
        ("GET", "/pages"),
        ("GET", "/v1/models/%2e%2e/%2e%2e/health"),
        ("GET", "/page"),
        ("GET", "/HEALTH"),
    ]:
        is_open = method == "GET" and (path in ("/health", "/") or path.startswith("/page/"))
        for headers in (
            {},
            {"authorization": "Bearer sk-wrong"},
            {"authorization": KEY},
            {"authorization": f"Basic {KEY}"},
            {"authorization": "Bearer"},
            {"authorization": f"Bearer {KEY[:-2]}"},
            {"authorization": f"Bearer {KEY}x"},
            {"authorization": "Bearer é".encode("latin-1")},
        ):
            r = locked.client.request(method, path, headers=headers)
            assert (r.status_code == 401) == (not is_open), (method, path, headers)
            if not is_open:
                assert r.headers["www-authenticate"] == "Bearer"
                assert r.json()["error"]["type"] == "authentication_error"
    for key in (KEY, OTHER):
        headers = {"authorization": f"bearer {key}"}
        until(lambda h=headers: locked.client.get("/v1/models", headers=h).status_code == 200)
    assert locked.client.get(f"/v1/models?api_key={KEY}").status_code == 401


def test_keys_are_compared_in_constant_time(locked, monkeypatch):
    """API keys are compared in constant time: every request compares the digests of both keys."""
    compare, compared = hmac.compare_digest, []

    def record(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return compare(a, b)

    monkeypatch.setattr(guard.hmac, "compare_digest", record)
    for key in ("x", "s", KEY, KEY[:-1], OTHER):
        compared.clear()
        locked.client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
        assert len(compared) == 2
        assert all(len(a) == len(b) == 32 for a, b in compared)


def test_no_log_line_holds_a_key_or_a_prompt(locked, caplog):
    with caplog.at_level(logging.DEBUG):
        for key in (KEY, OTHER, "sk-wrong-but-secret"):
            locked.client.post(
                f"/v1/completions?api_key={key}",
                json={"prompt": "a secret", "max_tokens": 1, "user": "ann"},
                headers={"authorization": f"Bearer {key}"},
            )
            locked.client.get(
                "/v1/models", headers={"authorization": f"Bearer {key}", "cookie": key}
            )

        def logged() -> int:
            fields = [getattr(r, "fields", {}) for r in caplog.records]
            return sum(f.get("path") == "/v1/models" for f in fields)

        until(lambda: logged() >= 3)
    client_loggers = ("httpx2", "httpcore2")
    records = [r for r in caplog.records if not r.name.startswith(client_loggers)]
    lines = [JsonLines().format(r) for r in records]
    assert len([line for line in lines if '"user": "ann"' in line]) == 2
    assert any('"status": 401' in line for line in lines)
    for line in lines:
        assert "\n" not in line and "sk-" not in line and "secret" not in line
        json.loads(line)


# ---- other web pages -----------------------------------------------------------------------------
def test_foreign_page_cannot_use_a_server_on_loopback():
    """Two attacks by web pages fail.

    - DNS rebinding: a host name of the attacker that resolves to 127.0.0.1.
    - Content types of forms, which browsers send to foreign servers without a CORS preflight.
    """
    with Running(paced) as server:
        server.wait_ready()
        for host in (
            "evil.example",
            "evil.example:8000",
            "127.0.0.1.evil.example",
            "localhost.evil",
            "",
        ):
            r = server.client.get("/lamoe/stats", headers={"host": host})
            assert r.status_code in (400, 403), host
        for host in ("localhost", "LOCALHOST:99", "127.0.0.1:8000", "[::1]:8000"):
            assert server.client.get("/health", headers={"host": host}).status_code == 200
        for kind in (
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "",
        ):
            headers = {"content-type": kind}
            r = server.client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
            assert r.status_code == 415
        r = server.client.get("/v1/models", headers={"origin": "http://evil.example"})
        assert "access-control-allow-origin" not in r.headers
    with Running(paced, allowed_hosts="box.lan, other.lan") as server:
        assert [
            server.client.get("/page/x.js", headers={"host": h}).status_code
            for h in ("box.lan:80", "other.lan", "localhost")
        ] == [404, 404, 403]


# ---- cached prefixes -----------------------------------------------------------------------------
LONG = "the cat sat on the mat. " * 8


def cached_tokens(server, key: str, **body) -> int:
    r = server.client.post(
        "/v1/completions",
        json={"prompt": LONG, "max_tokens": 1, **body},
        headers={"authorization": f"Bearer {key}"},
    )
    return r.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_one_key_cannot_test_guesses_of_what_another_key_has_sent(locked):
    assert cached_tokens(locked, KEY) == 0
    assert cached_tokens(locked, OTHER) == 0
    assert cached_tokens(locked, KEY) > 0
    assert cached_tokens(locked, OTHER) > 0


def test_cache_salt_separates_the_users_of_one_key(locked):
    assert cached_tokens(locked, KEY, cache_salt="user 1") == 0
    assert cached_tokens(locked, KEY, cache_salt="user 2") == 0
    assert cached_tokens(locked, OTHER, cache_salt="user 2") == 0
    assert cached_tokens(locked, KEY, cache_salt="user 2") > 0


@pytest.mark.parametrize(
    ("keys", "scope", "salted"),
    [((KEY, OTHER), "key", True), ((KEY, OTHER), "server", False), ((KEY, KEY), "key", False)],
)
def test_salts_of_keys(tmp_path, keys, scope, salted):
    """Keys are kept apart only if there are several, and the operator does not share the cache."""
    (tmp_path / "keys").write_text("\n".join(keys))
    settings = Settings(api_key_file=str(tmp_path / "keys"), prefix_cache_scope=scope)
    own = guard.Guard(None, settings, Metrics())
    headers = [{b"authorization": f"Bearer {key}".encode()} for key in (KEY, OTHER)]
    first, second = map(own.cache_salt, headers)
    assert (first != second) == salted == bool(first)
    assert KEY not in first
