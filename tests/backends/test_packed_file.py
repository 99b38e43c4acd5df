"""Packed folders whose writing was cut off or raced.

(Layout, formats, hostile files: test_packed.py.)
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

SIZES = dict(
    num_hidden_layers=2, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
)


@pytest.fixture
def source(tmp_path) -> Path:
    lamoe.save(tiny.model(tiny.config(**SIZES), dtype=torch.bfloat16), tmp_path / "model")
    return tmp_path / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_killed_while_it_wrote_the_config(source, tmp_path, monkeypatch):
    list(packed_file.write(source, tmp_path / "whole", Formats("int4")))
    for done in (0, 1, 3):  # pieces of an earlier call; 0: killed in the first one
        target = tmp_path / f"out{done}"
        for _, _ in zip(range(done), packed_file.write(source, target, Formats("int4"))):
            pass

        def half(path, text, temporary):
            temporary.write_text('{"architectures": ["Deep')
            raise KeyboardInterrupt

        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(packed_file.atomic, "write_text", half)
            list(packed_file.write(source, target, Formats("int4")))
        list(packed_file.write(source, target, Formats("int4")))
        assert contents(target) == contents(tmp_path / "whole")


def test_a_file_that_another_process_finished_meanwhile_is_not_cut_off(
    source, tmp_path, monkeypatch
):
    """Between the second process's open and its lock, the first renames the file: the second one
    holds the finished file now.
    """
    target = tmp_path / "out"
    list(packed_file.write(source, tmp_path / "whole", Formats("int4")))
    first, try_lock = packed_file.write(source, target, Formats("int4")), lock.try_lock
    for piece, _ in first:
        if piece.name == "w2":
            break  # the last piece of layer 0; its file has no name yet

    def late(f):
        monkeypatch.setattr(lock, "try_lock", try_lock)
        next(first)
        return try_lock(f)

    monkeypatch.setattr(lock, "try_lock", late)
    with pytest.raises(ValueError, match="another process was writing"):
        list(packed_file.write(source, target, Formats("int4")))
    list(first)
    assert contents(target) == contents(tmp_path / "whole")


def test_a_calibrated_folder_goes_on_where_it_stopped(source, tmp_path):
    """The walk begins anew, at layer 0, and gives the layers that are left the same moments; only
    one layer's weights are alive at a time.
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


def test_the_walk_keeps_one_layer(tmp_path):
    alive, config, source = [], tiny.config(**SIZES, first_k_dense_replace=0), tmp_path / "model"
    lamoe.save(tiny.model(config, dtype=torch.bfloat16), source)
    build = calibrate._block
    gc.disable()  # gigabytes must not wait for it

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
            del part  # what options() does
    gc.enable()
    assert len(alive) > 20


def test_one_huge_input_does_not_drown_the_others():
    """Real models have inputs a thousand times larger than the rest.

    What the others tell of one another must still be used.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(512, 4, generator=g) @ torch.randn(4, 64, generator=g) + 0.05 * torch.randn(
        512, 64, generator=g
    )  # go together closely
    plain = calibrate.solve(x.T @ x / len(x))[1]
    x[:, 63] = 1000 * torch.randn(512, generator=g)
    drowned = calibrate.solve(x.T @ x / len(x))[1]
    assert plain[0, 1:63].norm() > 0.2 and drowned[0, 1:63].norm() > 0.5 * plain[0, 1:63].norm()
