"""Tests that checkpoints are complete or absent, and that nothing is pickled.

Saves are killed at every file operation and fail on full disks. Files are damaged byte by byte.
"""

import errno
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from lamoe.train import checkpoint
from lamoe.train.checkpoint import (
    latest,
    load_tensors,
    rng_state,
    save,
    save_tensors,
    set_rng_state,
    verify,
)


def writer(step: int, size: int = 2000):
    """Return a write function for `save` whose files contain the step number."""

    def write(folder: Path):
        (folder / "tokenizer").mkdir()
        (folder / "model.bin").write_bytes(bytes([step % 256]) * size)
        (folder / "tokenizer/vocab.txt").write_text(f"step {step}")

    return write


def is_step(path: Path, step: int) -> bool:
    return (path / "tokenizer/vocab.txt").read_text() == f"step {step}" and set(
        (path / "model.bin").read_bytes()
    ) == {step % 256}


def names(run: Path) -> list[str]:
    return sorted(p.name for p in run.iterdir())


def in_child(work) -> int:
    """Run `work` in a forked process (files only, no torch) and return its wait status."""
    pid = _fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(77)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def _fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 warns if a process with threads forks. The child uses no threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def test_saved_checkpoints_verify_and_latest_finds_them(tmp_path):
    run = tmp_path / "runs/tiny"
    assert latest(run) is None
    path = save(run, 123, writer(123))
    assert (
        path == run / "step-00000123" == latest(run)
        and is_step(path, 123)
        and (run / "latest").read_text() == "step-00000123\n"
    )
    assert checkpoint.step_of(path) == 123 and checkpoint.name(123) == path.name
    with pytest.raises(ValueError, match="not named like a checkpoint"):
        checkpoint.step_of(run / "latest")
    manifest = verify(path)
    assert manifest["step"] == 123 and {n: f["bytes"] for n, f in manifest["files"].items()} == {
        "model.bin": 2000,
        "tokenizer/vocab.txt": 8,
    }
    assert names(run) == ["latest", "step-00000123"]


def test_keep_last_k_by_time_of_saving_not_by_number(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, writer(step), keep=0)
    assert names(tmp_path) == ["latest", "step-00000010", "step-00000020", "step-00000030"]
    # The run was resumed from step 10, so step 30 belongs to an abandoned branch.
    save(tmp_path, 15, writer(15), keep=2)
    assert (
        names(tmp_path) == ["latest", "step-00000015", "step-00000030"]
        and latest(tmp_path).name == "step-00000015"
    )
    save(tmp_path, 123456789, writer(1), keep=1)
    assert names(tmp_path) == ["latest", "step-123456789"]
    with pytest.raises(ValueError, match="at least 0"):
        save(tmp_path, 1, writer(1), keep=-1)


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, writer(5))
    save(tmp_path, 5, writer(6))
    assert names(tmp_path) == ["latest", "step-00000005"] and is_step(latest(tmp_path), 6)


@pytest.mark.parametrize("second", [2, 1])  # a new step, and the same step again
def test_killed_at_every_file_operation(tmp_path, monkeypatch, second):
    """A save that is killed at any file operation leaves the previous checkpoint loadable.

    The process dies before its n-th file operation, for every n.
    """
    # fsync matters for power cuts only, not for killed processes.
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    operations = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")

    def save_and_die(run, n):
        left = n

        def dying(real):
            def call(*args, **kw):
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return real(*args, **kw)

            return call

        for module, name in [(os, name) for name in operations] + [(io, "open")]:
            setattr(module, name, dying(getattr(module, name)))
        save(run, second, writer(200), keep=1)

    deaths = 0
    for n in range(200):
        run = tmp_path / str(n)
        save(run, 1, writer(100))
        status = in_child(lambda: save_and_die(run, n))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no checkpoint may be reported as damaged
            found = latest(run)
        assert is_step(found, 100) or is_step(found, 200)
        assert (run / (run / "latest").read_text().strip()).is_dir() or found.name.endswith(".old")
        save(run, 3, writer(44), keep=2)  # the next save works and cleans up
        assert is_step(latest(run), 44) and not [x for x in names(run) if ".tmp" in x]
        if status == 0:
            assert is_step(found, 200) and found.name == f"step-0000000{second}"
            break
        assert os.waitstatus_to_exitcode(status) == 9
        deaths += 1
    assert status == 0 and deaths > 20


def test_kill_9_at_random_moments(tmp_path):
    rng, last = random.Random(0), 0

    def save_forever(start):
        for step in range(start, start + 10_000):
            save(tmp_path, step, writer(step, 200_000), keep=2)

    save(tmp_path, 0, writer(0, 200_000))
    for attempt in range(200):
        if attempt >= 10 and last > 3:
            break
        pid = _fork()
        if pid == 0:
            try:
                save_forever(last + 1)
            finally:
                os._exit(77)
        time.sleep(rng.uniform(0.02, 0.15))
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a warning would mean that an older checkpoint was used
            found = latest(tmp_path)
        step = verify(found)["step"]
        assert step >= last and is_step(found, step)
        # `latest` may lag: a kill can hit between the rename and the writing of the pointer
        assert verify(tmp_path / (tmp_path / "latest").read_text().strip())["step"] <= step
        last = step
    assert last > 3
    save(tmp_path, last + 1, writer(last + 1), keep=2)
    assert len(names(tmp_path)) == 3  # only `latest` and two checkpoints


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("where", ["write", "fsync", "manifest", "rename", "folder"])
def test_disk_errors_keep_the_old_checkpoint(tmp_path, monkeypatch, code, where):
    save(tmp_path, 1, writer(1))

    def refuse(*args, **kw):
        raise OSError(code, os.strerror(code))

    def half(folder):
        writer(2)(folder)
        refuse()

    target = {
        "fsync": (os, "fsync"),
        "manifest": (Path, "write_bytes"),
        "rename": (os, "rename"),
        "folder": (Path, "mkdir"),
    }
    with monkeypatch.context() as patch:
        write = half if where == "write" else lambda folder: (folder / "x").write_text("x")
        if where != "write":
            patch.setattr(*target[where], refuse)
        with pytest.raises(
            OSError,
            match=f"{os.strerror(code)}"
            + ("" if where == "folder" else ".*step-00000001 is complete"),
        ) as caught:
            save(tmp_path, 2, write)
    assert caught.value.errno == code and (
        where == "folder" or ("free some space" in str(caught.value)) == (code == errno.ENOSPC)
    )
    assert names(tmp_path) == ["latest", "step-00000001"] and is_step(latest(tmp_path), 1)


def test_a_failing_write_function_leaves_no_files(tmp_path):
    for error in (KeyboardInterrupt(), RuntimeError("CUDA")):

        def write(folder):
            writer(1)(folder)
            raise error

        with pytest.raises(type(error)):
            save(tmp_path, 1, write)
        assert names(tmp_path) == [] and latest(tmp_path) is None
    for write, found in [
        (lambda f: None, "found none"),
        (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json"),
        (lambda f: (f / "link").symlink_to("/etc/passwd"), "link is something else"),
    ]:
        with pytest.raises(ValueError, match=found):
            save(tmp_path, 1, write)
        assert names(tmp_path) == []


def test_a_file_at_the_path_of_the_run_folder(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OSError):
        save(tmp_path / "runs/tiny", 1, writer(1))
    assert (tmp_path / "runs").read_text() == "a file"


def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1]
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b))[1])
    save(tmp_path, 1, writer(1))
    at = events.index("rename")
    temp = min(events[:at], key=len)
    assert Path(temp).parent == tmp_path and Path(temp).name.startswith(".step.tmp-")
    assert {e.removeprefix(temp) for e in events[:at]} == {
        "",
        "/tokenizer",
        "/model.bin",
        "/tokenizer/vocab.txt",
        "/manifest.json",
    }
    assert events[at + 1] == str(tmp_path)


def test_every_flipped_byte_is_found(tmp_path):
    path, rng = save(tmp_path, 1, writer(1)), random.Random(1)
    for name in ("model.bin", "tokenizer/vocab.txt", "manifest.json"):
        good = (path / name).read_bytes()
        for at in range(len(good)) if name != "model.bin" else rng.sample(range(len(good)), 5):
            bad = bytearray(good)
            bad[at] ^= 1 << rng.randrange(8)
            (path / name).write_bytes(bad)
            with pytest.raises(ValueError, match=f"damaged: .*{re.escape(name)}"):
                verify(path)
        (path / name).write_bytes(good[:-1])
        with pytest.raises(ValueError, match=f"damaged: .*{re.escape(name)}"):
            verify(path)
        (path / name).unlink()
        with pytest.raises(ValueError, match=f"{re.escape(name)} is missing"):
            verify(path)
        (path / name).write_bytes(good)
    assert verify(path)["step"] == 1


def test_latest_falls_back_with_a_warning_or_fails(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, writer(step), keep=0)
    (tmp_path / "step-00000003/model.bin").write_bytes(b"\x03" * 1999 + b"\x04")
    with pytest.warns(
        UserWarning, match="contents of model.bin do not match.*using step-00000002 instead"
    ):
        assert latest(tmp_path).name == "step-00000002"
    (tmp_path / "step-00000002/manifest.json").write_text("{}")
    (tmp_path / "latest").unlink()  # `latest()` does not need this file
    with pytest.warns(UserWarning):
        assert latest(tmp_path).name == "step-00000001"
    (tmp_path / "step-00000001/model.bin").unlink()
    with pytest.raises(ValueError, match="no checkpoint in .* is complete"):
        latest(tmp_path)


def test_only_leftovers_of_dead_processes_are_removed(tmp_path):
    child = _fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    me, host = os.getpid(), socket.gethostname()
    for name in (
        f".step.tmp-{host}-{child}",
        f".step.old.tmp-{host}-{child}",
        f".step.tmp-{host}-{me}",
        f".step.tmp-{host}-{os.getppid()}",
        f".step.tmp-elsewhere-{child}",
        f".other.tmp-{host}-{child}",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    save(tmp_path, 1, writer(1))
    assert names(tmp_path) == sorted(
        [
            f".step.tmp-{host}-{os.getppid()}",
            f".step.tmp-elsewhere-{child}",
            f".other.tmp-{host}-{child}",
            "latest",
            "step-00000001",
        ]
    )


def test_an_old_checkpoint_that_cannot_be_removed_does_not_stop_training(tmp_path, monkeypatch):
    save(tmp_path, 1, writer(1))
    monkeypatch.setattr(
        shutil, "rmtree", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.EBUSY, "busy"))
    )
    with pytest.warns(UserWarning, match="could not be removed.*busy"):
        assert save(tmp_path, 2, writer(2), keep=1).name == "step-00000002"


# ---- tensors ----
def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(
                a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
            )
        )
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_nested_state_comes_back_bit_for_bit(tmp_path):
    nan = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    shared = torch.randn(3, 4)
    state = {
        "state": {
            0: {"step": torch.tensor(3.0), "m": torch.randn(4, 3).bfloat16(), "t": shared.t()},
            "0": nan,
            7: {},
        },
        "groups": [
            {
                "lr": 1 / 3,
                "betas": (0.9, 0.95),
                "params": [0, 1],
                "name": "\u4e2d.a\n",
                "on": True,
                "none": None,
            }
        ],
        "big": 2**127 + 1,
        "empty": torch.zeros(0, 5, dtype=torch.int64),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "halves": list(torch.arange(10.0).split(5)),
        "same": [shared, shared],
    }
    save_tensors(tmp_path / "s.safetensors", state)
    got = load_tensors(tmp_path / "s.safetensors")
    (tmp_path / "s.safetensors").unlink()  # the loaded tensors do not need the file any more
    assert equal(state, got)
    got["state"][0]["m"].add_(1)
    # Each converted copy is freed at once, so the next one may get the same id().
    arrays = [np.full(3, i) for i in range(50)]
    save_tensors(tmp_path / "a", {"arrays": arrays})
    assert [t.tolist() for t in load_tensors(tmp_path / "a")["arrays"]] == [
        a.tolist() for a in arrays
    ]


def test_optimizer_resumes_bitwise(tmp_path):
    def steps(model, optim, n):
        for _ in range(n):
            optim.zero_grad()
            model(torch.randn(5, 4)).square().sum().backward()
            optim.step()

    def build():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        return model, torch.optim.AdamW(
            [
                {"params": [model.weight], "weight_decay": 0.1},
                {"params": [model.bias], "weight_decay": 0.0},
            ]
        )

    model, optim = build()
    steps(model, optim, 3)
    save_tensors(
        tmp_path / "o",
        {"optim": optim.state_dict(), "model": model.state_dict(), "rng": rng_state()},
    )
    steps(model, optim, 3)
    again, optim2 = build()
    state = load_tensors(tmp_path / "o")
    again.load_state_dict(state["model"])
    optim2.load_state_dict(state["optim"])
    set_rng_state(state["rng"])
    steps(again, optim2, 3)
    assert torch.equal(model.weight, again.weight) and torch.equal(model.bias, again.bias)


def test_all_three_random_generators_resume(tmp_path):
    draw = lambda: (
        torch.rand(3).tolist(),
        np.random.normal(size=3).tolist(),
        random.random(),
        random.gauss(0, 1),
        torch.randperm(9).tolist(),
    )
    before = rng_state()
    # numpy and Python draw normal numbers in pairs, so the unused one is part of the state.
    (random.gauss(0, 1), np.random.normal())
    save_tensors(tmp_path / "r", rng_state())
    want = draw()
    assert draw() != want
    set_rng_state(load_tensors(tmp_path / "r"))
    assert draw() == want
    state = load_tensors(tmp_path / "r")
    set_rng_state({**state, "cuda": [torch.zeros(1)] * 99})  # as stored by earlier versions
    assert draw() == want
    set_rng_state(before)


def test_nothing_is_pickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, ("touch pwned",))

    for bad, where in [
        ({"a": [Evil()]}, r"state\.a\[0\] is a .*Evil"),
        ({"s": {1, 2}}, r"state\.s"),
        ({(1,): 2}, "key"),
        ({"f": np.float64(1)}, r"state\.f"),
        ({True: 1}, "key True"),
    ]:
        with pytest.raises(ValueError, match=where):
            save_tensors(tmp_path / "x", bad)
        assert not (tmp_path / "x").exists()
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle.pt")
    (tmp_path / "text").write_text("hello")
    for name in ("pickle.pt", "text"):
        with pytest.raises(ValueError, match="not a file that save_tensors wrote"):
            load_tensors(tmp_path / name)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="not a file that save_tensors wrote"):
        load_tensors(tmp_path / "foreign")
    save_file({}, tmp_path / "lying", metadata={"lamoe_state": json.dumps({"tensor": "gone"})})
    with pytest.raises(ValueError, match="not a file that save_tensors wrote"):
        load_tensors(tmp_path / "lying")
    whole = torch.zeros(4)
    with pytest.raises(ValueError, match="overlap"):
        save_tensors(tmp_path / "y", {"a": whole, "b": whole[1:]})
    with pytest.raises(OSError):
        save_tensors(tmp_path / "no/such/folder", {"a": whole})
    source = Path(checkpoint.__file__).read_text()
    assert not re.search(r"import pickle|torch\.(save|load)\(|allow_pickle=True", source)
