"""A child of fork() has no threads but one: the kernels there begin with new ones. Each scene is a process of its own, which must end by itself, as a
program does, with everything freed."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lamoe.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="needs the compiled kernels")

BEGIN = """
import multiprocessing, os, sys, threading, time
import torch
from native_run import Run
from oracles import tiny
from lamoe.packed import PackedModel

TEXT = [(5 * i) % 60 + 1 for i in range(40)]

def threads():  # of this process
    return len(os.listdir("/proc/self/task"))

def model(n):
    return PackedModel.of(tiny.model(tiny.HARD), "int8", n)

def fork(work):
    '''Run work() in a child that ends as programs do; its exit code.'''
    child = os.fork()
    if child == 0:
        work()
        sys.exit()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

torch.set_num_threads(1)
"""


def scene(code: str) -> None:
    tests = Path(__file__).parent
    program = subprocess.Popen([sys.executable, "-c", BEGIN + textwrap.dedent(code)], cwd=tests, env={"PATH": "", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": f"{tests}:{tests.parent}"},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        out, _ = program.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)  # with its children
        raise
    assert program.returncode == 0 and out.endswith("done\n"), out


def test_children_and_grandchildren_compute_the_same_on_as_many_threads():
    scene("""
        packed = model(3)
        want = Run(packed).all(TEXT, [7])
        before = threads()

        def child(deeper):
            assert threads() == 1
            got = Run(packed).all(TEXT, [7])
            assert torch.equal(got, want) and threads() == before == 3 and packed.native.threads == 3
            if deeper:
                assert fork(lambda: child(False)) == 0
                assert torch.equal(Run(packed).all(TEXT, [7]), want)

        for _ in range(3):
            assert fork(lambda: child(True)) == 0
            assert torch.equal(Run(packed).all(TEXT, [7]), want) and threads() == 3
        print("done")
    """)


def test_a_child_that_computes_nothing_can_end_and_free():
    scene("""
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


def test_forks_in_the_middle_of_steps():
    """Another thread is inside the kernels, whose locks and counters are then in any state. Its own model is copied half-way; the threads are not."""
    scene("""
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
    scene("""
        packed = model(2)
        want = Run(packed).all(TEXT, [7])

        def compute(size):
            return Run(packed).all(TEXT, [size])

        with multiprocessing.get_context("fork").Pool(2) as pool:
            got = pool.map(compute, [7, 7, 7, 7])
        assert all(torch.equal(g, want) for g in got)
        print("done")
    """)
