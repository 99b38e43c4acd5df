"""Tests of the remaining time that `lamoe train` shows, with a clock that the tests set."""

from types import SimpleNamespace

import pytest

from lamoe.train import metrics
from lamoe.train.recipe import Recipe
from lamoe.train.time_left import TimeLeft
from tiny_run import raw_recipe


def recipe(tmp_path, batch: dict | None = None, **run) -> Recipe:
    sections = {"batch": batch} if batch else {}
    return Recipe.from_dict(raw_recipe(tmp_path, tmp_path / "run", run=run, **sections))


def simulate(recipe: Recipe, step_s, pause_s) -> list[tuple[float | None, float]]:
    """Return [(estimate, truth)] after each step, for durations given as functions of the step."""
    left, now, estimates, ends = TimeLeft(recipe), 1000.0, [], []
    for step in range(1, recipe.run.steps + 1):
        now += step_s(step)
        estimates.append(left.update(step, step_s(step), now))
        ends.append(now)
        now += pause_s(step)
    return [(e, ends[-1] - end) for e, end in zip(estimates, ends)]


def test_a_disturbed_start_is_forgotten(tmp_path):
    steps = simulate(recipe(tmp_path, steps=60), lambda s: 10 if s < 21 else 0.5, lambda s: 0)
    assert steps[0][0] is None  # the first step is no measure
    assert steps[10][0] == pytest.approx(10 * 49)
    # 11 of the last 20 steps are fast. The mean since the start would say 216 s.
    assert steps[30] == pytest.approx((0.5 * 29, 0.5 * 29))
    assert steps[59] == (0, 0)


def test_one_slow_step_changes_nothing(tmp_path):
    steps = simulate(recipe(tmp_path, steps=60), lambda s: 90 if s == 40 else 1, lambda s: 0)
    assert [e for e, _ in steps[1:]] == pytest.approx([60 - s for s in range(2, 61)])


def test_evaluations_and_checkpoints_count_as_often_as_they_will_happen(tmp_path):
    run = recipe(tmp_path, steps=200, eval_every=10, save_every=25)

    def pause(step):
        return 0.25 + 2 * (step % 10 == 0) + 30 * (step % 25 == 0)

    steps = simulate(run, lambda s: 1.0, pause)
    for estimate, truth in steps[51:]:  # each kind of pause has happened once
        assert estimate == pytest.approx(truth)
    assert 194 < steps[5][0] < steps[5][1]  # no evaluation yet: its duration is unknown


def test_every_step_evaluated_or_saved(tmp_path):
    run = recipe(tmp_path, steps=20, eval_every=1, save_every=3)
    steps = simulate(run, lambda s: 1.0, lambda s: 2 + 4 * (s % 3 == 0))
    for estimate, truth in steps[4:]:
        assert estimate == pytest.approx(truth)


def test_a_growing_batch_takes_longer(tmp_path):
    batch = dict(size=8, micro=1, ramp_from=1, ramp_steps=50)
    run = recipe(tmp_path, batch, steps=100)
    steps = simulate(run, lambda s: 0.5 * run.batch.size_at(s - 1), lambda s: 0)
    for estimate, truth in steps[1:]:
        assert estimate == pytest.approx(truth)


@pytest.mark.parametrize("queued", [2, 5, 10])
def test_steps_that_are_read_at_once(tmp_path, queued):
    """On a GPU the values of several steps are read at once, and before each evaluation."""
    run = recipe(tmp_path, steps=200, eval_every=20)
    left, now, found = TimeLeft(run), 0.0, {}
    for first in range(1, 201, queued):
        now += queued * 0.5
        steps = range(first, first + queued)
        for step in steps:
            found[step] = left.update(step, 0.5, now), now
        now += 0.1 + 30 * (steps[-1] % 20 == 0)
    assert found[queued][0] is None
    for step in range(20 + queued, 201, queued):
        estimate, end = found[step]
        assert estimate == pytest.approx(found[200][1] - end, abs=1)  # an evaluation takes 30


@pytest.mark.parametrize("with_bar", [False, True])
def test_the_screen_shows_it(tmp_path, monkeypatch, capsys, with_bar):
    run = recipe(tmp_path, steps=100, log_every=10)
    tokens, now = run.batch.size * run.data.seq_len, 0.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    shown = []
    bar = SimpleNamespace(update=lambda task, completed, info: shown.append(info))
    screen = metrics.Screen(run, False, bar if with_bar else None)
    for step in range(1, 101):
        seconds = 10.0 if step < 21 else 1.5
        now += seconds
        screen.step(step, dict(loss=1.0, tokens_per_s=tokens / seconds, mfu=0.1, lr=1e-3))
    text = shown if with_bar else capsys.readouterr().out.splitlines()
    assert len(text) == (100 if with_bar else 11)
    assert "left" not in text[0]
    assert text[39 if with_bar else 4].endswith("lr 1.0e-03  0:01:30 left")  # after step 40
    assert text[-1].endswith("0:00:00 left")
