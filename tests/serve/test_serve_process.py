"""Tests of `lamoe serve` as a real process over a trained run.

They cover options, environment variables, log, signals and exit codes.
"""

import argparse
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from lamoe import cli
from lamoe.serve import settings
from lamoe.serve.settings import Settings
from tiny_run import trained  # noqa: F401 (a fixture)
from tiny_server import Client, until

ADDRESS = "127.0.0.1:8000"  # the address in the README's examples


@pytest.fixture(autouse=True)
def restore_logging():
    """Undo what `cli.main(["serve", ...])` does to the logging of the test process."""
    root, access = logging.getLogger(), logging.getLogger("uvicorn.access")
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level, access.disabled = handlers, level, False


class Process:
    """A server in its own process."""

    def __init__(self, *words, cwd=None, **environment):
        env = (
            {k: v for k, v in os.environ.items() if not k.startswith("LAMOE_")}
            | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LAMOE_THREADS": "1"}
            | environment
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lamoe", "serve", *map(str, words)],
            cwd=cwd,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        os.set_blocking(self.process.stderr.fileno(), False)
        self._text = b""

    @property
    def log(self) -> list[dict]:
        """The JSON lines that the server has logged so far."""
        self._text += self.process.stderr.read() or b""
        return [json.loads(line) for line in self._text.splitlines() if line.startswith(b"{")]

    def event(self, name: str) -> dict | None:
        """Return the first log line of an event, if there is one."""
        return next((line for line in self.log if line["event"] == name), None)

    def wait_ready(self):
        until(lambda: self.event("ready") or self.process.poll() is not None, 60)
        assert self.event("ready"), self._text
        self.url = self.event("listening")["url"]
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        self.process.stdout.close()
        self.process.stderr.close()


def test_newest_run_is_served_until_sigterm(trained, tmp_path):
    """Without a model argument, the newest run under runs/ is served. SIGTERM ends it cleanly."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(trained)
    key = "sk-from-the-environment"
    variables = {"LAMOE_API_KEY": key, "LAMOE_MAX_NUM_SEQS": "3"}
    with Process("--port", 0, "--seed", 7, cwd=tmp_path, **variables) as p:
        p.wait_ready()
        assert httpx2.get(f"{p.url}/v1/models").status_code == 401
        headers = {"authorization": f"Bearer {key}"}
        with httpx2.Client(base_url=p.url, headers=headers, timeout=30) as c:
            [model] = c.get("/v1/models").json()["data"]
            assert (model["id"], model["max_model_len"]) == ("mine", 64)
            body = {"prompt": "the ", "max_tokens": 8}
            replies = [c.post("/v1/completions", json=body).json() for _ in range(2)]
            texts = [reply["choices"][0]["text"] for reply in replies]
            assert texts[0] == texts[1]  # --seed applies to requests without a seed
            stream = {"prompt": "the ", "max_tokens": 50, "ignore_eos": True, "stream": True}
            with c.stream("POST", "/v1/completions", json=stream) as r:
                lines = r.iter_lines()
                next(lines)
                p.process.send_signal(signal.SIGTERM)
                assert [line for line in lines if line][-1] == "data: [DONE]"
        assert p.process.wait(20) == 0
        assert p.event("draining")
        assert p.event("stopped")["code"] == 0
        request = next(line for line in p.log if line.get("path") == "/v1/completions")
        assert request["id"].startswith("cmpl-") and request["status"] == 200
        assert request["generated_tokens"] == 8 and request["ms"] > 0
        assert b"sk-from" not in p._text
        assert all({"time", "level", "event"} <= set(line) for line in p.log)


def test_second_sigterm_cuts_requests_off(trained):
    with Process(trained, "--port", 0, "--max-num-seqs", 1) as p:
        p.wait_ready()
        slow = Client(p, prompt=["the"] * 40, max_tokens=60, ignore_eos=True, n=3, seed=1)
        time.sleep(0.3)
        p.process.send_signal(signal.SIGTERM)
        until(lambda: p.event("draining"))
        started = time.monotonic()
        p.process.send_signal(signal.SIGTERM)
        assert p.process.wait(10) == 1, p.log
        assert time.monotonic() - started < 5
        slow.join(5)
        assert slow.status in (0, 503)
        assert p.event("requests are cut off")["why"] == "a second signal"


def test_sigterm_while_the_model_loads(trained):
    with Process(trained, "--port", 0) as p:
        until(lambda: p.event("listening"), 60)
        p.process.send_signal(signal.SIGTERM)
        assert p.process.wait(20) == 0 and p.event("stopped"), p._text


def test_readme_examples_that_call_the_server(trained):
    """Every Python block with the server's address, and every shell block with curl, succeeds."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(sh|python)\n(.*?)```", readme, re.DOTALL)
    commands = [
        [sys.executable, "-c", b] for kind, b in blocks if kind == "python" and ADDRESS in b
    ]
    assert commands
    if shutil.which("curl"):
        commands += [["sh", "-c", b] for kind, b in blocks if kind == "sh" and "curl " in b]
    with Process(trained, "--port", 0) as p:
        address = p.wait_ready().url.removeprefix("http://")
        for command in commands:
            command = [word.replace(ADDRESS, address) for word in command]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0 and done.stdout.strip(), done.stderr
        generated = [line for line in p.log if line.get("generated_tokens", 0) > 0]
        assert len(generated) == len(commands)
        assert all(line["status"] == 200 for line in generated)


@pytest.mark.parametrize(
    "words, says",
    [
        (["/nowhere"], "/nowhere"),
        (["--port", "99999", "x"], "--port is 99999"),
        (["a", "--model", "b"], "two models are named"),
        (["x", "--max-num-seqs", "0"], "--max-num-seqs is 0"),
        (["x", "--api-key", "a b\n"], "printable"),
        (["x", "--api-key-file", "/nowhere"], "/nowhere"),
        (["x", "--host", "nowhere.invalid"], "--host nowhere.invalid"),
        ([], "no trained model"),
        (["x", "--log-level", "loud"], "known: debug"),
        (["x", "--request-timeout", "nan"], "--request-timeout"),
        (["x", "--write-timeout", "0"], "--write-timeout is 0"),
    ],
)
def test_failed_start_names_the_reason(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = cli.main(["serve", *words, *([] if "--port" in words else ["--port", "0"])])
    assert code and says in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, says",
    [
        (["--cache", "5bit"], "unknown cache format '5bit'"),
        (["--weights", "int5"], "int5"),
        (["--device", "gpu9"], "gpu9"),
        (["--max-connections", "100000000"], "--max-connections"),
    ],
)
def test_what_cannot_work_is_refused_before_the_server_listens(words, says, trained, capsys):
    assert cli.main(["serve", str(trained), "--port", "0", *words])
    error = capsys.readouterr().err
    assert says in error and "listening" not in error


def test_a_missing_model_is_refused_before_the_server_listens(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("/nowhere/at/all", str(tmp_path / "empty"), "nowhere"):
        assert cli.main(["serve", name, "--port", "0"])
        error = capsys.readouterr().err
        assert name in error and "listening" not in error, error


def test_a_port_in_use(trained, capsys):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert cli.main(["serve", str(trained), "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another --port" in capsys.readouterr().err


def parse(*words, **environment) -> Settings:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    settings.add_options(parser)
    return settings.from_options(parser.parse_args(words), environment)


def test_every_flag_has_an_environment_variable():
    values = {
        "host": "::1",
        "port": "9",
        "api_key": "k",
        "api_key_file": "f",
        "served_model_name": "m",
        "max_model_len": "99",
        "max_num_seqs": "3",
        "max_num_batched_tokens": "33",
        "cache": "6bit",
        "weights": "int4",
        "head": "int8",
        "kv_cache_memory": "2GiB",
        "dtype": "float32",
        "device": "cpu",
        "threads": "2",
        "seed": "5",
        "max_queued_requests": "4",
        "max_choices": "5",
        "max_body_bytes": "1MB",
        "max_header_bytes": "9kb",
        "max_connections": "6",
        "request_timeout": "1.5",
        "body_timeout": "2",
        "write_timeout": "3",
        "shutdown_timeout": "0",
        "allowed_hosts": "a,b",
        "prefix_cache_scope": "server",
        "allowed_origins": "https://a.example",
        "log_level": "debug",
    }
    assert set(values) == set(Settings.__dataclass_fields__)
    by_flag = parse(*[w for k, v in values.items() for w in ("--" + k.replace("_", "-"), v)])
    by_variable = parse(**{f"LAMOE_{k.upper()}": v for k, v in values.items()})
    assert by_flag == by_variable
    assert by_flag.kv_cache_memory == 2 << 30
    assert by_flag.host_names() == {"a", "b"}
    assert all(getattr(by_flag, k) != getattr(Settings(), k) for k in values)
    assert parse("--port", "1", LAMOE_PORT="2").port == 1 and parse(LAMOE_PORT="").port == 8000
    with pytest.raises(ValueError, match="LAMOE_PORT is not a value for --port"):
        parse(LAMOE_PORT="eighty")


def test_vllm_names_are_accepted_too():
    by_flag = parse("--quantization", "int4", "--kv-cache-dtype", "6bit")
    by_variable = parse(LAMOE_QUANTIZATION="int4", LAMOE_KV_CACHE_DTYPE="6bit")
    assert by_flag == by_variable == parse("--weights", "int4", "--cache", "6bit")
    assert parse(LAMOE_CACHE="int8", LAMOE_KV_CACHE_DTYPE="6bit").cache == "int8"


def test_api_keys_and_host_names(tmp_path):
    file = tmp_path / "keys"
    file.write_text("\n one \ntwo\n")
    assert Settings(api_key="zero", api_key_file=str(file)).api_keys() == ("zero", "one", "two")
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no key"):
        Settings(api_key_file=str(file)).api_keys()
    assert Settings().host_names() == {"127.0.0.1", "::1", "localhost"}
    assert Settings(api_key="k").host_names() is None
    assert Settings(host="0.0.0.0").host_names() is None
    assert Settings(allowed_hosts="*").host_names() is None
