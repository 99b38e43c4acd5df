"""What a model says of a given text: log-probabilities of its own tokens, and its mean state. Plain passes beside the paged cache, in chunks, between the
engine's steps, so that a long text holds nobody up for longer than a long prompt does."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lamoe.cache import KVCache, PagedCache
from lamoe.engine.async_llm import AsyncLLM
from lamoe.engine.llm import LLM, token_logprobs
from lamoe.model import Transformer
from lamoe.packed import PackedModel


async def prompt_logprobs(engine: AsyncLLM, ids: list[int], top: int) -> list[dict[int, float] | None]:
    """Per token {token id: natural log of its probability after those before it}: the token itself and the `top` most likely ones. None for the first."""
    found: list[dict[int, float] | None] = [None]
    passes = None

    def score(llm: LLM) -> bool:
        nonlocal passes
        passes = passes or forward(llm.runs, ids[:-1], llm.scheduler.max_tokens, logits=True)
        logits = next(passes, None)
        if logits is not None:
            found.extend(token_logprobs(row, ids[len(found)], top) for row in logits)
        return logits is not None

    while len(ids) > 1 and await engine.call(score):
        pass
    return found


async def mean_state(engine: AsyncLLM, ids: list[int]) -> list[float]:
    """The mean over all tokens of the final normed states, [D] float32."""
    total = passes = None

    def add(llm: LLM) -> bool:
        nonlocal total, passes
        passes = passes or forward(llm.runs, ids, llm.scheduler.max_tokens, logits=False)
        h = next(passes, None)
        if h is not None:
            total = h.float().sum(0) + (0 if total is None else total)
        return h is not None

    while await engine.call(add):
        pass
    return (total / len(ids)).tolist()


@torch.inference_mode()
def forward(model: Transformer | PackedModel, ids: list[int], chunk: int, logits: bool) -> Iterator[torch.Tensor]:
    """Logits [at most chunk, vocabulary] or final normed states [at most chunk, D] of `ids`, a chunk at a time."""
    if isinstance(model, PackedModel):
        cache = PagedCache(model.config, -(-len(ids) // 16), 16, model.elem, model.dtype)
        pages = torch.arange(cache.pages, dtype=torch.int32)
        for at in range(0, len(ids), chunk):
            part = ids[at : at + chunk]
            seqs = torch.tensor([[len(part), at + len(part), 0]], dtype=torch.int32)
            yield model.run(part, torch.arange(at, at + len(part)), seqs, pages, cache, list(range(len(part))), logits=logits)[0]
        return
    plain = KVCache(model.config, 1, len(ids), model.embed.weight.dtype)
    for at in range(0, len(ids), chunk):
        h = model.hidden(torch.tensor([ids[at : at + chunk]]), plain)[0]
        yield model.logits(h) if logits else h
