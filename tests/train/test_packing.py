"""Tests of packing that is interrupted, and of fill-in-the-middle.

As in test_data.py, bytes are ids, with BOS 256 and EOS 257.
"""

import gzip
import json
import os
import shutil
from collections import Counter

import pytest
from test_data import BOS, EOS, encode_batch, pack, texts_of, write_folder

from lamoe.train import packing, run_folder
from lamoe.train.data import open_corpus, prepare, verify
from lamoe.train.fill_in import FillIn
from test_atomic_states import Calls, Killed
from tiny_run import raw_recipe, train, write_texts

FIM = (258, 259, 260)


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder, a compressed file and a single document that is cut; a state after each batch."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a slow disk would take most of the time
    monkeypatch.setattr(packing, "BATCH", 1000)
    monkeypatch.setattr(packing, "COMMIT", 1500)
    write_folder(tmp_path / "in" / "a", 30)
    lines = [json.dumps({"text": f"line {i} " * (i % 9 + 1)}) for i in range(60)]
    lines += [lines[0], '{"text": ""}']  # left out and counted
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "in" / "c.txt").write_text("".join(f"paragraph {i}\n\n" for i in range(40)))
    return sorted((tmp_path / "in").iterdir())


def test_a_packing_killed_anywhere_continues_to_the_same_files(sources, tmp_path, monkeypatch):
    """A child process dies without any clean-up at each call of the tokenizer."""
    want = contents(pack(sources, tmp_path / "whole", holdout=0.1).folder)
    for survived in range(1, 100):
        tokenised, calls = [], 0

        def dying(texts):
            nonlocal calls
            calls += 1
            if calls > survived:
                os._exit(9)
            return encode_batch(texts)

        def watched(texts):
            tokenised.extend(texts)
            return encode_batch(texts)

        out = tmp_path / f"p{survived}"
        if not (child := os.fork()):
            pack(sources, out, holdout=0.1, encode_batch=dying)
            os._exit(0)
        died = os.waitpid(child, 0)[1] != 0
        assert out.exists() != died
        assert contents(pack(sources, out, holdout=0.1, encode_batch=watched).folder) == want
        # Only the text after the last state is tokenised again.
        characters = len(want["train.bin"]) // 2
        assert sum(map(len, tokenised)) < characters - (survived - 2) * 1000
        if not died:
            break
    assert survived > 5 and not tokenised
    assert sorted(p.name for p in tmp_path.glob(".*")) == []
    assert json.loads(want["meta.json"])["sources"][1]["skipped"] == {"duplicate": 1, "empty": 1}


def test_a_kill_at_any_system_call(sources, tmp_path):
    want = contents(pack(sources[1:], tmp_path / "whole", holdout=0.1).folder)
    for n in range(0, 400, 11):
        out = tmp_path / f"p{n}"
        with pytest.MonkeyPatch.context() as patch:
            calls = Calls(patch, n)
            try:
                pack(sources[1:], out, holdout=0.1)
            except Killed:
                pass
        assert contents(pack(sources[1:], out, holdout=0.1).folder) == want
        if calls.left > 0:
            assert sorted(p.name for p in tmp_path.glob(".*")) == []
            return
        shutil.rmtree(out)
    raise AssertionError("packing makes too many calls")


def interrupted(sources, out, after=3, **settings):
    calls = 0

    def stopping(texts):
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return encode_batch(texts)

    with pytest.raises(KeyboardInterrupt):
        pack(sources, out, encode_batch=stopping, **{"holdout": 0.1, **settings})
    return out.with_name(f".{out.name}.partial")


def test_an_interrupted_packing_of_changed_sources_starts_again(sources, tmp_path):
    work = interrupted(sources, tmp_path / "p")
    assert (work / "state.json").exists() and not (tmp_path / "p").exists()
    sources[2].write_text("".join(f"other paragraph {i}\n\n" for i in range(40)))
    with pytest.warns(UserWarning, match="have changed since .* interrupted; it starts again"):
        got = pack(sources, tmp_path / "p", holdout=0.1)
    assert contents(got.folder) == contents(pack(sources, tmp_path / "q", holdout=0.1).folder)
    assert not work.exists()


def test_an_interrupted_packing_with_other_settings_starts_again(sources, tmp_path):
    interrupted(sources, tmp_path / "p")
    got = pack(sources, tmp_path / "p", holdout=0.1, seed=1)
    want = pack(sources, tmp_path / "q", holdout=0.1, seed=1)
    assert contents(got.folder) == contents(want.folder)


def test_changed_text_of_the_same_size_and_time_is_never_mixed(sources, tmp_path):
    work, times = interrupted(sources, tmp_path / "p"), os.stat(sources[2])
    sources[2].write_text(sources[2].read_text().replace("paragraph 3", "paragraph 4"))
    os.utime(sources[2], ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ValueError, match="changed while it was read; nothing was kept"):
        pack(sources, tmp_path / "p", holdout=0.1)
    assert not work.exists() and not (tmp_path / "p").exists()
    want = pack(sources, tmp_path / "q", holdout=0.1)
    assert contents(pack(sources, tmp_path / "p", holdout=0.1).folder) == contents(want.folder)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "state", "plan"])
def test_a_damaged_work_folder_starts_again(sources, tmp_path, damage):
    work = interrupted(sources, tmp_path / "p")
    file = work / "corpus" / "train.bin"
    if damage == "flip":
        raw = bytearray(file.read_bytes())
        raw[3] ^= 1
        file.write_bytes(raw)
    elif damage == "cut":
        os.truncate(file, 10)
    elif damage == "remove":
        (work / "train.index").unlink()
    else:
        (work / f"{damage}.json").write_text("{")
    want = pack(sources, tmp_path / "q", holdout=0.1)
    assert contents(pack(sources, tmp_path / "p", holdout=0.1).folder) == contents(want.folder)


def test_two_processes_do_not_pack_into_one_folder(sources, tmp_path):
    def second(texts):
        if not (child := os.fork()):
            try:
                pack(sources, tmp_path / "p", holdout=0.1)
            except ValueError as e:
                os._exit("another process packs text into" in str(e))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        return encode_batch(texts)

    got = pack(sources, tmp_path / "p", holdout=0.1, encode_batch=second)
    verify(got.folder)


# ---- fill-in-the-middle ----
def fim_pack(where, out, rate=0.5, **changes):
    return pack(where, out, vocab_size=261, fim_rate=rate, fim_ids=FIM, **changes)


def restore(ids: list[int]) -> str:
    """Return the text of a document, whose parts may be in the order of fill-in-the-middle."""
    assert ids[0] == BOS and ids[-1] == EOS
    ids = ids[1:-1]
    if FIM[0] in ids:
        hole, end = ids.index(FIM[1]), ids.index(FIM[2])
        assert ids[0] == FIM[0] and hole < end and sum(i in FIM for i in ids) == 3
        ids = ids[1:hole] + ids[end + 1 :] + ids[hole + 1 : end]
    return bytes(ids).decode()


def test_fill_in_reorders_the_rate_of_training_documents(tmp_path):
    texts = write_folder(tmp_path / "texts", 400)
    plain = pack([tmp_path / "texts"], tmp_path / "plain", holdout=0.1)
    corpus = fim_pack([tmp_path / "texts"], tmp_path / "p", holdout=0.1)
    documents = [corpus.train.document(i).tolist() for i in range(len(corpus.train))]
    assert Counter(map(restore, documents)) == texts_of(plain.train)
    number = sum(FIM[0] in d for d in documents)
    assert abs(number / len(documents) - 0.5) < 0.08
    assert corpus.meta["sources"][0]["fill_in_documents"] == number
    assert f"{number} for fill-in-the-middle" in corpus.describe()
    # Held-out text is the same, and so is the split.
    assert contents(corpus.folder)["heldout.bin"] == contents(plain.folder)["heldout.bin"]
    tally = corpus.meta["sources"][0]
    assert tally["tokens"] == len(corpus.train.tokens) + len(corpus.heldout.tokens)
    assert tally["tokens"] == plain.meta["sources"][0]["tokens"] + 3 * number
    for rate, share in ((0.0, 0), (1.0, 1)):
        other = fim_pack([tmp_path / "texts"], tmp_path / f"p{rate}", rate, holdout=0.1)
        found = [FIM[0] in other.train.document(i) for i in range(len(other.train))]
        assert set(found) == {bool(share)}
    assert len(texts) == 400


def test_fill_in_depends_on_seed_and_name_only(sources, tmp_path, monkeypatch):
    first = contents(fim_pack(sources, tmp_path / "p", holdout=0.1).folder)
    assert contents(fim_pack(sources[:1], tmp_path / "one", holdout=0.1).folder) != first
    other = contents(fim_pack(sources, tmp_path / "q", holdout=0.1, seed=1).folder)
    assert other["train.bin"] != first["train.bin"]
    # Neither an interruption nor the size of pieces and batches changes it.
    interrupted(sources, tmp_path / "again", vocab_size=261, fim_rate=0.5, fim_ids=FIM, holdout=0.1)
    monkeypatch.setattr(packing, "BATCH", 77)
    again = fim_pack(sources, tmp_path / "again", holdout=0.1)
    assert contents(again.folder) == first
    monkeypatch.setattr(packing, "PIECE", 13)
    small = fim_pack(sources, tmp_path / "small", holdout=0.1)
    assert contents(small.folder) == first
    # A corpus is reused only for the same rate.
    assert (
        fim_pack(sources, tmp_path / "p", 0.4, holdout=0.1).fingerprint
        != open_corpus(tmp_path / "q").fingerprint
    )


def test_places_of_fill_in_are_spread_over_the_text():
    rule, text = FillIn(1.0, FIM, seed=0), "x" * 99
    parts = [[len(t) for _, t in rule.parts(f"{i}", text)] for i in range(2000)]
    assert all(sum(p) == 99 for p in parts)
    for lengths in zip(*parts):
        assert 30 < sum(lengths) / len(parts) < 36 and min(lengths) == 0 and max(lengths) > 80
    assert [t for _, t in rule.parts("n", "a")].count("a") == 1  # one part has the only character


def test_control_tokens_inside_a_text_and_a_wrong_rate_are_refused(tmp_path):
    write_folder(tmp_path / "texts", 5)
    with pytest.raises(ValueError, match="another control token inside the text"):
        fim_pack([tmp_path / "texts"], tmp_path / "p", encode_batch=lambda t: [[FIM[0]]] * len(t))
    for settings in ({"fim_rate": 1.5, "fim_ids": FIM}, {"fim_rate": 0.5}):
        with pytest.raises(ValueError, match="fim_rate is"):
            prepare(
                [str(tmp_path / "texts")],
                encode_batch,
                BOS,
                EOS,
                261,
                "bytes",
                tmp_path / "p",
                **settings,
            )


# ---- training runs ----
@pytest.mark.parametrize("resume", [True, False])
def test_a_run_interrupted_while_packing_continues_there(tmp_path, monkeypatch, capsys, resume):
    """Without --resume too: the tokenizer is trained again, and it is the same one."""
    texts = write_texts(tmp_path / "texts")
    monkeypatch.setattr(packing, "BATCH", 300)
    monkeypatch.setattr(packing, "COMMIT", 900)
    monkeypatch.setattr(run_folder, "REPORT_EVERY_S", 0.0)
    calls, fast_encode_batch = [], run_folder.fast_encode_batch

    def limited(last):
        def of_tokenizer(tokenizer):
            def encode(texts):
                calls.append(len(texts))
                if len(calls) == last:
                    raise KeyboardInterrupt
                return fast_encode_batch(tokenizer)(texts)

            return encode

        return of_tokenizer

    monkeypatch.setattr(run_folder, "fast_encode_batch", limited(None))
    train(raw_recipe(texts, tmp_path / "whole", run=dict(steps=1)))
    num_calls = len(calls)
    calls.clear()
    raw = raw_recipe(texts, tmp_path / "run", run=dict(steps=1))
    monkeypatch.setattr(run_folder, "fast_encode_batch", limited(8))
    with pytest.raises(KeyboardInterrupt):
        train(raw)
    monkeypatch.setattr(run_folder, "fast_encode_batch", limited(None))
    calls.clear()
    train(raw, resume=resume, quiet=False)
    data = contents(tmp_path / "run" / "data")
    assert data == contents(tmp_path / "whole" / "data")
    assert sorted(p.name for p in (tmp_path / "run").glob(".data*")) == []
    # There is a state after two or three calls. The seventh call was written, but not yet in one.
    assert num_calls - 7 < len(calls) <= num_calls - 4
    assert "tokenizing: 0 of 0 MB" in capsys.readouterr().out
