"""Tests of states of several files: after a kill or a full disk, the old or the new state is there.

A kill is simulated by an error that every system call raises from the n-th on, so that no clean-up
can work after it. A full disk is simulated by the limit on file sizes, and by a flush that fails.
"""

import builtins
import errno
import io
import json
import os
import resource
import shutil
from contextlib import contextmanager

import pytest

import tiny_packed
from lamoe import atomic, checkpoints
from lamoe.cli.chat import Chat
from lamoe.engine.llm import LLM
from lamoe.engine.sampler import SamplingParams
from lamoe.text.tokenizer import Tokenizer, train
from lamoe.train import checkpoint
from tiny_server import model, tok

OLD, NEW = ("<bos>", "<eos>"), ("<s>", "</s>", "<pad>")
TOKENIZERS = {name: train(["a text of words\n" * 9], 290, name) for name in (OLD, NEW)}
LIMITS = [0, 1, 100, 1_000, 4_000, 8_192, 16_384, 10**6]


class Killed(BaseException):
    """The process has ended."""


class Calls:
    """Counts system calls that change files, and ends the process at one of them."""

    NAMES = ("open", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "chmod")

    def __init__(self, monkeypatch, last):
        self.left = last
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))
        for module in (builtins, io):
            monkeypatch.setattr(module, "open", self.counted(open))
        monkeypatch.setattr(atomic, "_exchange", self.counted(atomic._exchange))

    def counted(self, call):
        def counting(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                raise Killed
            return call(*args, **kwargs)

        return counting


def states_after_kills(tmp_path, prepare, write, state):
    """Return the states that remain when `write` is killed before its first, second, ... call."""
    found = []
    for n in range(200):
        place = tmp_path / f"{n}"
        place.mkdir()
        prepare(place)
        with pytest.MonkeyPatch.context() as patch:
            calls = Calls(patch, n)
            try:
                write(place)
            except Killed:
                pass
        found.append(state(place))
        shutil.rmtree(place)
        if calls.left > 0:
            return found
    raise AssertionError("the write makes too many calls")


@contextmanager
def file_size_limit(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tokens_of(folder):
    """Return the special tokens of a tokenizer, or None if there is none."""
    try:
        t = Tokenizer.load(folder)
    except FileNotFoundError:
        return None
    assert t.inner.to_str() in {made.inner.to_str() for made in TOKENIZERS.values()}
    return t.bos_id, t.eos_id, t.pad_id, t.inner.id_to_token(t.bos_id)


# ---- the tokenizer ----
PREPARED = {
    "no folder": lambda place: None,
    "an empty folder": lambda place: (place / "t").mkdir(),
    "an old tokenizer": lambda place: TOKENIZERS[OLD].save(place / "t"),
}


@pytest.mark.parametrize("before", PREPARED)
def test_a_killed_save_of_a_tokenizer(tmp_path, before):
    old = None if before != "an old tokenizer" else (0, 1, 1, "<bos>")
    found = states_after_kills(
        tmp_path,
        PREPARED[before],
        lambda place: TOKENIZERS[NEW].save(place / "t"),
        lambda place: tokens_of(place / "t"),
    )
    assert len(found) > 5 and set(found) == {old, (0, 1, 1, "<s>")}
    assert found == sorted(found, key=lambda s: s == found[-1])  # never back to the old one


def test_a_killed_save_among_other_files_never_mixes_two_tokenizers(tmp_path):
    def prepare(place):
        TOKENIZERS[OLD].save(place)
        (place / "model.safetensors").touch()

    found = states_after_kills(
        tmp_path, prepare, lambda place: TOKENIZERS[NEW].save(place), tokens_of
    )
    assert set(found) <= {(0, 1, 1, "<bos>"), None, (0, 1, 1, "<s>")}
    assert found[-1] == (0, 1, 1, "<s>")


@pytest.mark.parametrize("others", [[], ["model.safetensors"]])
@pytest.mark.parametrize("size", LIMITS)
def test_a_full_disk_keeps_the_old_tokenizer(tmp_path, size, others):
    folder = tmp_path / "t"
    TOKENIZERS[OLD].save(folder)
    for name in others:
        (folder / name).touch()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    try:
        with file_size_limit(size):
            TOKENIZERS[NEW].save(folder)
    except OSError as e:
        assert e.errno == errno.EFBIG and " bytes are needed; " in str(e)
        assert str(folder) in str(e) and "tmp-" not in str(e)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    else:
        assert size > 1_000 and tokens_of(folder)[3] == "<s>"
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_flush_that_fails_keeps_the_old_tokenizer(tmp_path, monkeypatch, number):
    for others in (False, True):
        folder = tmp_path / "t"
        TOKENIZERS[OLD].save(folder)
        if others:
            (folder / "x").touch()
        for n in range(20):
            left, fsync = [n], os.fsync

            def failing(descriptor, left=left, fsync=fsync):
                left[0] -= 1
                if left[0] == -1:
                    raise OSError(number, os.strerror(number))
                fsync(descriptor)

            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", failing)
                try:
                    TOKENIZERS[NEW].save(folder)
                except OSError as e:
                    assert str(tmp_path) in str(e) and "tmp-" not in str(e)
                    assert " needed and " in str(e) and " are free; free some space" in str(e)
                    assert tokens_of(folder) is not None
            if left[0] >= 0:
                break
        assert tokens_of(folder)[3] == "<s>"


# ---- models, checkpoints and conversations ----
def test_a_killed_save_of_a_model_keeps_one_of_the_two(tmp_path):
    made = model()
    old, new = (made.config.replace(initializer_range=x) for x in (0.25, 0.5))

    def save(config, place):
        made.config = config
        checkpoints.save(made, place / "m", overwrite=True)

    try:
        found = states_after_kills(
            tmp_path,
            lambda place: save(old, place),
            lambda place: save(new, place),
            lambda place: checkpoints.load(place / "m").config.initializer_range,
        )
    finally:
        made.config = old.replace(initializer_range=model().config.initializer_range)
    assert len(found) > 8 and set(found) == {0.25, 0.5} and found == sorted(found)


def test_a_killed_checkpoint_of_the_same_step_keeps_one_of_the_two(tmp_path):
    def save(text, place):
        checkpoint.save(place, 3, lambda folder: (folder / "a").write_text(text) and None)

    found = states_after_kills(
        tmp_path,
        lambda place: save("old", place),
        lambda place: save("new", place),
        lambda place: (checkpoint.latest(place) / "a").read_text(),
    )
    assert len(found) > 8 and set(found) == {"old", "new"} and found[-1] == "new"


def test_a_conversation_is_saved_if_only_its_rows_do_not_fit(tmp_path):
    llm = LLM(model(), tok(), cache="fp32", page_size=8)
    c = Chat(llm, SamplingParams(max_tokens=2), None, io.StringIO(), io.StringIO())
    c.say("the cat sat on the mat and the dog ran to the hill")
    for size in (2_000, 10**7):
        with file_size_limit(size):
            c.command(f"/save {tmp_path / 'talk.json'}")
        assert json.loads((tmp_path / "talk.json").read_text())["messages"] == c.messages
    first, second = c.err.getvalue().strip().splitlines()[-2:]
    assert "its cached rows are not saved: " in first and "File too large; " in first
    assert "talk.json.cache.safetensors" in first and "tokens cached in" in second
    assert c.failures == 0


def test_a_full_disk_while_packing_names_the_file_and_a_second_call_finishes(tmp_path):
    source = tiny_packed.source(tmp_path / "m", "gqa tied")
    with (
        file_size_limit(9_000),
        pytest.raises(OSError, match="p/.*safetensors could not be written: .* bytes are needed"),
    ):
        tiny_packed.pack(source, tmp_path / "p")
    tiny_packed.pack(source, tmp_path / "p")
    tiny_packed.pack(source, tmp_path / "q")
    assert tiny_packed.contents(tmp_path / "p") == tiny_packed.contents(tmp_path / "q")
