"""What a model says of a given text: log-probabilities of its own tokens, and its mean state. Plain passes beside the paged cache, in chunks, between the
engine's steps, so that a long text holds nobody up for longer than a long prompt does."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from lamoe.backends.cpu.packed import PackedModel
from lamoe.backends.paged_cache import PagedCache
from lamoe.engine.async_llm import AsyncLLM
from lamoe.engine.llm import LLM, token_logprobs
from lamoe.engine.text_loss import TextLoss
from lamoe.model.cache import KVCache
from lamoe.model.transformer import Transformer


async def prompt_logprobs(
    engine: AsyncLLM, ids: list[int], top: int
) -> list[dict[int, float] | None]:
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
def forward(
    model: Transformer | PackedModel, ids: list[int], chunk: int, logits: bool
) -> Iterator[torch.Tensor]:
    """Logits [at most chunk, vocabulary] or final normed states [at most chunk, D] of `ids`, a chunk at a time."""
    if isinstance(model, PackedModel):
        yield from (out for _, out, _ in steps(model, ids, chunk, logits))
        return
    plain = KVCache(model.config, 1, len(ids), model.embed.weight.dtype)
    for at in range(0, len(ids), chunk):
        h = model.hidden(torch.tensor([ids[at : at + chunk]]), plain)[0]
        yield model.logits(h) if logits else h


def steps(
    model: PackedModel, ids: list[int], chunk: int, logits: bool, experts: bool = False
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """`ids` from an empty cache, a chunk at a time: (where it begins, its logits or states, its experts as PackedModel.run gives them)."""
    cache = PagedCache(model.config, -(-len(ids) // 16), 16, model.elem, model.dtype)
    pages = torch.arange(cache.pages, dtype=torch.int32)
    for at in range(0, len(ids), chunk):
        part = ids[at : at + chunk]
        seqs = torch.tensor([[len(part), at + len(part), 0]], dtype=torch.int32)
        yield (
            at,
            *model.run(
                part,
                torch.arange(at, at + len(part)),
                seqs,
                pages,
                cache,
                list(range(len(part))),
                logits=logits,
                experts=experts,
            ),
        )


@torch.inference_mode()
def text_loss(
    model: PackedModel,
    rows: Iterable[tuple[np.ndarray, np.ndarray]],
    document_mask: bool = True,
    chunk: int = 512,
) -> TextLoss:
    """text_loss of a packed model: rows of (ids, segments), each [T + 1]; a token is a target when it continues its predecessor's segment. Segments
    are sequences of their own (without `document_mask` whole rows are). chunk: tokens of a step, which bounds the logits in memory."""
    nats, targets, load = (
        0.0,
        0,
        np.zeros((len(model.config.moe_layers), model.config.n_routed_experts or 0)),
    )
    for ids, segments in rows:
        cuts = (
            [0, *(1 + np.flatnonzero(segments[1:] != segments[:-1])).tolist(), len(ids)]
            if document_mask
            else [0, len(ids)]
        )
        for begin, end in itertools.pairwise(cuts):
            if end - begin < 2:
                continue
            for at, logits, chosen in steps(
                model, ids[begin : end - 1].tolist(), chunk, True, model.config.is_moe
            ):
                goal = torch.from_numpy(
                    np.asarray(ids[begin + at + 1 : begin + at + 1 + len(logits)], dtype=np.int64)
                )
                if not document_mask:
                    place = slice(begin + at, begin + at + len(logits) + 1)
                    goal[torch.from_numpy(segments[place][1:] != segments[place][:-1])] = -1
                nats += float(F.cross_entropy(logits, goal, ignore_index=-1, reduction="sum"))
                targets += int((goal >= 0).sum())
                load += (
                    [
                        np.bincount(layer.flatten(), minlength=load.shape[1])
                        for layer in chosen.numpy()
                    ]
                    if len(chosen)
                    else 0
                )
    if not targets:
        raise ValueError(
            "there is nothing to evaluate on: the rows hold no token that follows another of its document"
        )
    return TextLoss(nats, targets, load / np.maximum(1, load.sum(-1, keepdims=True)))
