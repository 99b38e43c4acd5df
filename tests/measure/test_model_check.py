"""Tests of `lamoe doctor MODEL`: damaged and intact models of every kind."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lamoe
from lamoe.backends.cpu import native
from lamoe.checkpoints import checksums, shards
from lamoe.cli import main
from lamoe.measure import model_check
from lamoe.train import checkpoint
from oracles import tiny
from tiny_engine import greedy, llm
from tiny_packed import pack

CONFIG = tiny.config("llama", num_key_value_heads=2, num_hidden_layers=1, eos_token_id=2)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a model of every kind that lamoe writes."""
    root = tmp_path_factory.mktemp("written")
    lamoe.save(tiny.model(CONFIG, seed=3, dtype=torch.float32), root / "hf")
    if native.available():
        pack(root / "hf", root / "packed", "int8")
    checkpoint.save(root / "run", 1, lambda f: shutil.copytree(root / "hf", f / "model"))
    (root / "run" / "recipe.json").write_text("{}")
    engine = llm("gqa")
    engine.generate([list(range(40))], greedy(1))
    engine.save_cache(root / "rows", list(range(40)))
    return root


@pytest.fixture
def models(written, tmp_path):
    return shutil.copytree(written, tmp_path / "models")


KINDS = {
    "hf": "Hugging Face folder",
    "packed": "packed folder",
    "run": "run folder",
    "rows": "saved prefix",
}


def flip(file, at: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 4
    file.write_bytes(raw)


@pytest.mark.parametrize("name", KINDS)
def test_intact_and_damaged_models(models, name, capsys):
    if not (models / name).exists():
        pytest.skip("needs the compiled kernels")
    found = model_check.examine(models / name)
    assert (found["verdict"], found["problems"], found["notes"]) == ("good", [], [])
    assert found["kind"] == KINDS[name] and 0 < found["tensors"] == found["with_checksum"]
    assert main(["doctor", str(models / name)]) == 0
    assert capsys.readouterr().out.endswith("verdict   good\n")
    inside = [models / name] if name == "rows" else (models / name).rglob("*.safetensors")
    for file in inside:
        flip(file, -40)
        flip(file, -3)
    assert main(["doctor", str(models / name), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "damaged" and len(found["problems"]) >= 1
    assert all("damaged" in problem for problem in found["problems"])


def test_every_damaged_tensor_is_listed(models):
    file = models / "hf" / shards.SINGLE
    header = shards.read_header(file)
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    for tensor in header.values():
        flip(file, start + tensor.begin)
    problems = model_check.examine(models / "hf")["problems"]
    assert [p.split("'")[1] for p in problems] == list(header)


def test_changed_side_files_are_problems_here(models):
    (models / "hf" / "config.json").write_text((models / "hf" / "config.json").read_text() + "\n")
    [problem] = model_check.examine(models / "hf")["problems"]
    assert "config.json has changed since it was written" in problem


def foreign(folder, change) -> dict:
    """Write a folder without checksums, with changed tensors, and examine it."""
    (folder / checksums.FILE).unlink()
    tensors = load_file(folder / shards.SINGLE)
    change(tensors)
    save_file(tensors, folder / shards.SINGLE, {"format": "pt"})
    return model_check.examine(folder)


NORM, MATRIX = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t[NORM].fill_(float("nan")), f"'{NORM}' has .* not finite"),
        (lambda t: t[MATRIX].view(-1)[5:7].fill_(float("inf")), "has 2 values that are not finite"),
        (lambda t: t[MATRIX].zero_(), "is all zero"),
        (lambda t: t.pop(MATRIX), "1 of .* tensors of the config are missing"),
        (lambda t: t.update(more=torch.ones(2)), "tensors do not belong to the config"),
    ],
)
def test_models_of_other_programs(models, change, words):
    found = foreign(models / "hf", change)
    [problem] = found["problems"]
    assert re.search(words, problem), problem
    assert found["with_checksum"] == 0 and "no checksums" in found["notes"][0]


def test_other_files_and_switched_off_checks(models, monkeypatch):
    assert foreign(models / "hf", lambda t: None)["problems"] == []
    (models / "text").write_text("no model, but long enough for a header")
    for path in (models / "text", models / "absent"):
        [problem] = model_check.examine(path)["problems"]
        assert str(path) in problem
    monkeypatch.setenv("LAMOE_VERIFY", "0")
    assert "LAMOE_VERIFY=0" in model_check.examine(models / "rows")["problems"][0]


def test_the_smallest_run_without_a_checkpoint(tmp_path):
    (tmp_path / "recipe.json").write_text("{}")
    [problem] = model_check.examine(tmp_path)["problems"]
    assert "without a checkpoint" in problem
