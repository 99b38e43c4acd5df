"""Samples a token from logits: temperature, top-k, top-p and min-p, with one seed per request."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lamoe.engine.grammar import Grammar
from lamoe.model.config import check_types


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    Penalties and bias act first, then temperature, top_k, top_p and min_p.

    Attributes:
        temperature: divisor of the logits. 0 means greedy decoding.
        top_k: number of most likely tokens to sample from. 0 means all.
        seed: seed of sampling. None draws from torch's global generator. Sample i of a seeded
            request uses seed + i.
        stop: texts that end the output. The output does not include them.
        n: number of samples per prompt.
        presence_penalty: number that is subtracted once from the logits of tokens in the output.
        frequency_penalty: number that is subtracted once per occurrence of a token in the output.
        repetition_penalty: factor that divides positive and multiplies negative logits of tokens
            in the prompt or the output.
        logit_bias: {token id: number added to its logit}.
        logprobs: number of most likely tokens to report beside the chosen one, with
            log-probabilities from before temperature and filters.
        grammar: the grammar that the output must match. Tokens that do not fit are masked after
            penalties and bias. The output ends with "stop" when the grammar is complete, even
            before min_tokens.
        skip_special: whether to omit special tokens from the text.
        cache_salt: sequences share cached prefixes only with sequences of the same salt. Otherwise
            `Output.cached_tokens` would tell one user what another has sent.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict | None = None
    logprobs: int | None = None
    grammar: Grammar | None = None
    skip_special: bool = True
    cache_salt: str = ""

    def __post_init__(self):
        if isinstance(self.stop, (str, list)):
            object.__setattr__(
                self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
            )
        check_types(self)
        if not 0 <= self.temperature <= 100:  # also refuses nan
            raise ValueError(
                f"temperature is {self.temperature}; it must be between 0 (greedy) and 100"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be between 0 and 1")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 0 (0 switches it off)")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 1 <= self.n <= 128:
            raise ValueError(f"n is {self.n}; it must be from 1 to 128")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}; it must be from 0 to max_tokens "
                f"{self.max_tokens}"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between -2 and 2")
        if not 0 < self.repetition_penalty <= 10:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; "
                "it must be above 0 and at most 10 (1 switches it off)"
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise ValueError(f"logprobs is {self.logprobs}; it must be from 0 to 20")
        for token, bias in (self.logit_bias or {}).items():
            if (
                type(token) is not int
                or token < 0
                or type(bias) not in (int, float)
                or not -100 <= bias <= 100
            ):
                raise ValueError(
                    f"logit_bias has {token!r}: {bias!r}; it maps token ids to numbers from -100 "
                    "to 100"
                )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to 2**63 - 1")
        if any(not s for s in self.stop):
            raise ValueError("a stop string is empty; it would end every output at once")

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is the argmax of the logits and nothing else is reported."""
        return (
            self.temperature == 0
            and self.repetition_penalty == 1
            and not (self.presence_penalty or self.frequency_penalty or self.logit_bias)
            and not self.min_tokens
            and self.grammar is None
            and self.logprobs is None
        )

    def generator(self, sample: int = 0) -> torch.Generator | None:
        """Return the random generator of sample number `sample`, or None for torch's global one."""
        return None if self.seed is None else torch.Generator().manual_seed(self.seed + sample)

    def adjust(
        self, logits: torch.Tensor, tokens: list[int], prompt_len: int, eos_ids: frozenset[int]
    ) -> torch.Tensor:
        """Apply penalties, bias and min_tokens to logits [vocabulary] of a sequence of `tokens`.

        Returns `logits` itself if nothing applies. The input is never modified.
        """
        out = logits
        if self.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(tokens)))
            found, penalty = out[seen], self.repetition_penalty
            penalised = torch.where(found > 0, found / penalty, found * penalty)
            out = out.index_copy(0, seen, penalised)
        if (self.presence_penalty or self.frequency_penalty) and len(tokens) > prompt_len:
            seen, counts = torch.tensor(tokens[prompt_len:]).unique(return_counts=True)
            penalty = self.presence_penalty + self.frequency_penalty * counts
            out = out.index_add(0, seen, -penalty.to(out.dtype))
        if self.logit_bias:
            ids = torch.tensor(list(self.logit_bias))
            bias = torch.tensor(list(self.logit_bias.values()), dtype=out.dtype)
            out = out.index_add(0, ids, bias)
        if len(tokens) - prompt_len < self.min_tokens and eos_ids and not self.ignore_eos:
            out = out.index_fill(0, torch.tensor(sorted(eos_ids)), float("-inf"))
        return out


def probabilities(logits: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    """Return the distribution that `sample` draws from, float32 [vocabulary].

    Args:
        logits: [vocabulary].
        p: sampling parameters with a temperature above 0.
    """
    logits = logits.float()
    temperature = max(p.temperature, torch.finfo(torch.float32).tiny)
    logits = (logits - logits.max()) / temperature  # at most 0, so nothing overflows to infinity
    if p.top_k and p.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(p.top_k).values[-1], float("-inf"))
    if p.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        mass = ordered.softmax(0)
        # Exclude a token if the more likely tokens already reach top_p. The first always stays.
        beyond = mass.cumsum(0) - mass >= p.top_p
        logits = logits.index_fill(0, order[beyond], float("-inf"))
    probs = logits.softmax(0)
    if p.min_p:
        probs = probs * (probs >= p.min_p * probs.max())
        probs = probs / probs.sum()
    return probs


def sample(
    logits: torch.Tensor, p: SamplingParams, generator: torch.Generator | None = None
) -> int:
    """Draw one token id from logits [vocabulary], or take the argmax at temperature 0."""
    if p.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(probabilities(logits, p), 1, generator=generator))
