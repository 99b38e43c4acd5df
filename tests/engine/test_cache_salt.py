"""Tests of cache salts: sequences reuse cached prefixes only of sequences with the same salt."""

import pytest

from lamoe.engine.sampler import SamplingParams
from tiny_engine import llm, prompts

[PROMPT] = prompts(33)


def params(salt: str, **more) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=4, cache_salt=salt, **more)


def cached(engine, salt: str) -> int:
    """Run the prompt with a salt and return how many of its tokens were found in the cache."""
    return engine.generate([PROMPT], params(salt))[0].cached_tokens


def test_a_prefix_is_reused_with_the_same_salt_only():
    engine = llm()
    assert [cached(engine, salt) for salt in ("", "a", "b", "a/b")] == [0, 0, 0, 0]
    assert [cached(engine, salt) for salt in ("b", "", "a/b", "a")] == [32, 32, 32, 32]
    assert cached(engine, "\ud800") == 0  # half of a surrogate pair, which UTF-8 does not have


def test_salts_do_not_change_the_output_and_samples_share_their_prompt():
    engine = llm()
    plain = engine.generate([PROMPT], params(""))[0]
    salted = engine.generate([PROMPT], params("x", n=3))
    assert [o.token_ids for o in salted] == [plain.token_ids] * 3
    assert [o.cached_tokens for o in salted] == [0, 32, 32]  # the leader computes it once


@pytest.mark.parametrize("earlier", [None, "", "a"])
def test_a_saved_prefix_is_shared_by_all_salts(tmp_path, earlier):
    """A prefix file belongs to the owner of the engine. Other cached prefixes stay apart."""
    one, two = llm(), llm()
    one.generate([PROMPT], params(""))
    assert one.save_cache(tmp_path / "c", PROMPT[:20]) == 20
    if earlier is not None:
        assert cached(two, earlier) == 0
    assert two.load_cache(tmp_path / "c") == 20
    assert cached(two, "b") == 20  # and not the 32 tokens of the sequence before
    assert cached(two, "c") == 20
    assert cached(two, "b") == 32


def test_a_salted_prefix_cannot_be_saved_by_chance(tmp_path):
    engine = llm()
    cached(engine, "a")
    with pytest.raises(ValueError, match="nothing of these"):
        engine.save_cache(tmp_path / "c", PROMPT)
