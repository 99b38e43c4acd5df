"""Ops for accelerators: nothing in them waits for the device, and torch.compile can fuse them.

Each op computes the function of the same name in ref.py, which documents its arguments. All sizes
follow from shapes, never from values, so the host can queue whole steps ahead of the device. The
ops run on the CPU too, where tests compare them with the definitions.

Two cases still wait for the device, because torch has no other product for them: experts in float64
or on MPS (they run the ops of fused.py), and experts on CUDA in float32 or before compute
capability 9.0 (torch's own fallback of grouped_mm).
"""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lamoe.kernels import fused, ref


def rms_norm(x, weight, eps):
    """Normalise rows with torch's kernel, which rounds once, after the product with the weight."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x, residual, weight, eps):
    total = x + residual
    return total, rms_norm(total, weight, eps)


def rope(x, freqs, interleaved):
    """Rotate pairs in real arithmetic: torch.compile generates no code for complex numbers."""
    cos, sin = torch.view_as_real(freqs)[:, :, None].unbind(-1)  # [B or 1, T, 1, R / 2] each
    work = x.to(cos.dtype)
    a, b = work.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else work.chunk(2, -1)
    rotated = a * cos - b * sin, a * sin + b * cos
    out = torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)
    return out.to(x.dtype)


# ---- attention -----------------------------------------------------------------------------------
# Rows and columns of a block of FlexAttention's mask.
_BLOCK = 128
# FlexAttention's kernels need heads of at least this width.
_FLEX_MIN_WIDTH = 16


class Mask(NamedTuple):
    """Which keys each query of a packed batch may attend to, prepared once for all layers.

    Attributes:
        segments: [B, T] integers, as in ref.attend.
        blocks: the mask for FlexAttention. None where FlexAttention cannot train.
        dense: [B, 1, T, T] bool, only if `blocks` is None.
    """

    segments: torch.Tensor
    blocks: BlockMask | None
    dense: torch.Tensor | None


def document_mask(segments: torch.Tensor) -> Mask:
    """Prepare the mask of packed documents: attend only to earlier tokens of the same segment.

    Args:
        segments: [B, T] integers.
    """
    if _has_flex(segments.device):
        return Mask(segments, block_mask(segments), None)
    t = segments.shape[1]
    return Mask(segments, None, ref.visible(t, t, segments, segments.device)[:, None])


def _has_flex(device: torch.device) -> bool:
    """Whether FlexAttention has kernels for the device, with a backward pass."""
    return device.type in ("cuda", "xpu") and importlib.util.find_spec("triton") is not None


def block_mask(segments: torch.Tensor) -> BlockMask:
    """Return FlexAttention's mask of packed documents without ever holding T x T elements.

    The smallest and the largest segment of every block of 128 tokens decide which pairs of blocks
    can hold a visible pair of tokens, and which hold visible pairs only.

    Args:
        segments: [B, T] integers in any order.
    """
    t = segments.shape[1]
    padded = segments
    if t % _BLOCK:
        padded = torch.cat([segments, segments[:, -1:].expand(-1, -t % _BLOCK)], 1)
    blocks = padded.unflatten(1, (-1, _BLOCK))
    low, high = blocks.amin(-1), blocks.amax(-1)  # [B, T / 128]
    number = torch.arange(low.shape[1], device=segments.device)
    before = number[:, None] > number
    overlap = (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
    possible = overlap & (number[:, None] >= number)
    whole = (number + 1) * _BLOCK <= t
    uniform = (low == high) & whole
    same = (low[:, :, None] == low[:, None]) & uniform[:, :, None] & uniform[:, None]
    full = same & before

    def visible(b, h, q, kv):
        return (kv <= q) & (segments[b, q] == segments[b, kv])

    return BlockMask.from_kv_blocks(
        *_ordered(possible & ~full),
        *_ordered(full),
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(t, t),
    )


def _ordered(pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of True columns per row of [B, n, n], and the columns, True ones first."""
    columns = pairs.int().argsort(dim=-1, descending=True, stable=True)
    return pairs.sum(-1)[:, None].int(), columns[:, None].int()


@functools.cache
def _flex():
    """Return flex_attention as one kernel. Uncompiled, it would hold all attention logits."""
    return torch.compile(flex_attention, dynamic=False)


def attend(q, k, v, scale, segments=None):
    """Attend through FlexAttention if `segments` is a Mask with blocks, else through torch's SDPA.

    Args:
        segments: a Mask, or [B, S] integers as in ref.attend.
    """
    t, s = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    if isinstance(segments, Mask):
        if segments.blocks is not None and _fits_flex(q, v):
            # Within compiled code, FlexAttention becomes a kernel without a compiler of its own.
            flex = flex_attention if torch.compiler.is_compiling() else _flex()
            out = flex(q, k, v, block_mask=segments.blocks, scale=scale, enable_gqa=groups > 1)
            return out.transpose(1, 2)
        mask, segments = segments.dense, segments.segments
    else:
        mask = None
    if groups > 1:  # SDPA's kernels with a mask need equal numbers of heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    causal = segments is None and t == s
    if not causal and mask is None:
        mask = ref.visible(t, s, segments, q.device)[:, None]
    # Flash kernels need equal widths of keys and values.
    width, extra = v.shape[-1], q.shape[-1] - v.shape[-1]
    if causal and extra > 0:
        v = F.pad(v, (0, extra))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    return out[..., :width].transpose(1, 2)


def rope_attend(q, kv, k_rope, freqs, interleaved, scale, segments=None):
    q, k, v = ref.rotated_heads(q, kv, k_rope, freqs, interleaved, rope)
    return attend(q, k, v, scale, segments)


def _fits_flex(q: torch.Tensor, v: torch.Tensor) -> bool:
    return min(q.shape[-1], v.shape[-1]) >= _FLEX_MIN_WIDTH and q.dtype != torch.float64


# ---- experts -------------------------------------------------------------------------------------
class _Experts(Function):
    """Experts through one grouped product per matrix, over all N K rows sorted by expert.

    Assignments without an expert (id E) are computed by the last expert with weight 0. Leaving them
    out would make the number of rows depend on values, and rows after the last group are undefined.
    """

    @staticmethod
    def forward(ctx, x, expert, weight, w13, w2):
        e, (n, k) = w13.shape[0], expert.shape
        dropped = expert == e
        by_expert, order = expert.clamp(max=e - 1).flatten().sort(stable=True)
        ids = torch.arange(e, device=x.device)
        ends = torch.searchsorted(by_expert, ids, right=True, out_int32=True)
        # place[assignment] is its sorted row; order[row] is the assignment.
        place = torch.empty_like(order).scatter_(0, order, torch.arange(n * k, device=x.device))
        weights = weight.masked_fill(dropped, 0).flatten().index_select(0, order)[:, None]
        h = F.grouped_mm(x.index_select(0, order // k), w13.transpose(1, 2), offs=ends)
        act = (ref.swiglu(h) * weights).to(x.dtype)
        rows = F.grouped_mm(act, w2.transpose(1, 2), offs=ends)
        ctx.save_for_backward(x, dropped, weights, w13, w2, h, order, place, ends)
        return _combine(rows, place, k)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, dropped, weights, w13, w2, h, order, place, ends = ctx.saved_tensors
        k = dropped.shape[1]
        token = order // k
        rows = dout.index_select(0, token)
        gate, up = h.chunk(2, -1)
        silu = F.silu(gate)
        act = silu * up  # not yet multiplied by the router weight
        dact = F.grouped_mm(rows, w2, offs=ends)  # gradient of the weighted activation
        dweights = (dact.to(weights.dtype) * act).sum(-1)
        dw2 = F.grouped_mm(rows.t(), (act * weights).to(x.dtype), offs=ends)
        dact = (dact * weights).to(x.dtype)
        dgate = torch.ops.aten.silu_backward(dact * up, gate)
        dh = torch.cat([dgate, dact * silu], -1)
        dw13 = F.grouped_mm(dh.t(), x.index_select(0, token), offs=ends)
        dx = _combine(F.grouped_mm(dh, w13, offs=ends), place, k)
        dweight = dweights.index_select(0, place).view_as(dropped).masked_fill(dropped, 0)
        return dx, None, dweight, dw13, dw2


def _combine(rows: torch.Tensor, place: torch.Tensor, k: int) -> torch.Tensor:
    """Return the sum of each token's K rows, summed in at least float32 and rounded once.

    Args:
        rows: [N K, D], sorted by expert.
        place: [N K], the row of each assignment.
    """
    by_token = rows.index_select(0, place).unflatten(0, (-1, k))
    return by_token.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype)


def experts(x, expert, weight, w13, w2):
    """Compute the experts with torch's grouped_mm. Widths are padded to multiples of 16 bytes."""
    if x.dtype == torch.float64 or x.device.type == "mps":
        return fused.experts(x, expert, weight, w13, w2)
    d, f = w2.shape[1:]
    multiple = 16 // x.element_size()
    extra_d, extra_f = -d % multiple, -f % multiple
    if extra_d or extra_f:
        x = F.pad(x, (0, extra_d))
        w13 = F.pad(w13.unflatten(1, (2, f)), (0, extra_d, 0, extra_f)).flatten(1, 2)
        w2 = F.pad(w2, (0, extra_f, 0, extra_d))
    return _Experts.apply(x, expert, weight, w13, w2)[:, :d]


# ---- loss ----------------------------------------------------------------------------------------
# Largest number of logits that exist at once, in elements.
_LOSS_ELEMENTS = 1 << 26


class _CrossEntropy(fused._CrossEntropy):
    """The forward pass of fused.py's function without a value that the host reads."""

    @staticmethod
    def forward(ctx, h, head, targets):
        work = torch.promote_types(h.dtype, torch.float32)
        counted = (targets >= 0).to(work)
        share = counted / counted.sum().clamp_min(1)  # weight of each row in the mean
        grad = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=work, device=h.device)
        dhead = torch.zeros_like(head, dtype=work) if grad else None
        dh = []
        rows = max(128, _LOSS_ELEMENTS // head.shape[0])
        for part, target, weight in zip(
            h.split(rows), targets.clamp_min(0).split(rows), share.split(rows)
        ):
            log_p = (part @ head.t()).to(work).log_softmax(-1)
            total = total - (log_p.gather(1, target[:, None])[:, 0] * weight).sum()
            if grad:
                one_hot = torch.arange(head.shape[0], device=h.device) == target[:, None]
                dlogits = ((log_p.exp() - one_hot.to(work)) * weight[:, None]).to(h.dtype)
                dh.append(dlogits @ head)
                dhead = dhead + dlogits.t() @ part
        if grad:
            ctx.save_for_backward(torch.cat(dh), dhead.to(head.dtype))
        return total


def cross_entropy(h, head, targets):
    return _CrossEntropy.apply(h, head, targets)
