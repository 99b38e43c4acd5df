"""Ops with hand-written backward passes on top of torch's matrix products, the default in training.

Each op computes the function of the same name in ref.py, which documents its arguments. The ops
save few tensors for the backward pass, recompute cheap ones, and avoid reading and writing memory.
Second derivatives are not defined here. Use impl="ref" for them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lamoe.kernels import ref


def _work(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and statistics: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_work(x.dtype))
        inv = (norm * norm / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, inv)
        return _copy(x, inv.dtype).mul_(inv).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, inv = ctx.saved_tensors
        unit, dx = _copy(x, inv.dtype).mul_(inv), _copy(dy, inv.dtype)
        w = weight.to(inv.dtype)
        product = dx * unit
        along = product @ w  # [...], the part of the gradient along the normalised row
        dweight = product.flatten(0, -2).sum(0).to(weight.dtype)
        dx.mul_(w).addcmul_(unit, along.unsqueeze(-1), value=-1 / x.shape[-1]).mul_(inv)
        return dx.to(x.dtype), dweight, None


def _copy(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a contiguous copy of x in `dtype`.

    One cast in advance is faster than operations on mixed dtypes, because torch casts in each of
    them.
    """
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)


def rms_norm(x, weight, eps):
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x, residual, weight, eps):
    total = x + residual
    return total, rms_norm(total, weight, eps)


class _Rope(Function):
    @staticmethod
    def forward(ctx, x, freqs, interleaved):
        ctx.freqs, ctx.interleaved = freqs, interleaved
        return ref.rope(x, freqs, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx = ref.rope(dy, ctx.freqs.conj(), ctx.interleaved)  # transposed rotation
        return dx, None, None


def rope(x, freqs, interleaved):
    return _Rope.apply(x, freqs, interleaved)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _swiglu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return _swiglu_backward(x, dy)


def _swiglu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate.contiguous()).mul_(up)  # strided silu is three times slower


def _swiglu_backward(x, dy):
    gate, up = (half.contiguous() for half in x.chunk(2, -1))
    dx = torch.empty_like(x)
    dgate, dup = dx.chunk(2, -1)
    torch.mul(F.silu(gate), dy, out=dup)
    dgate.copy_(torch.ops.aten.silu_backward(up.mul_(dy), gate))
    return dx


def swiglu(x):
    return _SwiGLU.apply(x)


# ---- attention -----------------------------------------------------------------------------------
# Queries are processed in blocks of consecutive rows. A block skips the keys after its last query.
_BLOCK_ROWS = 128
# Limit on the attention probabilities that one call keeps for the backward pass. Above it, the
# backward pass recomputes them.
_KEEP_BYTES = 1 << 26


def _blocks(t: int, s: int) -> list[tuple[int, int, int]]:
    """Return (first query, end of queries, number of visible keys) of each block of queries.

    Args:
        t: number of queries T.
        s: number of keys S.
    """
    rows = [(a, min(a + _BLOCK_ROWS, t)) for a in range(0, t, _BLOCK_ROWS)]
    return [(a, b, s - t + b) for a, b in rows]


def _probs(q, k, a, b, end, segments):
    """Return the attention probabilities of queries a to b - 1 over the keys before `end`.

    Args:
        q: [B, H, T, width], already multiplied by the softmax scale.
        k: [B, H, S, width].

    Returns:
        [B, H, b - a, end].
    """
    s, t = k.shape[2], q.shape[2]
    logits = q[:, :, a:b] @ k[:, :, :end].transpose(2, 3)
    rows = b - a
    if segments is not None:
        first = s - t
        hidden = segments[:, first + a : first + b, None] != segments[:, None, :end]
        logits.masked_fill_(hidden[:, None], float("-inf"))
    if rows > 1:  # only the last `rows` keys can be later than a query
        future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
        logits[..., end - rows :].masked_fill_(future, float("-inf"))
    return logits.softmax(-1)


class _Attend(Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, segments):
        q = torch.mul(q.transpose(1, 2), scale, out=q.new_empty(0))
        k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        (n, h, t, _), s = q.shape, k.shape[2]
        out = q.new_empty(n, t, h, v.shape[-1])
        keep = any(ctx.needs_input_grad) and n * h * t * s * q.element_size() <= _KEEP_BYTES
        probs = []
        for a, b, end in _blocks(t, s):
            p = _probs(q, k, a, b, end, segments)
            out[:, a:b] = (p @ v[:, :, :end]).transpose(1, 2)
            if keep:
                probs.append(p)
        ctx.save_for_backward(q, k, v, *probs)
        ctx.scale, ctx.segments = scale, segments
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, *probs = ctx.saved_tensors
        dout, dq, dk, dv = dout.transpose(1, 2).contiguous(), torch.empty_like(q), None, None
        # Process the last block first. It sees every key, so its products have the full size and
        # can hold the sums.
        for i, (a, b, end) in reversed(list(enumerate(_blocks(q.shape[2], k.shape[2])))):
            p = probs[i] if probs else _probs(q, k, a, b, end, ctx.segments)
            dp = dout[:, :, a:b] @ v[:, :, :end].transpose(2, 3)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, :, a:b] = ds @ k[:, :, :end]
            dk = _add_to(dk, ds.transpose(2, 3) @ q[:, :, a:b])
            dv = _add_to(dv, p.transpose(2, 3) @ dout[:, :, a:b])
        grads = (dq.mul_(ctx.scale), dk.to(q.dtype), dv.to(q.dtype))
        return *(g.transpose(1, 2) for g in grads), None, None


def _add_to(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """Add `part` to the first rows of `total` and return `total`.

    If `total` is None, `part` becomes the total. The caller passes the longest part first. Sums are
    in at least float32.
    """
    if total is None:
        return part.to(_work(part.dtype))
    total[:, :, : part.shape[2]] += part
    return total


def attend(q, k, v, scale, segments=None):
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    return _Attend.apply(q, k, v, scale, segments)


def rope_attend(q, kv, k_rope, freqs, interleaved, scale, segments=None):
    q, k, v = ref.rotated_heads(q, kv, k_rope, freqs, interleaved, rope, _concat_by_head)
    return attend(q, k, v, scale, segments)


def _concat_by_head(nope, rope):
    """Concatenate [B, T, H, N] and [B, T, H, R] to [B, T, H, N + R].

    In memory, heads come before tokens. Attention reads one head after the other, so this layout
    avoids a transposed copy.
    """
    if nope.shape[-1] == 0:
        return rope
    return torch.cat([nope.transpose(1, 2), rope.transpose(1, 2)], -1).transpose(1, 2)


# ---- experts -------------------------------------------------------------------------------------
# The number of rows of an expert is padded to a multiple of this constant, because oneDNN compiles
# and caches a matrix product for every new number of rows.
_PAD = 64


class _Plan:
    """The order of all assignments (token, expert) when rows are sorted by expert.

    Row j of the sorted rows holds assignment order[j], whose token is order[j] // K. If there are
    many rows, each expert's rows are padded with copies of assignment 0. The copies get weight 0
    and are not gathered back. Assignments to expert id E (no expert) get no row.

    Attributes:
        counts: number of rows per expert, padding included.
        order: [rows], the assignment of each row.
        real: [rows, 1] bool, False for padding.
        place: [N K], the row of each assignment. 0 for assignments without a row.
        kept: [N, K, 1] bool, False for assignments without a row. None if all have a row.
        token: [rows], the token of each row.
        shape: (N, K).
    """

    def __init__(self, expert: torch.Tensor, n_experts: int):
        n, k = expert.shape
        flat = expert.flatten()
        by_expert = flat.argsort(stable=True)
        counts = flat.bincount(minlength=n_experts + 1)[:n_experts]
        total, padded = int(counts.sum()), counts
        if total >= _PAD * n_experts:
            padded = (counts + _PAD - 1) // _PAD * _PAD
        padding = padded - counts
        padding_before = padding.cumsum(0) - padding  # padding rows of all earlier experts
        gap = padding_before.repeat_interleave(counts, output_size=total)
        slot = torch.arange(total, device=expert.device) + gap
        self.counts, rows = padded.tolist(), int(padded.sum())
        self.order = flat.new_zeros(rows).index_copy_(0, slot, by_expert[:total])
        self.real = torch.zeros(rows, 1, dtype=torch.bool, device=expert.device)
        self.real.index_fill_(0, slot, True)
        self.place = flat.new_zeros(n * k).index_copy_(0, by_expert[:total], slot)
        self.kept = None if total == n * k else (expert < n_experts).unsqueeze(-1)
        self.token, self.shape = self.order // k, (n, k)

    def sorted_weights(self, weight: torch.Tensor) -> torch.Tensor:
        """Return router weights [N, K] in the order of the sorted rows, as [rows, 1].

        Padding gets weight 0.
        """
        return weight.flatten()[self.order].unsqueeze(1) * self.real

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the sum of each token's rows, [rows, D] -> [N, D], in at least float32."""
        n, k = self.shape
        if rows.shape[0] == 0:
            return rows.new_zeros(n, rows.shape[1])
        # embedding_bag gathers and adds in one pass, much faster than index_select and sum. Given
        # bfloat16 rows on a CPU it would round ties away from zero.
        wide = rows.to(_work(rows.dtype))
        if self.kept is None:
            return F.embedding_bag(self.place.view(n, k), wide, mode="sum").to(rows.dtype)
        per_token = self.kept.view(n, k).sum(1)
        begin = per_token.cumsum(0) - per_token
        place = self.place[self.kept.flatten()]
        return F.embedding_bag(place, wide, begin, mode="sum").to(rows.dtype)

    def products(self, rows: torch.Tensor, mats: torch.Tensor, out: torch.Tensor) -> None:
        """Multiply the rows of each expert by its matrix: out = rows @ mats[expert]."""
        for a, b, m in zip(rows.split(self.counts), out.split(self.counts), mats.unbind(0)):
            if a.shape[0]:
                torch.mm(a, m, out=b)

    def outer(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
        """Set out[expert] = left^T @ right over each expert's rows, or 0 if it has no rows."""
        for a, b, m in zip(left.split(self.counts), right.split(self.counts), out.unbind(0)):
            torch.mm(a.t(), b, out=m) if a.shape[0] else m.zero_()


class _Experts(Function):
    @staticmethod
    def forward(ctx, x, expert, weight, w13, w2):
        plan = _Plan(expert, w13.shape[0])
        xs = x.index_select(0, plan.token)
        h = xs.new_empty(xs.shape[0], w13.shape[1])
        plan.products(xs, w13.transpose(1, 2), h)
        act = _swiglu(h).mul_(plan.sorted_weights(weight))
        plan.products(act, w2.transpose(1, 2), xs)
        ctx.save_for_backward(x, weight, w13, w2, h)
        ctx.plan = plan
        return plan.combine(xs)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight, w13, w2, h = ctx.saved_tensors
        plan, ws = ctx.plan, ctx.plan.sorted_weights(weight)
        rows = dout.index_select(0, plan.token)
        act = _swiglu(h)  # activation, not yet multiplied by the router weight
        dact = torch.empty_like(act)  # gradient of the weighted activation
        plan.products(rows, w2, dact)
        dws = torch.linalg.vecdot(dact.to(ws.dtype), act.to(ws.dtype))
        dw2, dw13 = torch.empty_like(w2), torch.empty_like(w13)
        plan.outer(rows, act.mul_(ws), dw2)
        dh = _swiglu_backward(h, dact.mul_(ws))
        torch.index_select(x, 0, plan.token, out=rows)
        plan.outer(dh, rows, dw13)
        plan.products(dh, w13, rows)
        # If every assignment was dropped, there is no row, and indexing would fail.
        dweight = dws[plan.place] if dws.shape[0] else dws.new_zeros(weight.numel())
        if plan.kept is not None:
            dweight.masked_fill_(~plan.kept.flatten(), 0)
        return plan.combine(rows), None, dweight.view(plan.shape), dw13, dw2


def experts(x, expert, weight, w13, w2):
    return _Experts.apply(x, expert, weight, w13, w2)


# ---- loss ----------------------------------------------------------------------------------------
# Largest number of rows of logits that exist at once.
_LOSS_ROWS = 512


class _CrossEntropy(Function):
    """Cross-entropy that computes the gradient together with the loss, in chunks of rows.

    The logits [N, vocabulary] exist only one chunk at a time, and none are kept for the backward
    pass.
    """

    @staticmethod
    def forward(ctx, h, head, targets):
        work = _work(h.dtype)
        counted = (targets >= 0).to(work)
        share = 1.0 / max(counted.sum().item(), 1.0)
        total = torch.zeros((), dtype=work, device=h.device)
        grad = any(ctx.needs_input_grad)
        dh = torch.empty_like(h) if grad else None
        dhead = torch.zeros_like(head, dtype=work) if grad else None
        for a in range(0, h.shape[0], _LOSS_ROWS):
            rows = h[a : a + _LOSS_ROWS]
            t = targets[a : a + _LOSS_ROWS].clamp_min(0)[:, None]
            on = counted[a : a + _LOSS_ROWS, None]
            logits = rows @ head.t()
            top = logits.amax(-1, keepdim=True)
            p = _copy(logits, work).sub_(top)
            of_target = p.gather(1, t)
            mass = p.exp_().sum(-1, keepdim=True)
            total += ((mass.log() - of_target) * on).sum() * share
            if grad:
                p = p.mul_(on * share / mass).scatter_add_(1, t, on * -share).to(h.dtype)
                torch.mm(p, head, out=dh[a : a + _LOSS_ROWS])
                dhead += p.t() @ rows
        if grad:
            ctx.save_for_backward(dh, dhead.to(head.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dh, dhead = ctx.saved_tensors
        return dh * dloss, dhead * dloss, None


def cross_entropy(h, head, targets):
    return _CrossEntropy.apply(h, head, targets)
