"""Tests of a training run: it reduces the loss, resumes bitwise, and overwrites nothing."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from lamoe import cli
from lamoe.checkpoints import hf
from lamoe.model import routing
from lamoe.model.transformer import Transformer
from lamoe.text.tokenizer import Tokenizer
from lamoe.train import checkpoint, loop
from lamoe.train import metrics as metrics_module
from lamoe.train.data import Batches, open_corpus
from lamoe.train.optim import MasterAdamW
from lamoe.train.recipe import Recipe
from tiny_run import (  # noqa: F401 (trained is a fixture)
    metrics,
    raw_recipe,
    same,
    state,
    train,
    trained,
    write_texts,
    write_toml,
)

FAMILIES = {
    "mla": {},
    "group-limited": {"model": dict(topk_method="group_limited_greedy", n_group=4, topk_group=2)},
    "moe-v1": {
        "model": dict(
            model_type="deepseek",
            moe_intermediate_size=16,
            n_routed_experts=8,
            n_shared_experts=2,
            num_experts_per_tok=2,
        )
    },
    "llama": {"model": dict(model_type="llama", num_key_value_heads=1)},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "in")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def signal_after(step: int, number=signal.SIGTERM):
    """Send a signal to this process during step `step`."""
    original, calls = MasterAdamW.step, []

    def wrapped(self, *args):
        original(self, *args)
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(number)

    return mock.patch.object(MasterAdamW, "step", wrapped)


# ---- training result ----
def test_training_reduces_the_loss(trained):
    lines = metrics(trained)
    losses = [m["loss"] for m in lines if "loss" in m]
    assert len(losses) == 40 and losses[0] > 5.4 and np.mean(losses[-5:]) < 0.7 * losses[0]
    held = [m["heldout_bits_per_token"] for m in lines if "heldout_bits_per_token" in m]
    assert len(held) == 2 and held[1] < held[0] < math.log2(300)
    assert (
        lines[-1]["heldout_bits_per_byte"] < 8
        and "heldout_bits_per_byte" not in [m for m in lines if "heldout_perplexity" in m][0]
    )


def test_files_of_a_finished_run(trained):
    names = {p.name for p in trained.iterdir()}
    assert names == {
        ".lock",
        "recipe.json",
        "tokenizer",
        "data",
        "metrics.jsonl",
        "curves.png",
        "tensorboard",
        "step-00000020",
        "step-00000040",
        "latest",
    }
    assert Recipe.from_dict(json.loads((trained / "recipe.json").read_text())).run.steps == 40
    folder = trained / "step-00000040" / "model"
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {
        p.name for p in folder.iterdir()
    }
    model, tok = hf.load(folder), Tokenizer.load(folder)
    assert model.config.aux_loss_alpha == 0.003 and (
        model.config.bos_token_id,
        model.config.eos_token_id,
    ) == (tok.bos_id, tok.eos_id)
    masters = state(trained / "step-00000040")["optimizer"]["masters"]
    assert all(torch.equal(p, m) for p, m in zip(model.parameters(), masters, strict=True))


@pytest.mark.parametrize("micro", [1, 2])
def test_metrics_do_not_depend_on_micro_batches(micro, texts, tmp_path):
    """Only the budget of token dropping belongs to a micro-batch. It is off here."""
    found = {}
    for size in (4, micro):
        balance = dict(devices=4, capacity_factor=0.0)
        raw = raw_recipe(texts, tmp_path / f"{size}", balance=balance, run=dict(steps=1))
        raw["batch"]["micro"] = size
        train(raw)
        found[size] = metrics(tmp_path / f"{size}")[0]
    assert found[4].keys() == found[micro].keys() and found[4]["grad_norm"] > 0
    assert found[micro].pop("expert_load") == found[4].pop("expert_load")
    assert found[micro] == pytest.approx(found[4], rel=2e-5)


def test_metrics_are_complete(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in lines if "loss" in m]
    assert [m["step"] for m in steps] == list(range(1, 41))
    keys = {
        "step",
        "tokens",
        "epoch",
        "loss",
        "balance",
        "lr",
        "grad_norm",
        "batch",
        "tokens_per_s",
        "mfu",
        "gemm_peak",
        "balance_expert",
        "balance_device",
        "balance_communication",
        "load_max_over_mean",
        "router_entropy",
        "drop_rate",
        "expert_load",
        "skipped_steps",
        "restarts",
    }
    for i, m in enumerate(steps):
        assert (
            m.keys() == keys
            and m["tokens"] == (i + 1) * 4 * 32
            and m["batch"] == 4
            and m["tokens_per_s"] > 0
        )
        assert np.shape(m["expert_load"]) == (1, 8) and sum(m["expert_load"][0]) == pytest.approx(
            1, abs=1e-4
        )
        assert m["load_max_over_mean"] == pytest.approx(8 * max(m["expert_load"][0]), abs=1e-3)
        assert 0 <= m["drop_rate"] < 1 and 0 < m["router_entropy"] <= math.log(8) + 1e-5
        assert m["balance"] == pytest.approx(
            0.003 * m["balance_expert"]
            + 0.05 * m["balance_device"]
            + 0.02 * m["balance_communication"],
            rel=1e-3,
        )
        assert m["lr"] == pytest.approx(
            1e-2 * min(1, (i + 1) / 2) * 0.316 ** ((i >= 24) + (i >= 36)), rel=1e-5
        )
    assert max(m["drop_rate"] for m in steps) > 0


def test_tensorboard_events(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(trained / "tensorboard"))
    board.Reload()
    assert {
        "loss",
        "lr",
        "drop_rate",
        "heldout_bits_per_byte",
        "expert_load_max/moe_layer_0",
    } <= set(board.Tags()["scalars"])
    losses = [m["loss"] for m in metrics(trained) if "loss" in m]
    assert [e.step for e in board.Scalars("loss")] == list(range(1, 41))
    assert [e.value for e in board.Scalars("loss")] == pytest.approx(losses, rel=1e-4)


def test_master_weights_start_unrounded(texts, tmp_path):
    """The float32 master weights of a bfloat16 run start unrounded.

    After a step with a tiny learning rate they equal the initial weights of a float32 run.
    """
    raw = raw_recipe(
        texts, tmp_path / "run", optim=dict(lr=1e-30), run=dict(steps=1, dtype="bfloat16")
    )
    saved = state(train(raw))["optimizer"]["masters"]
    fresh = list(Transformer(Recipe.from_dict(raw).model).init_weights(0).parameters())
    assert same(saved, [p.detach() for p in fresh]) and not torch.equal(
        fresh[0], fresh[0].bfloat16().float()
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains(texts, tmp_path, name):
    train(
        raw_recipe(texts, tmp_path / "run", run=dict(steps=12, dtype="bfloat16"), **FAMILIES[name])
    )
    lines = [m for m in metrics(tmp_path / "run") if "loss" in m]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert ("expert_load" in lines[0]) == (name != "llama")
    config = hf.load(checkpoint.latest(tmp_path / "run") / "model").config
    assert config.model_type == FAMILIES[name].get("model", {}).get("model_type", "deepseek_v2")


# Recorded losses of the recipe below in float32.
GOLDEN = [5.69414, 5.3503, 5.04059, 4.56978, 4.42201]


def test_golden_losses(texts, tmp_path):
    train(raw_recipe(texts, tmp_path / "run", run=dict(steps=5)))
    assert [m["loss"] for m in metrics(tmp_path / "run") if "loss" in m] == pytest.approx(
        GOLDEN, abs=1e-4
    )


# ---- loss and gradients of one step ----
def gradients(raw: dict) -> tuple[dict, list[torch.Tensor]]:
    """Return the first line of the metrics and the unclipped gradients of the first step."""
    found, original = [], MasterAdamW.clip

    def clip(self):
        found.extend(g.clone() for g in self.grads)
        return original(self)

    with mock.patch.object(MasterAdamW, "clip", clip):
        train(raw)
    return metrics(Path(raw["run"]["out"]))[0], found


def test_the_rate_follows_the_tokens_under_a_ramp(texts, tmp_path):
    """With a batch ramp, the decay of the learning rate depends on tokens, not on steps.

    Batches have 2, 4, 4, 6, 8, 8 rows. Before step 5, 16 of 32 rows are used, which is below 0.6
    although 4 of 6 steps are done. Before the last step, 24 of 32 rows are used.
    """
    train(
        raw_recipe(
            texts,
            tmp_path / "run",
            batch=dict(size=8, micro=2, ramp_from=2, ramp_steps=4),
            optim=dict(warmup_steps=0),
            run=dict(steps=6),
        )
    )
    steps = [m for m in metrics(tmp_path / "run") if "loss" in m]
    assert [m["batch"] for m in steps] == [2, 4, 4, 6, 8, 8] and [
        m["tokens"] // 32 for m in steps
    ] == [2, 6, 10, 16, 24, 32]
    assert [m["lr"] for m in steps] == pytest.approx([1e-2] * 5 + [3.16e-3])


@pytest.mark.parametrize("mask", [True, False])
def test_accumulated_micro_batches_equal_one_big_batch(texts, tmp_path, mask):
    """Accumulating micro-batches equals one big batch.

    Micro-batches are weighted by their number of targets. This number varies, because the first
    token of a document is not a target.
    """
    raws = [
        raw_recipe(
            texts,
            tmp_path / str(micro),
            data=dict(document_mask=mask),
            batch=dict(size=6, micro=micro),
            balance=dict(capacity_factor=0.0),
            run=dict(steps=1),
        )
        for micro in (6, 2, 1)
    ]
    (big, big_grads), *others = map(gradients, raws)
    for line, grads in others:
        for key in (
            "loss",
            "balance",
            "grad_norm",
            "balance_expert",
            "router_entropy",
            "load_max_over_mean",
        ):
            assert line[key] == pytest.approx(big[key], rel=1e-5), key
        assert line["expert_load"] == big["expert_load"]
        for a, b in zip(grads, big_grads, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()) + 1e-7)


def test_a_step_equals_a_plain_torch_program(texts, tmp_path):
    """Loss and gradients of the first step equal those of a plain torch program.

    The program computes all rows at once. Its loss is the mean over the targets plus balance
    losses.
    """
    raw = raw_recipe(
        texts, tmp_path / "run", balance=dict(capacity_factor=0.0), run=dict(steps=1, seed=3)
    )
    line, grads = gradients(raw)
    recipe = Recipe.from_dict(raw)
    corpus = open_corpus(tmp_path / "run" / "data")
    ids, segments = map(torch.from_numpy, Batches(corpus, 32, 3).next_batch(4))
    model = Transformer(recipe.model).init_weights(3)
    watch = routing.Training(recipe.balance)
    logits = (
        model(ids[:, :-1], segments=segments[:, :-1], routing_hook=watch).float().log_softmax(-1)
    )
    nll = -logits.gather(-1, ids[:, 1:, None])[..., 0][segments[:, 1:] == segments[:, :-1]]
    (nll.mean() + watch.loss()).backward()
    assert (segments[:, 1:] != segments[:, :-1]).any()
    assert line["loss"] == pytest.approx(nll.mean().item(), rel=1e-5) and line[
        "balance"
    ] == pytest.approx(watch.loss().item(), rel=1e-5)
    for p, g in zip(model.parameters(), grads, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-6)


def test_the_document_mask_changes_the_loss(texts, tmp_path):
    losses = []
    for mask in (True, False):
        train(
            raw_recipe(
                texts, tmp_path / str(mask), data=dict(document_mask=mask), run=dict(steps=3)
            )
        )
        losses.append([m["loss"] for m in metrics(tmp_path / str(mask)) if "loss" in m])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.2)


def test_drop_rate(texts, tmp_path):
    """Tokens are dropped only with a capacity factor, and never from a protected sequence.

    The router always chooses the same experts, so most assignments exceed the budget.
    """

    def run(name, **balance):
        train(raw_recipe(texts, tmp_path / name, balance=balance, run=dict(steps=2)))
        return [m["drop_rate"] for m in metrics(tmp_path / name) if "loss" in m]

    assert run("off", capacity_factor=0.0) == [0, 0]
    assert run("protected", capacity_factor=1.0, keep_share=1.0) == [0, 0]
    original = routing.route

    def biased(x, gate, config):
        # Experts 0 and 1, which are on one of four devices, get all tokens.
        r = original(x, gate, config)
        return routing.Route(
            r.scores, torch.tensor([0, 1]).expand_as(r.expert).contiguous(), r.weight
        )

    with mock.patch.object(routing, "route", biased):
        assert run("biased", capacity_factor=1.0, keep_share=0.0) == pytest.approx(
            [0.75, 0.75], abs=0.01
        )


def test_metrics_cover_all_micro_batches():
    def record(load, dropped, entropy, losses):
        return routing.LayerRecord(
            torch.tensor(losses), torch.tensor(load), torch.tensor(dropped), torch.tensor(entropy)
        )

    # One record for each of the two MoE layers.
    first = [record([3, 1], 1, 0.5, [1.0, 1.0, 1.0]), record([2, 2], 0, 0.7, [1.0, 1.0, 1.0])]
    second = [record([3, 1], 1, 0.1, [2.0, 1.0, 1.0]), record([0, 4], 0, 0.3, [2.0, 3.0, 1.0])]
    m = metrics_module.router_metrics([first, second], 2)
    assert m["expert_load"] == [[0.75, 0.25], [0.25, 0.75]] and m["drop_rate"] == pytest.approx(
        2 / 16
    )
    assert m["router_entropy"] == pytest.approx(0.4) and m["load_max_over_mean"] == pytest.approx(
        1.5
    )
    assert (m["balance_expert"], m["balance_device"], m["balance_communication"]) == (1.5, 1.5, 1.0)
    assert metrics_module.router_metrics([], 2) == metrics_module.router_metrics([[]], 2) == {}


def test_protected_sequences_depend_on_seed_and_step_alone(texts, tmp_path):
    r = Recipe.from_dict(raw_recipe(texts, tmp_path, balance=dict(keep_share=0.5)))
    assert torch.equal(
        loop._draw_protected(64, r, 7), loop._draw_protected(64, r, 7)
    ) and not torch.equal(loop._draw_protected(64, r, 7), loop._draw_protected(64, r, 8))
    assert 10 < loop._draw_protected(64, r, 7).sum() < 54


def test_peak_is_measured():
    before = torch.get_rng_state()
    assert 1e7 < loop.measure_peak(torch.float32, size=64, repeats=2) < 1e15
    assert torch.equal(before, torch.get_rng_state())  # a resumed run depends on this generator


# ---- resumed runs ----
RESUMES = {  # recipes with different kinds of state to restore after step 5 of 9
    "fp32": {"run": dict(dtype="float32")},
    "bf16": {"run": dict(dtype="bfloat16")},
    "ramp and dropping": {
        "batch": dict(size=8, micro=2, ramp_from=2, ramp_steps=7),
        "balance": dict(capacity_factor=0.8, keep_share=0.3),
    },
    "border of epochs": {"batch": dict(size=16, micro=8), "run": dict(dtype="bfloat16")},
}


@pytest.mark.parametrize("name", RESUMES)
def test_resume_is_bitwise(texts, tmp_path, name):
    changes = {k: dict(v) for k, v in RESUMES[name].items()}
    changes["run"] = {**changes.get("run", {}), "steps": 9}
    whole = train(raw_recipe(texts, tmp_path / "whole", **changes))
    stopped = raw_recipe(texts, tmp_path / "stopped", **changes)
    with signal_after(5):
        assert train(stopped).name == "step-00000005"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the handlers are restored
    epoch = metrics(tmp_path / "stopped")[-1]["epoch"]
    torch.manual_seed(999)  # another process has another state
    resumed = train(stopped, resume=True)
    assert resumed.name == whole.name and same(state(resumed), state(whole))
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    end = metrics(tmp_path / "whole")[8]["epoch"]
    assert (int(epoch) < int(end)) if name == "border of epochs" else (0 < epoch < end < 1)


def test_resume_restores_the_random_generators(texts, tmp_path):
    raw = raw_recipe(texts, tmp_path / "run", run=dict(steps=4))
    with signal_after(2):
        folder = train(raw)
    saved = checkpoint.load_tensors(folder / "state.safetensors")["rng"]["torch"]
    torch.manual_seed(5)
    with signal_after(1):
        train(raw, resume=True)
    assert torch.equal(torch.get_rng_state(), saved)


def test_resume_from_a_periodic_checkpoint_forgets_later_metrics(texts, tmp_path):
    """A resumed run drops metrics of steps after its checkpoint.

    After kill -9 the metrics are ahead of the newest checkpoint, and their last line may be
    incomplete.
    """
    raw = raw_recipe(texts, tmp_path / "run", run=dict(steps=7, save_every=3, keep=0))
    whole = state(train(raw))
    lines = metrics(tmp_path / "run")
    for step in (6, 7):
        shutil.rmtree(tmp_path / "run" / f"step-{step:08d}")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 8, "lo')
    assert same(state(train(raw, resume=True)), whole) and metrics(tmp_path / "run") == lines


def test_resume_does_not_need_the_sources(tmp_path):
    """A resumed run uses the packed text.

    So it continues unchanged after the source files have been edited or deleted.
    """
    texts = write_texts(tmp_path / "in")
    raw = raw_recipe(texts, tmp_path / "run", run=dict(steps=4))
    with signal_after(2):
        train(raw)
    before = contents(tmp_path / "run" / "data")
    (texts / "00.txt").write_text("something else entirely\n" * 50)
    assert (
        train(raw, resume=True).name == "step-00000004"
        and contents(tmp_path / "run" / "data") == before
    )


def test_resume_before_the_first_checkpoint_starts_afresh(texts, tmp_path):
    raw = raw_recipe(texts, tmp_path / "run", run=dict(steps=2))
    with (
        mock.patch.object(loop, "prepare_corpus", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        train(raw)
    assert train(raw, resume=True).name == "step-00000002"


def test_resume_of_a_finished_run_changes_nothing(texts, tmp_path):
    raw = raw_recipe(texts, tmp_path / "run", run=dict(steps=2))
    train(raw)
    before = {
        k: v for k, v in contents(tmp_path / "run").items() if not k.startswith("tensorboard")
    }
    assert train(raw, resume=True).name == "step-00000002"
    assert {
        k: v for k, v in contents(tmp_path / "run").items() if not k.startswith("tensorboard")
    } == before


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"optim": dict(beta1=0.8)}, r"optim.beta1 was 0.9, now 0.8"),
        ({"run": dict(steps=41)}, "run.steps was 40, now 41"),
        ({"model": dict(hidden_size=64)}, "model.hidden_size was 32, now 64"),
        ({"data": dict(sources=["stdlib"])}, "data.sources was"),
        ({"balance": dict(devices=2)}, "balance.devices was 4, now 2"),
        ({"run": dict(seed=1)}, "run.seed was 0, now 1"),
        ({"batch": dict(size=8)}, "batch.size was 4, now 8"),
    ],
)
def test_resume_with_another_recipe_is_refused(trained, tmp_path, changes, words):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = contents(run)
    changes = {
        **changes,
        "run": dict(
            steps=40, eval_every=20, eval_tokens=200, save_every=20, **changes.get("run", {})
        )
        if "steps" not in changes.get("run", {})
        else changes["run"],
    }
    with pytest.raises(ValueError, match=f"cannot resume .* with another recipe: {words}"):
        train(raw_recipe(trained.parent / "texts", run, **changes), resume=True)
    assert contents(run) == before


def test_settings_without_effect_on_training_may_change_on_resume(texts, tmp_path):
    with signal_after(1):
        train(raw_recipe(texts, tmp_path / "run", run=dict(steps=3)))
    shutil.move(tmp_path / "run", tmp_path / "moved")
    raw = raw_recipe(
        texts,
        tmp_path / "moved",
        run=dict(steps=3, log_every=3, save_every=2, eval_every=2, eval_tokens=50, keep=1),
    )
    assert train(raw, resume=True).name == "step-00000003"
    assert [p.name for p in (tmp_path / "moved").glob("step-*")] == ["step-00000003"]


# ---- existing files ----
def test_a_used_run_folder_is_refused(trained):
    before = contents(trained)
    for raw in (raw_recipe(trained.parent / "texts", trained), raw_recipe("elsewhere", trained)):
        with pytest.raises(
            ValueError,
            match="holds a run already .step-00000040.; add --resume to resume it, or choose "
            "another --run.out",
        ):
            train(raw)
    assert contents(trained) == before


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "metrics.jsonl", "data/mine.txt"])
def test_a_foreign_folder_is_refused(texts, tmp_path, name):
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(
        ValueError,
        match=f"holds {name.split('/')[0]} but no recipe.json, so it is not a run folder",
    ):
        train(raw_recipe(texts, tmp_path / "run"))
    assert contents(tmp_path / "run") == {name: b"mine"}


def test_nothing_to_resume(texts, tmp_path):
    with pytest.raises(ValueError, match="nothing to resume"):
        train(raw_recipe(texts, tmp_path / "run"), resume=True)
    assert not (tmp_path / "run").exists()


def test_a_restart_does_not_reuse_the_old_vocabulary(texts, tmp_path):
    """A restart trains a new tokenizer if the first attempt has saved no checkpoint.

    The tokenizer of the first attempt may belong to another recipe.
    """
    with (
        mock.patch.object(loop, "prepare_corpus", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        train(raw_recipe(texts, tmp_path / "run", model=dict(vocab_size=270)))
    assert Tokenizer.load(tmp_path / "run" / "tokenizer").vocab_size == 270
    train(raw_recipe(texts, tmp_path / "run", run=dict(steps=1)))
    assert Tokenizer.load(tmp_path / "run" / "tokenizer").vocab_size == 300


def test_empty_corpus(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("")
    with pytest.raises(ValueError, match="(?i)empty|no text|nothing"):
        train(raw_recipe(tmp_path / "in", tmp_path / "run"))
    assert checkpoint.latest(tmp_path / "run") is None


def test_tokenizer_larger_than_the_model(trained, texts, tmp_path):
    raw = raw_recipe(
        texts,
        tmp_path / "run",
        model=dict(vocab_size=280),
        data=dict(tokenizer=str(trained / "tokenizer")),
    )
    with pytest.raises(
        ValueError,
        match="the tokenizer has 300 tokens, more than model.vocab_size 280; raise "
        "model.vocab_size",
    ):
        train(raw)
    raw = raw_recipe(
        texts,
        tmp_path / "roomy",
        model=dict(vocab_size=350),
        data=dict(tokenizer=str(trained / "tokenizer")),
        run=dict(steps=1),
    )
    folder = train(raw)
    assert (folder / "model" / "tokenizer.json").read_bytes() == (
        trained / "tokenizer" / "tokenizer.json"
    ).read_bytes()
    assert hf.load(folder / "model").config.vocab_size == 350


def test_without_held_out_text(texts, tmp_path):
    folder = train(
        raw_recipe(texts, tmp_path / "run", data=dict(holdout=0.0), run=dict(steps=2, eval_every=1))
    )
    assert folder.name == "step-00000002" and not [
        m for m in metrics(tmp_path / "run") if "heldout_bits_per_token" in m
    ]


def test_without_tensorboard(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(raw_recipe(texts, tmp_path / "run", run=dict(steps=1)), quiet=False)
    assert (
        "TensorBoard is not installed" in capsys.readouterr().out
        and not (tmp_path / "run" / "tensorboard").exists()
    )
    assert metrics(tmp_path / "run")[0]["step"] == 1


def test_progress_output(texts, tmp_path, capsys, monkeypatch):
    train(raw_recipe(texts, tmp_path / "plain", run=dict(steps=3)), quiet=False)
    out = capsys.readouterr().out
    for words in (
        "learning a vocabulary of 300 tokens",
        "parameters",
        "GEMM peak",
        "step 1/3  loss 5.",
        "tok/s  MFU",
        "heldout bits per byte",
        "done: 3 steps",
    ):
        assert words in out, words
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train(raw_recipe(texts, tmp_path / "bar", run=dict(steps=3)), quiet=False)
    assert "3/3" in capsys.readouterr().err
    train(raw_recipe(texts, tmp_path / "quiet", run=dict(steps=1)))
    assert capsys.readouterr() == ("", "")


# ---- failures during training ----
def nan_at(call: int):
    original, calls = Transformer.loss, []

    def loss(self, *args):
        calls.append(1)
        return original(self, *args) * (math.nan if len(calls) == call else 1.0)

    return mock.patch.object(Transformer, "loss", loss)


def test_nan_loss_stops_before_the_weights_change(texts, tmp_path):
    """A NaN loss stops training before the weights change.

    The loss is NaN in the first micro-batch of step 4. With two micro-batches per step this is the
    7th call. The checkpoint of step 2 exists.
    """
    raw = raw_recipe(texts, tmp_path / "run", run=dict(steps=6, save_every=2))
    raw["spikes"] = dict(skip=False)
    updates, original = [], MasterAdamW.step
    with (
        nan_at(7),
        mock.patch.object(
            MasterAdamW, "step", lambda *args: (updates.append(args), original(*args))
        ),
    ):
        with pytest.raises(
            loop.Stopped,
            match="step 4: loss nan, gradient norm nan. Stopped before the weights changed",
        ) as e:
            train(raw)
    assert (
        len(updates) == 3
        and "Resume from" in str(e.value)
        and "step-00000002 with --resume and a lower --optim.lr" in str(e.value)
    )
    bad = checkpoint.load_tensors(tmp_path / "run" / "bad-batch-4.safetensors")
    assert bad["ids"].shape == bad["segments"].shape == (4, 33) and math.isnan(bad["loss"])
    assert train(raw, resume=True).name == "step-00000006"  # the folder can still be used


def test_an_infinite_gradient_stops_training(texts, tmp_path):
    """A gradient that is not finite stops training, also if the loss is finite.

    No checkpoint exists yet. On the command line the exit code is 3.
    """
    raw = {**raw_recipe(texts, tmp_path / "run"), "spikes": dict(skip=False)}
    original = MasterAdamW.collect

    def collect(self):
        self.params[0].grad[0, 0] = math.inf
        original(self)

    file = write_toml(tmp_path / "r.toml", raw)
    with (
        mock.patch.object(MasterAdamW, "collect", collect),
        mock.patch.object(loop, "measure_peak", return_value=1e10),
    ):
        with mock.patch("sys.stderr") as err:
            assert cli.main(["train", str(file), "--quiet"]) == 3
    said = "".join(c.args[0] for c in err.write.call_args_list)
    assert (
        "gradient norm inf" in said
        and "No checkpoint was saved yet" in said
        and said.count("\n") == 1
    )
    assert (tmp_path / "run" / "bad-batch-1.safetensors").exists() and checkpoint.latest(
        tmp_path / "run"
    ) is None


def test_a_second_signal_ends_the_process_at_once(texts, tmp_path):
    before = signal.getsignal(signal.SIGINT)  # SIGINT is ignored under nohup
    with (
        signal_after(2, signal.SIGINT),
        mock.patch.object(
            loop.hf, "save", side_effect=lambda *a, **k: signal.raise_signal(signal.SIGINT)
        ),
    ):
        with pytest.raises(KeyboardInterrupt):
            train(raw_recipe(texts, tmp_path / "run", run=dict(steps=50)))
    assert checkpoint.latest(tmp_path / "run") is None and not list(
        (tmp_path / "run").glob(".step*")
    )
    assert signal.getsignal(signal.SIGINT) is before


CHILD = """
import sys
sys.modules["torch.utils.tensorboard"] = sys.modules["matplotlib"] = None  # seconds less
from lamoe.train import loop
from lamoe import cli
loop.measure_peak = lambda *_, **__: 1e10
sys.exit(cli.main(sys.argv[1:]))
"""


def test_real_processes_stopped_or_killed_resume_exactly(texts, tmp_path):
    """Runs that SIGTERM, SIGINT or SIGKILL stops resume to the result of an uninterrupted run.

    Every run is a real process. All of them run at the same time, to save time.
    """
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
    raws = {
        s: raw_recipe(
            texts, tmp_path / s.name, run=dict(steps=5000, save_every=2, keep=2, log_every=1)
        )
        for s in signals
    }
    children = {}
    for s, raw in raws.items():
        file = write_toml(tmp_path / f"{s.name}.toml", raw)
        children[s] = subprocess.Popen(
            [sys.executable, "-c", CHILD, "train", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    waiting, stopped, deadline = set(signals), {}, time.monotonic() + 100
    while waiting:
        for s in list(waiting):
            assert children[s].poll() is None and time.monotonic() < deadline, children[
                s
            ].communicate()
            if (tmp_path / s.name / "latest").exists():
                children[s].send_signal(s)
                waiting.remove(s)
        time.sleep(0.01)
    for s, child in children.items():
        out, err = child.communicate(timeout=60)
        stopped[s] = int(checkpoint.latest(tmp_path / s.name).name[5:])
        if s == signal.SIGKILL:
            assert child.returncode == -9
        else:
            assert child.returncode == 130 and err == ""
            assert (
                f"stopped by {s.name} after step {stopped[s]} of 5000" in out
                and "To resume, run the same command with --resume" in out
            )
    steps = max(stopped.values()) + 3
    whole = raw_recipe(texts, tmp_path / "whole", run=dict(steps=5000, save_every=2, keep=2))
    with signal_after(steps):
        want = train(whole)
    for s, raw in raws.items():
        with signal_after(steps - stopped[s]):
            assert same(state(train(raw, resume=True)), state(want)), s.name
        assert metrics(tmp_path / s.name) == metrics(tmp_path / "whole")
