"""Tests that a run folder belongs to one run, process and recipe, and that other files are kept."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from test_train import signal_after, texts  # noqa: F401 (texts is a fixture)

import lamoe
from lamoe.checkpoints import resolve, runs
from lamoe.train import checkpoint, run_folder
from tiny_run import metrics, raw_recipe, train, trained  # noqa: F401 (trained is a fixture)


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


def refused(raw: dict, **options) -> str:
    with pytest.raises(ValueError) as e:
        train(raw, **options)
    return str(e.value)


# ---- the place of a run ----
def test_a_place_that_cannot_be_a_run_folder_is_named(texts, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "recipe.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    for out, words in (
        ("file", "run.out {} is a file, not a folder; choose another run.out"),
        ("file/x", "lies under {}, which is a file"),
        ("x" * 300, "has a name that is too long"),
        ("runs", "run.out {} holds the runs a, so it is not the folder of one run"),
        ("model", "{} holds config.json but no recipe.json, so it is not a run folder"),
        ("", "is the root or your home folder"),
    ):
        place = tmp_path / out
        before = sorted(tmp_path.rglob("*"))
        first = tmp_path / out.partition("/")[0]
        assert words.format(first if "{}" in words else "") in refused(raw_recipe(texts, place))
        assert sorted(tmp_path.rglob("*")) == before
    assert "is the root or your home folder" in refused(raw_recipe(texts, "/"))
    assert "is the root or your home folder" in refused(raw_recipe(texts, "~"))


def test_a_run_is_not_written_into_its_own_source(texts, tmp_path):
    source = shutil.copytree(texts, tmp_path / "texts")
    for out in (source, source / "run"):
        assert "so the files of the run would be read as text" in refused(raw_recipe(source, out))
    assert sorted(source.iterdir()) == sorted(source / p.name for p in Path(texts).iterdir())


def test_a_tilde_in_run_out_is_the_home_folder(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    train(raw_recipe(texts, "~/run", run=dict(steps=1)))
    assert (tmp_path / "run" / "latest").exists()


# ---- space on the disk ----
def disk(monkeypatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")(1 << 40, 0, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_a_run_whose_checkpoint_does_not_fit_is_refused_at_the_start(texts, tmp_path, monkeypatch):
    disk(monkeypatch, 300_000)
    said = refused(raw_recipe(texts, tmp_path / "run", run=dict(steps=6)))
    assert "a checkpoint needs about 699.4 kB" in said and "has 300.0 kB free" in said
    assert "free some space, or choose another --run.out" in said
    assert not (tmp_path / "run").exists()


def test_a_run_whose_second_checkpoint_does_not_fit_warns(texts, tmp_path, monkeypatch, capsys):
    disk(monkeypatch, 1_000_000)
    raw = raw_recipe(texts, tmp_path / "run", run=dict(steps=6, save_every=3, keep=2))
    train(raw, quiet=False)
    assert "warning: a checkpoint needs about" in (out := "".join(capsys.readouterr()))
    assert "but the run adds up to 2 checkpoints" in out


def test_the_needed_space_is_that_of_a_checkpoint(texts, tmp_path, monkeypatch):
    for dtype in ("float32", "bfloat16"):
        run = tmp_path / dtype
        raw = raw_recipe(texts, run, run=dict(steps=1, dtype=dtype))
        disk(monkeypatch, 1 << 40)
        last = train(raw)
        names = ("state.safetensors", "model/model.safetensors")
        size = sum((last / name).stat().st_size for name in names)
        disk(monkeypatch, int(0.9 * size))
        raw["run"]["out"] = str(tmp_path / f"{dtype}-2")
        assert "a checkpoint needs about" in refused(raw)


def test_no_message_begins_with_an_empty_error_number(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    def write(folder: Path) -> None:
        checkpoint.save_tensors(folder / "state.safetensors", {"x": torch.zeros(1)})

    for error, words in (
        (None, "could not be saved in"),
        (OSError("own words"), "own words"),
    ):
        with monkeypatch.context() as m, pytest.raises(OSError) as e:
            m.setattr(checkpoint, "save_file", full if error is None else raising(error))
            checkpoint.save(tmp_path, 1, write)
        assert words in str(e.value) and "Errno" not in str(e.value)
        assert "there is no earlier checkpoint" in str(e.value) and e.value.errno is not None


def raising(error: Exception):
    def fail(*args, **kwargs):
        raise error

    return fail


# ---- resuming ----
def test_a_finished_run_names_the_way_to_train_on(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    raw = raw_recipe(tmp_path / "texts", run)
    raw["data"]["sources"] = list(runs_sources(run))
    raw["run"] |= dict(steps=48, eval_every=20, eval_tokens=200, save_every=20)
    said = refused(raw, resume=True)
    assert "run.steps was 40, now 48 (the learning rate of every step depends on it)" in said
    assert f"without --resume: --run.init_from {run} --run.out NEW" in said
    raw["optim"]["weight_decay"] = 0.5
    said = refused(raw, resume=True)
    assert "optim.weight_decay was 0.1, now 0.5" in said and "run.steps was 40, now 48" in said
    # the way that the message names
    raw["run"] |= dict(out=str(tmp_path / "new"), init_from=str(run), steps=1)
    assert train(raw).name == "step-00000001"


def runs_sources(run: Path) -> list[str]:
    return run_folder._read_recipe(run / "recipe.json")["data"]["sources"]


def test_what_cannot_be_resumed_is_named(trained, texts, tmp_path):
    raw = raw_recipe(texts, tmp_path / "empty")
    assert "holds no checkpoint; leave --resume out to start" in refused(raw, resume=True)
    model = shutil.copytree(runs.latest(trained) / "model", tmp_path / "model")
    said = refused(raw_recipe(texts, model), resume=True)
    assert f"{model} is a model folder, not a run" in said and "--run.init_from" in said


def test_a_checkpoint_of_another_version_is_named(texts, tmp_path):
    raw = raw_recipe(texts, tmp_path / "run", run=dict(steps=4, save_every=2))
    with signal_after(2):
        last = train(raw)
    state = checkpoint.load_tensors(last / "state.safetensors")
    del state["data"]

    def write(folder: Path) -> None:
        shutil.copytree(last / "model", folder / "model")
        checkpoint.save_tensors(folder / "state.safetensors", state)

    checkpoint.save(tmp_path / "run", 2, write)
    said = refused(raw, resume=True)
    assert "does not fit this version of lamoe (KeyError: 'data')" in said
    assert "--run.init_from" in said


# ---- a run as a model ----
def test_a_run_is_a_model_in_python_too(trained, tmp_path, monkeypatch):
    model = runs.latest(trained) / "model"
    for name in (trained, str(trained), runs.latest(trained), model):
        assert resolve(name) == model
    assert lamoe.load(trained).config == lamoe.load(model).config
    assert lamoe.LLM(trained, max_model_len=8).max_model_len == 8
    monkeypatch.setenv("HOME", os.fspath(trained.parent))
    assert resolve(f"~/{trained.name}") == model
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(ValueError, match="is a training run without a checkpoint yet"):
        lamoe.load(tmp_path)
