"""Tests of AsyncLLM: same tokens as LLM, concurrency, cancellation, errors, shutdown."""

import asyncio

import pytest

from lamoe.engine.async_llm import AsyncLLM, EngineDead
from lamoe.engine.llm import LLM
from lamoe.engine.sampler import SamplingParams
from oracles import tiny

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = [[1, 2, 3], [5] * 20, [7, 8]]


@pytest.fixture
def engine():
    e = AsyncLLM(LLM(tiny.model(tiny.config(), 0), cache="fp32", speculate=0))
    yield e
    e.close(10)
    assert not e._thread.is_alive()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def until(engine, condition):
    for _ in range(2000):
        if await engine.call(condition):
            return
        await asyncio.sleep(0.001)
    raise AssertionError("the condition did not become true")


def test_concurrent_requests_give_the_synchronous_tokens(engine):
    async def main():
        outs = await asyncio.gather(*(engine.generate(p, GREEDY) for p in PROMPTS))
        return [o[0].token_ids for o in outs]

    want = [
        o.token_ids
        for o in LLM(tiny.model(tiny.config(), 0), cache="fp32", speculate=0).generate(
            PROMPTS, GREEDY
        )
    ]
    assert run(main()) == want


def test_samples_of_one_request_come_in_order(engine):
    params = SamplingParams(n=3, seed=4, max_tokens=6)
    want = [
        o.token_ids
        for o in LLM(tiny.model(tiny.config(), 0), cache="fp32").generate([[1, 2]], params)
    ]
    assert [o.token_ids for o in run(engine.generate([1, 2], params))] == want


def test_leaving_a_stream_and_cancelling_a_task_free_the_pages(engine):
    async def main():
        long = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
        stream = engine.stream([1, 2, 3], long)
        assert (await anext(stream)).output is None
        await stream.aclose()
        task = asyncio.create_task(engine.generate([4, 5], long))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(engine, lambda llm: not llm.busy and llm.pool.owned == 0)
        assert not engine._readers
        # The engine still works after the cancellation.
        return await engine.generate([1, 2, 3], GREEDY)

    assert len(run(main())[0].token_ids) == 12


def test_an_invalid_request_does_not_affect_others(engine):
    async def main():
        good = asyncio.create_task(engine.generate([1, 2, 3], GREEDY))
        with pytest.raises(ValueError, match="no tokens"):
            await engine.generate([], GREEDY)
        with pytest.raises(ValueError, match="logit_bias names token 999999"):
            await engine.generate([1], SamplingParams(logit_bias={999999: 1.0}))
        return await good

    assert run(main())[0].finish_reason == "length"


def test_open_requests_get_an_error_when_the_engine_closes(engine):
    async def main():
        stream = engine.stream(
            [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
        )
        await anext(stream)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineDead, match="closed"):
            async for _ in stream:
                pass
        with pytest.raises(EngineDead, match="closed"):
            await engine.generate([1], GREEDY)

    run(main())


def test_an_error_of_the_engine_reaches_every_reader(engine, monkeypatch):
    async def main():
        monkeypatch.setattr(engine._llm, "step", lambda: 1 / 0)
        with pytest.raises(EngineDead, match="division by zero") as e:
            await engine.generate([1, 2], GREEDY)
        assert isinstance(e.value.__cause__, ZeroDivisionError)
        with pytest.raises(EngineDead, match="division by zero"):
            await engine.generate([1, 2], GREEDY)

    run(main())
