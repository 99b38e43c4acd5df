"""The memory plan: the bytes of weights, cache and attention, computed before any allocation."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from lamoe.backends import cache_codec
from lamoe.model import accounting
from lamoe.model.accounting import human_bytes
from lamoe.model.config import ModelConfig

# Default limit of the cache size, unless one full context needs more.
DEFAULT_CACHE_BYTES = 1 << 30
DEFAULT_CONTEXTS = 4  # default cache size, in sequences of max_model_len tokens


@dataclass(frozen=True)
class Plan:
    """Memory of a model and its cache, in bytes over all layers.

    format: storage format of the cache.
    cache: bytes of all `pages` pages.
    bytes_per_token: bytes of the cache rows of one token.
    expanded_bytes_per_token: bytes of the full keys and values of one token at 16 bits, which a
        program without a latent cache stores.
    max_model_len: longest sequence in tokens, prompt and output together.
    states: upper bound on the bytes of attention's partial results (Backend.state_bytes).
    """

    format: str
    weights: int
    cache: int
    pages: int
    page_size: int
    bytes_per_token: int
    expanded_bytes_per_token: int
    max_model_len: int
    max_num_seqs: int
    states: int

    @property
    def tokens(self) -> int:
        """Number of tokens that the cache holds, over all sequences."""
        return self.pages * self.page_size

    @property
    def sequences(self) -> int:
        """Number of sequences of max_model_len tokens that the cache holds at once."""
        return self.pages // math.ceil(self.max_model_len / self.page_size)

    def describe(self) -> str:
        """Describe the plan in three lines for people."""
        expanded = ""
        if self.expanded_bytes_per_token > self.bytes_per_token:
            ratio = self.expanded_bytes_per_token / self.bytes_per_token
            tokens = self.cache // self.expanded_bytes_per_token
            expanded = (
                f"; as expanded keys and values {self.expanded_bytes_per_token:,} "
                f"({ratio:.1f} x), the same memory would hold {tokens:,} tokens"
            )
        limit = ""
        if self.max_num_seqs < self.sequences:
            limit = f" (max_num_seqs lets {self.max_num_seqs} run)"
        states = f"; {human_bytes(self.states)} at most for attention" if self.states else ""
        plural = "s" * (self.sequences != 1)
        return (
            f"weights {human_bytes(self.weights)}{states}\n"
            f"cache   {human_bytes(self.cache)} in {self.format}, "
            f"{self.bytes_per_token:,} bytes a token{expanded}\n"
            f"fits    {self.tokens:,} tokens: {self.sequences:,} sequence{plural} "
            f"of {self.max_model_len:,} at once{limit}"
        )


def fit(
    config: ModelConfig,
    weights: int,
    format: str,
    cache_memory: int | None,
    max_model_len: int | None,
    max_num_seqs: int,
    page_size: int,
    available: int | None = None,
    state_bytes: Callable[[int], int] = lambda max_model_len: 0,
) -> Plan:
    """Choose the size of the cache and check that everything fits in memory.

    Args:
        weights: bytes of the weights.
        format: storage format of the cache.
        cache_memory: bytes of the cache. None means enough for four full contexts but at most
            1 GiB, and in any case enough for one full context.
        max_model_len: longest sequence in tokens. None means the model's limit.
        available: bytes that weights, cache and attention may take together. None if unknown.
        state_bytes: function from max_model_len to the bytes of attention's partial results.

    Raises:
        ValueError: if the cache cannot hold one sequence of max_model_len, or memory cannot hold
            everything. The message has the numbers and the largest value that would fit.
    """
    limit = config.max_position_embeddings
    if max_model_len is not None and not 1 < max_model_len <= limit:
        raise ValueError(
            f"max_model_len is {max_model_len}; it must be from 2 to the model's "
            f"max_position_embeddings {limit}"
        )
    length = limit if max_model_len is None else max_model_len
    token_bytes = config.num_hidden_layers * cache_codec.row_bytes(format, config.cache_row)
    page_bytes = page_size * token_bytes
    needed, states = math.ceil(length / page_size) * page_bytes, state_bytes(length)
    free = math.inf if available is None else max(0, available - weights - states)
    given = cache_memory is not None
    if cache_memory is None:
        cache_memory = int(max(needed, min(DEFAULT_CONTEXTS * needed, DEFAULT_CACHE_BYTES, free)))
    if cache_memory < needed:
        tokens = cache_memory // page_bytes * page_size
        raise ValueError(
            f"a cache of {human_bytes(cache_memory)} in {format} holds {tokens} tokens, less than "
            f"max_model_len {length}, which needs {human_bytes(needed)}; give more cache_memory, "
            f"a smaller cache format, or max_model_len {max(tokens, 2)}"
        )
    pages = cache_memory // page_bytes
    if available is not None and pages * page_bytes > free:
        fitting_pages = bisect_right(
            range(1, length // page_size + 1),
            available - weights,
            key=lambda n: n * page_bytes + state_bytes(n * page_size),
        )
        fix = _fix(config, given and free >= needed, int(free), page_size * fitting_pages)
        attention = f", with {human_bytes(states)} for attention," if states else ""
        raise ValueError(
            f"{human_bytes(weights)} of weights and a cache of {human_bytes(pages * page_bytes)} "
            f"({pages * page_size:,} tokens in {format}, {token_bytes:,} bytes a token)"
            f"{attention} are more than the {human_bytes(available)} of memory that are "
            f"available; {fix}"
        )
    expanded = 2 * accounting.expanded_elements(config) if config.is_mla else token_bytes
    return Plan(
        format=format,
        weights=weights,
        cache=pages * page_bytes,
        pages=pages,
        page_size=page_size,
        bytes_per_token=token_bytes,
        expanded_bytes_per_token=expanded,
        max_model_len=length,
        max_num_seqs=max_num_seqs,
        states=states,
    )


def _fix(config: ModelConfig, smaller_cache_fits: bool, free: int, tokens: int) -> str:
    """Return advice on how to make a model fit. `tokens` is the longest context that would fit."""
    if smaller_cache_fits:
        return f"lower cache_memory to at most {human_bytes(free)}"
    if tokens < 2:
        return "free some memory, or take a smaller model"
    smallest = config.num_hidden_layers * cache_codec.row_bytes("4bit", config.cache_row)
    return (
        f"lower max_model_len to {tokens}, or take a smaller cache format "
        f"(4bit: {smallest:,} bytes a token)"
    )
