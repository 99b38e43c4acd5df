"""Tests that run every script in examples/ on a tiny trained model."""

import os
import runpy
import socket
import sys
from pathlib import Path

import pytest

from lamoe.backends.cpu import native
from lamoe.train import checkpoint
from tiny_run import trained, write_texts  # noqa: F401 (trained is a fixture)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a script in this process, in an empty folder, and return what it printed."""
    monkeypatch.chdir(tmp_path)
    # Subprocesses of the scripts must find this checkout for `python -m lamoe`.
    path = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LAMOE_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def model(trained) -> Path:
    return checkpoint.model_of_run(trained)


def test_load_and_score(model, run):
    out = run("load_and_score.py", model)
    *tokens, total = out.splitlines()
    assert all(float(line.split()[0]) <= 0 for line in tokens)
    assert total.startswith(f"{len(tokens)} tokens, ") and total.endswith(" bits per byte")


def test_generate_takes_the_newest_run(trained, run, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(trained)
    out = run("generate.py")
    assert out.startswith("class Node:") and "finish reason: " in out


def test_scripts_without_a_run_exit_with_a_message(run):
    with pytest.raises(SystemExit, match="no run yet"):
        run("generate.py")


def test_batch_6bit_cache(model, run):
    out = run("batch_6bit_cache.py", model)
    assert "def read(self" in out and "def tell(self" in out


def test_train_on_my_text(run, tmp_path):
    write_texts(tmp_path / "notes")
    small = "--run.steps 2 --batch.size 2 --batch.micro 2 --data.seq_len 32 --model.hidden_size 64"
    out = run("train_on_my_text.py", "notes", *small.split())
    assert "The " in out and (tmp_path / "runs" / "my-text" / "metrics.jsonl").exists()


def test_serve_and_call(model, run):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    assert run("serve_and_call.py", model, port).strip()


@pytest.mark.skipif(not native.available(), reason="needs the compiled kernels")
def test_quantise_and_bench(model, run):
    out = run("quantise_and_bench.py", model)
    assert "original: " in out and "int4: " in out


def test_every_example_is_tested():
    tested = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{script.name}"' in tested for script in EXAMPLES.glob("*.py"))
