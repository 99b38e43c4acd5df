"""Chooses the next token from logits and converts it to text, for every kind of generation."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lamoe.engine.request import Sequence
from lamoe.engine.sampler import sample
from lamoe.text.text_finder import TextFinder
from lamoe.text.tokenizer import Tokenizer


class NextToken(NamedTuple):
    """A chosen token and the text that can be shown after it.

    finish_reason: why the sequence ends with this token, "stop" (EOS, a stop string or a complete
        grammar) or "length" (max_tokens or a full context). None if it continues.
    """

    token_id: int
    text: str
    finish_reason: str | None


def next_token(
    seq: Sequence,
    text: TextStream,
    logits: torch.Tensor,
    eos_ids: frozenset[int],
    argmax: int | None = None,
) -> NextToken:
    """Choose the next token of a sequence from its logits and append it to `seq.tokens`.

    Its log-probabilities are appended to `seq.logprobs` if the request asks for them.

    Args:
        seq: the sequence.
        logits: [vocabulary], the logits after its last token.
        argmax: index of the largest logit, if known. It saves a pass over the logits when sampling
            is greedy.

    Raises:
        ValueError, RuntimeError: if the options or the grammar exclude every token.
    """
    params = seq.params
    adjusted = params.adjust(logits, seq.tokens, seq.prompt_len, eos_ids)
    if seq.matcher:
        adjusted = seq.matcher.mask(adjusted, params.ignore_eos)
    if argmax is not None and params.temperature == 0 and adjusted is logits:
        token = argmax
    else:
        token = sample(adjusted, params, seq.generator)
    if seq.matcher:
        seq.matcher.accept(token)
    if params.logprobs is not None:
        seq.logprobs.append(token_logprobs(logits, token, params.logprobs))
    seq.tokens.append(token)
    if token in eos_ids and not params.ignore_eos:
        return NextToken(token, text.rest(), "stop")
    piece, stopped = text.add(token)
    if stopped:
        return NextToken(token, piece, "stop")
    complete = seq.matcher is not None and seq.matcher.complete
    if complete or len(seq.tokens) >= seq.limit:
        return NextToken(token, piece + text.rest(), "stop" if complete else "length")
    return NextToken(token, piece, None)


def token_logprobs(logits: torch.Tensor, token: int, top: int) -> dict[int, float]:
    """Return {token id: natural log-probability} of the `top` most likely tokens and of `token`.

    The most likely tokens come first.
    """
    logp = logits.float().log_softmax(-1)
    ids = logp.topk(min(top, len(logp))).indices.tolist() if top else []
    return {i: float(logp[i]) for i in dict.fromkeys([*ids, token])}


class TextStream:
    """Turns tokens into text to show, holding back what may become a stop string."""

    def __init__(
        self, tokenizer: Tokenizer | None, stop: tuple[str, ...], skip_special: bool = True
    ):
        self._decoder = tokenizer.stream(skip_special=skip_special) if tokenizer else None
        self._finder, self._held = TextFinder(stop), ""
        # The text of a special token may be a stop string, but is left out of the text.
        self._stop_ids = (
            frozenset(tokenizer.inner.token_to_id(s) for s in stop if s in tokenizer.control_tokens)
            if tokenizer
            else frozenset()
        )
        self._shown: list[str] = []

    @property
    def shown(self) -> str:
        """All text that was returned so far."""
        return "".join(self._shown)

    def add(self, token: int) -> tuple[str, bool]:
        """Add a token. Return the new text to show, and whether a stop string is complete."""
        if token in self._stop_ids:
            return self.rest(), True
        return self._add(self._decoder.step(token)) if self._decoder else ("", False)

    def rest(self) -> str:
        """Return the text that was held back. Call it at the end of the output.

        An incomplete last character is decoded too. If the text completes a stop string, it is cut
        before this string.
        """
        piece, stopped = self._add(self._decoder.flush() if self._decoder else "")
        held, self._held = self._held, ""
        return piece if stopped else piece + self._show(held)

    def _add(self, piece: str) -> tuple[str, bool]:
        begin, held = self._finder.add(piece)
        text = self._held + piece
        end = len(text) - held if begin is None else len(self._held) + begin
        self._held = text[end:] if begin is None else ""
        return self._show(text[:end]), begin is not None

    def _show(self, text: str) -> str:
        self._shown.append(text)
        return text
