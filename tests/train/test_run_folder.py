"""Tests that a run folder belongs to one run, process and recipe, and that other files are kept."""

import pytest
from test_train import signal_after, texts  # noqa: F401 (texts is a fixture)

from lamoe.train import run_folder
from tiny_run import metrics, raw_recipe, train


def test_two_processes_do_not_share_a_run_folder(texts, tmp_path):
    raw = raw_recipe(texts, tmp_path / "run")
    with run_folder.locked(tmp_path / "run"):
        with pytest.raises(ValueError, match="another process trains in .*run"):
            train(raw)
    train(raw)  # the lock is free again


@pytest.mark.parametrize("text", ['{"pasta": {}}', '["x"]', "not json", '{"model": 1, "run": {}}'])
def test_a_foreign_recipe_file_is_not_overwritten(texts, tmp_path, text):
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    (tmp_path / "run" / "recipe.json").write_text(text)
    (tmp_path / "run" / "tokenizer" / "precious.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ValueError, match="recipe.json is not the recipe of a lamoe run"):
            train(raw_recipe(texts, tmp_path / "run"), resume=resume)
    assert (tmp_path / "run" / "recipe.json").read_text() == text and (
        tmp_path / "run" / "tokenizer" / "precious.txt"
    ).read_text() == "mine"


def test_a_missing_source_is_reported_before_writing(texts, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        train(raw_recipe(texts, tmp_path / "run", data=dict(sources=[str(tmp_path / "nowhere")])))
    assert not (tmp_path / "run").exists()


def test_a_diverged_run_resumes_with_a_lower_learning_rate(texts, tmp_path):
    raw = raw_recipe(texts, tmp_path / "run", run=dict(steps=6, save_every=2))
    with signal_after(3):
        train(raw)
    raw["optim"]["lr"] = raw["optim"]["lr"] / 10
    train(raw, resume=True)
    rates = {m["step"]: m["lr"] for m in metrics(tmp_path / "run") if "lr" in m}
    assert rates[6] < rates[3] / 5
