"""Scores of a given text: the log-probabilities of its tokens, and its mean hidden state.

The forward passes use a cache of their own and run in chunks between the engine's steps. A long
text therefore delays other requests no longer than a long prompt does.
"""

from __future__ import annotations

import torch

from lamoe.engine.async_llm import AsyncLLM
from lamoe.engine.llm import LLM
from lamoe.engine.next_token import token_logprobs


async def prompt_logprobs(
    engine: AsyncLLM, ids: list[int], top: int
) -> list[dict[int, float] | None]:
    """Return {token id: natural log-probability} for each position of a text.

    The dict of a position holds its actual token and the `top` most likely ones, given the tokens
    before. The first position has None, because no token precedes it.
    """
    found: list[dict[int, float] | None] = [None]
    results = None

    @torch.inference_mode()
    def score_chunk(llm: LLM) -> bool:
        """Score the next chunk. Return False if no chunk is left."""
        nonlocal results
        results = results or llm.backend.run_sequence(ids[:-1], llm.scheduler.max_tokens)
        result = next(results, None)
        if result is not None:
            found.extend(token_logprobs(row, ids[len(found)], top) for row in result.output)
        return result is not None

    while len(ids) > 1 and await engine.call(score_chunk):
        pass
    return found


async def mean_state(engine: AsyncLLM, ids: list[int]) -> list[float]:
    """Return the mean over all tokens of the final normed states, float32 [D]."""
    total = results = None

    @torch.inference_mode()
    def add_chunk(llm: LLM) -> bool:
        """Add the states of the next chunk. Return False if no chunk is left."""
        nonlocal total, results
        results = results or llm.backend.run_sequence(ids, llm.scheduler.max_tokens, head=False)
        result = next(results, None)
        if result is not None:
            chunk = result.output.float().sum(0)
            total = chunk if total is None else total + chunk
        return result is not None

    while await engine.call(add_chunk):
        pass
    assert total is not None
    return (total / len(ids)).tolist()
