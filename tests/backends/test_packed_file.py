"""Tests of packed folders whose writer was interrupted or had a concurrent second writer.

test_packed.py tests layout and formats, test_packed_hostile.py damaged files.
"""

import gc
import shutil
import weakref
from pathlib import Path

import pytest
import torch

import lamoe
from lamoe.backends.base import Formats
from lamoe.backends.cpu import calibrate, packed_file
from lamoe.checkpoints import lock
from oracles import tiny
from tiny_packed import contents

SIZES = dict(
    num_hidden_layers=2, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
)


@pytest.fixture
def source(tmp_path) -> Path:
    """Save a tiny random model as a checkpoint folder."""
    lamoe.save(tiny.model(tiny.config(**SIZES), dtype=torch.bfloat16), tmp_path / "model")
    return tmp_path / "model"


def test_a_writer_that_was_killed_while_writing_the_config(source, tmp_path, monkeypatch):
    list(packed_file.write(source, tmp_path / "whole", Formats("int4")))
    for done in (0, 1, 3):  # number of tensors that an earlier call has written
        target = tmp_path / f"out{done}"
        for _, _ in zip(range(done), packed_file.write(source, target, Formats("int4"))):
            pass

        def write_half(path, text, temporary):
            temporary.write_text('{"architectures": ["Deep')
            raise KeyboardInterrupt

        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(packed_file.atomic, "write_text", write_half)
            list(packed_file.write(source, target, Formats("int4")))
        list(packed_file.write(source, target, Formats("int4")))
        assert contents(target) == contents(tmp_path / "whole")


def test_a_file_that_another_process_finished_meanwhile_is_not_truncated(
    source, tmp_path, monkeypatch
):
    """A process does not truncate a file that another process has just finished.

    The second process opens the file. Before it locks the file, the first process finishes and
    renames it. So the second process has the finished file open.
    """
    target = tmp_path / "out"
    list(packed_file.write(source, tmp_path / "whole", Formats("int4")))
    first, try_lock = packed_file.write(source, target, Formats("int4")), lock.try_lock
    for tensor, _ in first:
        if tensor.name == "w2":
            break  # the last tensor of layer 0, whose file is not renamed yet

    def finish_file_then_lock(f):
        monkeypatch.setattr(lock, "try_lock", try_lock)
        next(first)
        return try_lock(f)

    monkeypatch.setattr(lock, "try_lock", finish_file_then_lock)
    with pytest.raises(ValueError, match="another process was writing"):
        list(packed_file.write(source, target, Formats("int4")))
    list(first)
    assert contents(target) == contents(tmp_path / "whole")


def test_a_calibrated_folder_continues_where_it_stopped(source, tmp_path):
    """An interrupted calibrated folder is completed with the same bytes.

    Calibration runs the model again from layer 0, so the missing files get the same moments.
    """
    config, ids = lamoe.checkpoints.read_config(source), torch.arange(128).reshape(4, 32) * 7 % 64

    def write(target: Path, calibrated: bool = True) -> list[int]:
        walked = []
        list(
            packed_file.write(
                source,
                target,
                Formats("int4"),
                **(calibrate.options(source, config, ids, walked.append) if calibrated else {}),
            )
        )
        return walked

    assert write(tmp_path / "whole") == [0, 1, 2] and write(tmp_path / "whole") == []
    for kept in (0, 1, 2):
        target = tmp_path / f"cut{kept}"
        shutil.copytree(tmp_path / "whole", target)
        for name in [f"packed-{n:05d}.safetensors" for n in (1, 2, 0)][kept:]:
            (target / name).unlink()
        assert write(target) == [0, 1, 2] and contents(target) == contents(tmp_path / "whole")
    write(tmp_path / "plain", calibrated=False)
    assert (
        contents(tmp_path / "plain")["packed-00002.safetensors"]
        != contents(tmp_path / "whole")["packed-00002.safetensors"]
    )


def test_calibration_keeps_one_layer_in_memory(tmp_path):
    alive, config, source = [], tiny.config(**SIZES, first_k_dense_replace=0), tmp_path / "model"
    lamoe.save(tiny.model(config, dtype=torch.bfloat16), source)
    build = calibrate._block
    gc.disable()  # weights must be freed without the garbage collector

    def watched(*args):
        assert all(ref() is None for ref in alive)
        block = build(*args)
        alive.extend(weakref.ref(p) for p in block.parameters())
        return block

    with pytest.MonkeyPatch.context() as m:
        m.setattr(calibrate, "_block", watched)
        for part in calibrate.moments(
            config,
            packed_file.reader(source, config),
            torch.arange(64).reshape(2, 32),
            torch.float32,
        ):
            del part  # options() drops its reference in the same way
    gc.enable()
    assert len(alive) > 20


def test_one_huge_input_does_not_suppress_the_feedback_of_others():
    """One input that is a thousand times larger does not suppress the feedback of other inputs.

    Real models have such inputs. The correlations among the other inputs must still be used.
    """
    g = torch.Generator().manual_seed(0)
    # The 64 inputs are mixtures of 4 random ones and a little noise, so they are correlated.
    x = torch.randn(512, 4, generator=g) @ torch.randn(4, 64, generator=g)
    x += 0.05 * torch.randn(512, 64, generator=g)
    plain = calibrate.solve(x.T @ x / len(x))[1]
    x[:, 63] = 1000 * torch.randn(512, generator=g)
    with_huge = calibrate.solve(x.T @ x / len(x))[1]
    assert plain[0, 1:63].norm() > 0.2
    assert with_huge[0, 1:63].norm() > 0.5 * plain[0, 1:63].norm()
