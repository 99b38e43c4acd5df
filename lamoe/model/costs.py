"""What a model costs, as closed formulas of its config: parameters, FLOPs, cache and memory bytes.

Imports neither torch nor the model. The tests compare every formula with the real model: with its
parameters, its counted matrix products and its allocated cache. accounting.py formats the results
as reports.

Shapes use the letters of transformer.py. One multiply-add counts as two FLOPs, so a product
[m, k] x [k, n] has 2 m k n.
Bytes are decimal (1 GB = 1e9 bytes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lamoe.model.config import ModelConfig

DTYPE_BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}


# ---- parameters ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Parameters:
    """Parameter counts by class. The first eight fields add up to `total`.

    `attention` includes the norms on MLA's latents, and `norms` counts all other norms. `head` is 0
    when the embedding serves as the head. `head_active` is the size of the head's matrix in either
    case. `routed_active` is the part of `routed_experts` that one token uses. Counts of one layer
    or one expert are 0 when the model has no such layer or expert.
    """

    embedding: int
    head: int
    attention: int
    dense_ffn: int
    routed_experts: int
    shared_experts: int
    router: int
    norms: int
    attention_per_layer: int
    dense_ffn_per_layer: int
    moe_ffn_per_layer: int
    routed_expert: int
    routed_active: int
    head_active: int

    @property
    def total(self) -> int:
        """Number of all parameters of the model, activated or not."""
        ends = self.embedding + self.head
        ffn = self.dense_ffn + self.routed_experts + self.shared_experts + self.router
        return ends + self.attention + ffn + self.norms

    @property
    def activated_body(self) -> int:
        """Number of parameters that one token uses, without the embedding and the head."""
        return self.total - self.embedding - self.head - self.routed_experts + self.routed_active

    @property
    def activated(self) -> int:
        """Number of parameters that one token uses, with the head but without the embedding.

        The paper counts this way: 21B for V2 and 2.4B for V2-Lite.
        """
        return self.activated_body + self.head_active

    @property
    def activated_all(self) -> int:
        """Number of parameters that one token uses, with both the head and the embedding.

        The DeepSeekMoE paper counts this way: 2.8B for its 16B model. A matrix that serves as both
        counts once.
        """
        return self.activated_body + self.embedding + self.head


def attention_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return {name: (outputs, inputs)}, the shape of each matrix of one attention layer."""
    d, h = config.hidden_size, config.num_attention_heads
    queries = h * config.qk_head_dim
    if not config.is_mla:
        keys = config.n_kv_heads * config.qk_head_dim
        return {"wq": (queries, d), "wk": (keys, d), "wv": (keys, d), "wo": (d, queries)}
    c, q = config.kv_lora_rank, config.q_lora_rank
    query = {"wq": (queries, d)} if q is None else {"wq_a": (q, d), "wq_b": (queries, q)}
    return query | {
        "wkv_a": (c + config.qk_rope_head_dim, d),
        "wkv_b": (h * (config.qk_nope_head_dim + config.v_head_dim), c),
        "wo": (d, h * config.v_head_dim),
    }


def parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of the model that `config` describes, by class."""
    d, layers, moe = config.hidden_size, config.num_hidden_layers, len(config.moe_layers)
    latent_norms = config.kv_lora_rank + (config.q_lora_rank or 0) if config.is_mla else 0
    attention = sum(out * inp for out, inp in attention_shapes(config).values()) + latent_norms
    dense = 3 * d * config.intermediate_size
    expert = 3 * d * (config.moe_intermediate_size or 0)
    experts, router = config.n_routed_experts or 0, d * (config.n_routed_experts or 0)
    table = config.vocab_size * d
    return Parameters(
        embedding=table,
        head=0 if config.tie_word_embeddings else table,
        attention=layers * attention,
        dense_ffn=(layers - moe) * dense,
        routed_experts=moe * experts * expert,
        shared_experts=moe * config.n_shared_experts * expert,
        router=moe * router,
        norms=(2 * layers + 1) * d,
        attention_per_layer=attention,
        dense_ffn_per_layer=dense if layers > moe else 0,
        moe_ffn_per_layer=(experts + config.n_shared_experts) * expert + router,
        routed_expert=expert,
        routed_active=moe * (config.num_experts_per_tok or 0) * expert,
        head_active=table,
    )


# ---- the two forms of MLA ------------------------------------------------------------------------
def latent_products(config: ModelConfig) -> int:
    """Return the multiply-adds of W^UK and W^UV per MLA head and token.

    The expanded form spends this number on every attended latent. The absorbed form spends it on
    every new token only.
    """
    return config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)


def pair_products(config: ModelConfig, form: str | None = None) -> int:
    """Return attention's multiply-adds per head for one pair (query, attended row).

    `form` is MLA's form, "expand" or "absorb". Models without MLA ignore it.
    """
    if config.is_mla and form == "absorb":
        return 2 * config.kv_lora_rank + config.qk_rope_head_dim
    return config.qk_head_dim + config.value_head_dim


def cheaper_form(config: ModelConfig, queries: int, rows: int) -> str:
    """Return the form of MLA, "expand" or "absorb", with fewer multiply-adds.

    All T * S pairs (query, key) count, including the pairs that the causal mask hides.

    Args:
        config: the config of a model with MLA.
        queries: number T of new tokens of one sequence.
        rows: number S of cache rows that they attend to, including the rows of the new tokens.
    """
    up, pairs = latent_products(config), queries * rows
    expand = rows * up + pairs * pair_products(config, "expand")
    absorb = queries * up + pairs * pair_products(config, "absorb")
    return "expand" if expand < absorb else "absorb"


# ---- FLOPs ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Flops:
    """FLOPs of the matrix products of one forward pass, by place.

    projections: products with attention's weight matrices, except W^UK and W^UV.
    latent: products with W^UK and W^UV. 0 without MLA.
    attention: attention scores and weighted sums over the attended rows.
    feed_forward: products in dense layers, routed experts, shared experts and routers.
    head: products that compute the logits.
    """

    projections: int
    latent: int
    attention: int
    feed_forward: int
    head: int

    @property
    def total(self) -> int:
        """FLOPs of the whole forward pass, the sum of all fields."""
        return self.projections + self.latent + self.attention + self.feed_forward + self.head


def forward_flops(
    config: ModelConfig,
    tokens: int = 1,
    depth: int = 0,
    form: str | None = None,
    head_tokens: int | None = None,
) -> Flops:
    """Count the FLOPs of a forward pass over new tokens of one sequence.

    Products with weight matrices and attention's two products count. Attention is causal, so new
    token t (from 0) attends to depth + t + 1 rows. Embedding lookup, norms, rotation, softmax,
    activations, routing and residuals do not count.

    Args:
        config: the config of the model.
        tokens: number of new tokens.
        depth: number of cached tokens before the new ones.
        form: the form of MLA, "expand" or "absorb". The expanded form recomputes the keys and
            values of all depth + tokens latents, because only latents are cached. None means the
            form that the model itself chooses (cheaper_form).
        head_tokens: number of positions that need logits. None means all new tokens.

    Returns:
        FLOPs by place, over all layers and new tokens.

    Raises:
        ValueError: if a count is out of range or the form is unknown.
    """
    _check_count("tokens", tokens, 1)
    _check_count("depth", depth, 0)
    if form not in (None, "expand", "absorb"):
        raise ValueError(f"form is {form!r}; known: expand, absorb, or None for the cheaper")
    layers, h = config.num_hidden_layers, config.num_attention_heads
    pairs = tokens * depth + tokens * (tokens + 1) // 2
    latents = 0
    if config.is_mla:
        form = form or cheaper_form(config, tokens, depth + tokens)
        latents = latent_products(config) * (depth + tokens if form == "expand" else tokens)
    shapes = attention_shapes(config)
    shapes.pop("wkv_b", None)
    p = parameters(config)
    ffn = p.dense_ffn + p.routed_active + p.shared_experts + p.router
    return Flops(
        projections=2 * layers * tokens * sum(out * inp for out, inp in shapes.values()),
        latent=2 * layers * h * latents,
        attention=2 * layers * h * pairs * pair_products(config, form),
        feed_forward=2 * tokens * ffn,
        head=2 * (tokens if head_tokens is None else head_tokens) * p.head_active,
    )


def training_flops(config: ModelConfig, sequence: int) -> float:
    """Count the FLOPs per token of one training step on sequences of one document each.

    The count is three times that of the forward pass in the expanded form, because backward
    computes two products for every product of the forward pass. Recomputation, the optimizer and
    the operations that forward_flops leaves out do not count.

    Args:
        config: the config of the model.
        sequence: number of tokens per sequence.
    """
    return 3 * forward_flops(config, sequence, form="expand").total / sequence


def decode_flops(config: ModelConfig, depth: int, form: str | None = None) -> Flops:
    """Count the FLOPs of one new token with `depth` cached tokens."""
    return forward_flops(config, 1, depth, form)


def prefill_flops(
    config: ModelConfig, tokens: int, depth: int = 0, form: str | None = None
) -> Flops:
    """Count the FLOPs of `tokens` prompt tokens that follow `depth` cached tokens.

    Only the last position computes logits.
    """
    return forward_flops(config, tokens, depth, form, head_tokens=1)


# ---- cache ---------------------------------------------------------------------------------------
def cache_elements(config: ModelConfig) -> int:
    """Return the number of cached elements per token, summed over all layers.

    Source: paper Table 1. With l layers this is (C + R) l under MLA, and 2 n_g d_h l for n_g
    key / value heads of width d_h otherwise.
    """
    return config.num_hidden_layers * sum(config.cache_row)


def gqa_groups(config: ModelConfig) -> int:
    """Return the number of groups of the GQA model that MLA is compared with.

    This is the largest divisor of the number of heads that is at most 8.
    """
    h = config.num_attention_heads
    return max((g for g in range(1, min(8, h - 1) + 1) if h % g == 0), default=1)


def cache_twins(config: ModelConfig) -> dict[str, int]:
    """Return {name: cached elements per token} of the same model with other kinds of attention.

    MHA, GQA and MQA get key and value heads as wide as the model's value head. For MLA, the entry
    "expanded K, V" counts the model's own keys and values, cached in place of latents.
    """
    groups = {
        "MHA": config.num_attention_heads,
        f"GQA, {gqa_groups(config)} groups": gqa_groups(config),
        "MQA": 1,
    }
    per_group = 2 * config.value_head_dim * config.num_hidden_layers
    twins = {name: g * per_group for name, g in groups.items()}
    if config.is_mla:
        twins["expanded K, V"] = expanded_elements(config)
    return twins


def expanded_elements(config: ModelConfig) -> int:
    """Return the cached elements per token if the keys and values of all heads were cached."""
    heads = config.num_attention_heads if config.is_mla else config.n_kv_heads
    return config.num_hidden_layers * heads * (config.qk_head_dim + config.value_head_dim)


def equivalent_groups(config: ModelConfig) -> float:
    """Return the number of GQA groups whose cache row is as wide as the model's.

    It is 2.25 for the released models.

    Source: paper Table 1.
    """
    return sum(config.cache_row) / (2 * config.value_head_dim)


def stored_bytes(elements: float, bits: float) -> float:
    """Return the bytes that `elements` elements take at a mean of `bits` bits each.

    `bits` includes group scales and zero points. For example, 4-bit codes in groups of 32 with one
    16-bit scale per group take 4.5 bits each.
    """
    _check_bits("bits", bits)
    return elements * bits / 8


def cache_saving(config: ModelConfig, bits: float, other: ModelConfig, other_bits: float) -> float:
    """Return how much smaller the cache of `config` is, as a fraction of the cache of `other`.

    The result is negative if the cache of `config` is larger. `bits` and `other_bits` are the mean
    bits per cached element.

    Source: the paper's 93.3 % compares V2 at 6 bits with DeepSeek 67B at 16 bits.
    """
    own = stored_bytes(cache_elements(config), bits)
    return 1 - own / stored_bytes(cache_elements(other), other_bits)


# ---- memory --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MemoryPlan:
    """The result of `plan`. Bytes per token cover all layers and may be fractional.

    expanded_*: the same numbers if the cache held the full keys and values of all heads, at the
        same bits per element.
    cache_tokens: number of tokens, over all sequences, whose cache fits beside the weights.
    longest_context: number of tokens of one sequence that fit, at most max_position_embeddings.
    sequences: number of sequences of `context` tokens that fit at once.
    """

    memory_bytes: int
    reserve_bytes: int
    weight_bytes: int
    cache_bytes_per_token: float
    expanded_bytes_per_token: float
    cache_tokens: int
    longest_context: int
    context: int
    sequences: int
    expanded_sequences: int


def plan(
    config: ModelConfig,
    weight_bits: float,
    cache_bits: float,
    memory_bytes: int,
    context: int | None = None,
    reserve_bytes: int = 0,
) -> MemoryPlan:
    """Compute how many cached tokens and sequences fit beside the weights.

    Args:
        config: the config of the model.
        weight_bits: mean bits per parameter, scales included.
        cache_bits: mean bits per cached element, scales included.
        memory_bytes: total memory, for weights, cache and reserve together.
        context: number of tokens per sequence. None means max_position_embeddings.
        reserve_bytes: memory to keep free for activations, the program and the system.

    Raises:
        ValueError: if the weights alone do not fit, or a number is out of range.
    """
    _check_bits("weight_bits", weight_bits)
    _check_bits("cache_bits", cache_bits)
    limit = config.max_position_embeddings
    context = limit if context is None else context
    _check_count("context", context, 1)
    _check_count("reserve_bytes", reserve_bytes, 0)
    _check_count("memory_bytes", memory_bytes, 1)
    if context > limit:
        raise ValueError(
            f"context is {context:,} tokens, but the model's max_position_embeddings is "
            f"{limit:,}; choose a smaller context"
        )
    weights = math.ceil(stored_bytes(parameters(config).total, weight_bits))
    free = memory_bytes - reserve_bytes - weights
    if free < 0:
        _refuse_memory(config, weight_bits, weights, memory_bytes, reserve_bytes)
    row = stored_bytes(cache_elements(config), cache_bits)
    expanded = stored_bytes(expanded_elements(config), cache_bits)
    tokens = math.floor(free / row)
    return MemoryPlan(
        memory_bytes=memory_bytes,
        reserve_bytes=reserve_bytes,
        weight_bytes=weights,
        cache_bytes_per_token=row,
        expanded_bytes_per_token=expanded,
        cache_tokens=tokens,
        longest_context=min(tokens, limit),
        context=context,
        sequences=tokens // context,
        expanded_sequences=math.floor(free / expanded) // context,
    )


def _refuse_memory(
    config: ModelConfig, weight_bits: float, weights: int, memory_bytes: int, reserve_bytes: int
) -> None:
    n = parameters(config).total
    fits = 8 * (memory_bytes - reserve_bytes) / n
    fix = "no storage format is that small"
    if fits >= 1:
        fix = f"at most {fits:.2f} bits per weight would fit"
    kept = f" ({human_bytes(reserve_bytes)} of it reserved)" if reserve_bytes else ""
    raise ValueError(
        f"{n:,} parameters at {weight_bits:g} bits are {human_bytes(weights)}, more than the "
        f"{human_bytes(memory_bytes)} of memory{kept}; {fix}"
    )


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of the state of mixed-precision AdamW, unsharded and without activations.

    Weights and gradients are bfloat16; master weights and both moments are float32.
    """

    weights: int
    gradients: int
    master: int
    first_moment: int
    second_moment: int

    @property
    def total(self) -> int:
        """Bytes of the whole training state, which is 16 per parameter."""
        return self.weights + self.gradients + self.master + self.first_moment + self.second_moment


def training_memory(config: ModelConfig) -> TrainingMemory:
    """Return the bytes of the training state of the model that `config` describes."""
    n = parameters(config).total
    return TrainingMemory(2 * n, 2 * n, 4 * n, 4 * n, 4 * n)


def decode_bytes(
    config: ModelConfig, depth: int, weight_bits: float, cache_bits: float, sequences: int = 1
) -> float:
    """Return a lower bound on the bytes that one decode step reads.

    The step reads every weight that it uses and every cached row once. Tokens are assumed to choose
    experts independently and uniformly. Then `sequences` tokens use on average
    E (1 - (1 - K / E)^sequences) experts of each MoE layer.

    Args:
        config: the config of the model.
        depth: number of cached tokens per sequence.
        weight_bits: mean bits per parameter, scales included.
        cache_bits: mean bits per cached element, scales included.
        sequences: number of sequences in the batch, each with one new token.
    """
    _check_count("sequences", sequences, 1)
    _check_count("depth", depth, 0)
    p, used = parameters(config), 0.0
    if config.is_moe:
        used = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** sequences
    weights = p.activated - p.routed_active + used * p.routed_experts
    rows = sequences * depth * cache_elements(config)
    return stored_bytes(weights, weight_bits) + stored_bytes(rows, cache_bits)


# ---- numbers for people --------------------------------------------------------------------------
def human_bytes(n: float) -> str:
    """Format bytes: 25920 -> '25.92 kB'."""
    return _human(n, ("B", "kB", "MB", "GB", "TB", "PB"))


def human_count(n: float) -> str:
    """Format a count with B for billions, as parameters are counted: 235741434880 -> '235.7 B'."""
    return _human(n, ("", "K", "M", "B", "T")).strip()


def human_flops(n: float) -> str:
    """Format FLOPs: 84.9e6 -> '84.90 MFLOP'."""
    return _human(n, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def _human(n: float, units: tuple[str, ...]) -> str:
    step = 0
    while abs(n) >= 999.5 and step < len(units) - 1:
        n, step = n / 1000, step + 1
    return f"{n:#.4g} {units[step]}" if step else f"{n:g} {units[0]}"


def _check_bits(name: str, bits: float) -> None:
    if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not 0 < bits <= 64:
        raise ValueError(f"{name} is {bits!r}; it must be a number above 0 and at most 64")


def _check_count(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {low}")
