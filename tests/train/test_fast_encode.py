"""Tests that the cached encoder gives the ids of the tokenizers library."""

import random
import sys
import unicodedata

import pytest
import tokenizers as library

from lamoe.text.tokenizer import SPECIAL_TOKENS, Tokenizer, train
from lamoe.train import fast_encode
from lamoe.train.fast_encode import CachedEncoder, fast_encode_batch, is_supported
from lamoe.train.sources import read_documents

# One character of every Unicode category, and everything that some rule treats in its own way.
SPACES = [c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace()] + list(
    "\u180e\u200b\ufeff"
)
KINDS = {
    unicodedata.category(chr(i)): chr(i) for i in range(0x20, 0x1F700) if not 0xD800 <= i < 0xE000
}
ALPHABET = [
    *SPACES,
    *KINDS.values(),
    *"aZ09_.,<>|\u4e2d\u3042\u30a2\ud55c\u0301\u00e9\u00b2\u2167\U0001f600",
    *SPECIAL_TOKENS,
    "<x>",
    "word",
    "the",
]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [d.text for d in read_documents(["stdlib", "austen"])][::40]


@pytest.fixture(scope="module")
def tokenizer(documents) -> Tokenizer:
    return train(documents[:8], 800)


def random_texts(number: int) -> list[str]:
    rng = random.Random(0)
    texts = []
    for _ in range(number):
        few = rng.choices(ALPHABET, k=rng.randint(1, 8)) + [" ", " ", "\n", "a"]
        texts.append("".join(rng.choices(few, k=rng.randint(0, 40))))
    return texts


def same(tokenizer, texts):
    encoder = CachedEncoder(tokenizer)
    assert is_supported(tokenizer)
    for text, want, *got in zip(
        texts,
        tokenizer.encode_batch(texts),
        encoder.encode_batch(texts),
        encoder.encode_batch(texts),  # from the caches
    ):
        assert all(g.tolist() == want for g in got), repr(text)
    return encoder


def test_real_text_has_the_same_ids(tokenizer, documents):
    same(tokenizer, documents)


def test_random_text_of_all_kinds_of_characters_has_the_same_ids(tokenizer):
    same(tokenizer, random_texts(1500))
    same(tokenizer, [a + b + c for a in SPACES for b in SPACES for c in ("", "a", "1", ".")])


def test_text_without_blanks_goes_to_the_library(tokenizer):
    chinese = "\u4f60\u597d\u3002" * 40
    encoder = same(tokenizer, [chinese, "a word", f"x {chinese}\n{chinese} y", "\u00e9t\u00e9 a b"])
    assert not any(len(unit) > 16 for unit in encoder._units)


def test_a_saved_tokenizer_is_recognised(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    same(Tokenizer.load(tmp_path), ["a text, of 12 words"])


def test_wide_vocabularies_use_32_bits(tokenizer):
    wide = Tokenizer(tokenizer.inner)
    wide.vocab_size = 100_000
    (ids,) = CachedEncoder(wide).encode_batch(["text"])
    assert ids.dtype == "uint32" and ids.tolist() == tokenizer.encode("text")


def test_text_of_control_tokens_stays_text(documents):
    tokenizer = train(["<> <> <> a <> <s> <s>"] * 9, 400, ("<>", "</s>", "<s>"))
    encoder = same(tokenizer, ["<>", "a <> b", "<s> </s>", "x<>y"])
    assert 0 not in encoder.encode_batch(["<> <>"])[0]


def test_full_caches_start_again(tokenizer, documents, monkeypatch):
    monkeypatch.setattr(fast_encode, "_MAX_ENTRIES", 10)
    encoder = same(tokenizer, documents[:3])
    assert len(encoder._units) <= 10 and len(encoder._words) <= 10
    long = "x" * 1000
    encoder.encode_batch([long])
    assert long not in encoder._units


def test_other_tokenizers_use_the_library(tokenizer, monkeypatch):
    for change in ("normalizer", "pre_tokenizer", "added"):
        inner = library.Tokenizer.from_str(tokenizer.inner.to_str())
        if change == "normalizer":
            inner.normalizer = library.normalizers.NFC()
        elif change == "pre_tokenizer":
            inner.pre_tokenizer = library.pre_tokenizers.ByteLevel()
        else:
            inner.add_tokens(["added"])
        other = Tokenizer(inner)
        assert not is_supported(other)
        assert fast_encode_batch(other) == other.encode_batch
    monkeypatch.setattr(fast_encode, "_MANY_CORES", 10**6)
    assert isinstance(fast_encode_batch(tokenizer).__self__, CachedEncoder)
    monkeypatch.setattr(fast_encode, "_MANY_CORES", 1)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    assert fast_encode_batch(tokenizer) == tokenizer.encode_batch
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert isinstance(fast_encode_batch(tokenizer).__self__, CachedEncoder)
