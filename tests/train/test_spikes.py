"""Tests of skipped steps and automatic restarts."""

import math
import random
import signal
from unittest import mock

import pytest
import torch

from lamoe import cli
from lamoe.model.transformer import Transformer
from lamoe.train import checkpoint, loop
from lamoe.train.optim import MasterAdamW
from lamoe.train.recipe import Recipe
from lamoe.train.spikes import SpikeGuard, Spikes
from tiny_run import metrics, raw_recipe, same, state, train, write_texts, write_toml


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "in")


# ---- the rule ----
def healthy(steps: int, seed: int = 0):
    """Yield (loss, gradient norm) like those of a run that begins: both fall, with noise."""
    rng = random.Random(seed)
    for step in range(steps):
        loss = 3 + 6 * math.exp(-step / 40) + rng.gauss(0, 0.1)
        yield loss, (0.5 + 4 * math.exp(-step / 15)) * rng.lognormvariate(0, 0.25)


def guard_after(steps: int, **keys) -> SpikeGuard:
    guard = SpikeGuard(Spikes(**keys))
    assert not any(guard.check(*values) for values in healthy(steps))
    return guard


@pytest.mark.parametrize("seed", range(5))
def test_healthy_steps_are_accepted(seed):
    guard = SpikeGuard(Spikes())
    assert [guard.check(*v) for v in healthy(600, seed)] == [""] * 600
    assert guard.skipped == 0 and len(guard.losses) == 128


def test_a_norm_that_rises_during_warm_up_is_accepted():
    """A rise of the norm by 20 times within 100 steps is no spike, as each step rises a little."""
    guard = SpikeGuard(Spikes())
    assert not any(guard.check(5.0, 0.1 * 20 ** (min(i, 100) / 100)) for i in range(200))


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (3.0, math.inf), (-math.inf, math.nan)])
def test_values_that_are_not_finite_are_skipped_from_the_first_step(loss, norm):
    guard = SpikeGuard(Spikes())
    assert guard.check(loss, norm) == f"loss {loss}, gradient norm {norm}"
    assert (guard.in_a_row, guard.skipped, list(guard.losses)) == (1, 1, [])


def test_spikes_are_skipped():
    guard = guard_after(200)
    assert guard.check(3.0, 4.0) == "" == guard.check(5.0, 0.5)  # unusual, but no spikes
    assert guard.check(3.0, 9.0).startswith("gradient norm 9, 1")
    assert "times the median of the last 128 accepted steps" in guard.check(3.0, 60.0)
    assert guard.check(6.5, 0.5).startswith("loss 6.5, 3.")
    assert (guard.in_a_row, guard.skipped) == (3, 3)
    assert guard.check(3.0, 0.5) == "" and (guard.in_a_row, guard.skipped) == (0, 3)


def test_the_limits_of_the_documentation():
    """On a constant history, 6 sigmas are 11.02 times the norm, and 2.4 nats of the loss."""
    guard = SpikeGuard(Spikes())
    for _ in range(128):
        guard.check(3.0, 0.5)
    assert guard.check(5.39, 5.5) == ""
    assert guard.check(5.41, 0.5) and guard.check(3.0, 5.52)


def test_a_noisy_history_tolerates_more():
    guard, rng = SpikeGuard(Spikes()), random.Random(0)
    assert not any(guard.check(3.0, rng.lognormvariate(0, 1)) for _ in range(2000))
    assert guard.check(3.0, 1e4)


def test_skipped_steps_do_not_enter_the_history():
    guard = guard_after(128)
    before = guard.state_dict()
    for _ in range(500):
        assert guard.check(3.0, 100.0)
    assert guard.state_dict() == {**before, "in_a_row": 500, "skipped": 500}


def test_spikes_are_judged_after_half_a_window():
    for steps, found in ((63, False), (64, True)):
        guard = SpikeGuard(Spikes())
        for _ in range(steps):
            guard.check(3.0, 1.0)
        assert bool(guard.check(3.0, 1000.0)) is found


def test_sigmas_and_window_are_used():
    guard = guard_after(200, window=16, sigmas=20.0)
    assert len(guard.losses) == 16
    assert guard.check(3.0, 500.0) == "" and guard.check(3.0, 0.5 * math.exp(9))


def test_a_norm_of_zero():
    guard = SpikeGuard(Spikes())
    assert not any(guard.check(0.0, 0.0) for _ in range(200))


def test_without_skipping_the_first_value_that_is_not_finite_stops():
    guard = guard_after(200, skip=False)
    assert guard.check(20.0, 1e6) == "" and not guard.must_stop
    assert guard.check(3.0, math.nan) and guard.must_stop


def test_the_state_survives(tmp_path):
    guard = guard_after(100)
    guard.checkpoint_saved(100)
    guard.check(math.nan, 1.0)
    guard.checkpoint_saved(101)
    guard.restarts = 1
    checkpoint.save_tensors(tmp_path / "s.safetensors", guard.state_dict())
    other = SpikeGuard(Spikes())
    other.load_state_dict(checkpoint.load_tensors(tmp_path / "s.safetensors"), 101)
    assert other.state_dict() == guard.state_dict() and other.good_step == 100
    other.load_state_dict(None, 7)  # a checkpoint of before
    assert other.state_dict() == {**SpikeGuard(Spikes()).state_dict(), "good_step": 7}


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(sigmas=0.0), "spikes.sigmas is 0.0; it must be a finite number above 0"),
        (dict(sigmas=math.nan), "spikes.sigmas is nan"),
        (dict(window=7), "spikes.window is 7; it must be at least 8"),
        (dict(max_in_a_row=0), "spikes.max_in_a_row is 0; it must be at least 1"),
        (dict(restarts=-1), "spikes.restarts is -1; it must be at least 0"),
        (dict(restarts=1), "run.save_every is 0, so there would be no checkpoint to restart from"),
        (dict(skip="maybe"), "spikes.skip"),
        (dict(sigma=3), "unknown key spikes.sigma, did you mean 'sigmas'"),
    ],
)
def test_bad_keys(keys, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict({**raw_recipe(tmp_path, tmp_path / "run"), "spikes": keys})


# ---- training ----
def faults(*batches: int, value: float = math.nan):
    """Make the loss of these batches `value` times too large. Batches are counted in the text.

    The fault belongs to the rows of a batch, so it comes back whenever they do.
    """
    original, rows, bad = Transformer.loss, {}, set(batches)

    def loss(self, ids, *args):
        return original(self, ids, *args) * (
            value if rows.get(ids.numpy().tobytes()) in bad else 1.0
        )

    next_batch = loop.data.Batches.next_batch

    def numbered(self, n):
        number = self.rows // n
        ids, segments = next_batch(self, n)
        for start in range(0, n, 2):
            rows[ids[start : start + 2, :-1].tobytes()] = number
        return ids, segments

    return (
        mock.patch.object(Transformer, "loss", loss),
        mock.patch.object(loop.data.Batches, "next_batch", numbered),
    )


def run(raw: dict, *batches: int, value: float = math.nan, stop_after: int = 0, **how):
    """Train with faults, and stop by a signal after this many steps of the process."""
    original, calls = loop.MetricsLog.step, []

    def step(self, *args, **values):
        original(self, *args, **values)
        calls.append(1)
        if len(calls) == stop_after:
            signal.raise_signal(signal.SIGTERM)

    bad_loss, numbered = faults(*batches, value=value)
    with bad_loss, numbered, mock.patch.object(loop.MetricsLog, "step", step):
        return train(raw, **how)


def recipe(texts, out, spikes=None, **keys) -> dict:
    raw = raw_recipe(texts, out, run=dict(steps=8, keep=0, **keys))
    return {**raw, "spikes": {"max_in_a_row": 3, **(spikes or {})}}


def test_a_skipped_step_changes_nothing_but_the_place_in_the_text(texts, tmp_path, capsys):
    raw = recipe(texts, tmp_path / "run", save_every=1, log_every=4)
    with mock.patch.object(loop, "_is_due", lambda step, every: True):  # also between skipped steps
        last = run(raw, 3, quiet=False)
    lines = metrics(tmp_path / "run")
    assert last.name == "step-00000008"
    assert "step 4: skipped, loss nan, gradient norm nan; 1 skipped so far" in (
        out := capsys.readouterr().out
    )
    assert "done: 8 steps (1 step skipped)" in out

    before = state(tmp_path / "run" / "step-00000003")
    assert not (tmp_path / "run" / "step-00000004").exists()  # not saved while skipping
    with mock.patch.object(loop, "_is_due", lambda step, every: True):
        run(recipe(texts, tmp_path / "short", save_every=1), 3, stop_after=4)
    after = state(tmp_path / "short" / "step-00000004")
    assert same(before["optimizer"], after["optimizer"])
    assert before["weights"] == after["weights"]
    assert (before["data"]["rows"], after["data"]["rows"]) == (12, 16)

    steps = {m["step"]: m for m in lines if "loss" in m}
    assert steps[4]["skipped"] == "loss nan, gradient norm nan"
    assert steps[4]["loss"] is None is steps[4]["grad_norm"] and steps[4]["skipped_steps"] == 1
    assert "skipped" not in steps[8] and steps[8]["skipped_steps"] == 1
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert state(last)["optimizer"]["adamw"][0]["step"] == 7


def test_a_finite_spike_is_skipped(texts, tmp_path):
    raw = recipe(texts, tmp_path / "run", spikes=dict(window=8))
    run(raw, 6, value=100.0)
    lines = {m["step"]: m for m in metrics(tmp_path / "run") if "loss" in m}
    assert lines[7]["skipped"].startswith("gradient norm") and lines[7]["loss"] > 100
    assert [step for step, m in lines.items() if "skipped" in m] == [7]


def test_too_many_skipped_steps_in_a_row_stop_the_run(texts, tmp_path, capsys):
    raw = recipe(texts, tmp_path / "run", save_every=2)
    file = write_toml(tmp_path / "r.toml", raw)
    bad_loss, numbered = faults(1, 3, 4, 5)
    with bad_loss, numbered, mock.patch.object(loop, "measure_peak", return_value=1e10):
        assert cli.main(["train", str(file), "--quiet"]) == 3
    assert (
        "step 6: loss nan, gradient norm nan. Stopped after 3 skipped steps in a row, which did "
        f"not change the weights; the batch is in {tmp_path}/run/bad-batch-6.safetensors. "
        f"Resume from {tmp_path}/run/step-00000003 with --resume and a lower --optim.lr"
    ) in capsys.readouterr().err
    bad = checkpoint.load_tensors(tmp_path / "run" / "bad-batch-6.safetensors")
    assert bad["ids"].shape == bad["segments"].shape == (4, 33) and math.isnan(bad["loss"])
    # With a restart, the run gets past the same batches.
    assert run({**raw, "spikes": dict(max_in_a_row=3, restarts=1)}, 3, 4, 5, resume=True)
    assert metrics(tmp_path / "run")[-2]["restarts"] == 1


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return run(recipe(texts, out, save_every=2), 3, 4, 6)


@pytest.mark.parametrize("first", [3, 4, 6])
def test_resume_is_bitwise_between_skipped_steps(first, whole, texts, tmp_path):
    """A run that is stopped before, within or after a row of skipped steps resumes exactly."""
    raw = recipe(texts, tmp_path / "parts", save_every=2)
    assert run(raw, 3, 4, 6, stop_after=first).name == f"step-{first:08d}"
    resumed = run(raw, 3, 4, 6, resume=True)
    assert same(state(resumed), state(whole))
    assert metrics(tmp_path / "parts") == metrics(whole.parent)
    assert state(whole)["spikes"]["skipped"] == 3


# ---- restarts ----
BAD = (5, 6, 7)  # batches; the checkpoints before and after are those of the steps 4 and 6


@pytest.fixture(scope="module")
def restarted(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("restarted") / "run"
    run(recipe(texts, out, spikes=dict(restarts=2), save_every=2), *BAD)
    return out


def test_a_restart_goes_back_in_steps_but_not_in_the_text(restarted):
    lines = metrics(restarted)
    steps = [(m["step"], m.get("restart_from"), bool(m.get("skipped"))) for m in lines[:-1]]
    assert steps == [
        *((step, None, step > 5) for step in range(1, 9)),
        (8, 4, False),  # the restart
        *((step, None, False) for step in range(5, 9)),
    ]
    end = state(restarted / "step-00000008")
    assert end["data"]["rows"] == 4 * 12  # 8 batches before the restart, 4 after it
    assert end["spikes"]["restarts"] == 1 and end["spikes"]["skipped"] == 3
    assert end["optimizer"]["adamw"][0]["step"] == 8
    assert lines[-2]["restarts"] == 1 and lines[8]["reason"].startswith("loss nan")
    assert (restarted / "bad-batch-8.safetensors").exists()


@pytest.mark.parametrize("first", [7, 9, 11])
def test_a_restarted_run_resumes_bitwise(first, restarted, texts, tmp_path):
    """Stop between skipped steps, after the restart, and after the next checkpoint."""
    raw = recipe(texts, tmp_path / "run", spikes=dict(restarts=2), save_every=2)
    run(raw, *BAD, stop_after=first)
    resumed = run(raw, *BAD, resume=True)
    assert same(state(resumed), state(restarted / "step-00000008"))
    assert metrics(tmp_path / "run") == metrics(restarted)


def test_a_run_killed_after_its_restart_repeats_it(restarted, texts, tmp_path):
    """Without a checkpoint since the restart, the resumed run meets the same fault again."""
    raw = recipe(texts, tmp_path / "run", spikes=dict(restarts=2), save_every=2)
    with pytest.raises(ZeroDivisionError), mock.patch.object(loop, "_restart", lambda *a: 1 // 0):
        run(raw, *BAD)
    resumed = run(raw, *BAD, resume=True)
    assert same(state(resumed), state(restarted / "step-00000008"))
    assert metrics(tmp_path / "run") == metrics(restarted)


def test_restarts_end(texts, tmp_path):
    raw = recipe(texts, tmp_path / "run", spikes=dict(restarts=2), save_every=2)
    with pytest.raises(loop.Stopped, match="step 5: loss nan.* after 3 skipped steps in a row"):
        run(raw, *range(2, 40))
    lines = metrics(tmp_path / "run")
    assert [(m["step"], m["restart_from"]) for m in lines if "restart_from" in m] == [(5, 2)] * 2
    assert lines[-1]["skipped_steps"] == 9


def test_no_checkpoint_before_the_skipped_steps(texts, tmp_path):
    raw = recipe(texts, tmp_path / "run", spikes=dict(restarts=2), save_every=4)
    with pytest.raises(loop.Stopped, match="No checkpoint was saved yet"):
        run(raw, 1, 2, 3)


def test_without_skipping_a_run_can_restart(texts, tmp_path):
    raw = recipe(texts, tmp_path / "run", spikes=dict(skip=False, restarts=1), save_every=2)
    run(raw, 3)
    assert [m["step"] for m in metrics(tmp_path / "run") if "restart_from" in m] == [4]
    assert state(tmp_path / "run" / "step-00000008")["data"]["rows"] == 4 * 10


# ---- runs of before ----
def test_a_run_of_before_resumes(texts, tmp_path):
    """Checkpoints and recipes had no part about spikes."""
    import json

    raw = recipe(texts, tmp_path / "run")
    run(raw, stop_after=4)
    file = tmp_path / "run" / "step-00000004" / "state.safetensors"
    content = checkpoint.load_tensors(file)
    del content["spikes"]
    checkpoint.save_tensors(file, content)
    from lamoe.checkpoints import runs

    (file.parent / "manifest.json").unlink()
    runs.write_manifest(file.parent, 4, 1)
    saved = json.loads((tmp_path / "run" / "recipe.json").read_text())
    del saved["spikes"]
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(saved))
    resumed = run(raw, 5, resume=True)
    assert resumed.name == "step-00000008"
    assert state(resumed)["spikes"]["skipped"] == 1 and len(state(resumed)["spikes"]["losses"]) == 3


def test_discard_clears_the_gradients():
    model = torch.nn.Linear(3, 2)
    optimizer = MasterAdamW(model, Recipe.from_dict({"model": {"preset": "tiny"}}).optim)
    before = [p.clone() for p in model.parameters()]
    model(torch.ones(1, 3)).sum().backward()
    optimizer.collect()
    assert optimizer.clip() > 0
    optimizer.discard()
    assert all(m.grad is None for m in optimizer.masters)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
