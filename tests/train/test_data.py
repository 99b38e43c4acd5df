"""Tests of sources, held-out split, packing and sampling.

Instead of a tokenizer, the tests use bytes as ids, with BOS 256 and EOS 257.
"""

import gzip
import json
import lzma
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lamoe.train import data, holdout, packing, sources
from lamoe.train.data import Batches, heldout_rows, open_corpus, prepare
from lamoe.train.holdout import choose_heldout
from lamoe.train.sources import read_documents

BOS, EOS, VOCAB = 256, 257, 258


def encode_batch(texts):
    return [list(t.encode()) for t in texts]


def pack(where, out, **changes):
    settings = {
        "encode_batch": encode_batch,
        "bos_id": BOS,
        "eos_id": EOS,
        "vocab_size": VOCAB,
        "tokenizer_hash": "bytes",
        **changes,
    }
    return prepare([str(w) for w in where], out_dir=out, **settings)


def write_folder(root: Path, count=40, seed=0) -> dict[str, str]:
    """Write texts of 1 to 400 characters, some not ASCII, two levels deep. Return {name: text}."""
    rng, texts = np.random.RandomState(seed), {}
    for i in range(count):
        body = "".join(rng.choice(list("abc \n\u00e9\u4e2d"), rng.randint(1, 400)))
        name = f"{'deep/' if i % 3 else ''}{i:03d}.txt"
        texts[name] = f"{i} {body}"
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts[name], encoding="utf-8", newline="")
    return texts


@pytest.fixture
def corpus(tmp_path):
    write_folder(tmp_path / "texts")
    return pack([tmp_path / "texts"], tmp_path / "packed", holdout=0.1)


def texts_of(split) -> Counter:
    return Counter(bytes(split.document(i)[1:-1].tolist()).decode() for i in range(len(split)))


@pytest.mark.parametrize("file", ["train.bin", "heldout.bin", "train.index.npy"])
def test_verify_finds_a_flipped_byte(corpus, file):
    data.verify(corpus.folder)
    raw = bytearray((corpus.folder / file).read_bytes())
    raw[-20] ^= 1  # in an index: the size of the last text
    (corpus.folder / file).write_bytes(raw)
    with pytest.raises(ValueError, match=f"tokens of {file.split('.')[0]} do not match"):
        data.verify(corpus.folder)


# ---- sources ----
def test_builtin_sources():
    counts = {}
    docs = list(read_documents(["stdlib", "austen"], counts))
    names = {d.name for d in docs}
    # Documents come in the order of the sources, here "stdlib" before "austen".
    assert [d.source for d in docs] == sorted((d.source for d in docs), reverse=True)
    assert {
        "statistics.py",
        "json/decoder.py",
        "emma.txt",
        "pydoc_data/topics.py#assert",
    } <= names and len(names) == len(docs)
    assert (
        not [
            n
            for n in names
            if {"test", "tests", "site-packages", "__pycache__"} & set(n.split("/"))
        ]
        and "pydoc_data/topics.py" not in names
    )
    assert (
        counts["austen"].documents == 6
        and 3.9e6 < counts["austen"].bytes < 4.1e6
        and counts["stdlib"].bytes > 5e6
    )
    assert (
        counts["stdlib"].skipped["generated character table"] > 20
        and "encodings/cp1252.py" not in names
    )
    emma = next(d for d in docs if d.name == "emma.txt")
    assert emma.text.startswith("EMMA\n\nBy Jane Austen") and emma.size == len(emma.text.encode())
    opening = (
        "Emma Woodhouse, handsome, clever, and rich, with a comfortable home and happy "
        "disposition, seemed to unite some of the best"
    )
    assert opening in emma.text  # the wrapped lines of a paragraph are joined
    assert "\nThat affliction to soften and heal.--" in emma.text  # lines of verse are not joined


def test_folder_is_sorted_and_every_omission_is_counted(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("same")
    (tmp_path / "a.md").write_text("same")
    (tmp_path / "sub/readme").write_text("no suffix")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "late.bin").write_bytes(b"x" * 100_000 + b"\0")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/x.txt").write_text("hidden")
    (tmp_path / ".secret").write_text("hidden")
    os.mkfifo(tmp_path / "pipe")  # opening a pipe would block
    (tmp_path / "loop").symlink_to(tmp_path)
    counts = {}
    docs = list(read_documents([str(tmp_path)], counts))
    assert [(d.name, d.text) for d in docs] == [
        ("a.md", "same"),
        ("bom.txt", "marked"),
        ("sub/readme", "no suffix"),
    ]
    assert counts[str(tmp_path)].skipped == {
        "binary": 2,
        "in another encoding": 1,
        "empty": 1,
        "duplicate": 1,
        "hidden file": 1,
        "hidden, cached or linked folder": 2,
        "no regular file": 1,
    }
    assert "2 binary" in str(counts[str(tmp_path)])


def test_files_globs_and_compression(tmp_path):
    (tmp_path / "d/e").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "d/g.txt.gz").write_bytes(gzip.compress("gz \u4e2d".encode()))
    (tmp_path / "d/e/x.txt.xz").write_bytes(lzma.compress(b"xz"))
    (tmp_path / "r.jsonl.gz").write_bytes(
        gzip.compress(b'{"text": "one"}\n\n{"text": "two", "n": 1}')
    )
    read = lambda *s: [(d.name, d.text) for d in read_documents([str(tmp_path / x) for x in s])]
    assert read("a.txt", "r.jsonl.gz") == [
        ("a.txt", "plain"),
        ("r.jsonl.gz:1", "one"),
        ("r.jsonl.gz:3", "two"),
    ]
    assert read("**/*.txt*") == [
        ("a.txt", "plain"),
        ("d/e/x.txt.xz", "xz"),
        ("d/g.txt.gz", "gz \u4e2d"),
    ]
    (tmp_path / "r[1].txt").write_text("a name with magic characters is a file first")
    assert read("r[1].txt")[0][0] == "r[1].txt"
    (tmp_path / "q.jsonl").write_text('{"body": "b"}')
    assert read("q.jsonl:body") == [("q.jsonl:1", "b")]


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b'{"text": "ok"}\n{"text": "cut', r"q\.jsonl, line 2: not valid JSON"),
        (b'{"text": "ok"}\n{"txt": "x"}', r"line 2: no field 'text', did you mean 'txt'"),
        (b'{"text": "ok"}\n["x"]', r"line 2: expected an object"),
        (b'{"text": 7}', r"line 1: field 'text' must be text, found int"),
        (b'{"text": "\\ud800"}', r"line 1: .*surrogate"),
        (b'{"text": "ok"}\n\xff\xfe', r"line 2: not UTF-8 \(byte FF at position 0"),
        (b"[" * 100_000, r"line 1: not valid JSON"),
    ],
)
def test_broken_jsonl_names_file_and_line(tmp_path, content, complaint):
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        list(read_documents([str(path)]))


def test_unusable_sources_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("bin.dat").write_bytes(b"a\0b")
    Path("latin.txt").write_bytes(b"abc\xe9")
    Path("pack.tar.bz2").write_bytes(b"BZh9")
    Path("cut.txt.gz").write_bytes(gzip.compress(b"x" * 1000)[:-9])
    Path("cut.txt.xz").write_bytes(lzma.compress(os.urandom(1000))[:-40])
    Path("notgz.txt.gz").write_bytes(b"plain text")
    Path("t.txt").write_text("t")
    Path("same.txt").write_text("t")
    for names, complaint in [
        (["stdlb"], "'stdlb' does not exist.*did you mean 'stdlib'"),
        (["*.nothing"], "matches no file"),
        (["empty"], "gives no text.*no files"),
        (["bin.dat"], "binary, not UTF-8"),
        (["latin.txt"], r"another encoding, not UTF-8 text \(byte E9 at position 3\)"),
        (["pack.tar.bz2"], "an archive.*unpack it first"),
        (["cut.txt.gz"], "damaged"),
        (["cut.txt.xz"], "damaged"),
        (["notgz.txt.gz"], "damaged"),
        ([], "at least one"),
        ("stdlib", "must be a list"),
        (["t.txt", "t.txt"], "listed 2 times"),
        (["t.txt", "same.txt"], "'same.txt' gives no text.*1 duplicate"),
        (["no.jsonl:field"], "does not exist"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            list(read_documents(names))


def test_hashes_of_documents_are_found_again_in_a_growing_table():
    numbers = np.random.RandomState(0).randint(0, 1 << 62, 20_000).tolist()
    numbers += [0, *range(1 << 13, 1 << 20, 1 << 13)]  # the same place in a small table
    table, seen = sources._HashSet(), set()
    for number in numbers + numbers[::7]:
        assert table.add(number) == (number not in seen)
        seen.add(number)
    assert len(table._table) <= 4 * len(seen)


# ---- split and packing ----
def test_every_document_is_packed_once_and_on_one_side(tmp_path):
    texts = write_folder(tmp_path / "texts")
    corpus = pack([tmp_path / "texts"], tmp_path / "packed", holdout=0.1)
    train, held = texts_of(corpus.train), texts_of(corpus.heldout)
    assert train + held == Counter(texts.values()) and not train & held
    for split in (corpus.train, corpus.heldout):
        assert all(
            split.document(i)[0] == BOS and split.document(i)[-1] == EOS for i in range(len(split))
        )
        assert split.tokens.dtype == np.uint16 and isinstance(split.tokens, np.memmap)
    size = sum(len(t.encode()) for t in texts.values())
    assert (
        corpus.heldout_bytes()
        == sum(len(t.encode()) for t in held)
        == corpus.meta["sources"][0]["heldout_bytes"]
    )
    assert 0.05 * size < corpus.heldout_bytes() <= 0.1 * size
    names = [
        json.loads(line) for line in (tmp_path / "packed/heldout.jsonl").read_text().splitlines()
    ]
    assert (
        Counter(texts[n["name"]] for n in names) == held
        and sum(n["bytes"] for n in names) == corpus.heldout_bytes()
    )
    tally = corpus.meta["sources"][0]
    assert tally["documents"] == 40 and tally["bytes"] == size
    assert tally["tokens"] == size + 80 == len(corpus.train.tokens) + len(corpus.heldout.tokens)
    assert [bytes(d.tolist()).decode() for d in corpus.heldout_documents()] == [
        texts[n["name"]] for n in names
    ]


def test_split_follows_names_and_seed_only(tmp_path):
    write_folder(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "moved/b")
    held = lambda folder, out, **c: texts_of(
        pack([tmp_path / folder], tmp_path / out, holdout=0.1, **c).heldout
    )
    first = held("a", "p1")
    assert held("moved/b", "p2") == first != held("a", "p3", seed=1)


def test_the_split_is_known_before_there_is_a_tokenizer(tmp_path):
    write_folder(tmp_path / "a")
    (tmp_path / "book.txt").write_text("".join(f"Line {i}.\n" for i in range(100)))
    both = [tmp_path / "a", tmp_path / "book.txt"]
    for seed in (0, 1):
        corpus = pack(both, tmp_path / f"p{seed}", holdout=0.1, seed=seed)
        plan = holdout.plan_split([str(s) for s in both], 0.1, seed, lambda *progress: None)
        parts = [part for number, doc in plan.documents() for part in plan.parts(number, doc)]
        assert Counter(text for split, _, text in parts if split == "train") == texts_of(
            corpus.train
        )
        assert Counter(text for split, _, text in parts if split == "heldout") == texts_of(
            corpus.heldout
        )


def test_choose_heldout_takes_at_least_one_document():
    # No document fits into the share, so the smallest one is taken.
    assert choose_heldout([3, 1, 2], [50, 100, 40], 0.01) == [2]
    # The order is that of the hashes. Documents that are too large are skipped.
    assert choose_heldout([3, 1, 2, 4], [10, 500, 10, 480], 0.02) == [2, 0]
    assert len(choose_heldout([5, 5], [7, 7], 0.5)) == 1


def test_each_source_is_held_out_on_its_own_and_can_be_evaluated_alone(tmp_path):
    write_folder(tmp_path / "a", 30)
    write_folder(tmp_path / "b", 6, seed=1)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    corpus = pack([a, b], tmp_path / "packed")
    assert corpus.heldout_bytes(a) > 0 and corpus.heldout_bytes(b) > 0
    assert corpus.heldout_bytes(a) + corpus.heldout_bytes(b) == corpus.heldout_bytes()
    for s in (a, b):
        ids = np.concatenate([i[1:][seg[1:] == seg[:-1]] for i, seg in heldout_rows(corpus, 16, s)])
        assert bytes(ids[ids < 256].tolist()) == b"".join(
            bytes(d.tolist()) for d in corpus.heldout_documents(s)
        )
    assert "held out" in corpus.describe() and len(corpus.describe().splitlines()) == 2
    with pytest.raises(ValueError, match="no source 'c'"):
        corpus.heldout_bytes("c")


def test_single_document_is_cut_between_paragraphs(tmp_path):
    path = tmp_path / "book.txt"
    text = "".join(f"Paragraph {i} has words.\nAnd a second line.\n\n" for i in range(50))
    path.write_text(text)
    corpus = pack([path], tmp_path / "packed", holdout=0.1)
    (head,), (tail,) = texts_of(corpus.train), texts_of(corpus.heldout)
    assert (
        head + tail == text
        and head.endswith("\n\n")
        and tail.startswith("Paragraph ")
        and abs(len(tail) / len(text) - 0.1) < 0.02
    )
    path.write_text("one line only")
    with pytest.raises(ValueError, match="single document without a line end.*holdout to 0"):
        pack([path], tmp_path / "packed2", holdout=0.1)
    whole = pack([path], tmp_path / "packed3", holdout=0)
    assert len(whole.heldout) == 0 and len(whole.train) == 1
    with pytest.raises(ValueError, match="no held-out text"):
        next(heldout_rows(whole, 8))


def test_long_documents_are_encoded_in_pieces_within_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "PIECE", 50)
    monkeypatch.setattr(packing, "BATCH", 200)
    texts, sizes = write_folder(tmp_path / "texts"), []

    def watched(batch):
        sizes.append((max(map(len, batch)), sum(map(len, batch))))
        return encode_batch(batch)

    seen = []
    corpus = pack(
        [tmp_path / "texts"],
        tmp_path / "packed",
        holdout=0.1,
        encode_batch=watched,
        progress=lambda *p: seen.append(p),
    )
    assert texts_of(corpus.train) + texts_of(corpus.heldout) == Counter(texts.values())
    assert max(s[0] for s in sizes) <= 50 and max(s[1] for s in sizes) < 250 and len(sizes) > 20
    size = corpus.meta["sources"][0]["bytes"]
    assert seen[-1] == (size, size, "tokenizing") and [s[0] for s in seen] == sorted(
        s[0] for s in seen
    )


def test_wide_vocabulary_uses_32_bits(tmp_path):
    (tmp_path / "a.txt").write_text("hello\n\nthere")
    shifted = lambda texts: [[b + 70000 for b in t.encode()] for t in texts]
    corpus = pack(
        [tmp_path / "a.txt"], tmp_path / "p", encode_batch=shifted, vocab_size=100_000, holdout=0
    )
    assert corpus.train.tokens.dtype == np.uint32 and corpus.train.document(0).tolist() == [
        BOS,
        *shifted(["hello\n\nthere"])[0],
        EOS,
    ]
    assert (
        pack(
            [tmp_path / "a.txt"], tmp_path / "p16", vocab_size=1 << 16, holdout=0
        ).train.tokens.dtype
        == np.uint16
    )


def test_a_packed_corpus_is_reused_only_for_equal_inputs(tmp_path):
    write_folder(tmp_path / "texts")
    calls = []

    def counted(texts):
        calls.append(len(texts))
        return encode_batch(texts)

    def fresh(**changes):
        calls.clear()
        got = pack(
            [tmp_path / "texts"],
            tmp_path / "packed",
            **{"holdout": 0.1, "encode_batch": counted, **changes},
        )
        return bool(calls), got.fingerprint

    new, first = fresh()
    assert new and fresh() == (False, first)
    # The tokens are the same, so a run can resume with them.
    assert fresh(tokenizer_hash="other") == (True, first)
    assert fresh(seed=1)[1] != first and fresh(seed=1)[0] is False
    assert fresh(holdout=0.2)[0] and fresh(seed=0) == (True, first)
    (tmp_path / "texts/000.txt").write_text("changed")
    new, changed = fresh()
    assert new and changed != first
    os.truncate(tmp_path / "packed/train.bin", 10)
    with pytest.raises(ValueError, match="train.bin has 10 bytes, expected"):
        open_corpus(tmp_path / "packed")
    with pytest.warns(UserWarning, match="packing it again"):
        assert fresh() == (True, changed)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_failed_packing_keeps_the_old_corpus_and_leaves_no_files(tmp_path):
    write_folder(tmp_path / "texts")
    old = pack([tmp_path / "texts"], tmp_path / "packed")

    def broken(texts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack([tmp_path / "texts"], tmp_path / "packed", encode_batch=broken, tokenizer_hash="new")
    assert open_corpus(tmp_path / "packed").fingerprint == old.fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed", "texts"]


def test_foreign_folders_are_never_overwritten(tmp_path):
    write_folder(tmp_path / "texts")
    for name, file in (("mine", "thesis.txt"), ("json", "meta.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
        with pytest.raises(ValueError, match="nothing was written"):
            pack([tmp_path / "texts"], tmp_path / name)
        assert [p.name for p in (tmp_path / name).iterdir()] == [file]
    with pytest.raises(ValueError, match="holds no packed corpus"):
        open_corpus(tmp_path / "nowhere")


def test_text_that_changes_during_packing_is_refused(tmp_path):
    write_folder(tmp_path / "texts")

    def meddle(texts):
        (tmp_path / "texts/deep/038.txt").write_text("written meanwhile")
        return encode_batch(texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BATCH", 100)
        with pytest.raises(ValueError, match="changed while it was read"):
            pack([tmp_path / "texts"], tmp_path / "packed", encode_batch=meddle)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"vocab_size": 256}, "bos_id is 256"),
        ({"eos_id": 258}, "eos_id is 258"),
        ({"holdout": 0.6}, "holdout is 0.6"),
        ({"holdout": float("nan")}, "holdout"),
        ({"seed": -1}, "seed is -1"),
        ({"encode_batch": lambda t: [[300]] * len(t)}, "ids 300 to 300, outside vocab_size 258"),
        ({"encode_batch": lambda t: [[-1]] * len(t)}, "outside vocab_size"),
        ({"encode_batch": lambda t: [[BOS, 1]] * len(t)}, "encodes to BOS 256 or EOS 257"),
        ({"encode_batch": lambda t: [[1]]}, "gave 1 results for"),
        ({"vocab_size": 1 << 33}, "vocab_size is"),
    ],
)
def test_settings_and_tokenizers_that_do_not_match_are_refused(tmp_path, changes, complaint):
    write_folder(tmp_path / "texts", 5)
    with pytest.raises(ValueError, match=complaint):
        pack([tmp_path / "texts"], tmp_path / "packed", **changes)
    assert not (tmp_path / "packed").exists()


# ---- sampling ----
def stream(corpus, seed, epochs):
    """Build the stream that Batches samples from: the documents of all epochs, concatenated.

    Returns the ids and a running document number for each.
    """
    ids, docs = [], []
    for epoch in range(epochs):
        order = np.random.RandomState([seed, 0, epoch]).permutation(len(corpus.train))
        for i in order:
            ids.append(corpus.train.document(int(i)))
            docs.append(np.full(len(ids[-1]), len(docs)))
    return np.concatenate(ids).astype(np.int64), np.concatenate(docs)


# With 100,000, one row is longer than several epochs.
@pytest.mark.parametrize("seq_len", [1, 7, 64, 100_000])
def test_rows_are_the_shuffled_stream_without_loss(corpus, seq_len):
    window = max(1, len(corpus.train.tokens) // (seq_len + 1))
    rows = 3 * window
    want, docs = stream(corpus, 5, 2 + rows * (seq_len + 1) // len(corpus.train.tokens))
    ids, segments = Batches(corpus, seq_len, seed=5).next_batch(rows)
    # Undo the shuffle. Position i of window w has row w * window + deal[w][i].
    dealt = np.concatenate(
        [w * window + np.random.RandomState([5, 1, w]).permutation(window) for w in range(3)]
    )
    # The rows of a batch are not consecutive in the text.
    assert window < 10 or (np.abs(np.diff(dealt)) == 1).mean() < 0.1
    back = np.argsort(dealt)
    ids, segments = ids[back], segments[back]
    assert (
        ids.dtype == np.int64
        and segments.dtype == np.int32
        and ids.shape == segments.shape == (rows, seq_len + 1)
    )
    np.testing.assert_array_equal(ids.ravel(), want[: ids.size])
    numbers = docs[: ids.size].reshape(ids.shape)
    np.testing.assert_array_equal(segments, numbers - numbers[:, :1])
    # A new segment starts at every BOS and nowhere else.
    np.testing.assert_array_equal(segments[:, 1:] != segments[:, :-1], ids[:, 1:] == BOS)


def test_an_epoch_has_every_document_once_in_its_own_order(corpus):
    total = len(corpus.train.tokens)
    batches = Batches(corpus, total - 1, seed=0)  # each row is exactly one epoch
    (first, second), _ = batches.next_batch(2)
    assert batches.epoch == 2 and not np.array_equal(first, second)
    split = lambda row: Counter(
        bytes(part[1:-1].tolist()) for part in np.split(row, np.flatnonzero(row == BOS)[1:])
    )
    assert split(first) == split(second) == Counter(t.encode() for t in texts_of(corpus.train))


def test_sampling_resumes_exactly_from_any_state(corpus):
    width = 50
    per_epoch = len(corpus.train.tokens) / width
    reference = Batches(corpus, width - 1, seed=3)
    want = [reference.next_batch(3) for _ in range(int(2.5 * per_epoch / 3))]
    states = []
    running = Batches(corpus, width - 1, seed=3)
    for _ in want:
        states.append(json.loads(json.dumps(running.state_dict())))
        running.next_batch(3)
    assert running.epoch > 2
    # States inside an epoch, inside a document, and across both ends of an epoch.
    for k, state in enumerate(states):
        resumed = Batches(corpus, width - 1, seed=3)
        resumed.next_batch(1)
        resumed.load_state_dict(state)
        for ids, segments in want[k : k + 3]:
            got = resumed.next_batch(3)
            np.testing.assert_array_equal(got[0], ids)
            np.testing.assert_array_equal(got[1], segments)
    assert {type(v) for v in states[0].values()} <= {int, str}


def test_ranks_share_the_rows_and_may_change_in_number(corpus):
    whole, _ = Batches(corpus, 31, seed=1).next_batch(12)
    parts = [Batches(corpus, 31, seed=1, rank=r, world=3) for r in range(3)]
    taken = [p.next_batch(2)[0] for p in parts]
    np.testing.assert_array_equal(np.stack(taken, 1).reshape(6, 32), whole[:6])
    assert parts[0].state_dict() == parts[1].state_dict() == parts[2].state_dict()
    alone = Batches(corpus, 31, seed=1)
    alone.load_state_dict(parts[2].state_dict())
    np.testing.assert_array_equal(alone.next_batch(6)[0], whole[6:])


def test_a_state_of_other_data_is_refused(corpus, tmp_path):
    write_folder(tmp_path / "other", seed=9)
    other = pack([tmp_path / "other"], tmp_path / "packed_other", holdout=0.1)
    state = Batches(corpus, 16).state_dict()
    for batches, complaint in [
        (Batches(other, 16), "the packed text is"),
        (Batches(corpus, 17), "seq_len is 17.*16"),
        (Batches(corpus, 16, seed=2), "the data seed is 2"),
    ]:
        with pytest.raises(ValueError, match=f"cannot resume: {complaint}"):
            batches.load_state_dict(state)
        assert batches.rows == 0
    for bad in ({}, {**state, "more": 1}, {**state, "rows": -1}, {**state, "rows": 1.5}):
        with pytest.raises(ValueError, match="data state"):
            Batches(corpus, 16).load_state_dict(bad)
    for wrong in (dict(seq_len=0), dict(seq_len=4, rank=2, world=2), dict(seq_len=4, seed=1 << 32)):
        with pytest.raises(ValueError, match="must be|at least"):
            Batches(corpus, **wrong)
    with pytest.raises(ValueError, match="at least 1"):
        Batches(corpus, 4).next_batch(0)


def test_batches_match_a_frozen_row(tmp_path):
    """The first batch equals a recorded one.

    A different order would silently change resumed runs.
    """
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": c * 3}) for c in "abcdefgh"))
    ids, segments = Batches(
        pack([tmp_path / "t.jsonl"], tmp_path / "p", holdout=0), 19, seed=7
    ).next_batch(2)
    shown = ["".join({BOS: "<", EOS: ">"}.get(t) or chr(t) for t in row) for row in ids.tolist()]
    assert shown == ["<eee><ddd><hhh><aaa>", "<bbb><fff><ccc><ggg>"] and segments[0].tolist() == [
        i // 5 for i in range(20)
    ]


@pytest.mark.parametrize("seq_len", [1, 8, 63, 5000])
def test_heldout_rows_predict_every_token_once(corpus, seq_len):
    targets, rows = [], 0
    for ids, segments in heldout_rows(corpus, seq_len):
        assert (
            ids.shape == segments.shape == (seq_len + 1,)
            and ids.dtype == np.int64
            and segments.dtype == np.int32
            and segments[0] == 0
        )
        inside = segments[1:] == segments[:-1]
        assert not np.any(ids[1:][inside] == BOS)  # targets never cross documents
        targets.append(ids[1:][inside])
        rows += 1
    want = np.concatenate([corpus.heldout.document(i)[1:] for i in range(len(corpus.heldout))])
    np.testing.assert_array_equal(np.concatenate(targets), want)
    assert rows == -(-(len(corpus.heldout.tokens) - 1) // seq_len)
