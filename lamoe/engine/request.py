"""One request and one result of the engine, and what the engine remembers of a sequence while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lamoe.engine.grammar import Matcher
from lamoe.engine.lookup import Lookup
from lamoe.engine.sampler import SamplingParams


@dataclass(frozen=True)
class Output:
    """A finished sequence. finish_reason: "stop" (EOS, a stop string, or a complete grammar), "length" (max_tokens or a full context), "abort" (cancelled), "error".
    logprobs: per token {token id: natural log of its probability} when asked for. cached_tokens: of the prompt, not computed again.
    experts: see LLM.experts. internal: the error is the model's or the engine's, not the request's own."""

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
    """`tokens` is prompt + output; rows of the first `computed` are in the cache, in `pages`; `contents` are the hashes of its full pages;
    `draft` is what the next pass checks behind `tokens`."""

    id: int
    tokens: list[int]
    prompt_len: int
    params: SamplingParams
    limit: int  # most tokens in all: max_tokens or the context, whichever is less
    generator: torch.Generator | None = None
    matcher: Matcher | None = (
        None  # where the output stands in the grammar; it goes on with sampled tokens only, so preemption does not touch it
    )
    leader: Sequence | None = (
        None  # a sibling with the same prompt that goes first, so that the others find its pages
    )
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
        return self.tokens[self.prompt_len :]

    @property
    def todo(self) -> int:
        """Tokens without a row. 1 while decoding."""
        return len(self.tokens) - self.computed
