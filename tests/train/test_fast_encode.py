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


@pytest.fixture(params=["python", "compiled"], autouse=True)
def code(request, monkeypatch) -> str:
    """Which code splits texts and looks their units up."""
    if request.param == "python":
        monkeypatch.setattr(fast_encode, "native", None)
    elif not hasattr(fast_encode.native, "UnitEncoder"):
        pytest.skip("needs lamoe._native")
    return request.param


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


def test_text_without_blanks_goes_to_the_library(tokenizer, code):
    chinese = "\u4f60\u597d\u3002" * 40
    encoder = same(tokenizer, [chinese, "a word", f"x {chinese}\n{chinese} y", "\u00e9t\u00e9 a b"])
    sizes = {"python": len(encoder._units)}
    if code == "compiled":
        sizes["compiled"] = encoder._compiled.num_units
    assert sizes[code] == 5  # "a", " word", "\u00e9t\u00e9", " a", " b"


def test_long_units_and_zeros_have_the_same_ids(tokenizer):
    long = ["x" * 70_000, "ab1." * 99, " " * 5000, "\n" * 65, "\x00" * 65, "\u00e9" * 99]
    edges = [f"{c * n} b{c * n}" for c in "a1.\u00e9\u2003\x00 " for n in (31, 32, 63, 64, 65, 257)]
    same(tokenizer, [*long, "", "\x00", "a\x00 b \x00", *edges, "x ".join(long)])


def test_lone_surrogates_are_refused_as_by_the_library(tokenizer):
    encoder = CachedEncoder(tokenizer)
    for text in ("a \ud800 b", "\udfff"):
        with pytest.raises(ValueError, match="lone surrogate"):
            tokenizer.encode_batch([text])
        with pytest.raises(ValueError, match="lone surrogate"):
            encoder.encode_batch(["first", text])
    assert encoder.encode_batch(["first"])[0].tolist() == tokenizer.encode("first")


def test_an_interrupted_text_leaves_no_ids(tokenizer, monkeypatch):
    encoder = CachedEncoder(tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "_encode_word", lambda word: 1 / 0)
        patch.setattr(encoder._words, "_compute", lambda word: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encoder.encode_batch(["a text"])
    assert encoder.encode_batch(["other"])[0].tolist() == tokenizer.encode("other")


def test_calls_out_of_order_are_refused(code):
    if code == "python":
        pytest.skip("a test of the compiled code")
    encoder = fast_encode.native.UnitEncoder(10)
    assert encoder.ids() == b""
    with pytest.raises(ValueError, match="no piece"):
        encoder.supply(b"")
    assert encoder.start(b"a \xff\xc2") == b"a"
    with pytest.raises(ValueError, match="a piece of the text is missing"):
        encoder.ids()
    assert encoder.supply(b"1") == b" \xff\xc2" and encoder.supply(b"2") is None
    assert encoder.ids() == b"12"


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


def test_full_caches_start_again(tokenizer, documents, monkeypatch, code):
    monkeypatch.setattr(fast_encode, "_MAX_ENTRIES", 10)
    encoder = same(tokenizer, documents[:3])
    long = "x" * 1000
    if code == "compiled":
        compiled = encoder._compiled
        assert 0 < compiled.num_units <= 10 and 0 < compiled.num_words <= 10
        before = compiled.num_units, compiled.num_words
        encoder.encode_batch([long])
        assert (compiled.num_units, compiled.num_words) == before
    else:
        assert 0 < len(encoder._units) <= 10 and 0 < len(encoder._words) <= 10
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
