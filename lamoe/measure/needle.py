"""The needle-in-a-haystack test, which measures if a model finds one sentence in a long text."""

from __future__ import annotations

import bisect
import os
import random
import re
from collections.abc import Callable, Iterable
from itertools import accumulate

import numpy as np
import torch

from lamoe.backends.base import Backend
from lamoe.text.tokenizer import Tokenizer

CHUNK = 1024  # tokens per forward pass; bounds the activation memory of a long haystack
Needle = Callable[[int, float, random.Random], tuple[list[int], list[int]]]
CITIES = (
    "Amsterdam Athens Bergen Berlin Bombay Boston Cairo Calcutta Dublin Geneva Havana Lima Lisbon "
    "London Madrid Milan Moscow Munich Naples Oslo Paris Prague Rome Seville Tokyo Turin Venice "
    "Vienna Warsaw York Zurich"
).split()


@torch.inference_mode()
def needle(
    backend: Backend,
    make: Needle,
    lengths: list[int],
    depths: list[float],
    draws: int = 8,
    seed: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> np.ndarray:
    """Measure how often the model answers the question about the needle, by greedy decoding.

    Args:
        make: make(length, depth, random) returns the token ids of a haystack that ends with the
            question, and the token ids of the answer. Together they have at most `length` tokens.
            The needle lies at `depth`: 0 is the start of the haystack, 1 its end.
        draws: number of needles per depth and length. Each needle depends only on (seed, length,
            depth, index of the draw).
        note: function that is called with a line of progress after each length.

    Returns:
        [depths, lengths], the fraction of draws whose answer was exact.

    Raises:
        ValueError: if a length is beyond the model's limit, or a depth is outside 0 to 1.
    """
    _check(backend.config.max_position_embeddings, lengths, depths, draws)
    found = np.zeros((len(depths), len(lengths)))
    for column, length in enumerate(lengths):
        for row, depth in enumerate(depths):
            for draw in range(draws):
                generator = random.Random(f"{seed} {length} {depth:.6f} {draw}")
                prompt, answer = make(length, depth, generator)
                assert answer and len(prompt) + len(answer) <= length
                found[row, column] += _answers(backend, prompt, answer)
        note(f"{length} tokens: {found[:, column].mean() / draws:.0%} found")
    return found / draws


def _check(limit: int, lengths: list[int], depths: list[float], draws: int) -> None:
    if not lengths or not depths or draws < 1:
        raise ValueError(
            "a needle test needs at least one length, depth and draw; found "
            f"{len(lengths)}, {len(depths)}, {draws}"
        )
    if bad := [n for n in lengths if not 2 <= n <= limit]:
        raise ValueError(
            f"a haystack of {bad[0]} tokens is not possible; it must have from 2 to the model's "
            f"max_position_embeddings {limit}"
        )
    if bad_depths := [d for d in depths if not 0 <= d <= 1]:
        raise ValueError(
            f"a depth is {bad_depths[0]}; it must be from 0 (the beginning of the haystack) to 1 "
            "(its end)"
        )


def _answers(backend: Backend, prompt: list[int], answer: list[int]) -> bool:
    """Return whether greedy decoding of `prompt` gives `answer`.

    One pass over both is enough, because each answer token must be the most likely at its position.
    """
    likely: list[int] = []
    for output, _ in backend.run_sequence(prompt + answer[:-1], CHUNK, last=len(answer)):
        likely += output.argmax(-1).tolist()
    return likely == answer


def text_needle(tok: Tokenizer, texts: Iterable[str]) -> Needle:
    """Return a `make` function for `needle` with haystacks of text.

    The needle is "The secret number of Paris is 48213." between two sentences of `texts`. The
    question is "The secret number of Paris is". The haystack is a run of consecutive sentences that
    starts at a random one and wraps around.

    Raises:
        ValueError: if the texts have no sentences.
    """
    sentences = [
        s for text in texts for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if s
    ]
    encoded = [ids for ids in tok.encode_batch([f" {s}" for s in sentences]) if ids]
    if not encoded:
        raise ValueError("the haystack has no text; name a source with sentences")
    begin = [tok.bos_id] if tok.add_bos and tok.bos_id is not None else []

    def make(length: int, depth: float, draw: random.Random) -> tuple[list[int], list[int]]:
        city, number = draw.choice(CITIES), f"{draw.randrange(10000, 100000)}"
        question, answer, hidden = _sentences(tok, city, number)
        space = length - len(begin) - len(hidden) - len(question) - len(answer)
        if space < 0:
            raise ValueError(
                f"a haystack of {length} tokens is too short for the needle and the question, "
                f"which have {length - space} tokens; use longer haystacks"
            )
        hay = _hay(encoded, draw.randrange(len(encoded)), space)
        cut = _nearest_gap(hay, depth * space)
        parts = [begin, *hay[:cut], hidden, *hay[cut:], question]
        return [token for part in parts for token in part], answer

    return make


def _sentences(tok: Tokenizer, city: str, number: str) -> tuple[list[int], list[int], list[int]]:
    """Return the token ids of the question, of the answer and of the needle."""
    asked = tok.encode(f" The secret number of {city} is")
    whole = tok.encode(f" The secret number of {city} is {number}")
    # A tokenizer may merge the end of the question with the start of the number.
    question = whole[: len(os.path.commonprefix([asked, whole]))]
    return (
        question,
        whole[len(question) :],
        tok.encode(f" The secret number of {city} is {number}."),
    )


def _hay(sentences: list[list[int]], first: int, size: int) -> list[list[int]]:
    """Return consecutive sentences from number `first` on, with `size` tokens in total.

    The last sentence is cut to fit.
    """
    hay: list[list[int]] = []
    while size > 0:
        hay.append(sentences[(first + len(hay)) % len(sentences)][:size])
        size -= len(hay[-1])
    return hay


def _nearest_gap(hay: list[list[int]], place: float) -> int:
    """Return the number of sentences before the gap that is nearest to token `place`."""
    ends = [0, *accumulate(map(len, hay))]
    cut = min(bisect.bisect_left(ends, place), len(hay))
    if cut > 0 and ends[cut] - place > place - ends[cut - 1]:
        cut -= 1
    return cut
