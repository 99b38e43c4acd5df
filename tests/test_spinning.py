"""Tests that lamoe bounds how long OpenMP's threads spin, unless the user has decided it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lamoe.spinning import BOUNDS, DECIDED_BY, bound_spinning

ROOT = Path(__file__).resolve().parent.parent
# Prints the variables as C code in the same process sees them.
PRINT = """
import ctypes, json
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
print(json.dumps({n: v.decode() for n in names if (v := getenv(n.encode())) is not None}))
"""
posix = pytest.mark.skipif(os.name != "posix", reason="ctypes.CDLL(None) needs dlopen")


def start(*command: str, **variables: str) -> subprocess.CompletedProcess:
    """Run Python with only these variables about OpenMP."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**env, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def without_torch(monkeypatch):
    """Pretend that torch is not imported and that no variable is set."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for name in DECIDED_BY:
        monkeypatch.delenv(name, raising=False)


@posix
def test_native_code_sees_the_bounds_after_import_lamoe():
    assert json.loads(start("-c", "import lamoe" + PRINT).stdout) == BOUNDS


@posix
def test_a_child_process_inherits_the_bounds_and_keeps_them():
    code = f"import lamoe, subprocess, sys; subprocess.run([sys.executable, '-c', {PRINT!r}])"
    assert json.loads(start("-c", code).stdout) == BOUNDS
    code = code.replace("'-c', '", "'-c', 'import lamoe")
    assert code.count("import lamoe") == 2
    assert json.loads(start("-c", code).stdout) == BOUNDS


def test_the_command_line_sets_them_before_torch_is_loaded():
    """OpenMP prints what it has read. `evaluate` imports torch before it looks for the folder."""
    done = start("-m", "lamoe", "evaluate", "no/such/folder/here", OMP_DISPLAY_ENV="verbose")
    lines = [line.strip().replace("[host] ", "") for line in done.stderr.splitlines()]
    known = [line for line in lines if line.startswith(tuple(BOUNDS))]
    if not known:
        pytest.skip("this build of torch does not use GCC's or LLVM's OpenMP")
    assert done.returncode == 2
    for line in known:
        name, _, value = line.partition("=")
        assert value.strip(" '").startswith(BOUNDS[name.strip()])


@pytest.mark.parametrize("name", DECIDED_BY)
def test_the_users_variable_wins(without_torch, monkeypatch, name):
    monkeypatch.setenv(name, "7")
    before = dict(os.environ)
    bound_spinning()
    assert dict(os.environ) == before


def test_other_variables_do_not_matter(without_torch, monkeypatch):
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "2"})
    bound_spinning()
    assert os.environ == {"OMP_NUM_THREADS": "2", **BOUNDS}


def test_nothing_changes_after_torch_was_imported(without_torch, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", object())
    before = dict(os.environ)
    bound_spinning()
    assert dict(os.environ) == before
