"""A tiny engine with a tokenizer, for the tests of structured output."""

import pytest
import torch

from lamoe.engine.llm import LLM
from lamoe.text import tokenizer
from lamoe.text.tokenizer import Tokenizer
from oracles import tiny
from tiny_engine import FAMILIES

ROWS = 400  # rows of logits; the vocabulary is smaller, as in DeepSeek-V2
TEXT = [
    '{"name": "abc", "n": [1, 22, 333], "ok": true, "no": null}',
    "abab baba ab ba abba the cat ü 中文 the cat",
] * 3


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    """A byte-level tokenizer trained on TEXT."""
    made = tokenizer.train(TEXT, 330)
    assert 261 < made.vocab_size < ROWS
    return made


@pytest.fixture(scope="module")
def llm(tok) -> LLM:
    """Return an engine that the tests of a module share."""
    return engine(tok)


def engine(tok: Tokenizer, **options) -> LLM:
    """Make an engine over a tiny model with a tokenizer. `options` are those of LLM."""
    c = FAMILIES["mla"].replace(max_position_embeddings=512, vocab_size=ROWS)
    return LLM(
        tiny.model(c, dtype=torch.float32),
        tok,
        **{"cache": "fp32", "page_size": 4, "max_num_seqs": 16, **options},
    )
