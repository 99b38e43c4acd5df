"""Whether a model finds a needle in a haystack at any depth of any length."""

from __future__ import annotations

import bisect
import os
import random
import re
from collections.abc import Callable, Iterable
from itertools import accumulate

import numpy as np
import torch

from lamoe.model.cache import KVCache
from lamoe.model.transformer import Transformer
from lamoe.text.tokenizer import Tokenizer

# ---- a needle in a haystack ------------------------------------------------------------------------------------------------
CHUNK = 1024  # tokens of one pass: bounds what a long haystack needs beside its cache
Needle = Callable[[int, float, random.Random], tuple[list[int], list[int]]]
CITIES = """Amsterdam Athens Bergen Berlin Bombay Boston Cairo Calcutta Dublin Geneva Havana Lima Lisbon London Madrid Milan Moscow Munich Naples Oslo Paris Prague
Rome Seville Tokyo Turin Venice Vienna Warsaw York Zurich""".split()


@torch.inference_mode()
def needle(
    model: Transformer,
    make: Needle,
    lengths: list[int],
    depths: list[float],
    draws: int = 8,
    seed: int = 0,
    note=lambda text: None,
) -> np.ndarray:
    """How often the model finds the needle, [depths, lengths]: the share of `draws` whose answer it gives token for token (greedily).

    make(length, depth, random): (ids of a haystack with the needle at `depth`, 0 the beginning and 1 the end, and the question behind it; ids of the
    answer), together at most `length` tokens. A cell's draws depend on (seed, length, depth, number of the draw) alone. `note` is told about each
    finished length. ValueError when a length is beyond the model's limit.
    """
    limit = model.config.max_position_embeddings
    if not lengths or not depths or draws < 1:
        raise ValueError(
            f"a needle test needs at least one length, depth and draw; found {len(lengths)}, {len(depths)}, {draws}"
        )
    if bad := [n for n in lengths if not 2 <= n <= limit]:
        raise ValueError(
            f"a haystack of {bad[0]} tokens was asked for; it must have from 2 to the model's max_position_embeddings {limit}"
        )
    if bad := [d for d in depths if not 0 <= d <= 1]:
        raise ValueError(f"a depth is {bad[0]}; 0 is the beginning of the haystack and 1 its end")
    found = np.zeros((len(depths), len(lengths)))
    for column, length in enumerate(lengths):
        for row, depth in enumerate(depths):
            for draw in range(draws):
                prompt, answer = make(
                    length, depth, random.Random(f"{seed} {length} {depth:.6f} {draw}")
                )
                assert answer and len(prompt) + len(answer) <= length
                found[row, column] += _answers(model, prompt, answer)
        note(f"{length} tokens: {found[:, column].mean() / draws:.0%} found")
    return found / draws


def _answers(model: Transformer, prompt: list[int], answer: list[int]) -> bool:
    """Whether greedy decoding of `prompt` gives `answer`: each of its tokens is the most likely one behind those before it."""
    weight = model.embed.weight
    ids = torch.tensor([prompt + answer[:-1]], device=weight.device)
    cache = KVCache(model.config, 1, ids.shape[1], weight.dtype, weight.device)
    kept = ids[0, :0]
    for part in ids.split(CHUNK, 1):
        kept = torch.cat(
            [kept, model.logits(model.hidden(part, cache)[0, -len(answer) :]).argmax(-1)]
        )[-len(answer) :]
    return kept.tolist() == answer


def text_needle(tok: Tokenizer, texts: Iterable[str]) -> Needle:
    """Needles for a model of text: "The secret number of Paris is 48213." between two sentences of `texts`, and at the end "The secret number of Paris
    is". The haystack is a stretch of consecutive sentences, begun anew at the first when the text ends. ValueError for a text without sentences."""
    sentences = [
        s for text in texts for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if s
    ]
    encoded = [ids for ids in tok.encode_batch([f" {s}" for s in sentences]) if ids]
    if not encoded:
        raise ValueError("the haystack has no text; name a source with sentences")
    begin = [tok.bos_id] if tok.add_bos and tok.bos_id is not None else []

    def make(length: int, depth: float, draw: random.Random) -> tuple[list[int], list[int]]:
        city, number = draw.choice(CITIES), f"{draw.randrange(10000, 100000)}"
        question, whole = (
            tok.encode(f" The secret number of {city} is"),
            tok.encode(f" The secret number of {city} is {number}"),
        )
        question = os.path.commonprefix(
            [question, whole]
        )  # a vocabulary may join the end of one to the beginning of the other
        answer, hidden = (
            whole[len(question) :],
            tok.encode(f" The secret number of {city} is {number}."),
        )
        room = length - len(begin) - len(hidden) - len(question) - len(answer)
        if room < 0:
            raise ValueError(
                f"a haystack of {length} tokens has no room for the needle and the question, {length - room} tokens; take longer ones"
            )
        at, hay, size = draw.randrange(len(encoded)), [], 0
        while size < room:
            hay.append(encoded[at % len(encoded)])
            at, size = at + 1, size + len(hay[-1])
        if hay:
            hay[-1] = hay[-1][: len(hay[-1]) - (size - room)]
        ends = [0, *accumulate(map(len, hay))]
        cut = min(bisect.bisect_left(ends, depth * room), len(hay))
        cut -= (
            cut > 0 and ends[cut] - depth * room > depth * room - ends[cut - 1]
        )  # the nearer gap between two sentences
        return begin + [
            t for part in (*hay[:cut], hidden, *hay[cut:], question) for t in part
        ], answer

    return make
