"""Packed folders whose writing was interrupted or happened twice at once.

Layout and formats: test_packed.py. Damaged files: test_packed_hostile.py.
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
    """Save a tiny model."""
    lamoe.save(tiny.model(tiny.config(**SIZES), dtype=torch.bfloat16), tmp_path / "model")
    return tmp_path / "model"


def test_a_writer_that_was_killed_while_writing_the_config(source, tmp_path, monkeypatch):
    list(packed_file.write(source, tmp_path / "whole", Formats("int4")))
    for done in (0, 1, 3):  # tensors that an earlier call has written
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
    """The first process renames the file after the second one has opened it, before it locks it.

    The second process now has the finished file open.
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
    """The model runs again from layer 0, and the missing files get the same moments."""
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
            del part  # as options() does
    gc.enable()
    assert len(alive) > 20


def test_one_huge_input_does_not_suppress_the_feedback_of_others():
    """Real models have inputs that are a thousand times larger than the rest.

    The correlations among the other inputs must still be used.
    """
    g = torch.Generator().manual_seed(0)
    # Strongly correlated inputs.
    x = torch.randn(512, 4, generator=g) @ torch.randn(4, 64, generator=g)
    x += 0.05 * torch.randn(512, 64, generator=g)
    plain = calibrate.solve(x.T @ x / len(x))[1]
    x[:, 63] = 1000 * torch.randn(512, generator=g)
    with_huge = calibrate.solve(x.T @ x / len(x))[1]
    assert plain[0, 1:63].norm() > 0.2
    assert with_huge[0, 1:63].norm() > 0.5 * plain[0, 1:63].norm()
