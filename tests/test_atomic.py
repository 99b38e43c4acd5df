"""Tests of write-then-rename: after any failure the old content remains, and no temporary file."""

import errno
import os
import socket

import pytest

from lamoe import atomic


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    with atomic.replace_file(file, "w") as f:
        f.write("né")
        assert file.read_text() == "old"
    assert file.read_bytes() == "né".encode() and names(tmp_path) == ["a.json"]


def test_a_failing_block_leaves_the_old_file(tmp_path):
    file = tmp_path / "a"
    atomic.write_text(file, "old")
    with pytest.raises(KeyError), atomic.replace_file(file) as f:
        f.write(b"new")
        raise KeyError
    assert file.read_text() == "old" and names(tmp_path) == ["a"]


def test_errors_name_the_final_file(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="missing/a'"):
        atomic.write_text(tmp_path / "missing" / "a", "x")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    full_disk = (
        f"^{tmp_path}/a could not be written: {os.strerror(errno.ENOSPC)}; 1 bytes are needed and "
        ".* are free; free some space"
    )
    with pytest.raises(OSError, match=full_disk):
        atomic.write_text(tmp_path / "a", "x")
    with (
        pytest.raises(OSError, match=f"{tmp_path}/m could .*more than the 3 bytes written so far"),
        atomic.replace_folder(tmp_path / "m") as folder,
    ):
        (folder / "x").write_text("abc")
    assert names(tmp_path) == []


def test_a_fixed_temporary_name_may_exist(tmp_path):
    (tmp_path / ".part").write_text("of a killed process, and longer than the new text")
    atomic.write_text(tmp_path / "a", "x", temporary=tmp_path / ".part")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "x"


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_is_replaced_as_a_whole(tmp_path, fails):
    target = tmp_path / "m"
    for content in ("old", "new"):
        try:
            with atomic.replace_folder(target) as folder:
                (folder / "sub").mkdir()
                (folder / "sub" / content).touch()
                if fails and content == "new":
                    raise RuntimeError
        except RuntimeError:
            pass
    assert names(tmp_path) == ["m"] and names(target / "sub") == ["old" if fails else "new"]


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    # This number exceeds the largest process id of Linux.
    host, dead = socket.gethostname(), 2**22 + 1
    gone = [f".m.tmp-{host}-{dead}.3", f".m.old.tmp-{host}-{dead}", f".m.tmp-{host}-{os.getpid()}"]
    kept = [f".m.tmp-elsewhere-{dead}.3", f".n.tmp-{host}-{dead}", f".m.tmp-{host}-1.0"]
    for name in (*gone, *kept):
        (tmp_path / name).touch()
    atomic.remove_leftovers(tmp_path, "m")
    assert names(tmp_path) == sorted(kept)
