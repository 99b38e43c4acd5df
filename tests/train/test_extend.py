"""Tests of runs that start from the weights of another run, for example to extend the context."""

import json
import shutil

import pytest
import torch
from test_train import signal_after

from lamoe.checkpoints import hf
from lamoe.model.config import RopeScaling
from lamoe.text.tokenizer import Tokenizer
from lamoe.train import checkpoint
from lamoe.train.recipe import Recipe
from tiny_run import metrics, raw_recipe, state, train, trained, write_texts  # noqa: F401 (trained is a fixture)

YARN = dict(factor=8.0, original_max_position_embeddings=32)


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "more", seed=5)


def longer(texts, out, start, **changes) -> dict:
    changes = {
        "model": dict(max_position_embeddings=256, rope_scaling=YARN),
        "data": dict(seq_len=96),
        **changes,
    }
    return raw_recipe(
        texts,
        out,
        **changes,
        run={"init_from": str(start), "steps": 4, "save_every": 2, **changes.pop("run", {})},
    )


def test_training_starts_from_the_old_weights_with_a_new_rope(trained, texts, tmp_path):
    """The first loss is that of the old weights under the new config.

    With random weights it would be ln 300 = 5.7.
    """
    last = train(longer(texts, tmp_path / "run", trained))
    config = hf.read_config(last / "model")
    assert config.rope_scaling == RopeScaling(**YARN) and config.max_position_embeddings == 256
    first = metrics(tmp_path / "run")[0]
    assert first["step"] == 1 and first["loss"] < 4
    old, new = hf.load(checkpoint.latest(trained) / "model"), hf.load(last / "model")
    assert all(
        0 < (a - b).norm() < 0.5 * a.norm()
        for a, b in zip(old.parameters(), new.parameters())
        if a.dim() > 1
    )
    a, b = (Tokenizer.load(f / "model") for f in (checkpoint.latest(trained), last))
    # The tokenizer is that of the first run, although the text differs.
    assert a.encode("the cat sang") == b.encode("the cat sang")
    with torch.no_grad():
        assert torch.isfinite(new(torch.zeros(1, 200, dtype=torch.int64))).all()


def test_start_from_a_model_folder_with_another_tokenizer(trained, texts, tmp_path):
    shutil.copytree(checkpoint.latest(trained) / "model", tmp_path / "model")
    a = train(longer(texts, tmp_path / "a", trained))
    b = train(longer(texts, tmp_path / "b", tmp_path / "model"))
    assert state(a)["weights"] == state(b)["weights"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    raw = longer(texts, tmp_path / "c", tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        train(raw)
    raw["data"]["tokenizer"] = str(tmp_path / "a" / "tokenizer")
    assert state(train(raw))["weights"] == state(a)["weights"]


def test_resume_does_not_need_the_starting_model(trained, texts, tmp_path):
    whole = train(longer(texts, tmp_path / "whole", trained))
    shutil.copytree(checkpoint.latest(trained) / "model", tmp_path / "model")
    raw = longer(texts, tmp_path / "run", tmp_path / "model")
    with signal_after(3):
        train(raw)
    shutil.rmtree(tmp_path / "model")
    assert state(train(raw, resume=True))["weights"] == state(whole)["weights"]


@pytest.mark.parametrize(
    "changes, what",
    [
        (dict(model=dict(hidden_size=48)), "model.hidden_size is 48, there 32"),
        (
            dict(model=dict(model_type="llama"), balance=dict(devices=1)),
            "model.model_type is 'llama', there 'deepseek_v2'",
        ),
        (dict(run=dict(init_from="/nowhere/at/all")), "there is no folder"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_writing(
    trained, texts, tmp_path, changes, what
):
    raw = longer(texts, tmp_path / "run", trained)
    if "model" in changes and "model_type" in changes["model"]:
        raw["model"] = raw_recipe(texts, tmp_path, model=changes["model"])["model"] | {
            "max_position_embeddings": 256
        }
    for section, values in changes.items():
        raw[section].update(values)
    with pytest.raises(ValueError, match=what):
        train(raw)
    assert not (tmp_path / "run").exists()


def test_shipped_recipe_extends_the_demo_model():
    """recipes/extend.toml extends the model of recipes/tiny.toml to 16 times its context."""
    tiny, extend = (Recipe.load(f"recipes/{name}.toml") for name in ("tiny", "extend"))
    assert (
        extend.run.init_from == tiny.run.out
        and extend.model.rope_scaling.original_max_position_embeddings == tiny.data.seq_len
    )
    assert (
        extend.model.replace(
            rope_scaling=None, max_position_embeddings=tiny.model.max_position_embeddings
        )
        == tiny.model
    )
    assert (
        extend.model.max_position_embeddings == extend.model.rope_scaling.factor * tiny.data.seq_len
    )
    assert (
        json.loads(json.dumps(extend.to_dict())) == extend.to_dict()
        and Recipe.from_dict(extend.to_dict()) == extend
    )
