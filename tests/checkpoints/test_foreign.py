"""Tests of what people give instead of a model folder: each is named, with the way out."""

import json
import os
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lamoe import checkpoints
from lamoe.checkpoints import foreign, shards
from lamoe.cli import main
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer

DENSE = ModelConfig(
    model_type="llama",
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    torch_dtype="float32",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "m"
    checkpoints.save(Transformer(DENSE).init_weights(0), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "m"))


@pytest.fixture
def bare(folder) -> Path:
    """A folder with config.json and no weights."""
    (folder / "model.safetensors").unlink()
    return folder


def index(folder: Path, **placed: str) -> None:
    (folder / shards.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


# ---- an index beside a single file ----
def test_an_index_that_names_the_single_file_is_no_second_model(folder):
    names = load_file(folder / "model.safetensors")
    expected = checkpoints.load(folder).state_dict()
    index(folder, **dict.fromkeys([*names, "a.name.too.many"], "model.safetensors"))
    found = checkpoints.load(folder).state_dict()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_an_index_of_other_files_beside_the_single_one(folder):
    index(folder, a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors")
    with pytest.raises(
        ValueError, match=r"names 'model-00001.*, which are not there.*delete the index"
    ):
        checkpoints.load(folder)
    for i in (1, 2):
        save_file({"ab"[i - 1]: torch.ones(1)}, folder / f"model-0000{i}-of-00002.safetensors")
    with pytest.raises(ValueError, match="has both model.safetensors and .*delete the stale ones"):
        checkpoints.load(folder)


def test_an_index_may_place_a_part_in_model_safetensors(folder):
    tensors = load_file(folder / "model.safetensors")
    last = list(tensors)[-1]
    save_file({last: tensors[last]}, folder / "more.safetensors")
    save_file({n: t for n, t in tensors.items() if n != last}, folder / "model.safetensors")
    index(
        folder,
        **{n: "model.safetensors" for n in tensors if n != last},
        **{last: "more.safetensors"},
    )
    assert checkpoints.load(folder)


# ---- other things than a model ----
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_adapter_folders_are_named_before_any_advice(bare, weights, with_config):
    (bare / weights).write_bytes(b"x")
    (bare / "adapter_config.json").write_text(json.dumps(ADAPTER))
    if not with_config:
        (bare / "config.json").unlink()
    for call in (checkpoints.load, checkpoints.read_config):
        with pytest.raises(ValueError, match="LoRA adapter of the base model 'owner/base'.*merge"):
            call(bare)


def test_a_model_with_an_adapter_beside_it_is_a_model(folder):
    (folder / "adapter_config.json").write_text("{")
    assert checkpoints.load(folder)


@pytest.mark.parametrize(
    "name, says",
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "adapter.*merge"),
        ("model.layers.0.mlp.up_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "FP8"),
        ("model.layers.0.mlp.up_proj.scales", "MLX"),
        ("layers.0.attention.wq.weight", "for transformers"),
        ("module.model.norm.weight", "wrapped model"),
        ("model.vision_tower.patch.weight", "multimodal"),
        ("transformer.h.0.attn.weight", "another architecture"),
    ],
)
def test_tensors_of_another_kind_are_named(folder, name, says):
    path = folder / "model.safetensors"
    save_file({**load_file(path), name: torch.ones(1)}, path)
    with pytest.raises(ValueError, match=rf"{name.split('.')[0]}.*{says}"):
        checkpoints.load(folder)
    save_file({name: torch.ones(1)}, path)
    path.rename(folder / "other.safetensors")
    with pytest.raises(ValueError, match=says):
        checkpoints.load(folder)


@pytest.mark.parametrize(
    "names, says",
    [
        (["m-Q4_K_M.gguf"], "lamoe convert .*m-Q4_K_M.gguf NEW_FOLDER"),
        (["model_index.json", "unet"], "diffusers"),
        (["model.safetensors.incomplete"], "unfinished download; download the rest"),
        (["model-00001-of-00002.safetensors"], "get the index too"),
        (["optimizer.pt", "scheduler.pt", "rng_state.pth"], "state of a trainer without its model"),
        (["optimizer.pt", "pytorch_model.bin"], "'pytorch_model.bin': pickles"),
        (["consolidated.00.pth"], "pickles"),
        (["zero_to_fp32.py", "global_step10"], "DeepSpeed checkpoint; run its zero_to_fp32"),
        (["__0_0.distcp"], "torch.distributed checkpoint; merge"),
        (["tf_model.h5"], "TensorFlow weights; load it in transformers"),
        (["flax_model.msgpack"], "Flax weights"),
        (["model.onnx", "model.onnx_data"], "ONNX model"),
        (["openvino_model.bin", "openvino_model.xml"], "compiled for another program"),
        (["train.parquet", "dataset_info.json"], "a dataset"),
        ([], "has no weights; expected model.safetensors"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_folders_without_weights_say_what_they_hold(bare, names, says):
    for name in names:
        (bare / name).touch()
    with pytest.raises(ValueError, match=says):
        checkpoints.load(bare)


def test_folders_without_a_config_name_the_folder_inside(saved, tmp_path):
    for step in (5, 40, 300):
        shutil.copytree(saved, tmp_path / f"run/checkpoint-{step}")
    with pytest.raises(ValueError, match=r"no config.json.*checkpoint-300 inside it"):
        checkpoints.load(tmp_path / "run")
    (tmp_path / "hub/snapshots/abc").mkdir(parents=True)
    with pytest.raises(ValueError, match="snapshots/abc inside it"):
        checkpoints.load(tmp_path / "hub")


@pytest.mark.parametrize(
    "content, says",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"PK\3\4" + bytes(100), "a zip archive"),
        (b"\x1f\x8b" + bytes(100), "is not valid JSON|gzip"),
        (b"GGUF" + bytes(100), "a GGUF file"),
        (b"\x80\2}q" + b"x" * 100, "a pickle"),
    ],
)
def test_other_files_under_the_name_of_weights(folder, content, says):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"model.safetensors.* is .*({says})|{says}"):
        checkpoints.load(folder)


def test_files_in_place_of_folders(tmp_path, capsys):
    for name, content, says in [
        ("m.gguf", b"GGUF", "lamoe convert"),
        ("renamed.bin", b"GGUF", "lamoe convert"),
        ("m.zip", b"PK\3\4", "a zip archive"),
        ("m.pt", b"x", "a pickle"),
        ("m.safetensors", b"x", "give the model folder"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=says):
            checkpoints.resolve(tmp_path / name)
    assert main(["convert", str(tmp_path / "renamed.bin"), str(tmp_path / "out")]) == 2
    assert "renamed.bin is not a complete GGUF file" in capsys.readouterr().err
    assert not foreign.is_gguf(tmp_path) and foreign.is_gguf(tmp_path / "absent.gguf")


def test_convert_with_another_tokenizer_names_the_files_of_the_source(
    folder, tmp_path, capsys, caplog
):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("L")
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text("{ }")
    words = ["convert", str(folder), str(tmp_path / "out"), "--tokenizer"]
    assert main([*words, str(tmp_path / "nowhere")]) == 2
    assert "--tokenizer is" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "tok")]) == 0
    assert (tmp_path / "out/tokenizer.json").read_text() == "{ }"
    assert "m: not copied: 'LICENSE', 'tokenizer.json'" in caplog.text


def test_info_on_a_file_of_another_kind(folder, capsys):
    assert main(["info", str(folder / "model.safetensors")]) == 2
    assert "give the model folder" in capsys.readouterr().err


# ---- damaged folders ----
def test_mutated_folders_load_or_are_refused_in_bounded_time_and_memory(saved, tmp_path):
    """Damage config.json, the index or the safetensors header, 100 times each."""
    folder = tmp_path / "m"
    checkpoints.save(checkpoints.load(saved), folder, max_shard_bytes=20_000)
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    files = [folder / "config.json", folder / shards.INDEX, shard]
    good = {path: path.read_bytes() for path in files}
    texts = [b"null", b"-1", b"1e999", b"[]", b"{}", b'"x"', b"9" * 40, b"NaN", b"[[[[", b"true"]
    random, refused, slowest = np.random.default_rng(7), 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(300):
        path = files[i % 3]
        bad = bytearray(good[path])
        end = min(len(bad), 3000)
        for _ in range(random.integers(1, 4)):
            at = int(random.integers(0, end))
            if i % 2:
                bad[at] = random.integers(256)
            else:  # a value of the JSON text becomes another one
                colon = max(bad.rfind(b":", 0, at), 8)
                stop = min((n for n in (bad.find(c, colon) for c in b",}") if n > 0), default=colon)
                bad[colon + 1 : stop] = texts[random.integers(len(texts))]
        path.write_bytes(bad)
        start = time.perf_counter()
        try:
            checkpoints.load(folder)
        except (ValueError, OSError) as e:
            assert str(folder) in str(e)
            refused += 1
        slowest = max(slowest, time.perf_counter() - start)
        path.write_bytes(good[path])
    assert refused > 150 and slowest < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_pipes_are_not_opened(bare):
    os.mkfifo(bare / "other.safetensors")
    os.mkfifo(bare / "adapter_config.json")
    with pytest.raises(ValueError, match="LoRA adapter and not a model"):
        checkpoints.load(bare)
