"""Tests of the plotted training curves: which points, lines and marks they show."""

import json
import math
import shutil
import sys
from unittest import mock

import matplotlib.image
import numpy as np
import pytest

from lamoe import cli
from lamoe.train import curves, loop
from lamoe.train.curves import draw, figure, read
from tiny_run import metrics, raw_recipe, train, trained, write_texts  # noqa: F401

PANELS = [
    "Loss (nats per token)",
    "Gradient norm before clipping",
    "Learning rate",
    "Router entropy (nats)",
    "Load of the busiest expert / mean",
    "Dropped assignments",
    "Tokens per second",
]
RESTART = {"step": 8, "restart_from": 4, "reason": "loss nan"}


def line(step: int, **values) -> dict:
    return {"step": step, "loss": 5 - step / 100, "grad_norm": 1.0, "lr": 1e-3, **values}


def write(folder, lines) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))


def panels(lines, repeated=(), recipe=None, render=False) -> dict:
    """Return {title: axis} of the figure, in the order of PANELS."""
    picture = figure(list(lines), list(repeated), recipe or {}, "name")
    if render:
        picture.canvas.draw()
    axes = {axis.get_title(loc="left"): axis for axis in picture.axes}
    return dict(sorted(axes.items(), key=lambda item: PANELS.index(item[0])))


def points(axis, label: str) -> list[tuple[float, float]]:
    (found,) = (one for one in axis.lines if one.get_label() == label)
    return list(zip(found.get_xdata(), found.get_ydata(), strict=True))


def vertical_lines(axis) -> list[float]:
    return [x[0] for x in (one.get_xdata() for one in axis.lines) if len(x) == 2 and x[0] == x[1]]


# ---- runs ----
def test_a_run_has_its_picture(trained):
    assert matplotlib.image.imread(trained / "curves.png").shape[2] == 4
    lines, repeated = read(trained)
    recipe = json.loads((trained / "recipe.json").read_text())
    axes = panels(lines, repeated, recipe)
    assert list(axes) == PANELS and repeated == []
    logged = [m for m in metrics(trained) if "loss" in m]
    loss = axes[PANELS[0]]
    assert points(loss, "training") == [(m["step"], m["loss"]) for m in logged]
    held = [m for m in metrics(trained) if "heldout_bits_per_token" in m]
    assert points(loss, "held out") == [
        (m["step"], m["heldout_bits_per_token"] * math.log(2)) for m in held
    ]
    assert loss.get_xlim()[1] > 40 and [m["step"] for m in held] == [20, 40]
    assert points(axes[PANELS[1]], "clipped to 1")[0][1] == 1
    assert points(axes[PANELS[3]], "even over 8 experts")[0][1] == math.log(8)
    for title, field in zip(PANELS[3:6], ("router_entropy", "load_max_over_mean", "drop_rate")):
        assert list(axes[title].lines[0].get_ydata()) == [m[field] for m in logged]
    assert axes[PANELS[5]].yaxis.get_major_formatter()(0.125, 0) == "12.5 %"


def test_the_title(trained):
    lines, _ = read(trained)
    recipe = json.loads((trained / "recipe.json").read_text())
    last = [m for m in lines if "loss" in m][-1]
    lines[-2:] = [last | {"skipped_steps": 3, "restarts": 1}, lines[-1]]
    (title,) = (text.get_text() for text in figure(lines, [], recipe, "mine").texts)
    assert title == (
        f"mine: step 40 of 40, 5.12K tokens, loss {last['loss']:.3f}, held out "
        f"{lines[-1]['heldout_bits_per_byte']:.3f} bits per byte, 3 steps skipped, 1 restart"
    )


def test_a_dense_run_has_no_router_panels(tmp_path):
    texts = write_texts(tmp_path / "in")
    raw = raw_recipe(texts, tmp_path / "run", model=dict(model_type="llama"), run=dict(steps=1))
    train(raw, draw=True)
    assert (tmp_path / "run" / "curves.png").exists()
    lines, _ = read(tmp_path / "run")
    axes = panels(lines)
    assert list(axes) == [*PANELS[:3], PANELS[6]]
    assert len(points(axes[PANELS[0]], "training")) == 1  # a run of one step


@pytest.mark.parametrize("missing", ["grad_norm", "lr", "tokens", "tokens_per_s"])
def test_fields_that_a_run_of_before_does_not_have(missing, trained):
    lines, _ = read(trained)
    lines = [{k: v for k, v in m.items() if k != missing} for m in lines]
    assert len(panels(lines)) == len(PANELS) - (missing != "tokens")


def test_only_a_loss():
    assert list(panels([{"step": 1, "loss": 2.0}], render=True)) == PANELS[:1]


def test_many_points_get_a_running_mean():
    lines = [line(step) for step in range(1, 501)]
    axis = panels(lines)[PANELS[0]]
    raw, mean = axis.lines[:2]
    assert len(raw.get_xdata()) == 500 and raw.get_alpha() < 1
    np.testing.assert_allclose(mean.get_ydata()[10:-10], raw.get_ydata()[10:-10])  # a straight line
    noisy = np.where(np.arange(500) % 2, 1.0, 3.0)
    assert np.ptp(curves._running_mean(noisy, 11)[5:-5]) < 0.2
    assert curves._running_mean(np.arange(5.0), 3).tolist() == [0.5, 1, 2, 3, 3.5]


# ---- faults ----
def test_skipped_steps_are_marked_and_not_in_the_line():
    skipped = [line(4, loss=None, grad_norm=None, skipped="loss nan"), line(5, skipped="spike")]
    lines = [*map(line, (1, 2, 3)), *skipped, line(6, loss=math.nan), line(7)]
    axes = panels(lines)
    assert [x for x, _ in points(axes[PANELS[0]], "training")] == [1, 2, 3, 7]
    for title in PANELS[:2]:
        assert [x for x, _ in points(axes[title], "skipped steps")] == [4, 5]
    assert {text.get_text() for text in axes[PANELS[0]].get_legend().get_texts()} == {
        "training",
        "skipped steps",
    }


def test_a_run_in_which_every_step_was_skipped():
    lines = [line(i, loss=None, grad_norm=None, skipped="loss nan") for i in (1, 2)]
    axes = panels(lines, render=True)
    assert len(points(axes[PANELS[0]], "skipped steps")) == 2


def test_steps_before_a_restart_are_grey(tmp_path):
    lines = [*map(line, range(1, 8)), line(8, skipped="loss nan"), RESTART]
    lines += [line(step, loss=1.0, restarts=1) for step in range(5, 11)]
    write(tmp_path / "run", lines)
    kept, repeated = read(tmp_path / "run")
    assert [m["step"] for m in kept if "loss" in m] == list(range(1, 11))
    assert [m["step"] for m in repeated] == [5, 6, 7, 8]
    axes = panels(kept, repeated)
    loss = axes[PANELS[0]]
    assert points(loss, "before a restart") == [(s, 5 - s / 100) for s in (5, 6, 7)]
    assert points(loss, "training")[3:5] == [(4, 4.96), (5, 1.0)]
    assert points(loss, "skipped step") == [(8, 0.97)]
    assert all(vertical_lines(axis) == [4] for axis in axes.values())


def test_two_restarts_from_the_same_step(tmp_path):
    again = [*map(line, range(5, 9)), RESTART]
    write(tmp_path / "run", [*map(line, range(1, 9)), RESTART, *again, line(5), line(6)])
    kept, repeated = read(tmp_path / "run")
    assert [m["step"] for m in kept if "loss" in m] == [1, 2, 3, 4, 5, 6]
    loss = panels(kept, repeated)[PANELS[0]]
    grey = [one for one in loss.lines if one.get_label() == "before a restart"]
    assert [list(one.get_xdata()) for one in grey] == [[5, 6, 7, 8]] * 2
    assert len(loss.get_legend().get_texts()) == 2  # each label once


def test_the_incomplete_line_of_a_live_run(tmp_path):
    load = [[0.25, 0.75], [0.5, 0.5]]
    write(tmp_path / "run", [line(1, expert_load=load, later=7), line(2, expert_load=load)])
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "loss": 1.0, "expert_load": [[0.2')
    kept, _ = read(tmp_path / "run")
    assert kept == [line(1, later=7), line(2)]
    assert draw(tmp_path / "run") == tmp_path / "run" / "curves.png"


# ---- where pictures are made ----
def test_the_command(trained, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("metrics.jsonl", "recipe.json"):
        shutil.copy(trained / name, run)
    assert cli.main(["curves", str(run)]) == 0
    assert capsys.readouterr().out == f"wrote {run}/curves.png\n"
    assert cli.main(["curves", str(run), "--out", str(tmp_path / "x.png")]) == 0
    assert matplotlib.image.imread(tmp_path / "x.png").size
    assert sorted(p.name for p in run.iterdir()) == ["curves.png", "metrics.jsonl", "recipe.json"]


def test_folders_without_curves(tmp_path, capsys):
    assert cli.main(["curves", str(tmp_path / "none")]) == 2
    assert "has no metrics.jsonl; name the folder of a training run" in capsys.readouterr().err
    write(tmp_path / "run", [{"step": 3, "heldout_bits_per_token": 2.0}])
    assert cli.main(["curves", str(tmp_path / "run")]) == 2
    assert "has not logged a step yet" in capsys.readouterr().err


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    texts = write_texts(tmp_path / "in")
    train(raw_recipe(texts, tmp_path / "run", run=dict(steps=1)), quiet=False, draw=True)
    assert "curves" not in capsys.readouterr().out
    assert cli.main(["curves", str(tmp_path / "run")]) == 2
    assert "plots need matplotlib, which is not installed (pip install" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").glob("*curves*")] == []


def test_when_a_run_draws(tmp_path, capsys):
    """After every evaluation and at the end, also if the run stops. A failure ends no run."""
    texts = write_texts(tmp_path / "in")
    raw = raw_recipe(texts, tmp_path / "run", run=dict(steps=4, eval_every=2))
    with mock.patch.object(curves, "draw", side_effect=ZeroDivisionError("broken")) as drawn:
        assert train(raw, quiet=False, draw=True).name == "step-00000004"
    assert drawn.call_count == 3
    assert "warning: the curves were not plotted: ZeroDivisionError: broken" in (
        capsys.readouterr().out
    )
    raw = {**raw_recipe(texts, tmp_path / "bad"), "spikes": dict(skip=False)}
    with (
        mock.patch.object(loop.MasterAdamW, "clip", lambda self: math.nan),
        mock.patch.object(curves, "draw") as drawn,
        pytest.raises(loop.Stopped),
    ):
        train(raw, draw=True)
    assert drawn.call_count == 1
