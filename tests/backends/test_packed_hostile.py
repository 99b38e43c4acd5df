"""Tests that packed folders with damaged, hostile or unexpected files are refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from lamoe.backends.cpu import native, packed_file
from lamoe.engine.llm import LLM
from tiny_packed import pack, source

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled kernels are not there")


def rewrite(path: Path, change) -> None:
    """Rewrite a safetensors file.

    Args:
        change: modifies the header dict in place; may return other data bytes.
    """
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__")  # without the checksums, only the checks under test remain
    data = change(header, raw[start:])
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(
        len(text).to_bytes(8, "little") + text + (raw[start:] if data is None else data)
    )


def _misalign(header, data):
    """Move a small tensor to the front, so that all other tensors begin 4 bytes later.

    The result is still a valid safetensors file, but its tensors are no longer aligned.
    """
    for entry in header.values():
        entry["data_offsets"] = [x + 4 for x in entry["data_offsets"]]
    header["layers.0.attn_norm.scale"], first = (
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        header["layers.0.attn_norm.scale"]["data_offsets"],
    )
    at = first[0] - 4
    for name, entry in header.items():
        if entry["data_offsets"][0] >= first[1]:
            entry["data_offsets"] = [x - 4 for x in entry["data_offsets"]]
    return data[at : at + 4] + data[:at] + data[at + 4 :]


def _nan_scale(header, data):
    at = header["layers.0.wq.scale"]["data_offsets"][0]
    return data[:at] + np.float32("nan").tobytes() + data[at + 4 :]


HOSTILE = {
    "renamed tensor": lambda h, d: h.update({"layers.0.evil": h.pop("layers.0.wq")}),
    "wrong size": lambda h, d: h["layers.0.wq"].update(shape=[h["layers.0.wq"]["shape"][0] - 64]),
    "offset beyond the file": lambda h, d: h["layers.0.wq"].update(
        data_offsets=[x + 1 << 40 for x in h["layers.0.wq"]["data_offsets"]]
    ),
    "overlap": lambda h, d: h["layers.0.wo"].update(
        data_offsets=h["layers.0.wq"]["data_offsets"], shape=h["layers.0.wq"]["shape"]
    ),
    "negative": lambda h, d: h["layers.0.wq"].update(data_offsets=[-64, 0]),
    "scales of another kind": lambda h, d: h["layers.0.wq.scale"].update(dtype="I32"),
    "bytes of another kind": lambda h, d: h["layers.0.wq"].update(dtype="I8"),
    "misaligned": _misalign,
    "scale not a number": _nan_scale,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_invalid_headers_are_refused(tmp_path, case):
    pack(source(tmp_path / "model", "mla"), tmp_path / "out")
    packed_file.load(tmp_path / "out")
    rewrite(tmp_path / "out" / "packed-00001.safetensors", HOSTILE[case])
    with pytest.raises(ValueError, match="packed-00001"):
        packed_file.load(tmp_path / "out")


def test_truncated_missing_and_swapped_files_are_refused(tmp_path):
    pack(source(tmp_path / "model", "mla"), tmp_path / "out")
    file = tmp_path / "out" / "packed-00002.safetensors"
    raw = file.read_bytes()
    for keep in (0, 7, 100, len(raw) // 2, len(raw) - 1):
        file.write_bytes(raw[:keep])
        with pytest.raises(ValueError, match="packed-00002"):
            packed_file.load(tmp_path / "out")
    file.unlink()
    with pytest.raises(
        ValueError, match="packed-00002.safetensors is missing.*lamoe quantize.*continues"
    ):
        packed_file.load(tmp_path / "out")
    shutil.copy(tmp_path / "out" / "packed-00001.safetensors", file)
    with pytest.raises(ValueError, match="does not hold the tensors that config.json needs"):
        packed_file.load(tmp_path / "out")


def test_files_that_the_config_does_not_name_are_refused(tmp_path):
    """A folder with files that the config does not name is refused.

    With copies, or files of more layers, it is unclear which files belong to the model.
    """
    pack(source(tmp_path / "model", "mla"), out := tmp_path / "out")
    packed_file.load(out)
    (out / "packed-00003.safetensors.bak").touch()
    (out / ".packed-00009.safetensors.part").touch()
    # Files with these names are ignored, because packed files have other names.
    packed_file.load(out)
    for name in ("packed-00004.safetensors", "packed-00001 (1).safetensors"):
        shutil.copy(out / "packed-00001.safetensors", out / name)
        with pytest.raises(
            ValueError,
            match=f"holds '{re.escape(name)}' beside the 4 files that its config.json needs for "
            "3 layers. .*delete",
        ):
            packed_file.load(out)
        (out / "packed-00002.safetensors").rename(tmp_path / "away")
        with pytest.raises(
            ValueError,
            match=r"has 4 packed files, but its config.json needs 4 \(packed-00002.safetensors is "
            r"missing\)",
        ):
            packed_file.load(out)
        (tmp_path / "away").rename(out / "packed-00002.safetensors")
        (out / name).unlink()
    path = out / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    with pytest.raises(
        ValueError,
        match="holds 'packed-00003.safetensors' beside the 3 files that its config.json needs "
        "for 2 layers",
    ):
        packed_file.load(out)


def test_other_and_impossible_configs_are_refused(tmp_path):
    model = source(tmp_path / "model", "mla")
    pack(model, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    assert not packed_file.is_packed(model) and not packed_file.is_packed(tmp_path)
    with pytest.raises(ValueError, match="is not a model packed by lamoe"):
        packed_file.load(model)

    def load_error(**changes):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(ValueError) as e:
            LLM(tmp_path / "out", max_model_len=16)
        return str(e.value)

    q = config["quantization_config"]
    assert "layout version 2, but this lamoe reads version 1" in load_error(
        quantization_config=q | {"version": 2}
    )
    assert "weights 'int3'" in load_error(quantization_config=q | {"weights": "int3"})
    assert "weights ['int4']" in load_error(quantization_config=q | {"weights": ["int4"]})
    assert "does not hold the tensors" in load_error(quantization_config=q | {"weights": "int8"})
    # Sizes beyond the limits of the kernels are refused before any loop over the layers.
    limit = "layers is 1000000000; it must be from 1 to 65536"
    assert limit in load_error(num_hidden_layers=10**9)
    with pytest.raises(ValueError, match="incomplete"):
        packed_file.load(tmp_path / "out")
    no_groups = {"n_group": None, "topk_group": None}
    assert "experts is 1000000000" in load_error(n_routed_experts=10**9, **no_groups)
    assert "does not hold the tensors" in load_error(n_routed_experts=30_000, **no_groups)
    assert "vocab is 2147483647" in load_error(vocab_size=2**31 - 1)
    assert "limit is 2147483647" in load_error(vocab_size=2**40)
    assert "does not hold the tensors" in load_error(vocab_size=4_000_000)
    # Other quantisation methods go to the loader of plain checkpoints, which refuses them.
    assert "quantization_config" in load_error(quantization_config={"quant_method": "gptq"})
    assert "hidden_size" in load_error(hidden_size="many")
