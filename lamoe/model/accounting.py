"""What a model costs, from its config ALONE: parameters, FLOPs, cache bytes, memory. Imports neither torch nor the model.

Closed forms, asserted in the tests against the parameters, the counted products and the allocated cache of the real model.
Letters: D model, H heads, C latent, N nope, R rope, V value, E experts, K experts per token, T new tokens, S attended rows.
A multiply-accumulate is two FLOPs: a product [m, k] x [k, n] is 2 m k n. Bytes are decimal (GB = 1e9).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from lamoe.model.config import ModelConfig

BITS = (16, 8, 6, 4)  # storage widths shown side by side
DTYPE_BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}


# ---- parameters ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Parameters:
    """Parameter counts. The classes add up to `total`; `attention` includes the norms on MLA's latents, `norms` all others."""

    embedding: int
    head: int  # 0 when the embedding is used again (tie_word_embeddings)
    attention: int
    dense_ffn: int
    routed_experts: int
    shared_experts: int
    router: int
    norms: int
    # one of each; 0 when the model has none
    attention_per_layer: int
    dense_ffn_per_layer: int
    moe_ffn_per_layer: int
    routed_expert: int
    routed_active: int  # the part of routed_experts that one token passes through
    head_active: int  # the head's matrix, also when it is the embedding's

    @property
    def total(self) -> int:
        return (
            self.embedding
            + self.head
            + self.attention
            + self.dense_ffn
            + self.routed_experts
            + self.shared_experts
            + self.router
            + self.norms
        )

    @property
    def activated_body(self) -> int:
        """Activated per token without embedding and head."""
        return self.total - self.embedding - self.head - self.routed_experts + self.routed_active

    @property
    def activated(self) -> int:
        """Activated per token with the head: the convention behind the paper's 21B and 2.4B."""
        return self.activated_body + self.head_active

    @property
    def activated_all(self) -> int:
        """Activated per token with head and embedding table (a tied table counts once): DeepSeekMoE-16B's 2.8B."""
        return self.activated_body + self.embedding + self.head


def attention_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The matrices of one attention layer by the paper's name: (outputs, inputs)."""
    d, h = config.hidden_size, config.num_attention_heads
    if not config.is_mla:
        keys = config.n_kv_heads * config.qk_head_dim
        return {
            "wq": (h * config.qk_head_dim, d),
            "wk": (keys, d),
            "wv": (keys, d),
            "wo": (d, h * config.qk_head_dim),
        }
    c, q = config.kv_lora_rank, config.q_lora_rank
    queries = (
        {"wq": (h * config.qk_head_dim, d)}
        if q is None
        else {"wq_a": (q, d), "wq_b": (h * config.qk_head_dim, q)}
    )
    return queries | {
        "wkv_a": (c + config.qk_rope_head_dim, d),
        "wkv_b": (h * (config.qk_nope_head_dim + config.v_head_dim), c),
        "wo": (d, h * config.v_head_dim),
    }


def parameters(config: ModelConfig) -> Parameters:
    """Count every weight of the model that `config` describes, by class."""
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


# ---- FLOPs -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Flops:
    """FLOPs of the matrix products of one forward pass, by where they happen."""

    projections: int  # attention's weight matrices, W^UK and W^UV excepted
    latent: int  # W^UK and W^UV: on every attended latent (expand) or on every new token (absorb); 0 without MLA
    attention: int  # scores and weighted sums over the attended rows
    feed_forward: int  # dense, routed and shared experts, router
    head: int

    @property
    def total(self) -> int:
        return self.projections + self.latent + self.attention + self.feed_forward + self.head


def forward_flops(
    config: ModelConfig,
    tokens: int = 1,
    depth: int = 0,
    form: str | None = None,
    head_tokens: int | None = None,
) -> Flops:
    """FLOPs of one forward pass of `tokens` new tokens of one sequence behind `depth` cached ones.

    Counted: every product with a weight matrix (router and head included) and attention's two products, causally: token t
    attends depth + t + 1 rows. Not counted: embedding lookup, norms, rotary, softmax, activation, routing, residuals.
    form: MLA's "expand" (keys and values of all depth + tokens latents are made anew, for nothing but latents is cached),
    "absorb", or None for the cheaper of the two. head_tokens: positions that need logits; None means all.
    """
    _check_count("tokens", tokens, 1)
    _check_count("depth", depth, 0)
    if form not in (None, "expand", "absorb"):
        raise ValueError(f"form is {form!r}; known: expand, absorb, or None for the cheaper")
    if form is None and config.is_mla:
        both = [forward_flops(config, tokens, depth, f, head_tokens) for f in ("expand", "absorb")]
        return min(both, key=lambda f: f.total)
    layers, h = config.num_hidden_layers, config.num_attention_heads
    pairs = tokens * depth + tokens * (tokens + 1) // 2  # (new token, attended row)
    if not config.is_mla:
        latent, per_pair = 0, config.qk_head_dim + config.value_head_dim
    elif form == "expand":
        latent, per_pair = depth + tokens, config.qk_head_dim + config.v_head_dim
    else:
        latent, per_pair = tokens, 2 * config.kv_lora_rank + config.qk_rope_head_dim
    shapes = attention_shapes(config)
    up = math.prod(shapes.pop("wkv_b", (0, 0)))
    p = parameters(config)
    ffn = p.dense_ffn + p.routed_active + p.shared_experts + p.router
    return Flops(
        projections=2 * layers * tokens * sum(out * inp for out, inp in shapes.values()),
        latent=2 * layers * latent * up,
        attention=2 * layers * h * pairs * per_pair,
        feed_forward=2 * tokens * ffn,
        head=2 * (tokens if head_tokens is None else head_tokens) * p.head_active,
    )


def training_flops(config: ModelConfig, sequence: int) -> float:
    """FLOPs per token of one training step (forward + backward) on sequences of `sequence` tokens, one document each.

    Three times the forward pass in the expanded form: backward makes two products (for the input and for the weight) of every
    forward one. What is counted is what forward_flops counts, attention causally, i.e. (sequence + 1) / 2 rows per token on
    average; recomputation, optimizer and everything elementwise are not. Preset "small" at 512: 84.8 MFLOP. (The shortcut
    6 x activated parameters + attention gives 84.9: it also counts the norms' gains as if they were matrices.)
    """
    return 3 * forward_flops(config, sequence, form="expand").total / sequence


def decode_flops(config: ModelConfig, depth: int, form: str | None = None) -> Flops:
    """FLOPs of generating one token behind `depth` cached ones."""
    return forward_flops(config, 1, depth, form)


def prefill_flops(
    config: ModelConfig, tokens: int, depth: int = 0, form: str | None = None
) -> Flops:
    """FLOPs of reading a whole prompt of `tokens` behind `depth` cached ones; only the last position needs logits."""
    return forward_flops(config, tokens, depth, form, head_tokens=1)


# ---- the cache -------------------------------------------------------------------------------------------------------
def cache_elements(config: ModelConfig) -> int:
    """Cached elements per token, all layers (paper Table 1): (C + R) l under MLA, 2 n_g d_h l otherwise."""
    return config.num_hidden_layers * sum(config.cache_row)


def plain_twin(config: ModelConfig, kv_heads: int) -> ModelConfig:
    """The same model with ordinary attention: `kv_heads` = heads is MHA, 1 is MQA, between them GQA. Of an MLA model the twin's
    heads are v_head_dim wide, the paper's d_h (ValueError if that is odd: nothing for rotary pairs)."""
    mla = (
        {
            "model_type": "deepseek",
            "q_lora_rank": None,
            "kv_lora_rank": None,
            "qk_nope_head_dim": None,
            "qk_rope_head_dim": None,
            "v_head_dim": None,
        }
        if config.is_mla
        else {}
    )
    return config.replace(**mla, head_dim=config.value_head_dim, num_key_value_heads=kv_heads)


def gqa_groups(config: ModelConfig) -> int:
    """Groups of the GQA twin: 8, or the largest number below that really groups the heads (a proper divisor of them)."""
    h = config.num_attention_heads
    return max((g for g in range(1, min(8, h - 1) + 1) if h % g == 0), default=1)


def cache_twins(config: ModelConfig) -> dict[str, int]:
    """Elements per token of MHA / GQA / MQA caches of the same model, 2 n_g d_h l, and of MLA's own keys and values kept expanded."""
    groups = {
        "MHA": config.num_attention_heads,
        f"GQA, {gqa_groups(config)} groups": gqa_groups(config),
        "MQA": 1,
    }
    twins = {
        name: 2 * g * config.value_head_dim * config.num_hidden_layers for name, g in groups.items()
    }
    return twins | ({"expanded K, V": expanded_elements(config)} if config.is_mla else {})


def expanded_elements(config: ModelConfig) -> int:
    """Elements per token when full keys and values of every head are cached, as a program without latent cache does."""
    per_head = config.qk_head_dim + config.value_head_dim
    return (
        config.num_hidden_layers
        * (config.num_attention_heads if config.is_mla else config.n_kv_heads)
        * per_head
    )


def equivalent_groups(config: ModelConfig) -> float:
    """How many GQA groups of d_h-wide heads the cache row equals; 2.25 for the released MLA models."""
    return sum(config.cache_row) / (2 * config.value_head_dim)


def stored_bytes(elements: int, bits: float) -> float:
    """Bytes of `elements` at a mean of `bits` each; count scales and zero points into `bits` (blocks of 32 + a half: 4.5)."""
    _check_bits("bits", bits)
    return elements * bits / 8


def cache_saving(config: ModelConfig, bits: float, other: ModelConfig, other_bits: float) -> float:
    """Share of `other`'s cache that `config` does without, 0 to 1 (negative: it needs more). Paper: 0.9334 for V2 at 6 bit
    beside DeepSeek 67B at 16."""
    return 1 - stored_bytes(cache_elements(config), bits) / stored_bytes(
        cache_elements(other), other_bits
    )


# ---- memory ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MemoryPlan:
    """What fits. Bytes; per-token figures are over all layers and need not be whole."""

    memory_bytes: int
    reserve_bytes: int
    weight_bytes: int
    cache_bytes_per_token: float
    expanded_bytes_per_token: float  # full keys and values at the same width
    cache_tokens: int  # rows that fit beside the weights, all sequences together
    longest_context: int  # of one sequence; never beyond max_position_embeddings
    context: int
    sequences: int  # that fit at `context` tokens each
    expanded_sequences: int  # the same with full keys and values cached


def plan(
    config: ModelConfig,
    weight_bits: float,
    cache_bits: float,
    memory_bytes: int,
    context: int | None = None,
    reserve_bytes: int = 0,
) -> MemoryPlan:
    """What fits in `memory_bytes`, with every parameter at `weight_bits` and every cached element at `cache_bits` on average.

    context: tokens per sequence; None means max_position_embeddings. reserve_bytes: kept free for activations, the program
    and the system, of which nothing else is counted. ValueError when the weights alone do not fit.
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
            f"a context of {context:,} tokens was asked for, but the model's max_position_embeddings is {limit:,}; ask for less"
        )
    n = parameters(config).total
    weights = math.ceil(stored_bytes(n, weight_bits))
    free = memory_bytes - reserve_bytes - weights
    if free < 0:
        fits = 8 * (memory_bytes - reserve_bytes) / n
        fix = (
            f"at most {fits:.2f} bits per weight would fit"
            if fits >= 1
            else "no storage format is that small"
        )
        kept = f" ({human_bytes(reserve_bytes)} of it reserved)" if reserve_bytes else ""
        raise ValueError(
            f"{n:,} parameters at {weight_bits:g} bits are {human_bytes(weights)}, more than the {human_bytes(memory_bytes)} of memory{kept}; {fix}"
        )
    row, expanded = (
        stored_bytes(cache_elements(config), cache_bits),
        stored_bytes(expanded_elements(config), cache_bits),
    )
    tokens = math.floor(free / row)
    return MemoryPlan(
        memory_bytes,
        reserve_bytes,
        weights,
        row,
        expanded,
        tokens,
        min(tokens, limit),
        context,
        tokens // context,
        math.floor(free / expanded) // context,
    )


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of the state of mixed-precision AdamW: bf16 weights and gradients, fp32 master weights and moments."""

    weights: int
    gradients: int
    master: int
    first_moment: int
    second_moment: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.master + self.first_moment + self.second_moment


def training_memory(config: ModelConfig) -> TrainingMemory:
    """2 + 2 + 4 + 4 + 4 bytes per parameter, unsharded; activations are not counted."""
    n = parameters(config).total
    return TrainingMemory(2 * n, 2 * n, 4 * n, 4 * n, 4 * n)


def decode_bytes(
    config: ModelConfig, depth: int, weight_bits: float, cache_bits: float, sequences: int = 1
) -> float:
    """Bytes a decode step must read at least, for `sequences` each behind `depth` tokens: the weights in use once, every cached
    row once. Of a MoE layer's experts an independent, uniform choice touches E (1 - (1 - K/E)^sequences)."""
    _check_count("sequences", sequences, 1)
    _check_count("depth", depth, 0)
    p = parameters(config)
    touched = (
        1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** sequences
        if config.is_moe
        else 0.0
    )
    weights = p.activated - p.routed_active + touched * p.routed_experts
    return stored_bytes(weights, weight_bits) + stored_bytes(
        sequences * depth * cache_elements(config), cache_bits
    )


# ---- the report ------------------------------------------------------------------------------------------------------
def report(
    config: ModelConfig,
    *,
    name: str | None = None,
    sequence: int | None = None,
    context: int | None = None,
    weight_bits: float | None = None,
    cache_bits: float = 6,
    memory_bytes: int | None = None,
    reserve_bytes: int = 0,
) -> dict[str, Any]:
    """Everything above as one JSON-serialisable dict.

    sequence: training length (None: the model's limit, at most 4096). context: tokens a sequence may grow to (None: the model's limit).
    weight_bits: None means the width of torch_dtype. memory_bytes: adds the memory plan; None leaves it out ("plan" is None).
    """
    limit = config.max_position_embeddings
    sequence = min(4096, limit) if sequence is None else sequence
    context = limit if context is None else context
    for what, value in (("sequence", sequence), ("context", context)):
        _check_count(what, value, 1)
        if value > limit:
            raise ValueError(
                f"{what} is {value:,}, but the model's max_position_embeddings is {limit:,}; ask for less"
            )
    weight_bits = DTYPE_BITS[config.torch_dtype] if weight_bits is None else weight_bits
    p, elements = parameters(config), cache_elements(config)
    baseline = ModelConfig.preset("deepseek-67b")
    depths = sorted({0, min(4096, context - 1), context - 1})
    forms = ("expand", "absorb") if config.is_mla else (None,)
    return {
        "name": name or config.model_type,
        "config": config.to_dict(),
        "parameters": {
            "total": p.total,
            "activated_body": p.activated_body,
            "activated": p.activated,
            "activated_all": p.activated_all,
            **dataclasses.asdict(p),
        },
        "flops": {
            "sequence": sequence,
            "training_per_token": training_flops(config, sequence),
            "prefill_per_token": {
                form or "plain": prefill_flops(config, sequence, form=form).total / sequence
                for form in forms
            },
            "decode": [
                {
                    "depth": s,
                    **{form or "plain": decode_flops(config, s, form).total for form in forms},
                }
                for s in depths
            ],
        },
        "cache": {
            "elements_per_token": elements,
            "twins": cache_twins(config),
            "deepseek_67b": cache_elements(baseline),
            "equivalent_groups": equivalent_groups(config),
            "saving_against_67b": {str(b): cache_saving(config, b, baseline, 16) for b in BITS},
        },
        "memory": {
            "weight_bits": weight_bits,
            "cache_bits": cache_bits,
            "context": context,
            "weight_bytes": stored_bytes(p.total, weight_bits),
            "cache_bytes_per_token": stored_bytes(elements, cache_bits),
            "decode_bytes_read": decode_bytes(config, context - 1, weight_bits, cache_bits),
            "training": {
                **dataclasses.asdict(training_memory(config)),
                "total": training_memory(config).total,
            },
        },
        "plan": None
        if memory_bytes is None
        else dataclasses.asdict(
            plan(config, weight_bits, cache_bits, memory_bytes, context, reserve_bytes)
        ),
    }


def render(config: ModelConfig, **options):
    """The report as one rich renderable, made for terminals of about 100 columns. Options are report's."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    r = report(config, **options)

    def table(title: str, *columns: str, note: str = ""):
        t = Table(
            title=title,
            title_justify="left",
            title_style="bold cyan",
            caption=note or None,
            caption_justify="left",
            caption_style="dim",
            box=None,
            padding=(0, 2, 0, 0),
            header_style="dim",
            show_header=any(columns),
        )
        t.add_column("", min_width=32)
        for column in columns:
            t.add_column(column, justify="right", min_width=9)
        return t

    p, memory = r["parameters"], r["memory"]
    head = Text.assemble(
        (r["name"], "bold"),
        f"  {human_count(p['total'])} parameters, {human_count(p['activated'])} activated per token, "
        f"{human_bytes(memory['cache_bytes_per_token'])} of {memory['cache_bits']:g}-bit cache per token",
    )
    shape = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    shape.add_column(style="dim")
    for label, text in _shape_lines(config):
        shape.add_row(label, text)
    parts = [
        head,
        shape,
        _parameter_table(table, config, p),
        _flops_table(table, config, r["flops"]),
        _cache_table(table, config, r),
        _memory_table(table, r),
    ] + ([_plan_table(table, r)] if r["plan"] else [])
    return Group(*(x for part in parts for x in (part, Text())))


def _shape_lines(c: ModelConfig):
    moe, layers = len(c.moe_layers), c.num_hidden_layers
    kinds = f", {layers - moe} dense + {moe} mixture of experts" if moe else ", all dense"
    yield (
        "shape",
        f"{layers} layers{kinds}, {c.hidden_size:,} wide, vocabulary {c.vocab_size:,}{' (head tied)' if c.tie_word_embeddings else ''}",
    )
    if c.is_mla:
        latents = f"latent {c.kv_lora_rank:,}" + (
            f", query latent {c.q_lora_rank:,}" if c.q_lora_rank else ""
        )
        yield (
            "attention",
            f"MLA, {c.num_attention_heads} heads of {c.qk_nope_head_dim} + {c.qk_rope_head_dim} rotary, values {c.v_head_dim}, {latents}",
        )
    else:
        yield "attention", f"{_plain_name(c)}, {c.num_attention_heads} heads of {c.qk_head_dim}"
    if c.is_moe:
        groups = (
            f", from {c.topk_group} of {c.n_group} groups"
            if c.topk_method == "group_limited_greedy"
            else ""
        )
        yield (
            "experts",
            (
                f"top {c.num_experts_per_tok} of {c.n_routed_experts} routed{groups}, + {c.n_shared_experts} shared, "
                f"each {c.moe_intermediate_size:,} wide"
            ),
        )
    if moe < layers:
        yield "dense FFN", f"{c.intermediate_size:,} wide"
    yarn = c.rope_scaling
    yield (
        "context",
        f"{c.max_position_embeddings:,} tokens"
        + (
            f" (YaRN x{yarn.factor:g} from {yarn.original_max_position_embeddings:,})"
            if yarn
            else ""
        ),
    )


def _plain_name(c: ModelConfig) -> str:
    if c.n_kv_heads == c.num_attention_heads:
        return "MHA"
    return "MQA" if c.n_kv_heads == 1 else f"GQA, {c.n_kv_heads} groups"


def _parameter_table(table, c: ModelConfig, p: dict):
    note = f"activated: with the head only; {human_count(p['activated_body'])} without it, {human_count(p['activated_all'])} with embedding too"
    t = table("Parameters", "one layer", "total", "share", "activated", note=note)
    moe = len(c.moe_layers)
    one = {
        "attention": p["attention_per_layer"],
        "dense_ffn": p["dense_ffn_per_layer"],
        "routed_experts": (c.n_routed_experts or 0) * p["routed_expert"],
        "shared_experts": c.n_shared_experts * p["routed_expert"],
        "router": p["router"] // moe if moe else 0,
    }
    for part in (
        "embedding",
        "attention",
        "dense_ffn",
        "routed_experts",
        "shared_experts",
        "router",
        "norms",
        "head",
    ):
        active = {
            "embedding": 0,
            "routed_experts": p["routed_active"],
            "head": p["head_active"],
        }.get(part, p[part])
        if p[part] or active:
            t.add_row(
                part.replace("_", " ").replace("ffn", "FFN"),
                human_count(one[part]) if part in one else "",
                human_count(p[part]),
                f"{p[part] / p['total']:.1%}",
                human_count(active) if active else "-",
            )
    t.add_row("all", "", f"{p['total']:,}", "", human_count(p["activated"]), style="bold")
    return t


def _flops_table(table, c: ModelConfig, f: dict):
    note = (
        "expand makes keys and values of every latent anew, absorb attends over the latents; the cheaper in bold"
        if c.is_mla
        else ""
    )
    t = table(
        "FLOPs per token, matrix products",
        *(("expand", "absorb") if c.is_mla else ("",)),
        note=note,
    )

    def row(name, costs: dict):
        best = min(costs.values())
        t.add_row(
            name,
            *(
                f"[bold]{human_flops(n)}[/]" if n == best and c.is_mla else human_flops(n)
                for n in costs.values()
            ),
        )

    t.add_row(f"training, sequences of {f['sequence']:,}", human_flops(f["training_per_token"]))
    row(f"prefill of {f['sequence']:,}", f["prefill_per_token"])
    for step in f["decode"]:
        row(
            f"decode behind {step['depth']:,}",
            {form: n for form, n in step.items() if form != "depth"},
        )
    return t


def _cache_table(table, c: ModelConfig, r: dict):
    cache, own = r["cache"], "MLA" if c.is_mla else _plain_name(c)
    mine, saving = cache["elements_per_token"], cache["saving_against_67b"]["6"]
    note = f"a row as wide as {cache['equivalent_groups']:.4g} GQA groups; at 6 bit {saving:.1%} less than DeepSeek 67B at 16 bit"
    t = table(
        "Cache per token, all layers", "elements", *(f"{b} bit" for b in BITS), "x ours", note=note
    )

    def row(name, n, style=""):
        t.add_row(
            name,
            f"{n:,}",
            *(human_bytes(stored_bytes(n, b)) for b in BITS),
            f"{n / mine:.2f}",
            style=style,
        )

    row(f"this model ({own})", mine, "bold")
    for name, n in cache["twins"].items():
        if name != own:
            row(
                "its keys and values, expanded"
                if name == "expanded K, V"
                else f"same model as {name}",
                n,
            )
    if c != ModelConfig.preset("deepseek-67b"):
        row("DeepSeek 67B (GQA, 8 groups)", cache["deepseek_67b"])
    return t


def _memory_table(table, r: dict):
    m = r["memory"]
    t = table(
        "Memory",
        *(f"{b} bit" for b in BITS),
        note=f"training state (16 bytes a parameter, no activations): {human_bytes(m['training']['total'])}",
    )
    t.add_row("weights", *(human_bytes(stored_bytes(r["parameters"]["total"], b)) for b in BITS))
    t.add_row(
        f"cache of {m['context']:,} tokens",
        *(
            human_bytes(stored_bytes(r["cache"]["elements_per_token"] * m["context"], b))
            for b in BITS
        ),
    )
    return t


def _plan_table(table, r: dict):
    m, fit = r["memory"], r["plan"]
    reserved = (
        f", {human_bytes(fit['reserve_bytes'])} of it reserved" if fit["reserve_bytes"] else ""
    )
    t = table(f"Plan for {human_bytes(fit['memory_bytes'])}{reserved}", "")
    t.add_row(f"weights at {m['weight_bits']:g} bit", human_bytes(fit["weight_bytes"]))
    t.add_row(f"cache at {m['cache_bits']:g} bit", f"{fit['cache_tokens']:,} tokens fit")
    t.add_row("longest context of one sequence", f"{fit['longest_context']:,} tokens")
    t.add_row(f"sequences of {fit['context']:,} tokens", f"[bold]{fit['sequences']:,}[/] at once")
    if "expanded K, V" in r["cache"]["twins"]:
        t.add_row("with keys and values expanded", f"{fit['expanded_sequences']:,} at once")
    return t


# ---- small things ----------------------------------------------------------------------------------------------------
def human_bytes(n: float) -> str:
    """25920 -> '25.9 kB'."""
    return _human(n, ("B", "kB", "MB", "GB", "TB", "PB"))


def human_count(n: float) -> str:
    """235741434880 -> '235.7 B' (billions, as parameters are counted)."""
    return _human(n, ("", "K", "M", "B", "T")).strip()


def human_flops(n: float) -> str:
    """84.9e6 -> '84.9 MFLOP'."""
    return _human(n, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def _human(n: float, units: tuple[str, ...]) -> str:
    step = 0
    while abs(n) >= 999.5 and step < len(units) - 1:
        n, step = n / 1000, step + 1
    return f"{n:#.4g} {units[step]}" if step else f"{n:g} {units[0]}"


def _check_bits(name: str, bits: float):
    if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not 0 < bits <= 64:
        raise ValueError(f"{name} is {bits!r}; it must be a number above 0 and at most 64")


def _check_count(name: str, value: int, low: int):
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {low}")
