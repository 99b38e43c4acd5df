"""Helpers for engine tests: tiny random engines, prompts, and an oracle without a cache."""

import pytest
import torch

from lamoe.engine.llm import LLM
from lamoe.engine.request import Sequence
from lamoe.engine.sampler import SamplingParams
from oracles import tiny

FAMILIES = {
    "mla": tiny.HARD,  # q_lora, YaRN, group-limited routing
    "moe-v1 mha": tiny.config("deepseek"),
    "gqa": tiny.config("llama", num_key_value_heads=2),
}
EVERY = pytest.mark.parametrize("family", FAMILIES)
CONTEXT = 96


def llm(family: str = "mla", vocabulary: int = 64, changes: dict | None = None, **options) -> LLM:
    """Make an engine over a tiny model.

    Args:
        changes: fields of the ModelConfig to replace.
        options: of LLM.
    """
    c = FAMILIES[family].replace(
        max_position_embeddings=256, vocab_size=vocabulary, **(changes or {})
    )
    options = {
        "cache": "fp32",
        "max_model_len": CONTEXT,
        "page_size": 4,
        "max_num_seqs": 8,
        **options,
    }
    return LLM(tiny.model(c, dtype=torch.float32), **options)


def prompts(*lengths: int, seed: int = 2) -> list[list[int]]:
    """Return a random prompt of each length. Prompt i depends on seed + i only."""
    return [tiny.ids(FAMILIES["mla"], n, seed=seed + i).tolist() for i, n in enumerate(lengths)]


def greedy(n: int = 16, **more) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=n, **more)


def reforward(
    m, prompt: list[int], n: int, adjust=lambda logits, ids: logits
) -> tuple[list[int], list[torch.Tensor]]:
    """Decode n greedy tokens by full forward passes without a cache.

    Args:
        adjust: changes the logits, given also all ids so far.

    Returns:
        the tokens, and the logits that each was chosen from.
    """
    ids, rows = list(prompt), []
    with torch.no_grad():
        for _ in range(n):
            rows.append(m(torch.tensor([ids]))[0, -1])
            ids.append(int(adjust(rows[-1].clone(), ids).argmax()))
    return ids[len(prompt) :], rows


def watch(engine: LLM) -> tuple[list[list[tuple[Sequence, int]]], list[Sequence]]:
    """Record the plan of every step and every added sequence, in lists that grow as steps run.

    Every plan is checked against the limits of the scheduler.
    """
    plans, sequences = [], []
    schedule, add = engine.scheduler.schedule, engine.scheduler.add

    def recorded():
        plans.append(schedule())
        assert len(engine.scheduler.running) <= engine.scheduler.max_sequences
        assert sum(n for _, n in plans[-1]) <= engine.scheduler.max_tokens
        return plans[-1]

    def added(seq):
        sequences.append(seq)
        add(seq)

    engine.scheduler.schedule, engine.scheduler.add = recorded, added
    return plans, sequences


def idle(engine: LLM) -> bool:
    """Return whether no sequence runs or waits and no page has an owner."""
    return (
        not engine.busy
        and engine.pool.owned == 0
        and engine.pool.available == engine.pool.total
        and not engine._texts
        and not engine._inboxes
    )


def tokens(outputs) -> list[list[int]]:
    """Return the token ids of each output."""
    return [o.token_ids for o in outputs]


def drain(engine: LLM, limit: int = 500) -> dict:
    """Step until the engine is idle, at most `limit` times. Return {id: output}."""
    done = {}
    for _ in range(limit):
        if not engine.busy:
            return done
        done.update({d.id: d.output for d in engine.step() if d.output is not None})
    raise AssertionError(f"the engine still has work after {limit} steps")
