"""Bounds how long OpenMP's threads spin, so that torch stays fast on a busy machine.

After each parallel operation, OpenMP's threads spin: they wait for the next one without sleeping.
By default they spin for milliseconds. If other programs keep the cores busy, a spinning thread uses
up its time slice while the thread that it waits for has no core, and torch gets many times slower.
A bound below a millisecond costs nothing on an idle machine, because the next operation usually
follows sooner.
"""

from __future__ import annotations

import os
import sys

# If one of these variables is set, the user has decided how threads wait.
DECIDED_BY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
# GCC's runtime counts pauses of the CPU. LLVM's and Intel's count milliseconds.
BOUNDS = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}


def bound_spinning() -> None:
    """Set the variables that bound the spinning of GCC's, LLVM's and Intel's OpenMP runtimes.

    The runtimes read them when torch is loaded, so `import lamoe` calls this function first. Child
    processes inherit the variables. Nothing changes if the user has set one of `DECIDED_BY`, or if
    torch was imported before lamoe.
    """
    if "torch" in sys.modules or any(name in os.environ for name in DECIDED_BY):
        return
    os.environ.update(BOUNDS)
