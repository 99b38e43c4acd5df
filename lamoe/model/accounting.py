"""Reports of what a model costs: one JSON-serialisable dict, or tables for a terminal.

The formulas are in costs.py. This module exports them too, so users need `lamoe.accounting` only.
Everything is computed from the config. Neither torch nor the model is imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from lamoe.model.config import ModelConfig
from lamoe.model.costs import (
    DTYPE_BITS,
    Flops,
    MemoryPlan,
    Parameters,
    TrainingMemory,
    attention_shapes,
    cache_elements,
    cache_saving,
    cache_twins,
    cheaper_form,
    decode_bytes,
    decode_flops,
    equivalent_groups,
    expanded_elements,
    forward_flops,
    gqa_groups,
    human_bytes,
    human_count,
    human_flops,
    parameters,
    plan,
    prefill_flops,
    stored_bytes,
    training_flops,
    training_memory,
)

__all__ = [
    "BITS",
    "DTYPE_BITS",
    "Flops",
    "MemoryPlan",
    "Parameters",
    "TrainingMemory",
    "attention_shapes",
    "cache_elements",
    "cache_saving",
    "cache_twins",
    "cheaper_form",
    "decode_bytes",
    "decode_flops",
    "equivalent_groups",
    "expanded_elements",
    "forward_flops",
    "gqa_groups",
    "human_bytes",
    "human_count",
    "human_flops",
    "parameters",
    "plan",
    "prefill_flops",
    "render",
    "report",
    "stored_bytes",
    "training_flops",
    "training_memory",
]

BITS = (16, 8, 6, 4)  # storage widths that the tables show side by side


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
    """Collect everything that costs.py computes about one model.

    Args:
        config: the config of the model.
        name: the model's name in the report. None means the model_type.
        sequence: number of tokens per training sequence and per prompt. None means 4096, or
            max_position_embeddings if that is less.
        context: number of tokens that a sequence may grow to. None means max_position_embeddings.
        weight_bits: mean bits per parameter. None means the width of torch_dtype.
        cache_bits: mean bits per cached element.
        memory_bytes: memory to plan for. None makes no plan, and "plan" is None in the result.
        reserve_bytes: memory that the plan keeps free.

    Returns:
        A dict that json.dumps accepts: name, config, parameters, flops, cache, memory, plan.

    Raises:
        ValueError: if a length exceeds max_position_embeddings, or the weights do not fit.
    """
    limit = config.max_position_embeddings
    sequence = min(4096, limit) if sequence is None else sequence
    context = limit if context is None else context
    for what, value in (("sequence", sequence), ("context", context)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{what} is {value!r}; it must be a whole number of at least 1")
        if value > limit:
            raise ValueError(
                f"{what} is {value:,}, but the model's max_position_embeddings is {limit:,}; "
                "ask for less"
            )
    weight_bits = DTYPE_BITS[config.torch_dtype] if weight_bits is None else weight_bits
    fit = None
    if memory_bytes is not None:
        fit = plan(config, weight_bits, cache_bits, memory_bytes, context, reserve_bytes)
    return {
        "name": name or config.model_type,
        "config": config.to_dict(),
        "parameters": _parameters(config),
        "flops": _flops(config, sequence, context),
        "cache": _cache(config),
        "memory": _memory(config, context, weight_bits, cache_bits),
        "plan": None if fit is None else dataclasses.asdict(fit),
    }


def _parameters(config: ModelConfig) -> dict[str, int]:
    p = parameters(config)
    sums = ("total", "activated_body", "activated", "activated_all")
    return {name: getattr(p, name) for name in sums} | dataclasses.asdict(p)


def _flops(config: ModelConfig, sequence: int, context: int) -> dict[str, Any]:
    forms: dict[str, str | None] = {"plain": None}
    if config.is_mla:
        forms = {"expand": "expand", "absorb": "absorb"}
    depths = sorted({0, min(4096, context - 1), context - 1})

    def prefill(form: str | None) -> float:
        return prefill_flops(config, sequence, form=form).total / sequence

    return {
        "sequence": sequence,
        "training_per_token": training_flops(config, sequence),
        "prefill_per_token": {name: prefill(form) for name, form in forms.items()},
        "decode": [
            {"depth": depth}
            | {name: decode_flops(config, depth, form).total for name, form in forms.items()}
            for depth in depths
        ],
    }


def _cache(config: ModelConfig) -> dict[str, Any]:
    baseline = ModelConfig.preset("deepseek-67b")
    return {
        "elements_per_token": cache_elements(config),
        "twins": cache_twins(config),
        "deepseek_67b": cache_elements(baseline),
        "equivalent_groups": equivalent_groups(config),
        "saving_against_67b": {str(b): cache_saving(config, b, baseline, 16) for b in BITS},
    }


def _memory(
    config: ModelConfig, context: int, weight_bits: float, cache_bits: float
) -> dict[str, Any]:
    training = training_memory(config)
    return {
        "weight_bits": weight_bits,
        "cache_bits": cache_bits,
        "context": context,
        "weight_bytes": stored_bytes(parameters(config).total, weight_bits),
        "cache_bytes_per_token": stored_bytes(cache_elements(config), cache_bits),
        "decode_bytes_read": decode_bytes(config, context - 1, weight_bits, cache_bits),
        "training": {**dataclasses.asdict(training), "total": training.total},
    }


# ---- the report as tables ------------------------------------------------------------------------
def render(config: ModelConfig, **options):
    """Format the report as one rich renderable for terminals of about 100 columns.

    Args:
        config: the config of the model.
        options: keyword arguments of `report`.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    r = report(config, **options)
    p, memory = r["parameters"], r["memory"]
    head = Text.assemble(
        (r["name"], "bold"),
        f"  {human_count(p['total'])} parameters, {human_count(p['activated'])} activated per "
        f"token, {human_bytes(memory['cache_bytes_per_token'])} of {memory['cache_bits']:g}-bit "
        "cache per token",
    )
    shape = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    shape.add_column(style="dim")
    for label, text in _shape_lines(config):
        shape.add_row(label, text)
    parts = [
        head,
        shape,
        _parameter_table(config, p),
        _flops_table(config, r["flops"]),
        _cache_table(config, r["cache"]),
        _memory_table(r),
    ]
    if r["plan"]:
        parts.append(_plan_table(r))
    return Group(*(x for part in parts for x in (part, Text())))


def _table(title: str, *columns: str, note: str = ""):
    from rich.table import Table

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


def _shape_lines(c: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield (label, text) of the lines that describe the architecture."""
    moe, layers = len(c.moe_layers), c.num_hidden_layers
    kinds = f"{layers - moe} dense + {moe} mixture of experts" if moe else "all dense"
    tied = " (head tied)" if c.tie_word_embeddings else ""
    yield (
        "shape",
        f"{layers} layers, {kinds}, {c.hidden_size:,} wide, vocabulary {c.vocab_size:,}{tied}",
    )
    yield "attention", _attention_line(c)
    if c.is_moe:
        limited = c.topk_method == "group_limited_greedy"
        groups = f", from {c.topk_group} of {c.n_group} groups" if limited else ""
        yield (
            "experts",
            f"top {c.num_experts_per_tok} of {c.n_routed_experts} routed{groups}, "
            f"+ {c.n_shared_experts} shared, each {c.moe_intermediate_size:,} wide",
        )
    if moe < layers:
        yield "dense FFN", f"{c.intermediate_size:,} wide"
    context, yarn = f"{c.max_position_embeddings:,} tokens", c.rope_scaling
    if yarn is not None:
        context += f" (YaRN x{yarn.factor:g} from {yarn.original_max_position_embeddings:,})"
    yield "context", context


def _attention_line(c: ModelConfig) -> str:
    if not c.is_mla:
        return f"{_attention_kind(c)}, {c.num_attention_heads} heads of {c.qk_head_dim}"
    query = f", query latent {c.q_lora_rank:,}" if c.q_lora_rank else ""
    return (
        f"MLA, {c.num_attention_heads} heads of {c.qk_nope_head_dim} + {c.qk_rope_head_dim} "
        f"rotary, values {c.v_head_dim}, latent {c.kv_lora_rank:,}{query}"
    )


def _attention_kind(c: ModelConfig) -> str:
    if c.is_mla:
        return "MLA"
    if c.n_kv_heads == c.num_attention_heads:
        return "MHA"
    return "MQA" if c.n_kv_heads == 1 else f"GQA, {c.n_kv_heads} groups"


def _parameter_table(c: ModelConfig, p: dict):
    note = (
        f"activated: with the head only; {human_count(p['activated_body'])} without it, "
        f"{human_count(p['activated_all'])} with embedding too"
    )
    t = _table("Parameters", "one layer", "total", "share", "activated", note=note)
    moe = len(c.moe_layers)
    one_layer = {
        "attention": p["attention_per_layer"],
        "dense_ffn": p["dense_ffn_per_layer"],
        "routed_experts": (c.n_routed_experts or 0) * p["routed_expert"],
        "shared_experts": c.n_shared_experts * p["routed_expert"],
        "router": p["router"] // moe if moe else 0,
    }
    ffn = ("dense_ffn", "routed_experts", "shared_experts", "router")
    parts = ("embedding", "attention", *ffn, "norms", "head")
    partly_active = {
        "embedding": 0,
        "routed_experts": p["routed_active"],
        "head": p["head_active"],
    }
    for part in parts:
        active = partly_active.get(part, p[part])
        if p[part] or active:
            t.add_row(
                part.replace("_", " ").replace("ffn", "FFN"),
                human_count(one_layer[part]) if part in one_layer else "",
                human_count(p[part]),
                f"{p[part] / p['total']:.1%}",
                human_count(active) if active else "-",
            )
    t.add_row("all", "", f"{p['total']:,}", "", human_count(p["activated"]), style="bold")
    return t


def _flops_table(c: ModelConfig, f: dict):
    columns: tuple[str, ...] = ("",)
    note = ""
    if c.is_mla:
        columns = ("expand", "absorb")
        note = (
            "expand recomputes the keys and values of all latents, absorb attends over the "
            "latents; bold: cheaper"
        )
    t = _table("FLOPs per token, matrix products", *columns, note=note)

    def add(label: str, costs: dict[str, float]) -> None:
        bold = min(costs.values()) if c.is_mla else None
        cells = [(human_flops(n), n == bold) for n in costs.values()]
        t.add_row(label, *(f"[bold]{text}[/]" if best else text for text, best in cells))

    t.add_row(f"training, sequences of {f['sequence']:,}", human_flops(f["training_per_token"]))
    add(f"prefill of {f['sequence']:,}", f["prefill_per_token"])
    for step in f["decode"]:
        costs = {form: n for form, n in step.items() if form != "depth"}
        add(f"decode, {step['depth']:,} cached tokens", costs)
    return t


def _cache_table(c: ModelConfig, cache: dict):
    kind, own = _attention_kind(c), cache["elements_per_token"]
    note = (
        f"a row as wide as {cache['equivalent_groups']:.4g} GQA groups; at 6 bit "
        f"{cache['saving_against_67b']['6']:.1%} less than DeepSeek 67B at 16 bit"
    )
    widths = [f"{b} bit" for b in BITS]
    t = _table("Cache per token, all layers", "elements", *widths, "x ours", note=note)

    def add(label: str, n: int, style: str = "") -> None:
        sizes = [human_bytes(stored_bytes(n, b)) for b in BITS]
        t.add_row(label, f"{n:,}", *sizes, f"{n / own:.2f}", style=style)

    add(f"this model ({kind})", own, "bold")
    for name, n in cache["twins"].items():
        if name == "expanded K, V":
            add("its keys and values, expanded", n)
        elif name != kind:
            add(f"same model as {name}", n)
    if c != ModelConfig.preset("deepseek-67b"):
        add("DeepSeek 67B (GQA, 8 groups)", cache["deepseek_67b"])
    return t


def _memory_table(r: dict):
    m = r["memory"]
    training = human_bytes(m["training"]["total"])
    note = f"training state (16 bytes a parameter, no activations): {training}"
    t = _table("Memory", *(f"{b} bit" for b in BITS), note=note)

    def add(label: str, elements: int) -> None:
        t.add_row(label, *(human_bytes(stored_bytes(elements, b)) for b in BITS))

    add("weights", r["parameters"]["total"])
    add(f"cache of {m['context']:,} tokens", r["cache"]["elements_per_token"] * m["context"])
    return t


def _plan_table(r: dict):
    m, fit = r["memory"], r["plan"]
    kept = f", {human_bytes(fit['reserve_bytes'])} of it reserved" if fit["reserve_bytes"] else ""
    t = _table(f"Plan for {human_bytes(fit['memory_bytes'])}{kept}", "")
    t.add_row(f"weights at {m['weight_bits']:g} bit", human_bytes(fit["weight_bytes"]))
    t.add_row(f"cache at {m['cache_bits']:g} bit", f"{fit['cache_tokens']:,} tokens fit")
    t.add_row("longest context of one sequence", f"{fit['longest_context']:,} tokens")
    t.add_row(f"sequences of {fit['context']:,} tokens", f"[bold]{fit['sequences']:,}[/] at once")
    if "expanded K, V" in r["cache"]["twins"]:
        t.add_row("with keys and values expanded", f"{fit['expanded_sequences']:,} at once")
    return t
