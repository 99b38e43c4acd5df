"""From logits to a token: temperature, top-k, top-p, min-p, with a seed of its own per request."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lamoe.config import check_types


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. temperature 0 is greedy; filters act in the order temperature, top_k, top_p, min_p.

    seed None: drawn from torch's global generator. stop: texts that end the output and are not part of it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        if isinstance(self.stop, (str, list)):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        check_types(self)
        if not 0 <= self.temperature <= 100:  # also refuses nan
            raise ValueError(f"temperature is {self.temperature}; it must be between 0 (greedy) and 100")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be between 0 and 1")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 0 (0 switches it off)")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to 2**63 - 1")
        if any(not s for s in self.stop):
            raise ValueError("a stop string is empty; it would end every output at once")

    def generator(self) -> torch.Generator | None:
        return None if self.seed is None else torch.Generator().manual_seed(self.seed)


def probabilities(logits: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    """The distribution that `sample` draws from, float32 [vocabulary]; logits [vocabulary]. temperature must be above 0."""
    logits = logits.float()
    logits = (logits - logits.max()) / max(p.temperature, torch.finfo(torch.float32).tiny)  # at most 0: nothing overflows to inf
    if p.top_k and p.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(p.top_k).values[-1], float("-inf"))
    if p.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        mass = ordered.softmax(0)
        beyond = mass.cumsum(0) - mass >= p.top_p  # the mass before a token already suffices; the first one always stays
        logits = logits.index_fill(0, order[beyond], float("-inf"))
    probs = logits.softmax(0)
    if p.min_p:
        probs = probs * (probs >= p.min_p * probs.max())
        probs = probs / probs.sum()
    return probs


def sample(logits: torch.Tensor, p: SamplingParams, generator: torch.Generator | None = None) -> int:
    """One token id from logits [vocabulary]."""
    if p.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(probabilities(logits, p), 1, generator=generator))
