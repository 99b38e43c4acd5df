"""Tests of the kernels after fork().

A child process has only the thread that called fork(), so it must start new worker threads. Each
test runs a program in its own process. The program must exit normally.
"""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lamoe.backends.cpu import native

pytestmark = pytest.mark.skipif(not native.available(), reason="needs the compiled kernels")

BEGIN = """
import multiprocessing, os, sys, threading, time
import torch
from native_run import Run
from oracles import tiny
from lamoe.backends.base import Formats
from lamoe.backends.cpu.backend import CpuBackend

TEXT = [(5 * i) % 60 + 1 for i in range(40)]

def threads():  # of this process
    return len(os.listdir("/proc/self/task"))

def model(n):
    return CpuBackend.from_transformer(tiny.model(tiny.HARD), Formats("int8"), n)

def fork(work):
    '''Run work() in a child process and return its exit code.'''
    child = os.fork()
    if child == 0:
        work()
        sys.exit()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

torch.set_num_threads(1)
"""


def run_program(code: str) -> None:
    """Run BEGIN + code in its own process. Check that it prints "done" and exits with status 0."""
    tests = Path(__file__).parents[1]
    program = subprocess.Popen(
        [sys.executable, "-c", BEGIN + textwrap.dedent(code)],
        cwd=tests,
        env={"PATH": "", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": f"{tests}:{tests.parent}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = program.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)  # kills the program and its children
        raise
    assert program.returncode == 0 and out.endswith("done\n"), out


def test_children_and_grandchildren_compute_the_same_on_equally_many_threads():
    run_program("""
        packed = model(3)
        want = Run(packed).all(TEXT, [7])
        before = threads()

        def child(deeper):
            assert threads() == 1
            got = Run(packed).all(TEXT, [7])
            assert torch.equal(got, want)
            assert threads() == before == packed.native.threads == 3
            if deeper:
                assert fork(lambda: child(False)) == 0
                assert torch.equal(Run(packed).all(TEXT, [7]), want)

        for _ in range(3):
            assert fork(lambda: child(True)) == 0
            assert torch.equal(Run(packed).all(TEXT, [7]), want) and threads() == 3
        print("done")
    """)


def test_a_child_can_exit_or_free_the_model_without_using_it():
    run_program("""
        packed = model(3)
        Run(packed).all(TEXT, [7])

        def free():
            global packed
            del packed
            assert threads() == 1
            other = model(2)
            Run(other).all(TEXT, [7])
            assert threads() == 2
            del other
            assert threads() == 1

        assert fork(lambda: None) == 0 and fork(free) == 0
        print("done")
    """)


def test_fork_while_another_thread_is_inside_the_kernels():
    """A fork while another thread is inside the kernels leaves a usable child.

    The child has copies of locks and counters in an arbitrary state, but not the threads.
    """
    run_program("""
        packed = model(2)
        want, end = Run(packed).all(TEXT, [7]), False

        def busy():
            while not end:
                Run(packed).all(TEXT, [7])

        thread = threading.Thread(target=busy)
        thread.start()
        def child():
            assert torch.equal(Run(packed).all(TEXT, [7]), want)
            os._exit(0)
        try:
            for _ in range(3):
                assert fork(child) == 0
        finally:
            end = True
            thread.join()
        print("done")
    """)


def test_multiprocessing_with_fork():
    run_program("""
        packed = model(2)
        want = Run(packed).all(TEXT, [7])

        def compute(size):
            return Run(packed).all(TEXT, [size])

        with multiprocessing.get_context("fork").Pool(2) as pool:
            got = pool.map(compute, [7, 7, 7, 7])
        assert all(torch.equal(g, want) for g in got)
        print("done")
    """)


def test_an_async_engine_refuses_requests_in_the_child():
    """In a child, an AsyncLLM of the parent refuses requests. In the parent it continues to work.

    During the fork, the thread of the engine holds its lock.
    """
    run_program("""
        import asyncio
        from lamoe.engine.async_llm import AsyncLLM, EngineDead
        from lamoe.engine.llm import LLM
        from lamoe.engine.sampler import SamplingParams

        engine = AsyncLLM(LLM(tiny.model(tiny.HARD).float()))
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)

        def generate():
            return asyncio.run(engine.generate(TEXT, params))[0].token_ids

        async def use(do):
            try:
                await do()
            except EngineDead as e:
                return str(e)

        async def read(deltas):
            async for _ in deltas:
                pass

        def child():
            assert not engine.alive and isinstance(EngineDead(), RuntimeError)
            parent = f"asked an AsyncLLM made in process {os.getppid()}"
            for do in (
                lambda: engine.generate(TEXT, params),
                lambda: read(engine.stream(TEXT, params)),
                lambda: read(run),
                lambda: engine.call(len),
                lambda: engine.open([(TEXT, params)]),
            ):
                error = asyncio.run(use(do))
                assert error.startswith(f"process {os.getpid()} {parent}"), error
                assert "after the fork" in error, error
            run.close()
            engine.close()
            again = AsyncLLM(LLM(tiny.model(tiny.HARD).float()))  # as the message advises
            assert asyncio.run(again.generate(TEXT, params))[0].token_ids == want
            again.close()

        want = generate()
        run = asyncio.run(engine.open([(TEXT, params)]))
        held, go = threading.Event(), threading.Event()

        def hold():
            with engine._wake:
                held.set()
                go.wait()

        threading.Thread(target=hold).start()
        held.wait()
        assert fork(child) == 0
        go.set()
        run.close()
        assert generate() == want and engine.alive
        engine.close()
        print("done")
    """)
