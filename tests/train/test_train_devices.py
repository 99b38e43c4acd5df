"""Tests of training on an accelerator, without one: values that are read later, torch.compile.

`queued` makes the CPU behave like an accelerator: steps are queued, the device decides about
skipped steps, and values are read every few steps.
"""

import json
import math
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_spikes import faults
from test_train import signal_after

from lamoe import cli, kernels
from lamoe.model.routing import Chosen
from lamoe.train import checkpoint, devices, loop, recompute
from lamoe.train.optim import MasterAdamW
from lamoe.train.recipe import Recipe
from tiny_run import MLA, MOE, metrics, raw_recipe, same, state, train, write_texts, write_toml


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "in")


@pytest.fixture
def queued(monkeypatch):
    """Queue steps on the CPU, and return the list of how many were read at once."""
    read, is_read_at, init = [], devices.is_read_at, MasterAdamW.__init__

    def is_read_at_on_device(device, step, run, queued):
        due = is_read_at(torch.device("mps"), step, run, queued)
        read.append(queued)
        return due

    def init_on_device(self, *args):
        init(self, *args)
        self.host_never_waits = True

    monkeypatch.setattr(kernels, "_DEFAULT", "fused")  # AdamW of torch, as on an accelerator
    monkeypatch.setattr(devices, "is_read_at", is_read_at_on_device)
    monkeypatch.setattr(MasterAdamW, "__init__", init_on_device)
    return read


# ---- which device ----
def test_unknown_devices_are_refused(texts, tmp_path):
    with pytest.raises(ValueError, match="run.device is 'gpu'; known: auto, cpu, cuda, mps"):
        Recipe.from_dict(raw_recipe(texts, tmp_path, run=dict(device="gpu")))


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_absent_devices_are_refused_before_anything_is_written(device, texts, tmp_path, capsys):
    file = write_toml(tmp_path / "r.toml", raw_recipe(texts, tmp_path / "run"))
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: False),
        mock.patch.object(torch.backends.mps, "is_available", lambda: False),
    ):
        assert cli.main(["train", str(file), "--run.device", device]) == 2
    said = capsys.readouterr().err
    assert f"run.device '{device}' is not available" in said and "--run.device cpu" in said
    assert said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_auto_prefers_cuda_then_mps():
    for cuda, mps, chosen in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        with (
            mock.patch.object(torch.cuda, "is_available", lambda: cuda),
            mock.patch.object(torch.backends.mps, "is_available", lambda: mps),
        ):
            assert devices.resolve("auto").type == chosen


def test_a_run_resumes_on_another_device(texts, tmp_path, queued):
    """The second half of a run is queued as on an accelerator, the first half was not."""
    raw = raw_recipe(texts, tmp_path / "run", run=dict(dtype="bfloat16", device="cpu"))
    with mock.patch.object(MasterAdamW, "host_never_waits", False, create=True), signal_after(3):
        train(raw)
    raw["run"]["device"] = "auto"
    resumed = train(raw, resume=True)
    whole = train(raw_recipe(texts, tmp_path / "whole", run=dict(dtype="bfloat16")))
    assert same(state(resumed), state(whole))


# ---- values that are read later ----
@pytest.mark.parametrize("bad, dtype", [((), "bfloat16"), ((3, 6), "float32")])
def test_queued_steps_give_the_same_run(bad, dtype, texts, tmp_path, queued, monkeypatch):
    """Weights, AdamW's state and metrics are the same as if every step were read at once."""
    keys = dict(steps=10, log_every=4, save_every=5, dtype=dtype)
    bad_loss, numbered = faults(*bad)
    with bad_loss, numbered:
        later = train(raw_recipe(texts, tmp_path / "later", run=keys))
        assert max(queued) == 3  # steps 1, 2 to 4, 5 (saved), 6 to 8, 9 and 10 are read
        monkeypatch.undo()
        monkeypatch.setattr(kernels, "_DEFAULT", "fused")
        at_once = train(raw_recipe(texts, tmp_path / "at once", run=keys))
    assert same(state(later), state(at_once))
    assert metrics(tmp_path / "later") == metrics(tmp_path / "at once")
    assert metrics(tmp_path / "later")[-2]["skipped_steps"] == len(bad)


def test_spikes_are_skipped_by_limits_of_earlier_steps(texts, tmp_path, queued):
    raw = raw_recipe(texts, tmp_path / "run", run=dict(steps=12, log_every=3))
    bad_loss, numbered = faults(10, value=100.0)
    with bad_loss, numbered:
        last = train({**raw, "spikes": dict(window=8)})
    lines = {m["step"]: m for m in metrics(tmp_path / "run") if "loss" in m}
    assert lines[12]["skipped_steps"] == 1 and state(last)["optimizer"]["adamw"][0]["step"] == 11


def test_queued_steps_stop_the_run_at_the_right_step(texts, tmp_path, queued):
    raw = raw_recipe(texts, tmp_path / "run", run=dict(steps=20, log_every=10, save_every=3))
    bad_loss, numbered = faults(3, 4)
    with bad_loss, numbered, pytest.raises(loop.Stopped, match="step 5: loss nan.*bad-batch-5"):
        train({**raw, "spikes": dict(max_in_a_row=2)})
    bad = checkpoint.load_tensors(tmp_path / "run" / "bad-batch-5.safetensors")
    assert math.isnan(bad["loss"]) and bad["ids"].shape == (4, 33)
    with bad_loss, numbered:
        train({**raw, "spikes": dict(max_in_a_row=2, restarts=1)}, resume=True)
    assert metrics(tmp_path / "run")[-2]["restarts"] == 1


def test_a_signal_reads_the_queued_steps(texts, tmp_path, queued):
    raw = raw_recipe(texts, tmp_path / "run", run=dict(steps=30, log_every=20))
    with signal_after(7):
        assert train(raw).name == "step-00000007"
    steps = state(tmp_path / "run" / "step-00000007")
    assert steps["optimizer"]["adamw"][0]["step"] == 7 and len(steps["spikes"]["losses"]) == 7


def test_the_queue_is_bounded():
    run = Recipe.from_dict(raw_recipe("x", "y", run=dict(steps=1000, log_every=500))).run
    due = [s for s in range(1, 1001) if devices.is_read_at(torch.device("cuda"), s, run, 2)]
    assert due == [1, 500, 1000]
    assert devices.is_read_at(torch.device("cuda"), 7, run, devices.MAX_QUEUED)
    assert devices.is_read_at(torch.device("cpu"), 7, run, 1)


# ---- torch.compile ----
def test_compiling_needs_bfloat16(texts, tmp_path):
    with pytest.raises(ValueError, match="run.compile needs run.dtype bfloat16, found float32"):
        Recipe.from_dict(raw_recipe(texts, tmp_path, run=dict(compile=True)))


DEEP = {**MLA, **MOE, "num_hidden_layers": 6}


class Backend:
    """A backend of torch.compile that runs graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def test_a_compiled_run_equals_an_uncompiled_one(texts, tmp_path, monkeypatch, capsys):
    """All MoE layers share one graph, and no batch and no evaluation is compiled again."""
    monkeypatch.setattr(kernels, "_DEFAULT", "device")  # compiled blocks use these ops in any case
    backend = Backend()
    monkeypatch.setattr(devices, "BACKEND", backend)
    keys = dict(steps=3, dtype="bfloat16", eval_every=1, eval_tokens=100)
    raw = raw_recipe(texts, tmp_path / "eager", model=DEEP, run=keys)
    raw["model"] = {**raw_recipe(texts, "")["model"], "num_hidden_layers": 6}
    eager = train(raw)
    raw["run"].update(out=str(tmp_path / "compiled"), compile=True)
    compiled = train(raw, quiet=False)
    assert "compiled the blocks in" in capsys.readouterr().out
    assert backend.graphs == 3  # a dense block, an MoE block, the loss
    assert same(state(compiled), state(eager))
    assert metrics(tmp_path / "compiled") == metrics(tmp_path / "eager")


def test_a_failing_compiler_is_reported_once_and_the_run_goes_on(
    texts, tmp_path, monkeypatch, capsys
):
    def broken(graph, inputs):
        raise OSError("no C++ compiler")

    monkeypatch.setattr(devices, "BACKEND", broken)
    keys = dict(steps=3, dtype="bfloat16")
    eager = train(raw_recipe(texts, tmp_path / "eager", run=keys))
    raw = raw_recipe(texts, tmp_path / "compiled", run=dict(keys, compile=True))
    compiled = train(raw, quiet=False)
    said = capsys.readouterr().out
    assert said.count("run.compile: the compiler failed, so the blocks run uncompiled") == 1
    assert "no C++ compiler" in said
    assert same(state(compiled), state(eager))


def test_gpu_check_runs_on_the_cpu(monkeypatch, capsys):
    """gpu_check.py runs the ops for accelerators, and its parity check fails for a wrong op."""
    monkeypatch.setattr(devices, "BACKEND", devices.BACKEND)  # the script sets it
    monkeypatch.setattr(torch, "compile", lambda run, **how: run)  # tested above, takes seconds
    file = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
    monkeypatch.setattr(sys, "argv", [str(file), "--device", "cpu", "--tiny"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(file), run_name="__main__")
    said = capsys.readouterr().out
    result = json.loads(said.splitlines()[-1])
    assert end.value.code == 0 and result["ok"] and "| tiny |" in said
    assert 0 < result["parity"]["float32"] < 1e-4 and 0 < result["parity"]["bfloat16"] < 0.1
    plain, compiled = result["rows"]
    assert (plain["compile"], compiled["compile"], compiled["compiled"]) == (False, True, True)
    assert plain["tokens_per_s"] > 0 < plain["peak_share"]
    for row in result["rows"]:
        assert row["last_loss"] < row["first_loss"] < math.log(512) + 0.5

    def broken(*args):
        return kernels.ref.rms_norm(*args) * 1.001

    check_parity = runpy.run_path(str(file))["check_parity"]
    monkeypatch.setattr(kernels.device, "rms_norm", broken)
    assert not check_parity(torch.device("cpu"), 64)["ok"]


def test_gpu_check_needs_a_gpu(monkeypatch):
    file = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
    for words, message in (
        (["--device", "cpu"], "there is no accelerator; --device cpu needs --tiny"),
        (["--device", "cuda:99"], "gpu_check: --device 'cuda:99' is not available"),
    ):
        monkeypatch.setattr(sys, "argv", [str(file), *words])
        with pytest.raises(SystemExit, match=message):
            runpy.run_path(str(file), run_name="__main__")


def test_compiled_models_serve_other_callers(monkeypatch):
    """A cache, another hook or no hook runs the block as it is."""
    from oracles import tiny

    monkeypatch.setattr(devices, "BACKEND", Backend())
    model = tiny.model(tiny.HARD)
    recompute.apply(model, 1)
    recomputing = model.layers[0].forward
    ids = tiny.ids(tiny.HARD, 2, 9)
    expected = model(ids)
    assert devices.compile_model(model, lambda: None, lambda text: None)
    chosen = Chosen()
    assert torch.equal(model(ids, routing_hook=chosen), expected) and chosen.layers
    with devices.uncompiled(model):
        assert "forward" not in vars(model.layers[1])
    assert "forward" in vars(model.layers[1]) and devices.BACKEND.graphs == 0
    assert model.layers[0].forward is recomputing  # such blocks are not compiled
