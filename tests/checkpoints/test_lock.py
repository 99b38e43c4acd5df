"""Tests of locks: one process holds a lock, others are refused, and it ends with its process."""

import errno
import subprocess
import sys

from lamoe.checkpoints import lock

HOLD = """
import sys
from lamoe.checkpoints import lock
file = open(sys.argv[1], "ab")
print(lock.try_lock(file), flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "file"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "True\n"
        with path.open("ab") as file:
            assert not lock.try_lock(file)
            other.stdin.close()
            other.wait()
            assert lock.try_lock(file)
            file.write(b"the lock leaves position and content alone")
    assert path.read_bytes() == b"the lock leaves position and content alone"


def test_two_files_of_one_process_exclude_each_other(tmp_path):
    with (tmp_path / "file").open("ab") as first, (tmp_path / "file").open("ab") as second:
        assert lock.try_lock(first)
        assert not lock.try_lock(second)
        first.close()
        assert lock.try_lock(second)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(file):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(lock, "_lock", refuse)
    with (tmp_path / "file").open("ab") as file:
        assert lock.try_lock(file)
