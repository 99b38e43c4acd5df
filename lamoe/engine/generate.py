"""Plain generation: one sequence, token by token, over a contiguous cache.

This is the readable form that the engine is tested against. The command line and the server use
the engine (llm.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lamoe.engine.next_token import TextStream, next_token
from lamoe.engine.request import Sequence, check_prompt
from lamoe.engine.sampler import SamplingParams
from lamoe.model.cache import KVCache
from lamoe.model.transformer import Transformer
from lamoe.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """The result of one step: a token and the text that can be shown after it.

    text: the new text. It is empty after half a character or the possible beginning of a stop
        string.
    finish_reason: None until the last piece, then "stop" (EOS, a stop string, or a complete
        grammar) or "length" (max_tokens, or the model's context is full).
    """

    token_id: int
    text: str
    finish_reason: str | None = None


def generate(
    model: Transformer,
    prompt: list[int],
    params: SamplingParams,
    tokenizer: Tokenizer | None = None,
    eos_ids: frozenset[int] = frozenset(),
) -> Iterator[Piece]:
    """Continue a prompt and yield one Piece per token.

    Args:
        prompt: token ids, including BOS if the model uses it.
        tokenizer: converts tokens to text. Stop strings need it. Its stop ids end the output.
        eos_ids: ids that end the output, instead of the tokenizer's.

    Raises:
        ValueError: if the prompt is empty, has an id outside the vocabulary, or fills the context.
            This is checked before anything runs.
    """
    context = model.config.max_position_embeddings
    limit_name = "the model's context of"
    check_prompt(prompt, params, tokenizer, model.config, context, limit_name)
    matcher = None if params.grammar is None else params.grammar.start(tokenizer)
    limit = min(len(prompt) + params.max_tokens, context)
    seq = Sequence(0, list(prompt), len(prompt), params, limit, params.generator(), matcher)
    eos_ids = eos_ids or (tokenizer.stop_ids if tokenizer else frozenset())
    return _steps(model, seq, tokenizer, eos_ids)


@torch.inference_mode()
def _steps(
    model: Transformer, seq: Sequence, tokenizer: Tokenizer | None, eos_ids: frozenset[int]
) -> Iterator[Piece]:
    weight = model.embed.weight
    cache = KVCache(model.config, 1, seq.limit, weight.dtype, weight.device)
    text = TextStream(tokenizer, seq.params.stop, seq.params.skip_special)
    new = seq.tokens
    while True:
        hidden = model.hidden(torch.tensor([new], device=weight.device), cache)
        logits = model.logits(hidden[0, -1]).cpu()
        piece = next_token(seq, text, logits, eos_ids)
        yield Piece(*piece)
        if piece.finish_reason:
            return
        new = [piece.token_id]
