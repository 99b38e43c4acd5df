"""What a model says of a given text: log-probabilities of its own tokens, and its mean state. Plain passes beside the paged cache, in chunks, between the
engine's steps, so that a long text holds nobody up for longer than a long prompt does."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lamoe.cache import KVCache
from lamoe.engine.async_llm import AsyncLLM
from lamoe.engine.llm import LLM, token_logprobs
from lamoe.model import Transformer


async def prompt_logprobs(engine: AsyncLLM, ids: list[int], top: int) -> list[dict[int, float] | None]:
    """Per token {token id: natural log of its probability after those before it}: the token itself and the `top` most likely ones. None for the first."""
    found: list[dict[int, float] | None] = [None]
    passes = None

    def score(llm: LLM) -> bool:
        nonlocal passes
        passes = passes or states(llm.model, ids[:-1], llm.scheduler.max_tokens)
        h = next(passes, None)
        if h is not None:
            with torch.inference_mode():
                found.extend(token_logprobs(row, ids[len(found)], top) for row in llm.model.logits(h))
        return h is not None

    while len(ids) > 1 and await engine.call(score):
        pass
    return found


async def mean_state(engine: AsyncLLM, ids: list[int]) -> list[float]:
    """The mean over all tokens of the final normed states, [D] float32."""
    total = passes = None

    def add(llm: LLM) -> bool:
        nonlocal total, passes
        passes = passes or states(llm.model, ids, llm.scheduler.max_tokens)
        h = next(passes, None)
        if h is not None:
            total = h.float().sum(0) + (0 if total is None else total)
        return h is not None

    while await engine.call(add):
        pass
    return (total / len(ids)).tolist()


@torch.inference_mode()
def states(model: Transformer, ids: list[int], chunk: int) -> Iterator[torch.Tensor]:
    """Final normed states of `ids`, [at most chunk, D] at a time."""
    cache = KVCache(model.config, 1, len(ids), model.embed.weight.dtype)
    for at in range(0, len(ids), chunk):
        yield model.hidden(torch.tensor([ids[at : at + chunk]]), cache)[0]
