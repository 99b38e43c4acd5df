"""A sequence of a request while it runs, its result, and the check of its prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lamoe.engine.grammar import Matcher
from lamoe.engine.lookup import Lookup
from lamoe.engine.sampler import SamplingParams
from lamoe.model.config import ModelConfig
from lamoe.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Output:
    """A finished sequence.

    finish_reason: "stop" (EOS, a stop string, or a complete grammar), "length" (max_tokens or a
        full context), "abort" (cancelled) or "error".
    cached_tokens: prompt tokens that were found in the cache and not computed again.
    logprobs: {token id: natural log-probability} for each token. None unless requested.
    experts: int64 [MoE layers, E], see LLM.experts. None unless the engine counts experts.
    internal: True if the model or the engine caused the error, False if the request caused it.
    """

    token_ids: list[int]
    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int = 0
    logprobs: list[dict[int, float]] | None = None
    error: str | None = None
    experts: torch.Tensor | None = field(default=None, compare=False)
    internal: bool = False


@dataclass(eq=False)
class Sequence:
    """A sequence while it runs.

    tokens: token ids of the prompt and the output so far.
    limit: largest number of tokens, which is prompt + max_tokens, or the context if that is less.
    matcher: the state of the output in its grammar. It advances with sampled tokens only, so
        preemption does not affect it.
    leader: a sequence with the same prompt that runs first. This sequence then reuses its pages.
    computed: number of tokens whose rows are in the cache.
    cached: number of prompt tokens that were found in the cache.
    pages: the cache pages that hold the rows.
    contents: content hashes of the full pages.
    draft: draft tokens that the next forward pass checks after `tokens`.
    """

    id: int
    tokens: list[int]
    prompt_len: int
    params: SamplingParams
    limit: int
    generator: torch.Generator | None = None
    matcher: Matcher | None = None
    leader: Sequence | None = None
    computed: int = 0
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None
    internal: bool = False
    experts: torch.Tensor | None = None
    preemptions: int = 0
    draft: list[int] = field(default_factory=list)
    lookup: Lookup = field(default_factory=Lookup)

    @property
    def output(self) -> list[int]:
        """Token ids of the output so far."""
        return self.tokens[self.prompt_len :]

    @property
    def todo(self) -> int:
        """Number of tokens whose rows are not in the cache yet. It is 1 while decoding."""
        return len(self.tokens) - self.computed


def check_prompt(
    prompt: list[int],
    params: SamplingParams,
    tokenizer: Tokenizer | None,
    config: ModelConfig,
    max_model_len: int,
    limit_name: str = "max_model_len",
) -> None:
    """Check that a prompt and its options can run.

    Args:
        limit_name: the name of max_model_len in messages.

    Raises:
        ValueError: if the prompt is empty, has an id outside the vocabulary, or is so long that no
            output fits in max_model_len, or if options need a tokenizer but there is none.
    """
    vocab = config.vocab_size
    if not prompt:
        raise ValueError("the prompt has no tokens; give at least one, for example BOS")
    invalid = [t for t in prompt if type(t) is not int or not 0 <= t < vocab]
    if invalid:
        known = 0 if tokenizer is None else tokenizer.vocab_size
        if type(invalid[0]) is int and 0 <= invalid[0] < known:
            raise ValueError(
                f"the prompt has the token {tokenizer.inner.id_to_token(invalid[0])!r} of id "
                f"{invalid[0]}, but the model has embeddings for {vocab} tokens only; leave this "
                "text out, or use the tokenizer that belongs to the model"
            )
        raise ValueError(
            f"a prompt is a list of token ids from 0 to {vocab - 1}; found {invalid[0]!r}"
        )
    if len(prompt) >= max_model_len:
        context = config.max_position_embeddings
        more = ""
        if max_model_len < context:
            more = f", or raise max_model_len (the model takes {context})"
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, but with at least one output token it must fit "
            f"in {limit_name} {max_model_len}; shorten it{more}"
        )
    if params.stop and tokenizer is None:
        raise ValueError("stop strings need a tokenizer")
    if params.logit_bias and max(params.logit_bias) >= vocab:
        raise ValueError(
            f"logit_bias names token {max(params.logit_bias)}; the vocabulary has {vocab}"
        )
