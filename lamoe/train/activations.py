"""Bytes of the tensors of one forward and backward pass, op by op, from the config alone.

memory_plan.py adds them up. The terms are those of kernels/fused.py and kernels/native.py, whose
buffers outside torch are in `buffers`. Where an op keeps or allocates other tensors, its terms
change here, and nothing else. tests/train/test_memory_plan.py compares the sums with the bytes that
torch allocates.

Letters are those of transformer.py, with N = B T rows. e is the size of an element in bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lamoe.kernels import fused
from lamoe.model.config import ModelConfig
from lamoe.model.costs import attention_shapes, parameters

F32, INT32, INT64 = 4, 4, 8  # bytes of an element
_HUGE_PAGE = 2 << 20  # bytes
Terms = dict[str, float]  # {tensor: bytes}


@dataclass(frozen=True)
class MicroBatch:
    """The shape of one micro-batch.

    sequences: B.
    tokens: T.
    element: bytes of an element of the activations, 2 or 4.
    drops: whether the router may drop tokens (balance.capacity_factor above 0).
    native: whether the compiled ops run.
    """

    sequences: int
    tokens: int
    element: int
    drops: bool = True
    native: bool = False

    @property
    def rows(self) -> int:
        return self.sequences * self.tokens


@dataclass(frozen=True)
class Stage:
    """Bytes of one part of the model in one forward and backward pass.

    saved: tensors that the forward pass keeps for the backward pass.
    forward: temporary tensors of the forward pass, at most, beside `saved`.
    backward: temporary tensors of the backward pass, at most, beside `saved` and `gradients`.
    gradients: gradients of the weights.
    pinned: the part of `saved` that recomputation does not free, apart from the block's input.
    """

    saved: Terms
    forward: float
    backward: float
    gradients: float
    pinned: float = 0.0

    @property
    def saved_bytes(self) -> float:
        return sum(self.saved.values())


def attention(config: ModelConfig, batch: MicroBatch) -> Stage:
    """Return the bytes of a block's first half: norm, attention, residual."""
    n, e, d, h = batch.rows, batch.element, config.hidden_size, config.num_attention_heads
    key, value = config.qk_head_dim, config.value_head_dim
    saved: Terms = {"block input": n * d * e, **_norm(n, d, e)}
    if config.is_mla:
        c, r, nope = config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim
        if config.q_lora_rank:
            saved["query latent"] = n * (2 * config.q_lora_rank * e + F32)
        saved["latent"] = n * ((2 * c + r) * e + F32)
        # Queries before and after their concatenation, rotated parts, keys and values side by side
        projections = n * h * e * (2 * key + r + nope + value)
    else:
        g = config.n_kv_heads
        repeated = 2 * h if g < h else 0  # keys and values, repeated for each query head
        projections = n * key * e * (2 * h + 3 * g + repeated)
    saved["attention output"] = n * h * e * value
    if batch.native:  # reads the outputs of the projections in place
        inputs = h * (key + config.qk_nope_head_dim + value) if config.is_mla else 0
        inputs = n * e * (inputs or key * (h + 2 * config.n_kv_heads))
        saved["queries, keys, values"] = inputs
        saved["log-sum-exp and spans of documents"] = n * (h + 2) * F32
        return Stage(
            saved,
            forward=n * d * e,
            backward=n * d * e + max(inputs + n * h * e * value, _norm_backward(d, batch)),
            gradients=parameters(config).attention_per_layer * e,
        )
    saved["queries, keys, values"] = n * h * e * (2 * key + value)
    b, t = batch.sequences, batch.tokens
    if b * h * t * t * e <= fused._KEEP_BYTES:
        pairs = sum((end - first) * visible for first, end, visible in fused._blocks(t, t))
        saved["attention probabilities"] = b * h * pairs * e
    block = b * h * min(fused._BLOCK_ROWS, t) * t * e  # probabilities of one block of queries
    key_sums = n * h * (key + value)  # elements of the gradients of keys and values
    backward = n * h * e * (2 * value + key) + key_sums * F32 + max(3 * block, key_sums * e)
    return Stage(
        saved,
        forward=projections + 2 * block + n * d * e,
        backward=n * d * e + max(backward, _norm_backward(d, batch)),
        gradients=parameters(config).attention_per_layer * e,
    )


def dense_feed_forward(config: ModelConfig, batch: MicroBatch) -> Stage:
    """Return the bytes of the second half of a dense block: norm, SwiGLU layer, residual."""
    n, e, d, width = batch.rows, batch.element, config.hidden_size, config.intermediate_size
    return Stage(
        {"attention residual": n * d * e, **_norm(n, d, e), **_swiglu(n, width, e)},
        forward=n * e * (width + d),
        backward=n * d * e + max(_swiglu_backward(width, batch), _norm_backward(d, batch)),
        gradients=3 * d * width * e,
    )


def moe_feed_forward(config: ModelConfig, batch: MicroBatch) -> Stage:
    """Return the bytes of the second half of an MoE block: norm, router, experts, residual."""
    n, e, d = batch.rows, batch.element, config.hidden_size
    experts, k = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    width = config.moe_intermediate_size or 0
    shared = _swiglu(n, config.n_shared_experts * width, e)
    shared_work = _swiglu_backward(config.n_shared_experts * width, batch)
    rows, order, pinned = _expert_rows(config, batch)
    router = n * experts * F32 + n * k * (INT64 + F32 + batch.drops * (F32 + 1))
    if e != F32 and not batch.native:  # the router reads float32 copies
        router += (n + experts) * d * F32
    weights = parameters(config).moe_ffn_per_layer * e
    forward, backward = n * d * e, n * d * e
    if not batch.native:
        forward += rows * (d + 2 * width) * e
        # The float32 sums for the router weights come before the gradients of the experts' weights.
        sums = rows * width * (2 * e + 3 * F32) - experts * parameters(config).routed_expert * e
        backward += rows * d * e + max(sums, 7 * rows * width * e)
    return Stage(
        {
            "attention residual": n * d * e,
            **_norm(n, d, e),
            "router": router,
            "order of the experts' rows": order,
            "experts' gate and up": 2 * rows * width * e,
            **{f"shared experts' {name}": size for name, size in shared.items()},
        },
        forward=forward,
        backward=n * d * e
        # The shared experts come first, and free what they saved.
        + max(backward - sum(shared.values()), shared_work, _norm_backward(d, batch)),
        gradients=weights,
        pinned=pinned,
    )


def _expert_rows(config: ModelConfig, batch: MicroBatch) -> tuple[int, int, int]:
    """Return (rows of all experts, bytes of their order, bytes of it that stay when recomputed)."""
    experts, k = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    rows = assigned = batch.rows * k
    ids = assigned * INT64  # the experts of the first run, which the second one uses
    if batch.native:
        return rows, (experts + 1 + 2 * assigned) * INT32, ids
    if rows >= fused._PAD * experts:
        rows += experts * fused._PAD // 2  # mean padding of an expert
    order = rows * (2 * INT64 + 1) + assigned * (INT64 + batch.drops)
    return rows, order, order + ids


def embedding(config: ModelConfig, batch: MicroBatch) -> Stage:
    """Return the bytes of the embedding. The first block counts its output."""
    row_bytes = batch.rows * config.hidden_size * batch.element
    table = config.vocab_size * config.hidden_size * batch.element
    if config.tie_word_embeddings:  # a second gradient, added to that of the head
        return Stage({}, row_bytes, row_bytes + table, 0)
    return Stage({}, row_bytes, row_bytes, table)


def final_norm(config: ModelConfig, batch: MicroBatch) -> Stage:
    """Return the bytes of the last norm. The loss counts its output."""
    n, e, d = batch.rows, batch.element, config.hidden_size
    saved: Terms = {"last block output": n * d * e, "norm statistics": n * F32}
    return Stage(saved, n * d * (F32 + e), _norm_backward(d, batch), 0)


def loss(config: ModelConfig, batch: MicroBatch) -> Stage:
    """Return the bytes of head and loss, which compute their gradients in the forward pass."""
    n, e, d, v = batch.rows, batch.element, config.hidden_size, config.vocab_size
    table = v * d * e
    # Later in a chunk: logits, rounded probabilities, and their product with the states
    chunk = max(loss_chunk(config, batch), 2 * min(fused._LOSS_ROWS, n) * v * e + table)
    saved: Terms = {"gradient of the last states": n * d * e, "gradient of the head": table}
    if batch.native:
        return Stage(saved, forward=n * d * e, backward=n * d * e, gradients=table)
    return Stage(
        saved,
        # The gradient of the head is a float32 sum first. It is rounded after the last chunk.
        forward=n * d * e + v * d * F32 + max(0, chunk - table),
        backward=n * d * e,
        gradients=table,
    )


def loss_chunk(config: ModelConfig, batch: MicroBatch) -> float:
    """Return the bytes of the logits that exist at once. They do not grow with the batch.

    A chunk of rows exists as logits, as float32 probabilities, and rounded for the products. The
    compiled op computes all of it in place.
    """
    rows = min(fused._LOSS_ROWS, batch.rows)
    if batch.native:
        return rows * config.vocab_size * batch.element
    return rows * config.vocab_size * (F32 + 2 * batch.element)


def buffers(config: ModelConfig, batch: MicroBatch) -> float:
    """Return the bytes that the compiled ops allocate outside torch and keep (csrc/train).

    Ops share the buffers, so each has the size of the largest use. They are allocated with an
    eighth to spare, large ones in huge pages.
    """
    if not batch.native:
        return 0.0
    n, e, d, v = batch.rows, batch.element, config.hidden_size, config.vocab_size
    width = config.moe_intermediate_size or 0
    experts, assigned = config.n_routed_experts or 0, n * (config.num_experts_per_tok or 0)
    matrices = [*attention_shapes(config).values(), (d, config.intermediate_size)]
    matrices += [(2 * config.intermediate_size, d), (2 * config.n_shared_experts * width, d)]
    packed_weights = max(*(out * inp for out, inp in matrices), 3 * experts * d * width)
    packed_inputs = n * max(inp for _, inp in matrices)
    pieces = assigned // 1536  # of experts that several threads share (kItemRows in experts.cpp)
    sizes = (
        max(packed_weights, packed_inputs) * e,
        max(v * d, assigned * d) * e,  # the packed head; the outputs of all experts
        max(v * d, 3 * width * d * pieces) * F32,  # sums of weight gradients
        fused._LOSS_ROWS * v * e,  # logits of a chunk
        torch.get_num_threads() * (e << 19),  # scratch of each thread, about
    )
    spare = (math.ceil(size * 9 / 8) for size in sizes)
    return float(sum(-(-s // _HUGE_PAGE) * _HUGE_PAGE if s >= _HUGE_PAGE else s for s in spare))


# ---- terms that several parts share --------------------------------------------------------------
def _norm(n: int, width: int, e: int) -> Terms:
    """RMSNorm: the statistics, and the output that the next product saves."""
    return {"norm statistics": n * F32, "normed": n * width * e}


def _norm_backward(width: int, batch: MicroBatch) -> float:
    """Three float32 copies and two gradients. The compiled op needs the gradients only."""
    return batch.rows * width * (2 * batch.element + 3 * F32 * (not batch.native))


def _swiglu(rows: int, width: int, e: int) -> Terms:
    """SwiGLU layer: the output of the first product, and the input of the second."""
    return {"gate and up": 2 * rows * width * e, "activation": rows * width * e}


def _swiglu_backward(width: int, batch: MicroBatch) -> float:
    """Gradients of activation, gate and up. The op on torch's products also makes three copies."""
    return (3 if batch.native else 6) * batch.rows * width * batch.element
