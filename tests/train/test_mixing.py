"""Tests of sources mixed by weight."""

import json
import shutil

import numpy as np
import pytest
from test_data import BOS, EOS, pack, texts_of, write_folder
from test_train import signal_after

from lamoe.text import tokenizer as tokenizers
from lamoe.train.data import Batches, open_corpus
from lamoe.train.mixing import Mixture
from tiny_run import metrics, raw_recipe, same, state, train, trained, write_texts  # noqa: F401

SEQ_LEN = 15
# In windows of 1,000 rows, rounding would take a row from the fourth source.
SMALL = (2.3055e-5, 8.96386e-5, 1.10673e-5, 1.11293e-5, 0.981480663, 0.0183844466)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three sources of different sizes, whose texts begin with A, B or C."""
    root = tmp_path_factory.mktemp("mixing")
    for name, number in (("A", 40), ("B", 10), ("C", 3)):
        lines = [json.dumps({"text": f"{name}{i} " * (i % 5 + 2)}) for i in range(number)]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    return pack([root / f"{name}.jsonl" for name in "ABC"], root / "packed", holdout=0.1)


def batches(corpus, weights=(0.5, 0.3, 0.2), **options) -> Batches:
    return Batches(corpus, SEQ_LEN, weights=weights, **{"seed": 3, **options})


@pytest.mark.parametrize(
    "weights",
    [(0.7, 0.3), (1, 1, 1), (5, 3, 2), (1e-5, 1), (0.1,) * 10, (2, 1e-4, 3, 0.003), SMALL],
)
def test_shares_are_exact_after_each_window_and_close_between(weights):
    mixture, shares = Mixture(weights, 0), np.array(weights) / sum(weights)
    window, counts = mixture._window_rows, np.zeros(len(weights), int)
    for row in range(2 * window + 500 if window <= 1000 else 3000):
        if row % 97 == 0 or row % window == 0:
            np.testing.assert_array_equal(mixture.counts(row), counts)
        if row % window == 0:
            assert np.abs(counts - shares * row).max() < 1
        source, index = mixture.place(row)
        assert index == counts[source]
        counts[source] += 1
        assert np.abs(counts - shares * (row + 1)).max() < 100
    for k in range(50):
        assert (np.diff([mixture.counts(n * window) for n in (k, k + 1)], axis=0) >= 0).all()
    # Without the rows before: any row is computed from its index.
    for rows in (10**9, 10**12):
        rows -= rows % window
        counts = mixture.counts(rows)
        assert counts.sum() == rows and np.abs(counts - shares * rows).max() < 1
        source, index = Mixture(weights, 0).place(rows)
        assert index == counts[source]


def test_each_row_is_from_one_source_and_each_source_repeats_in_whole_epochs(corpus):
    it, letters = batches(corpus), list(b"ABC")
    ids, _ = it.next_batch(2000)
    taken, mixture = {letter: [] for letter in letters}, Mixture((0.5, 0.3, 0.2), 3)
    for n, row in enumerate(ids.tolist()):
        letter = letters[mixture.place(n)[0]]
        taken[letter].append(row)
        assert {i for i in row if i in letters} <= {letter}
    assert [len(taken[letter]) for letter in letters] == [1000, 600, 400]
    epochs = it.source_epochs()
    texts = texts_of(corpus.train)
    for letter, name in zip(letters, epochs):
        own = [t for t in texts if t.startswith(chr(letter))]
        tokens = sum(len(t) + 2 for t in own)
        count = len(taken[letter]) * (SEQ_LEN + 1)
        assert epochs[name] == pytest.approx(count / tokens)
        # Every epoch has every document once, so their numbers differ by the windows' ends.
        starts = sum(row.count(BOS) for row in taken[letter])
        assert starts / len(own) == pytest.approx(count / tokens, rel=0.05)
    assert epochs[next(reversed(epochs))] > 10  # the short source repeats
    assert "20.0% " in it.describe_mixture(2000) and "50.0% " in it.describe_mixture(2000)


def test_a_weighted_mixture_resumes_exactly_and_shares_rows_among_ranks(corpus):
    whole = batches(corpus)
    want = [whole.next_batch(6) for _ in range(300)]
    running = batches(corpus)
    for k in range(0, 297, 50):
        state = json.loads(json.dumps(running.state_dict()))
        resumed = batches(corpus)
        resumed.load_state_dict(state)
        for expected in want[k : k + 3]:
            for a, b in zip(resumed.next_batch(6), expected):
                np.testing.assert_array_equal(a, b)
        running.next_batch(300)
    parts = [batches(corpus, rank=r, world=3) for r in range(3)]
    taken = np.stack([p.next_batch(2)[0] for p in parts], 1).reshape(6, -1)
    np.testing.assert_array_equal(taken, want[0][0])
    assert parts[0].state_dict() == parts[2].state_dict()


def test_other_weights_are_refused(corpus):
    state = batches(corpus).state_dict()
    assert state["weights"] == [0.5, 0.3, 0.2]
    with pytest.raises(ValueError, match=r"data.weights is \[1, 1, 1\], the checkpoint"):
        batches(corpus, (1, 1, 1)).load_state_dict(state)
    with pytest.raises(ValueError, match="not from this version's sampler"):
        batches(corpus, ()).load_state_dict(state)
    with pytest.raises(ValueError, match="there are 2 weights for the 3 sources"):
        batches(corpus, (1, 1))


def test_without_weights_the_state_is_the_old_one(corpus):
    it = batches(corpus, ())
    assert set(it.state_dict()) == {"rows", "seq_len", "seed", "corpus"}
    assert it.metrics() == {} and it.source_epochs() == {}


def test_a_weighted_mixture_matches_a_frozen_row(tmp_path):
    """A different order would silently change resumed runs."""
    for name in ("abcd", "xyz"):
        lines = [json.dumps({"text": c * 3}) for c in name]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    packed = pack([tmp_path / "abcd.jsonl", tmp_path / "xyz.jsonl"], tmp_path / "p", holdout=0)
    ids, _ = Batches(packed, 9, seed=7, weights=(1, 1)).next_batch(6)
    shown = ["".join({BOS: "<", EOS: ">"}.get(t) or chr(t) for t in row) for row in ids.tolist()]
    assert shown == [
        "<aaa><ccc>",
        "<bbb><ddd>",
        "<zzz><xxx>",
        "<yyy><yyy>",
        "<aaa><ddd>",
        "<ccc><bbb>",
    ]


def test_sources_of_equal_text_have_different_orders(tmp_path):
    write_folder(tmp_path / "a", 30)
    write_folder(tmp_path / "b", 30, seed=1)
    packed = pack([tmp_path / "a", tmp_path / "b"], tmp_path / "p", holdout=0)
    it = Batches(packed, 99, weights=(1, 1))
    first, second = (s._epoch_order(0)[0] for s in it._streams)
    assert sorted(first) != sorted(second)  # documents of their own
    assert not np.array_equal(np.argsort(first), np.argsort(second))


# ---- training runs ----
def test_a_run_with_weights_and_fill_in_resumes_bitwise(tmp_path):
    first = write_texts(tmp_path / "a", 20)
    second = write_texts(tmp_path / "b", 3, seed=1)
    mix = dict(sources=[str(first), str(second)], weights=[1, 3], fim_rate=0.5)
    raw = raw_recipe(first, tmp_path / "run", data=mix)
    whole, lines = state(train(raw)), metrics(tmp_path / "run")
    tokens = 6 * 4 * 33  # all but the first token of a row are targets
    corpus = open_corpus(tmp_path / "run" / "data")
    for n, (source, share) in enumerate(((first, 0.25), (second, 0.75))):
        train_tokens = corpus.train.lengths[corpus.train.sources == n].sum()
        epochs = lines[-1].get("source_epochs") or lines[-2]["source_epochs"]
        assert epochs[str(source)] == pytest.approx(share * tokens / train_tokens, rel=0.4)
    assert sum(t["fill_in_documents"] for t in corpus.meta["sources"]) > 5
    shutil.rmtree(tmp_path / "run")
    with signal_after(3):
        train(raw)
    assert same(state(train(raw, resume=True)), whole) and metrics(tmp_path / "run") == lines
    raw["data"]["weights"] = [1, 2]
    with pytest.raises(ValueError, match=r"data.weights was \[1, 3\], now \[1, 2\]"):
        train(raw, resume=True)


def test_a_run_from_before_these_keys_resumes(tmp_path):
    texts = write_texts(tmp_path / "texts")
    raw = raw_recipe(texts, tmp_path / "run", run=dict(steps=4))
    with signal_after(2):
        train(raw)
    file = tmp_path / "run" / "recipe.json"
    saved = json.loads(file.read_text())
    del saved["data"]["weights"], saved["data"]["fim_rate"]
    file.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"data.fim_rate was 0.0, now 0.5"):
        train(raw_recipe(texts, tmp_path / "run", data=dict(fim_rate=0.5)), resume=True)
    assert train(raw, resume=True).name == "step-00000004"


def test_fill_in_needs_a_tokenizer_with_its_tokens(tmp_path):
    texts = write_texts(tmp_path / "texts")
    tokenizers.train(["some words\n" * 9], 290, tokenizers.SPECIAL_TOKENS[:4]).save(tmp_path / "t")
    data = dict(fim_rate=0.5, tokenizer=str(tmp_path / "t"))
    with pytest.raises(
        ValueError, match="data.fim_rate is 0.5, but the tokenizer lacks .*set data.fim_rate to 0"
    ):
        train(raw_recipe(texts, tmp_path / "run", data=data))
