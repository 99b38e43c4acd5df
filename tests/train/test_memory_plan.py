"""Tests of the memory plan against the bytes that torch allocates in real steps."""

import json
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lamoe import cli, kernels
from lamoe.train import loop, memory_plan, recompute
from lamoe.train.recipe import Recipe
from tiny_run import MLA, MOE, raw_recipe, state, train, write_texts

ROOT = Path(__file__).resolve().parents[2]

BODY = dict(
    vocab_size=320,
    hidden_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=1024,
    torch_dtype="float32",
)
WIDE_MLA = {**MLA, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "v_head_dim": 24}
WIDE_MOE = {**MOE, "moe_intermediate_size": 48, "n_routed_experts": 8}
MODELS = {
    "mla-moe": {**BODY, **WIDE_MLA, **WIDE_MOE},
    "mla-dense": {**BODY, **WIDE_MLA},
    "mla-query-latent": {**BODY, **WIDE_MLA, **WIDE_MOE, "q_lora_rank": 48, "n_shared_experts": 2},
    "mha-moe": {**BODY, **WIDE_MOE, "model_type": "deepseek"},
    "mha": {**BODY, "model_type": "llama"},
    "gqa": {**BODY, "model_type": "llama", "num_key_value_heads": 2},
    "mqa-tied": {
        **BODY,
        "model_type": "llama",
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
}


def make_recipe(name, *, micro, size=4, seq_len=256, **changes):
    """Return a recipe without text: the steps of `run_step` draw random tokens."""
    raw = {
        "model": dict(MODELS[name]),
        "data": {"seq_len": seq_len},
        "batch": {"size": size, "micro": micro},
        "balance": {"devices": 4, "capacity_factor": 1.0},
        "run": {},
    }
    for section, values in changes.items():
        raw[section].update(values)
    return Recipe.from_dict(raw)


def prepare(recipe, recomputed):
    model = loop._build_model(recipe, recipe.model, fresh=True, note=print)
    recompute.apply(model, recomputed)
    return model, loop._build_optimizer(recipe, model)


def run_step(model, optimizer, recipe):
    generator = torch.Generator().manual_seed(1)
    shape = recipe.batch.size, recipe.data.seq_len + 1
    ids = torch.randint(0, recipe.model.vocab_size, shape, generator=generator)
    segments = (torch.arange(shape[1]) // 100).expand(shape)
    results = loop._accumulate_gradients(model, optimizer, recipe, 0, ids, segments)
    optimizer.clip()
    optimizer.step(1e-3)
    return results


def allocated_peak(call) -> int:
    """Return the most bytes that `call` held at once, beyond those that existed before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measured(recipe, recomputed) -> int:
    """Return the peak of the second step, when the optimizer has its state."""
    model, optimizer = prepare(recipe, recomputed)
    run_step(model, optimizer, recipe)
    tensors = [*model.parameters(), *optimizer.masters]
    tensors += [t for s in optimizer.adamw.state.values() for t in (s["exp_avg"], s["exp_avg_sq"])]
    state = sum({t.data_ptr(): t.nbytes for t in tensors}.values())
    return state + allocated_peak(lambda: run_step(model, optimizer, recipe))


CASES = [
    ("mla-moe", dict(micro=1), 0),
    ("mla-moe", dict(micro=2), 0),
    ("mla-moe", dict(micro=4), 0),
    ("mla-moe", dict(micro=2), 2),
    ("mla-moe", dict(micro=4), 3),
    ("mla-moe", dict(micro=4, run=dict(dtype="float32")), 0),
    ("mla-moe", dict(micro=2, size=2, balance=dict(capacity_factor=0)), 0),
    ("mla-moe", dict(micro=1, size=1, seq_len=32), 0),  # the gradients need most
    ("mla-moe", dict(micro=1, size=2, seq_len=32), 0),
    ("mla-moe", dict(micro=2, size=2, model=dict(vocab_size=2048)), 0),  # the loss needs most
    ("mla-query-latent", dict(micro=2, size=2), 0),
    ("mla-dense", dict(micro=2, size=2), 0),
    ("mla-dense", dict(micro=1, size=1, seq_len=1024, run=dict(dtype="float32")), 3),
    ("mha-moe", dict(micro=2, size=2), 0),
    ("mha", dict(micro=2, size=2), 0),
    ("gqa", dict(micro=2, size=2), 0),
    ("gqa", dict(micro=2, run=dict(dtype="float32")), 3),
    ("mqa-tied", dict(micro=2, size=2), 3),
]


NATIVE_CASES = [CASES[i] for i in (2, 4, 5, 9, 11, 13)]


@pytest.mark.parametrize(
    "name, settings, recomputed, ops",
    [(*c, "fused") for c in CASES] + [(*c, "native") for c in NATIVE_CASES],
)
def test_the_plan_equals_what_torch_allocates(name, settings, recomputed, ops):
    if ops == "native" and kernels.native.lib is None:
        pytest.skip("the compiled kernels are not built")
    recipe = make_recipe(name, **settings)
    with kernels.using(ops):
        plan = memory_plan.compute(recipe, recomputed)
        assert (plan.buffers > 0) == (ops == "native")
        assert plan.tensors == pytest.approx(measured(recipe, recomputed), rel=0.08)


def test_memory_does_not_grow_with_the_number_of_micro_batches():
    few, many = (make_recipe("mla-moe", micro=1, size=size, seq_len=64) for size in (3, 24))
    model, optimizer = prepare(few, 0)
    run_step(model, optimizer, few)
    grown = allocated_peak(lambda: run_step(model, optimizer, many))
    assert grown < 1.02 * allocated_peak(lambda: run_step(model, optimizer, few))


def test_a_restart_counts_if_the_recipe_allows_it():
    """The state of the checkpoint is read while that of the run is still there."""
    plain = make_recipe("mla-moe", micro=1, size=1, seq_len=32)
    restarts = memory_plan.changed(plain, {"run.save_every": 5, "spikes.restarts": 1})
    a, b = memory_plan.compute(plain), memory_plan.compute(restarts)
    assert b.when == "restart from a checkpoint" and b.temporary == a.masters + a.moments


def test_the_process_of_a_large_model_is_not_overestimated():
    raw = {"model": {"preset": "deepseek-v2-lite"}, "data": {"seq_len": 4096}}
    with kernels.using("fused"):
        plan = memory_plan.compute(Recipe.from_dict(raw))
    assert plan.total > 200e9 and plan.process < 2.5e9
    assert plan.loss_chunk == 512 * 102400 * 8  # logits, float32 and rounded probabilities


# ---- what fits ----
def with_memory(total):
    """Return the available bytes that a plan of `total` bytes fits into with the usual margin."""
    return int(total * (1 + memory_plan.ERROR)) + 1


def test_recomputation_begins_only_when_memory_is_short():
    recipe = make_recipe("mla-moe", micro=4)
    plans = [memory_plan.compute(recipe, n) for n in range(4)]
    assert plans[0].total > plans[1].total > plans[2].total
    for n in range(3):
        chosen = memory_plan.choose(recipe, with_memory(plans[n].total))
        assert chosen == plans[n]
    assert memory_plan.choose(recipe, None) == plans[0]  # memory unknown
    assert memory_plan.choose(recipe, 1).total == min(p.total for p in plans)
    always = make_recipe("mla-moe", micro=4, run=dict(recompute=True))
    never = make_recipe("mla-moe", micro=4, run=dict(recompute=False))
    assert memory_plan.choose(always, 1 << 40) == plans[3]
    assert memory_plan.choose(never, 1) == plans[0]


def test_recommended_settings_fit_and_larger_ones_do_not(monkeypatch):
    # The range of memory below is that of these ops.
    monkeypatch.setattr(kernels, "_DEFAULT", "fused")
    recipe = make_recipe("mla-moe", micro=8, size=24, seq_len=512, run=dict(recompute=False))
    seen = set()
    for memory in range(240_000_000, 420_000_000, 5_000_000):
        found = memory_plan.settings_that_fit(recipe, memory)
        for changes in found:
            keys = {name: value for name, value in changes.items() if name != "total"}
            seen.add(tuple(keys))
            plan = memory_plan.check(memory_plan.changed(recipe, keys), memory)
            assert plan.total == changes["total"] <= memory
            micro = keys.get("batch.micro", 8)
            assert 24 % micro == 0
            if list(keys) == ["batch.micro"] and micro < 8:
                larger = next(m for m in range(micro + 1, 9) if 24 % m == 0)
                bigger = memory_plan.changed(recipe, {"batch.micro": larger})
                assert not memory_plan.choose(bigger, memory).fits(memory, memory_plan.ERROR)
    assert seen == {
        ("run.recompute",),
        ("batch.micro",),
        ("batch.micro", "run.recompute"),
        ("data.seq_len", "batch.micro", "run.recompute"),
    }


def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    texts = write_texts(tmp_path / "in")
    raw = raw_recipe(texts, tmp_path / "run", run=dict(memory_gb=0.2))
    with pytest.raises(ValueError) as error:
        train(raw)
    assert re.fullmatch(
        r"the run does not fit in memory: it needs 2\S+ MB, 200.0 MB available: weights .*, "
        r"masters 0 B, .* No size of batch.micro or data.seq_len fits: take a smaller model, or "
        r"free memory. If the machine has more, say so with --run.memory_gb",
        str(error.value),
    )
    assert not (tmp_path / "run").exists()


def test_the_options_of_a_refusal_start_the_run(tmp_path):
    texts = write_texts(tmp_path / "in")
    raw = raw_recipe(texts, tmp_path / "run", data=dict(seq_len=64), batch=dict(size=64, micro=64))
    raw["run"].update(recompute=False, steps=1)
    need = memory_plan.compute(Recipe.from_dict(raw)).total
    raw["run"]["memory_gb"] = 0.95 * need / 1e9
    with pytest.raises(ValueError, match="These settings fit: ") as error:
        train(raw)
    micro = re.search(r"--batch.micro (\d+) \(needs", str(error.value))[1]
    raw["batch"]["micro"] = int(micro)
    assert train(raw).name == "step-00000001"


def test_memory_of_the_device_or_the_recipe():
    recipe = make_recipe("mha", micro=1)
    with mock.patch("torch.cuda.mem_get_info", return_value=(123, 456)):
        assert memory_plan.available(recipe, "cuda") == 123
    assert memory_plan.available(recipe, "mps") is None
    assert memory_plan.check(recipe, None).recomputed == 0
    limited = make_recipe("mha", micro=1, run=dict(memory_gb=1.5))
    assert memory_plan.available(limited, "cuda") == 1_500_000_000


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(recompute="maybe"), "run.recompute is 'maybe'; known: auto, true, false"),
        (dict(recompute=2), "run.recompute must be bool"),
        (dict(memory_gb=-1), "run.memory_gb is -1; it must be a finite number of at least 0"),
    ],
)
def test_wrong_keys(values, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make_recipe("mha", micro=1, run=values)


# ---- memory that runs out nevertheless ----
def fail_in_step(number, error):
    """Raise `error` in place of the gradients of step `number`."""
    original, calls = loop._accumulate_gradients, []

    def wrapped(*args):
        calls.append(1)
        if len(calls) == number:
            raise error
        return original(*args)

    return mock.patch.object(loop, "_accumulate_gradients", wrapped)


def allocation_error() -> RuntimeError:
    """Return the error of torch's allocator for more memory than any machine has."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 50)
    return error.value


def test_memory_that_runs_out_loses_nothing(tmp_path):
    texts = write_texts(tmp_path / "in")
    raw = raw_recipe(texts, tmp_path / "run", run=dict(steps=4, save_every=2))
    with fail_in_step(1, MemoryError()), pytest.raises(memory_plan.OutOfMemory) as error:
        train(raw)
    assert re.match(r"memory ran out \(MemoryError\). Planned were \d", str(error.value))
    assert str(error.value).endswith(
        "No checkpoint was saved yet: start again with --run.recompute true"
    )
    with fail_in_step(4, allocation_error()), pytest.raises(memory_plan.OutOfMemory) as error:
        train(raw)
    last = tmp_path / "run" / "step-00000002"
    assert "can't allocate memory" in str(error.value)
    assert f"{last} is complete: resume from it with --resume --run.recompute true" in str(
        error.value
    )
    raw["run"]["recompute"] = True
    with fail_in_step(2, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")):
        with pytest.raises(memory_plan.OutOfMemory, match="resume .* --resume --batch.micro 1"):
            train(raw, resume=True)
    finished = train(raw, resume=True)
    whole = train(raw_recipe(texts, tmp_path / "whole", run=dict(steps=4)))
    assert state(finished)["weights"] == state(whole)["weights"]  # recomputation changed no bit
    raw["batch"]["micro"], raw["run"]["out"] = 1, str(tmp_path / "smaller")
    with fail_in_step(1, allocation_error()):
        with pytest.raises(memory_plan.OutOfMemory, match="start again with a smaller model$"):
            train(raw)


def test_a_smaller_micro_batch_may_be_set_on_resume(tmp_path, capsys):
    raw = raw_recipe(
        write_texts(tmp_path / "in"), tmp_path / "run", run=dict(steps=3, save_every=2)
    )
    with fail_in_step(3, MemoryError()), pytest.raises(memory_plan.OutOfMemory):
        train(raw)
    raw["batch"]["micro"] = 1
    assert train(raw, resume=True, quiet=False).name == "step-00000003"
    out = capsys.readouterr().out
    assert "from here on batch.micro was 2, now 1" in out and "memory plan: 2" in out


def test_other_errors_are_not_about_memory(tmp_path):
    raw = raw_recipe(write_texts(tmp_path / "in"), tmp_path / "run")
    with fail_in_step(1, RuntimeError("sizes differ")), pytest.raises(RuntimeError) as error:
        train(raw)
    assert type(error.value) is RuntimeError and str(error.value) == "sizes differ"


# ---- lamoe info --train ----
def show(capsys, *words) -> tuple[int, str]:
    code = cli.main(["info", "--train", str(ROOT / "recipes" / "tiny.toml"), *words])
    return code, capsys.readouterr().out


def test_info_shows_the_plan(capsys):
    code, out = show(capsys, "--memory", "8GB", "--batch.micro", "8", "--run.dtype=float32")
    assert code == 0 and out.endswith("The run fits.\n")
    assert "5.268 M parameters" in out and "16.52 MFLOP per token" in out
    assert "4,096 tokens per step in 2 micro-batches" in out
    assert re.search(r"weights, float32 +21.07 MB\n  master weights, float32 +0 B\n", out)
    assert re.search(r"  available +8.000 GB\n", out)
    code, out = show(capsys, "--memory", "400MB", "--run.recompute", "false")
    assert code == 1 and "The run does not fit. These settings fit: --batch.micro " in out
    assert show(capsys)[1].count("\n") > 10  # the memory of this machine


def test_info_as_json(capsys):
    code, out = show(capsys, "--memory=300MB", "--json")
    report = json.loads(out)
    assert code == 1 and report["memory"]["fits"] is False
    recipe = Recipe.load(ROOT / "recipes" / "tiny.toml")
    plan = memory_plan.choose(recipe, 300_000_000)
    assert report["memory"]["total"] == plan.total and report["memory"]["recomputed"] == 3
    assert report["parameters"] == 5_268_416 and report["tokens"] == 480 * 4096
    assert report["settings_that_fit"] == memory_plan.settings_that_fit(recipe, 300_000_000)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "name a model; the memory plan of a recipe: lamoe info --train RECIPE"),
        (["tiny", "--batch.micro", "2"], "--batch.micro needs a recipe"),
        (["tiny", "--train", "recipes/tiny.toml"], "leave the model"),
        (["--train", "recipes/none.toml"], "no recipe at recipes/none.toml"),
        (["--train", "recipes/tiny.toml", "--batch.mikro", "2"], "unknown key batch.mikro"),
    ],
)
def test_info_refuses(capsys, monkeypatch, words, message):
    monkeypatch.chdir(ROOT)
    assert cli.main(["info", *words]) == 2
    assert message in capsys.readouterr().err
