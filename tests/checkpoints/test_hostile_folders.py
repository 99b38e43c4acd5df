"""Tests of hostile model folders: safetensors headers, indexes, pickles.

Loading such a folder either succeeds or raises a ValueError that names the file.
"""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lamoe import checkpoints
from lamoe.checkpoints import shards
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer

CONFIG = ModelConfig(
    model_type="deepseek_v2",
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    kv_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    moe_intermediate_size=20,
    n_routed_experts=8,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    torch_dtype="float32",
)
GATE = "model.layers.1.mlp.gate.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    checkpoints.save(Transformer(CONFIG).init_weights(), tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path) -> Path:
    checkpoints.save(Transformer(CONFIG).init_weights(), tmp_path / "m", max_shard_bytes=40_000)
    return tmp_path / "m"


def edit_json(path: Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- hostile headers ----
def raw(path: Path, header, data: bytes = b"", length: int | None = None) -> Path:
    """Write a safetensors file with any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def one(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {
        "dtype": dtype,
        "shape": shape if isinstance(shape, str) else list(shape),
        "data_offsets": list(offsets),
    }


def test_a_valid_file_is_read(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "b": one(offsets=(8, 16)),
        "a": one(shape=(), offsets=(4, 8)),
        "c": one(shape=(), offsets=(0, 4)),
        "empty": one(shape=(3, 0), offsets=(8, 8)),
    }
    found = shards.read_header(raw(tmp_path / "x.safetensors", header, bytes(16)))
    assert {n: (f.shape, f.begin) for n, f in found.items()} == {
        "b": ((2,), 8),
        "a": ((), 4),
        "c": ((), 0),
        "empty": ((3, 0), 8),
    }


@pytest.mark.parametrize(
    "header, data, message",
    [
        ({"a": one()}, 4, "has 73 bytes, but its header promises 77; it is truncated"),
        ({"a": one()}, 9, "1 bytes after its last tensor"),
        ({"a": one(offsets=(0, 2**62), shape=(2**60,))}, 8, "header promises 4,6.*truncated"),
        (
            {"a": one(), "b": one(offsets=(4, 12))},
            12,
            "'b' starts at byte 4 of the data, expected 8; it overlaps",
        ),
        ({"a": one(), "b": one()}, 8, "overlaps"),
        ({"a": one(), "b": one(offsets=(12, 20))}, 20, "expected 8; it leaves a hole"),
        ({"a": one(offsets=(4, 12))}, 12, "leaves a hole"),
        ({"a": one(offsets=(8, 0))}, 8, "span -8"),
        ({"a": one(shape=(3,))}, 8, "needs 12 bytes, but its data_offsets .* span 8"),
        ({"a": one(shape=(2**31, 2**31, 2**31, 2**31))}, 8, "needs 85,070,"),
        ({"a": one(dtype="F33")}, 8, "unknown dtype 'F33'"),
        ({"a": one(dtype=["F32"])}, 8, "unknown dtype"),
        ({"a": one(shape=(-2,))}, 8, "whole numbers >= 0"),
        ({"a": one(shape=(2.0,))}, 8, "whole numbers >= 0"),
        ({"a": one(shape=(True,))}, 8, "whole numbers >= 0"),
        ({"a": one(shape="22")}, 8, "whole numbers >= 0"),
        ({"a": one(shape=(2**64,))}, 8, "whole numbers >= 0"),
        ({"a": one(shape=(1,) * 10**4)}, 8, "at most 8 whole numbers"),
        ({"a": one(offsets=(0, 8, 16))}, 8, "two whole numbers"),
        ({"a": one(offsets=("0", "8"))}, 8, "two whole numbers"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "exactly dtype, shape and data_offsets"),
        ({"a": 7}, 8, "exactly dtype, shape and data_offsets"),
        (
            {"__metadata__": {"format": 1}, "a": one()},
            8,
            "__metadata__ must map strings to strings",
        ),
        (b'{"a": {"dtype": "F32"}, "a": 1}', 8, "'a' occurs twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", 8, "not valid JSON"),
        (b"[1, 2]", 8, "must be a JSON object, found list"),
        (b"{", 8, "not valid JSON"),
        (b"\xff\xfe{}", 8, "not valid JSON"),
        (b"[" * 100_000, 8, "nested too deeply"),
        (b"", 0, "not valid JSON"),
    ],
)
def test_wrong_headers_are_refused(tmp_path, header, data, message):
    path = raw(tmp_path / "x.safetensors", header, bytes(data))
    with pytest.raises(ValueError, match=message) as error:
        shards.read_header(path)
    assert "x.safetensors" in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "has 0 bytes"),
        (b"\x10\x00\x00", "has 3 bytes"),
        (struct.pack("<Q", 100) + b"{}", "claims a header of 100 bytes but has only 10 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "claims a header of 9,223,372,036,854,775,808 bytes"),
    ],
)
def test_wrong_header_lengths_are_refused(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        shards.read_header(tmp_path / "x.safetensors")


def test_truncated_shard_names_both_sizes(folder):
    path = folder / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 100)
    with pytest.raises(
        ValueError,
        match=f"has {size - 100:,} bytes, but its header promises {size:,}; it is truncated",
    ):
        checkpoints.load(folder)


def test_a_file_cut_while_it_is_read_is_an_error_not_a_crash(folder):
    found = shards.scan(folder)
    with pytest.raises(ValueError, match="could not be read"):
        shards.stream(
            found,
            lambda name, tensor: os.truncate(folder / "model.safetensors", 20_000) or tensor.sum(),
        )


def damaged(header: bytes, cut: int, flip: list[tuple[int, int]]) -> bytes:
    content = bytearray(struct.pack("<Q", len(header)) + header + bytes(16))
    for at, value in flip:
        content[at % len(content)] = value
    return bytes(content[: len(content) - cut])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    cut=st.integers(0, 20),
    flip=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
)
def test_fuzzed_files_raise_value_error_or_read(tmp_path_factory, cut, flip):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    header = json.dumps(
        {"a": one(), "b": one(dtype="BF16", shape=(2, 2), offsets=(8, 16))}
    ).encode()
    path.write_bytes(damaged(header, cut, flip))
    try:
        found = shards.read_header(path)
        shards.stream(
            found,
            lambda name, tensor: tuple(tensor.shape) == found[name].shape or pytest.fail("shape"),
        )
    except ValueError:
        pass


# ---- hostile indexes ----
@pytest.mark.parametrize(
    "name",
    [
        "../m/x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        "x\\y.safetensors",
        "model.bin",
        ".x.safetensors",
        "a\x00.safetensors",
        7,
        None,
    ],
)
def test_index_may_name_only_files_of_its_folder(sharded, name):
    index = sharded / shards.INDEX
    placed = json.loads(index.read_text())["weight_map"]
    placed[GATE] = name
    edit_json(index, weight_map=placed)
    with pytest.raises(ValueError, match="only plain .safetensors file names of the same folder"):
        checkpoints.load(sharded)


def test_missing_shard(sharded):
    next(sharded.glob("model-00002-*")).unlink()
    with pytest.raises(
        ValueError, match=r"places \d+ tensors in model-00002-.* but this file does not exist"
    ):
        checkpoints.load(sharded)


def test_index_places_a_tensor_in_the_wrong_shard(sharded):
    index = sharded / shards.INDEX
    placed = json.loads(index.read_text())["weight_map"]
    wrong = next(s for s in placed.values() if s != placed[GATE])
    edit_json(index, weight_map={**placed, GATE: wrong})
    with pytest.raises(
        ValueError, match=f"places '{GATE}' in {wrong}, but that shard does not hold it"
    ):
        checkpoints.load(sharded)


def test_tensor_in_two_shards(sharded):
    path = next(sharded.glob("model-00001-*"))
    save_file({**load_file(path), GATE: torch.zeros(8, 32)}, path)
    with pytest.raises(ValueError, match=f"holds '{GATE}', which another shard"):
        checkpoints.load(sharded)


def test_tensor_the_index_does_not_list(sharded):
    path = next(sharded.glob("model-00001-*"))
    save_file({**load_file(path), "stray": torch.zeros(8)}, path)
    with pytest.raises(ValueError, match="do not belong to the config: 'stray'"):
        checkpoints.load(sharded)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ("[]", "must be a JSON object"),
        ("{", "not valid JSON"),
        ('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "'a' occurs twice"),
    ],
)
def test_malformed_index(sharded, content, message):
    (sharded / shards.INDEX).write_text(content)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(sharded)


def test_huge_index_and_config_are_refused_before_reading(sharded):
    for name in (shards.INDEX, "config.json"):
        with open(sharded / name, "r+b") as f:
            f.truncate(shards.MAX_JSON_BYTES + 1)
        with pytest.raises(ValueError, match="more than 16,777,216 bytes is refused"):
            checkpoints.load(sharded)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt", "weights.pkl"]
)
def test_pickles_are_refused_by_name(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(
        ValueError,
        match=rf"weights only as '{name}': pickles.*save_file\(torch.load\('{name}', "
        r"weights_only=True\)",
    ):
        checkpoints.load(folder)


def test_folders_without_clear_weights(sharded):
    index = (sharded / shards.INDEX).read_text()
    (sharded / shards.INDEX).unlink()
    with pytest.raises(ValueError, match="has 'model-00001-.* but neither model.safetensors nor"):
        checkpoints.load(sharded)
    (sharded / shards.INDEX).write_text(index)
    shutil.copy(next(sharded.glob("model-00001-*")), sharded / "model.safetensors")
    with pytest.raises(ValueError, match="has both"):
        checkpoints.load(sharded)
    for file in sharded.glob("model*"):
        file.unlink()
    os.mkfifo(sharded / "model.safetensors")  # opening a pipe must not block
    with pytest.raises(ValueError, match="neither|no weights"):
        checkpoints.load(sharded)
