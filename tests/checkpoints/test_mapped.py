"""Tests of mapped files that change under a running model: it ends with a clear error."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lamoe
from lamoe.backends.cpu import native
from lamoe.checkpoints import mapped
from lamoe.engine import async_llm
from lamoe.engine.llm import LLM
from oracles import tiny
from tiny_engine import greedy
from tiny_packed import pack
from tiny_server import Running, until

pytestmark = pytest.mark.skipif(not native.available(), reason="needs the compiled kernels")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mapped")
    config = tiny.config("llama", num_key_value_heads=2, num_hidden_layers=1)
    lamoe.save(tiny.model(config, dtype=torch.float32), folder / "source")
    pack(folder / "source", folder / "packed", "int8")
    return folder / "packed"


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "packed")


def engine(folder: Path) -> LLM:
    return LLM(folder, max_model_len=64, page_size=4, threads=1)


def touch(file: Path, ns: int = 1) -> None:
    """Set another time of change. The clock of a file system may tick only every few ms."""
    os.utime(file, ns=(ns, ns))


def overwrite(file: Path) -> None:
    with open(file, "r+b") as f:
        f.seek(-100, os.SEEK_END)
        f.write(b"\x11" * 50)
    touch(file)


@pytest.mark.parametrize("name", ["packed-00000.safetensors", "packed-00001.safetensors"])
def test_a_file_that_is_overwritten_in_place_ends_the_engine(folder, name):
    llm = engine(folder)
    llm.generate([[1, 2, 3]], greedy(2))
    llm.add([1, 2, 3], greedy(8))
    llm.step()
    overwrite(folder / name)
    with pytest.raises(mapped.FileChanged, match=f"{name} was changed while it was in use.*chec"):
        llm.step()


def test_a_file_that_grows_or_shrinks_ends_the_engine(folder):
    llm = engine(folder)
    file = folder / "packed-00000.safetensors"
    with open(file, "ab") as f:
        f.write(b"x")
    with pytest.raises(mapped.FileChanged, match="packed-00000"):
        llm.generate([[1, 2]], greedy(2))
    os.truncate(file, 100)
    with pytest.raises(mapped.FileChanged, match="packed-00000"):
        llm.backend.check()


def test_a_file_that_is_only_touched_or_replaced_does_no_harm(folder, monkeypatch):
    llm = engine(folder)
    want = llm.generate([[1, 2, 3]], greedy(4))
    for file in folder.glob("packed-*"):
        touch(file)
    (folder / "new").write_bytes(b"something else")
    os.replace(folder / "new", folder / "packed-00001.safetensors")  # the mapping keeps the old one
    assert llm.generate([[1, 2, 3]], greedy(4)) == want
    touch(folder / "packed-00000.safetensors", 2)
    monkeypatch.setenv("LAMOE_VERIFY", "0")  # then a touched file cannot be told from a changed one
    with pytest.raises(mapped.FileChanged):
        llm.backend.check()


def test_an_idle_engine_notices_the_change(folder, monkeypatch):
    monkeypatch.setattr(async_llm, "IDLE_CHECK_S", 0.01)
    shared = async_llm.AsyncLLM(engine(folder))
    overwrite(folder / "packed-00001.safetensors")
    deadline = time.monotonic() + 20
    while shared.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert isinstance(shared.error, mapped.FileChanged)
    shared.close()


def test_a_server_ends_with_a_log_line_and_an_exit_code(folder, monkeypatch, caplog):
    monkeypatch.setattr(async_llm, "IDLE_CHECK_S", 0.01)
    with Running(lambda: engine(folder)) as server:
        server.wait_ready()
        ids = server.complete(prompt=[1, 2, 3], max_tokens=2)
        assert ids["usage"]["completion_tokens"] == 2
        overwrite(folder / "packed-00001.safetensors")
        until(lambda: server.code is not None)
        assert server.code == 1
    [record] = [r for r in caplog.records if r.getMessage() == "the engine ended"]
    assert "packed-00001.safetensors was changed" in record.fields["error"]


def test_descriptors_and_watches_end_with_the_model(folder):
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        engine(folder)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


# A process that forks a child for each case, because a start with all imports takes a second.
CASES = """
import faulthandler, json, os, signal, sys
import numpy as np
from pathlib import Path
from lamoe.checkpoints import mapped

def run(case):
    for file in (ours, other):
        np.ones(20_000, np.uint8).tofile(file)
    m, n = (np.memmap(p, np.uint8, "r") for p in (ours, other))
    if case == "faulthandler":
        faulthandler.enable()
    mapped.report_failed_reads(m, ours)
    if case == "unmapped":
        address = m.ctypes.data
        del m
        m = np.memmap(other, np.uint8, "r")
        assert m.ctypes.data == address
        os.truncate(other, 0)
    elif case == "other":
        os.truncate(other, 0)
        m = n
    elif case == "sent":
        os.kill(os.getpid(), signal.SIGBUS)
    else:
        os.truncate(ours, 0)
    m[9000]

ours, other, log = (Path(name) for name in sys.argv[1:])
found = {}
for case in ("truncated", "faulthandler", "other", "sent", "unmapped"):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        run(case)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found[case] = [code, log.read_text().splitlines()]
print(json.dumps(found))
"""


def test_a_failed_read_ends_the_process_with_a_message(tmp_path):
    files = [tmp_path / name for name in ("model", "other", "log")]
    out = subprocess.run(
        [sys.executable, "-c", CASES, *files], capture_output=True, text=True, timeout=120
    )
    found = json.loads(out.stdout)
    for case in ("truncated", "faulthandler"):
        code, [line] = found[case]
        assert code == 74 and str(files[0]) in line and "exit code 74" in line
    for case in ("other", "sent", "unmapped"):  # not our file: the handler from before, or none
        assert found[case] == [-signal.SIGBUS, []], case
