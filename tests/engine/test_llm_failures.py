"""Tests that an error inside a step ends only the sequences that it belongs to.

An error may belong to one sequence, to all sequences of a forward pass, or to the whole engine.
"""

import asyncio
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lamoe.backends.cpu import native
from lamoe.engine import runner
from lamoe.engine.async_llm import AsyncLLM, EngineDead
from lamoe.engine.sampler import SamplingParams
from tiny_engine import EVERY, drain, greedy, idle, llm, prompts, tokens

native_too = pytest.mark.parametrize(
    "impl",
    [
        "torch",
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(native.lib is None, reason="needs the compiled kernels"),
        ),
    ],
)
INTERNAL = "an internal error ended it ({}); the log has the traceback"


class Panic(BaseException):
    """A BaseException that is not an Exception, like a panic of Rust code in Python."""


# ---- failures of a forward pass ----
@EVERY
@native_too
def test_a_sequence_that_makes_a_pass_fail_ends_alone(family, impl, caplog):
    """A sequence that makes a forward pass fail ends, and the others give their usual outputs.

    One sequence gets a token id outside the vocabulary, so that the op refuses the whole pass. The
    other sequences are in prefill or decoding.
    """
    texts = prompts(5, 30, 9, 40)
    want = tokens(llm(family, backend=impl).generate(texts, greedy(12)))
    for at, steps in ((1, 0), (2, 0), (2, 4)):
        engine = llm(family, backend=impl, max_num_batched_tokens=16)
        ids = engine.add_all([(p, greedy(12)) for p in texts])
        for _ in range(steps):
            assert not [d for d in engine.step() if d.output]
        victim = next(
            s for s in (*engine.scheduler.running, *engine.scheduler.waiting) if s.id == ids[at]
        )
        victim.tokens[-1] = 10**6
        outputs = drain(engine)
        bad = outputs.pop(ids[at])
        assert (
            bad.finish_reason == "error"
            and bad.internal
            and bad.error.startswith("an internal error ended it (")
        )
        assert tokens(outputs[i] for i in sorted(outputs)) == want[:at] + want[at + 1 :] and idle(
            engine
        )
        assert all(o.finish_reason == "length" and not o.internal for o in outputs.values())
    assert "a pass failed" in caplog.messages and "outside the vocabulary" in caplog.text


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a kernel"), OSError(12, "no memory"), MemoryError()],
    ids=lambda e: type(e).__name__,
)
def test_a_pass_that_always_fails_ends_only_its_sequences(error, monkeypatch):
    """If every forward pass fails, the running sequences end and return their pages.

    Waiting and later requests get the outputs of a fresh engine, also with prefix hits.
    """
    texts, engine = prompts(9, 9, 20, 6), llm(backend="torch", max_num_seqs=2)
    want = tokens(llm(backend="torch").generate(texts, greedy(12)))
    running = engine.add_all([(p, greedy(12)) for p in texts[:2]])
    for _ in range(3):
        engine.step()
    later = engine.add_all([(p, greedy(12)) for p in texts[2:]])

    def broken(*args):
        raise type(error)(*error.args)  # a copy, because a traceback keeps the engine alive

    with monkeypatch.context() as m:
        m.setattr(runner, "run", broken)
        ends = {d.id: d for d in engine.step()}
    assert sorted(ends) == running and all(
        d.token_id is None and d.output.finish_reason == "error" and d.output.internal
        for d in ends.values()
    )
    assert {d.output.error for d in ends.values()} == {INTERNAL.format(type(error).__name__)} and [
        len(d.output.token_ids) for d in ends.values()
    ] == [3, 3]
    assert engine.pool.owned == 0
    outputs = drain(engine)
    assert tokens(outputs[i] for i in later) == want[2:] and idle(engine)
    assert (
        tokens(engine.generate(texts, greedy(12))) == want
        and engine.cached_tokens > 0
        and idle(engine)
    )


def test_a_pass_that_exceeds_memory_is_retried_one_sequence_at_a_time(monkeypatch):
    run, sizes = runner.run, []

    def little_memory(model, cache, work, *more):
        sizes.append(len(work))
        if len(work) > 1:
            raise MemoryError
        return run(model, cache, work, *more)

    texts = prompts(5, 9, 20)
    want = tokens(llm(backend="torch").generate(texts, greedy(6)))
    engine = llm(backend="torch", count_experts=True)
    monkeypatch.setattr(runner, "run", little_memory)
    outputs = engine.generate(texts, greedy(6))
    assert tokens(outputs) == want and max(sizes) == 3 and idle(engine)
    c = engine.model.config
    # Expert counts include each token once, although the failed pass had processed it too.
    per_token = len(c.moe_layers) * c.num_experts_per_tok
    assert [int(o.experts.sum()) for o in outputs] == [per_token * (len(p) + 5) for p in texts]


NO_MEMORY = """
import resource
from oracles import tiny
from tiny_engine import greedy, idle, prompts, tokens
from lamoe.engine.llm import LLM

model = tiny.model(tiny.HARD.replace(max_position_embeddings=4096, vocab_size=64))
def new():
    return LLM(model.float(), cache="fp32", max_num_batched_tokens=4096, backend="cpu")

texts = prompts(2400, 20, 30)
want = tokens(new().generate(texts, greedy(6)))
engine = new()
engine.generate([[1, 2, 3]], greedy(4))  # allocates what every step needs
status = open("/proc/self/status").read().splitlines()
size = int(next(line.split()[1] for line in status if line.startswith("VmSize"))) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), resource.RLIM_INFINITY))
long, *short = engine.generate(texts, greedy(6))
print(long.finish_reason, long.error)
assert tokens(short) == want[1:] and idle(engine)
assert tokens(engine.generate(texts[1:], greedy(6))) == want[1:] and idle(engine)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert tokens(engine.generate(texts, greedy(6))) == want
"""


@pytest.mark.skipif(native.lib is None, reason="needs the compiled kernels")
def test_out_of_memory_inside_the_kernels_ends_only_the_long_sequence():
    """If the kernels run out of memory, only the long sequence ends.

    The process is not allowed to grow. A failed allocation must not change the recorded buffer
    size.
    """
    tests = Path(__file__).parents[1]
    env = {
        "PATH": "",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "PYTHONPATH": f"{tests}:{tests.parent}",
    }
    run = subprocess.run(
        [sys.executable, "-c", NO_MEMORY],
        cwd=tests,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0 and run.stdout == f"error {INTERNAL.format('MemoryError')}\n", (
        run.stdout + run.stderr
    )


@EVERY
@native_too
@pytest.mark.parametrize("budget", [64, 8])
def test_nan_rows_are_not_shared_through_the_prefix_cache(family, impl, budget):
    """Cache rows with NaN are not shared with later requests that have the same prefix.

    A NaN token can turn earlier rows into NaN too, because masked attention computes 0 x NaN.
    """
    engine, (text,) = (
        llm(family, backend=impl, max_num_batched_tokens=budget),
        [[t % 62 for t in p] for p in prompts(24)],
    )
    want = llm(family, backend=impl).generate([text + [5]], greedy(6, logit_bias={63: -100}))
    with torch.no_grad():
        engine.model.embed.weight[63] = float("nan")
    (bad,) = engine.generate([text + [63, 2]], greedy(6))
    assert bad.finish_reason == "error" and bad.internal and idle(engine)
    outputs = engine.generate([text + [5]], greedy(6, logit_bias={63: -100}))
    assert tokens(outputs) == tokens(want) and idle(engine)


# ---- failures of one sequence ----
@pytest.mark.parametrize(
    "error, message, internal",
    [
        (ValueError("nothing fits"), "nothing fits", False),
        (RuntimeError("sum is zero"), "sum is zero", False),
        (KeyError(5), INTERNAL.format("KeyError"), True),
        (MemoryError(), INTERNAL.format("MemoryError"), True),
        (Panic("index out of bounds"), INTERNAL.format("Panic"), True),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize("where", ["sample", "token_logprobs", "text"])
def test_an_error_of_one_sequence_ends_it_alone(
    where, error, message, internal, monkeypatch, caplog
):
    engine, texts = llm(), prompts(5, 6, 7)
    odd = SamplingParams(temperature=1.0, max_tokens=8, seed=1, logprobs=0)
    want = tokens(llm().generate(texts, [greedy(8), odd, greedy(8)]))

    def broken(*args):
        raise type(error)(*error.args)  # a copy, because a traceback keeps the engine alive

    first, second, third = ids = engine.add_all(list(zip(texts, (greedy(8), odd, greedy(8)))))
    ends = {}
    for step in range(3):
        ends |= {d.id: d.output for d in engine.step() if d.output}
    if where == "text":
        engine._texts[second].add = broken
    else:
        monkeypatch.setattr(f"lamoe.engine.next_token.{where}", broken)
    ends |= drain(engine)
    bad = ends.pop(second)
    assert (bad.finish_reason, bad.error, bad.internal) == (
        "error",
        message,
        internal,
    ) and bad.token_ids[:3] == want[1][:3]
    assert len(bad.logprobs) == len(bad.token_ids)
    assert (
        tokens(ends[i] for i in (first, third)) == [want[0], want[2]]
        and idle(engine)
        and len(ids) == 3
    )
    assert [r.levelno for r in caplog.records if r.name == "lamoe.engine"] == [
        logging.ERROR
    ] * internal


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_keyboard_interrupt_and_system_exit_leave_the_engine(error, monkeypatch):
    engine = llm()
    monkeypatch.setattr(
        "lamoe.engine.next_token.sample", lambda *args: (_ for _ in ()).throw(error())
    )
    with pytest.raises(error):
        engine.generate(prompts(5), SamplingParams(seed=1))
    assert idle(engine)  # both requests have been cancelled


# ---- thread of AsyncLLM ----
def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


@pytest.fixture
def engine():
    e = AsyncLLM(llm(speculate=0))
    yield e
    e.close(10)


def test_the_thread_continues_after_a_failed_pass(engine, monkeypatch):
    async def main():
        want = (await engine.generate([1, 2], greedy(8)))[0]
        with monkeypatch.context() as m:
            m.setattr(runner, "run", lambda *args: 1 / 0)
            bad = (await engine.generate([1, 2], greedy(8)))[0]
        assert (bad.finish_reason, bad.error, engine.alive) == (
            "error",
            INTERNAL.format("ZeroDivisionError"),
            True,
        )
        assert (await engine.generate([1, 2], greedy(8)))[0].token_ids == want.token_ids
        await engine.call(lambda llm: None)
        assert not engine._readers

    run(main())


def test_readers_get_any_error_that_ends_the_thread(engine, monkeypatch):
    async def main():
        def panic():
            raise Panic("gone")

        # After an error in the scheduler the state of pages and queues is undefined.
        monkeypatch.setattr(engine._llm.scheduler, "schedule", panic)
        with pytest.raises(EngineDead, match="gone"):
            await engine.generate([1, 2], greedy())
        assert isinstance(engine.error, Panic) and not engine.alive

    run(main())


def test_actions_after_one_that_ends_the_thread_are_refused(engine):
    async def main():
        begin, refused = asyncio.Event(), []
        loop = asyncio.get_running_loop()

        def slow(llm):
            loop.call_soon_threadsafe(begin.set)
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0.1), loop).result()

        def panic(llm):
            raise Panic("in an action")

        engine._post(slow)
        # Two more actions are posted while `slow` runs, so the thread takes both of them together.
        await begin.wait()
        engine._post(panic, refused.append)
        with pytest.raises(EngineDead, match="in an action"):
            await engine.call(lambda llm: None)
        assert len(refused) == 1

    run(main())
