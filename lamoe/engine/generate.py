"""One sequence, token by token, from a contiguous latent cache: prefill (expanded), then absorbed decode steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lamoe.engine.sampler import SamplingParams, sample
from lamoe.model.cache import KVCache
from lamoe.model.transformer import Transformer
from lamoe.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """What one step added. `text` may be empty (half a character, a possible stop string). finish_reason: None until the last
    piece, then "stop" (EOS, a stop string, or a complete grammar) or "length" (max_tokens, or the model's context is full)."""

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
    """Continue `prompt` (token ids, BOS included where the model wants one). With a tokenizer the pieces carry text and its
    stop_ids end the output, stop strings need one. ValueError, before anything runs, for an empty prompt, an id outside the
    vocabulary, or a prompt that leaves no room in the context."""
    room = model.config.max_position_embeddings - len(prompt)
    if not prompt:
        raise ValueError("the prompt has no tokens; give at least one, for example BOS")
    if room < 1:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens and leaves no room in the model's context of {model.config.max_position_embeddings}; shorten it"
        )
    if params.stop and tokenizer is None:
        raise ValueError("stop strings need a tokenizer")
    matcher = None if params.grammar is None else params.grammar.start(tokenizer)
    if min(prompt) < 0 or max(prompt) >= model.config.vocab_size:
        raise ValueError(
            f"the prompt has token ids from {min(prompt)} to {max(prompt)}; the vocabulary has {model.config.vocab_size}"
        )
    return _steps(
        model,
        prompt,
        params,
        tokenizer,
        eos_ids or (tokenizer.stop_ids if tokenizer else frozenset()),
        min(params.max_tokens, room),
        matcher,
    )


@torch.inference_mode()
def _steps(model, prompt, params, tokenizer, eos_ids, limit, matcher) -> Iterator[Piece]:
    weight = model.embed.weight
    cache = KVCache(model.config, 1, len(prompt) + limit, weight.dtype, weight.device)
    generator, text = params.generator(), TextStream(tokenizer, params.stop, params.skip_special)
    tokens, new = list(prompt), prompt
    for step in range(limit):
        h = model.hidden(torch.tensor([new], device=weight.device), cache)
        logits = params.adjust(model.logits(h[0, -1]), tokens, len(prompt), eos_ids)
        token = sample(
            matcher.mask(logits, params.ignore_eos) if matcher else logits, params, generator
        )
        if matcher:
            matcher.accept(token)
        tokens.append(token)
        if token in eos_ids and not params.ignore_eos:
            yield Piece(token, text.rest(), "stop")
            return
        piece, stopped = text.add(token)
        if stopped:
            yield Piece(token, piece, "stop")
            return
        complete = matcher is not None and matcher.complete
        if complete or step == limit - 1:
            yield Piece(token, piece + text.rest(), "stop" if complete else "length")
            return
        yield Piece(token, piece)
        new = [token]


class TextStream:
    """Pieces of text as tokens come, with what could be the beginning of a stop string held back until it is not. `all` is what was shown."""

    def __init__(
        self, tokenizer: Tokenizer | None, stop: tuple[str, ...], skip_special: bool = True
    ):
        self.stream, self.stop, self.held, self.all = (
            tokenizer.stream(skip_special=skip_special) if tokenizer else None,
            stop,
            "",
            "",
        )

    def add(self, token: int) -> tuple[str, bool]:
        """(text to show, whether a stop string was completed)."""
        if self.stream is None:
            return "", False
        text = self.held + self.stream.step(token)
        found = [at for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.held = ""
            return self._show(text[: min(found)]), True
        keep = max(
            (n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0
        )
        self.held = text[len(text) - keep :]
        return self._show(text[: len(text) - keep]), False

    def rest(self) -> str:
        """What was held back, at the end of the output; cut at a stop string that an incomplete character completed."""
        text = self.held + (self.stream.flush() if self.stream else "")
        found = [at for s in self.stop if (at := text.find(s)) >= 0]
        return self._show(text[: min(found)] if found else text)

    def _show(self, text: str) -> str:
        self.all += text
        return text
