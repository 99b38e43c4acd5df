"""What a model and its cache take of the memory: decided before anything is allocated, refused when it cannot be, and said in words."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path

from lamoe.backends import cache_codec
from lamoe.model import accounting
from lamoe.model.accounting import human_bytes
from lamoe.model.attention import cheaper_form
from lamoe.model.config import ModelConfig

STATES = 128 << 20  # Model::state_limit of csrc/model.h
DEFAULT_BYTES = (
    1 << 30
)  # a cache is at most this large unless one full context needs more, or somebody says so


@dataclass(frozen=True)
class Plan:
    """Bytes, all layers. `cache` is `pages` pages; `expanded_bytes_per_token`: full keys and values at 16 bits, what a program without a latent cache keeps;
    `states`: what the compiled kernels take at most for partial results of attention (`state_bytes`), 0 on torch ops."""

    format: str
    weights: int
    cache: int
    pages: int
    page_size: int
    bytes_per_token: int
    expanded_bytes_per_token: int
    max_model_len: int  # tokens of one sequence, prompt and output
    max_num_seqs: int
    states: int

    @property
    def tokens(self) -> int:
        """Rows of the cache, all sequences together."""
        return self.pages * self.page_size

    @property
    def sequences(self) -> int:
        """Of max_model_len tokens, at once."""
        return self.pages // math.ceil(self.max_model_len / self.page_size)

    def describe(self) -> str:
        """Three lines for people."""
        e, same = self.expanded_bytes_per_token, self.cache // self.expanded_bytes_per_token
        expanded = (
            f"; as expanded keys and values {e:,} ({e / self.bytes_per_token:.1f} x), the same memory would hold {same:,} tokens"
            if e > self.bytes_per_token
            else ""
        )
        most = (
            f" (max_num_seqs lets {self.max_num_seqs} run)"
            if self.max_num_seqs < self.sequences
            else ""
        )
        partial = f"; {human_bytes(self.states)} at most for attention" if self.states else ""
        return (
            f"weights {human_bytes(self.weights)}{partial}\n"
            f"cache   {human_bytes(self.cache)} in {self.format}, {self.bytes_per_token:,} bytes a token{expanded}\n"
            f"fits    {self.tokens:,} tokens: {self.sequences:,} sequence{'s' * (self.sequences != 1)} of {self.max_model_len:,} at once{most}"
        )


def state_bytes(
    config: ModelConfig, max_model_len: int, max_num_seqs: int, step_tokens: int
) -> int:
    """What the compiled kernels take at most for partial results of attention (csrc/model.cpp, `few`) in a step of step_tokens tokens: a maximum, a sum and an output
    for each (token, head) and chunk of rows, in blocks of 16 of one KV head; STATES at once. Many tokens of one sequence take the expanded form, which has none."""
    kv, width = (
        (1, config.kv_lora_rank) if config.is_mla else (config.n_kv_heads, config.qk_head_dim)
    )
    per = config.num_attention_heads // kv
    if config.is_mla:
        most = max(
            1,
            bisect_left(
                range(1, step_tokens + 1),
                True,
                key=lambda n: cheaper_form(config, n, max_model_len) == "expand",
            ),
        )  # single ones never are
    else:
        most = 48 // per
    tokens = min(step_tokens, max_num_seqs * most)
    blocks = kv * (
        (tokens * per + 15 * min(max_num_seqs, tokens)) // 16 if per % 16 else tokens * per // 16
    )
    chunks = (
        min(math.ceil(max_model_len / 128), 8)
        if max_model_len <= 4096
        else math.ceil(max_model_len / 512)
    )
    one = kv * math.ceil(per / 16) * chunks * 4 * (32 + 16 * width)  # token
    size = min(blocks * chunks * 4 * (32 + 16 * width), max(STATES, one))
    return size + size // 4 + 4096  # as buffers grow


def fit(
    config: ModelConfig,
    weights: int,
    format: str,
    cache_memory: int | None,
    max_model_len: int | None,
    max_num_seqs: int,
    page_size: int,
    available: int | None = None,
    step_tokens: int = 0,
) -> Plan:
    """Size the cache. weights: their bytes; cache_memory: bytes, None for enough for four full contexts but at most 1 GiB (one full context in any case);
    max_model_len: None for the model's limit; available: bytes that all may take, None when nobody knows; step_tokens: of a step on the compiled kernels, 0 for torch ops.
    ValueError, with the numbers and the largest value that would do, when one sequence of max_model_len does not fit the cache, or all together not the memory."""
    limit = config.max_position_embeddings
    if max_model_len is not None and not 1 < max_model_len <= limit:
        raise ValueError(
            f"max_model_len is {max_model_len}; it must be from 2 to the model's max_position_embeddings {limit}"
        )
    length = limit if max_model_len is None else max_model_len
    page = page_size * config.num_hidden_layers * cache_codec.row_bytes(format, config.cache_row)

    def partial(length: int) -> int:
        return state_bytes(config, length, max_num_seqs, step_tokens) if step_tokens else 0

    needed, states = math.ceil(length / page_size) * page, partial(length)
    free = math.inf if available is None else max(0, available - weights - states)  # for the cache
    asked = cache_memory is not None
    if not asked:  # four contexts are a comfort, one is a need
        cache_memory = max(needed, min(4 * needed, DEFAULT_BYTES, free))
    if cache_memory < needed:
        fits = cache_memory // page * page_size
        raise ValueError(
            f"a cache of {human_bytes(cache_memory)} in {format} holds {fits} tokens, less than max_model_len {length}, which needs "
            f"{human_bytes(needed)}; give more cache_memory, a smaller cache format, or max_model_len {max(fits, 2)}"
        )
    pages = cache_memory // page
    if pages * page > free:
        fits = page_size * bisect_right(
            range(1, length // page_size + 1),
            available - weights,
            key=lambda n: n * page + partial(n * page_size),
        )
        if asked and free >= needed:
            cure = f"lower cache_memory to at most {human_bytes(free)}"
        elif fits >= 2:
            cure = f"lower max_model_len to {fits}, or take a smaller cache format (4bit: {cache_codec.row_bytes('4bit', config.cache_row) * config.num_hidden_layers:,} bytes a token)"
        else:
            cure = "free some memory, or take a smaller model"
        attention = f", with {human_bytes(states)} for attention," if states else ""
        raise ValueError(
            f"{human_bytes(weights)} of weights and a cache of {human_bytes(pages * page)} ({pages * page_size:,} tokens in {format}, {page // page_size:,} bytes a token)"
            f"{attention} are more than the {human_bytes(available)} of memory that are available; {cure}"
        )
    expanded = 2 * accounting.expanded_elements(config) if config.is_mla else page // page_size
    return Plan(
        format,
        weights,
        pages * page,
        pages,
        page_size,
        page // page_size,
        expanded,
        length,
        max_num_seqs,
        states,
    )


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take: what the system calls available, or what is left of the limit of its control group if that is less.
    None where neither can be read."""
    found = []
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (
                (root / "sys/fs/cgroup" / name).read_text().strip() for name in (limit, used)
            )
            found += [max(0, int(most) - int(now))]
        except (OSError, ValueError):  # "max" is no number and no limit
            pass
    return min(found, default=None)
