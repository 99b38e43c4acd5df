"""Tests of scoring and embedding in a running engine, expert counts and multi-prompt requests."""

import asyncio

import pytest
import torch

from lamoe.engine.async_llm import AsyncLLM
from lamoe.engine.sampler import SamplingParams
from lamoe.engine.score import mean_state, prompt_logprobs
from lamoe.model.routing import Chosen
from tiny_engine import llm, prompts

GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)


def with_engine(coroutine, **options):
    async def main():
        engine = AsyncLLM(llm(**options))
        try:
            return await asyncio.wait_for(coroutine(engine), 60)
        finally:
            await asyncio.to_thread(engine.close, 10)

    return asyncio.run(main())


@pytest.mark.parametrize("chunk", [1, 7, 20, 64])
@pytest.mark.parametrize("logits", [False, True])
def test_run_sequence_yields_chunks(chunk, logits):
    engine, [ids] = llm(), prompts(20)
    with torch.no_grad():
        want = (engine.model if logits else engine.model.hidden)(torch.tensor([ids]))[0]
    parts = [r.output for r in engine.backend.run_sequence(ids, chunk, head=logits)]
    assert [len(p) for p in parts] == [chunk] * (20 // chunk) + ([20 % chunk] if 20 % chunk else [])
    assert torch.allclose(torch.cat(parts), want, atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 30])
def test_prompt_logprobs(length):
    m, [ids] = llm().model, prompts(length)
    found = with_engine(
        lambda e: prompt_logprobs(e, ids, 3), max_num_seqs=8, max_num_batched_tokens=8
    )
    assert found[0] is None and len(found) == length
    with torch.no_grad():
        logp = m(torch.tensor([ids]))[0].log_softmax(-1)
    for i, entry in enumerate(found[1:]):
        best = logp[i].topk(3).indices.tolist()
        assert set(entry) == {*best, ids[i + 1]}
        assert [entry[t] for t in entry] == pytest.approx(
            [float(logp[i, t]) for t in entry], abs=1e-4
        )


def test_mean_state_while_others_generate():
    m, [ids, other] = llm().model, prompts(40, 5)

    async def main(engine):
        running = asyncio.create_task(engine.generate(other, GREEDY))
        return await mean_state(engine, ids), (await running)[0].token_ids

    state, tokens = with_engine(main, max_num_batched_tokens=8)
    with torch.no_grad():
        assert torch.allclose(
            torch.tensor(state), m.hidden(torch.tensor([ids]))[0].mean(0), atol=1e-5
        )
    assert tokens == llm().generate([other], GREEDY)[0].token_ids


def test_experts_are_counted_per_sequence():
    """Each sequence of a batch counts the experts of its own tokens.

    The last sampled token is not counted, because the model never processes it.
    """
    engine = llm(count_experts=True, speculate=0)
    m, c = engine.model, engine.config
    for prompt, out in zip(prompts(5, 9, 14), engine.generate(prompts(5, 9, 14), GREEDY)):
        chosen = Chosen()
        with torch.no_grad():
            m.hidden(torch.tensor([prompt + out.token_ids[:-1]]), routing_hook=chosen)
        want = torch.stack(
            [layer.flatten().bincount(minlength=c.n_routed_experts) for layer in chosen.layers]
        )
        assert len(chosen.layers) == len(c.moe_layers) and torch.equal(out.experts, want)
        assert int(out.experts.sum()) == len(c.moe_layers) * c.num_experts_per_tok * (
            len(prompt) + 9
        )


def test_expert_counts_of_an_unfinished_sequence():
    engine = llm(count_experts=True)
    [id] = engine.add(prompts(5)[0], GREEDY)
    assert engine.experts(id) is None
    engine.step()
    assert engine.experts(id).sum() > 0
    engine.cancel(id)
    assert engine.experts(id) is None
    assert llm().generate(prompts(5), GREEDY)[0].experts is None
    # A dense model has no experts.
    assert llm("gqa", count_experts=True).generate(prompts(5), GREEDY)[0].experts is None


def test_several_prompts_as_one_request():
    async def main(engine):
        run = await engine.open(
            [(p, SamplingParams(n=2, seed=1, max_tokens=4)) for p in prompts(3, 4)]
        )
        found = {}
        async for index, delta in run:
            found.setdefault(index, []).append(delta)
        with pytest.raises(ValueError, match="no tokens"):  # no part of a refused request is queued
            await engine.open([(prompts(3)[0], GREEDY), ([], GREEDY)])
        assert not await engine.call(lambda llm: llm.busy)
        return found

    found = with_engine(main)
    want = llm().generate(prompts(3, 4), SamplingParams(n=2, seed=1, max_tokens=4))
    assert [[d.token_id for d in found[i]] for i in range(4)] == [o.token_ids for o in want]


def test_fail_raises_in_the_reader_and_close_frees_the_pages():
    async def main(engine):
        run = await engine.open(
            [(prompts(3)[0], SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True))]
        )
        run.fail(TimeoutError("enough"))
        with pytest.raises(TimeoutError, match="enough"):
            async for _ in run:
                pass
        run.close()
        run.close()
        return await engine.call(lambda llm: (llm.busy, llm.pool.owned))

    assert with_engine(main) == (False, 0)
