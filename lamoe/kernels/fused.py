"""Ops with hand-written backward passes, all over torch's own matrix products: what training runs on a CPU.

Each saves little, recomputes what is cheap, and touches memory as few times as it can; each equals its twin in ref.py.
Gradients of gradients are not defined here (use impl="ref"). Letters as in ref.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lamoe.kernels import ref


def _work(dtype: torch.dtype) -> torch.dtype:
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
        along = product @ w  # projection of the gradient on the row: [..., D] -> [...]
        dweight = product.flatten(0, -2).sum(0).to(weight.dtype)
        dx.mul_(w).addcmul_(unit, along.unsqueeze(-1), value=-1 / x.shape[-1]).mul_(inv)
        return dx.to(x.dtype), dweight, None


def _copy(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A new contiguous tensor of `dtype`. One cast at the start beats operations that mix types: torch casts for each of those."""
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)


def rms_norm(x, weight, eps):
    return _RMSNorm.apply(x, weight, eps)


class _Rope(Function):
    @staticmethod
    def forward(ctx, x, freqs, interleaved):
        ctx.freqs, ctx.interleaved = freqs, interleaved
        return ref.rope(x, freqs, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return (
            ref.rope(dy, ctx.freqs.conj(), ctx.interleaved),
            None,
            None,
        )  # a rotation's transpose turns back


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


# ---- attention -----------------------------------------------------------------------------------------------------
_ROWS = 128  # query rows per block: the causal half beyond a block's last row is never computed
_KEEP_BYTES = (
    1 << 26
)  # probabilities are kept for the backward pass up to this size per call, else computed again


def _blocks(t: int, s: int) -> list[tuple[int, int, int]]:
    """(first row, end row, number of visible keys) of each block of queries."""
    rows = [(a, min(a + _ROWS, t)) for a in range(0, t, _ROWS)]
    return [(a, b, s - t + b) for a, b in rows]


def _probs(q, k, a, b, end, segments):
    """Softmax over the visible keys for query rows a:b; q (already scaled) [B, H, T, d], k [B, H, S, d] -> [B, H, b-a, end]."""
    s, t = k.shape[2], q.shape[2]
    logits = q[:, :, a:b] @ k[:, :, :end].transpose(2, 3)
    rows = b - a
    if segments is not None:
        first = s - t
        hidden = segments[:, first + a : first + b, None] != segments[:, None, :end]
        logits.masked_fill_(hidden[:, None], float("-inf"))
    if rows > 1:  # only the last `rows` keys can lie in the future
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
        # from the last block, which sees every key, so that its products start the sums (kept in at least float32)
        for i, (a, b, end) in reversed(list(enumerate(_blocks(q.shape[2], k.shape[2])))):
            p = probs[i] if probs else _probs(q, k, a, b, end, ctx.segments)
            dp = dout[:, :, a:b] @ v[:, :, :end].transpose(2, 3)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, :, a:b] = ds @ k[:, :, :end]
            dk = _add_to(dk, ds.transpose(2, 3) @ q[:, :, a:b])
            dv = _add_to(dv, p.transpose(2, 3) @ dout[:, :, a:b])
        return (
            dq.mul_(ctx.scale).transpose(1, 2),
            dk.to(q.dtype).transpose(1, 2),
            dv.to(q.dtype).transpose(1, 2),
            None,
            None,
        )


def _add_to(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """total[:, :, :rows of part] += part, beginning with the longest part."""
    if total is None:
        return part.to(_work(part.dtype))
    total[:, :, : part.shape[2]] += part
    return total


def attend(q, k, v, scale, segments=None):
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    return _Attend.apply(q, k, v, scale, segments)


# ---- experts -------------------------------------------------------------------------------------------------------
_PAD = 64  # rows per expert are padded to a multiple of this: oneDNN builds (and caches) a kernel for every new row count


class _Plan:
    """Assignments sorted by expert. Slot j of the sorted rows holds assignment `order[j]` (token = order // K).

    When many rows are at hand each expert's rows are padded with slots of assignment 0 that carry weight 0 and are never
    gathered back. Assignments to expert E (nobody) have no slot.
    """

    def __init__(self, expert: torch.Tensor, n_experts: int):
        n, k = expert.shape
        flat = expert.flatten()
        by_expert = flat.argsort(stable=True)
        counts = flat.bincount(minlength=n_experts + 1)[:n_experts]
        total, padded = int(counts.sum()), counts
        if total >= _PAD * n_experts:
            padded = (counts + _PAD - 1) // _PAD * _PAD
        gap = (padded - counts).cumsum(0) - (padded - counts)  # padding before each expert's rows
        slot = torch.arange(total, device=expert.device) + gap.repeat_interleave(
            counts, output_size=total
        )
        self.counts, rows = padded.tolist(), int(padded.sum())
        self.order = flat.new_zeros(rows).index_copy_(0, slot, by_expert[:total])
        self.real = torch.zeros(rows, 1, dtype=torch.bool, device=expert.device).index_fill_(
            0, slot, True
        )
        self.place = flat.new_zeros(n * k).index_copy_(0, by_expert[:total], slot)
        self.kept = None if total == n * k else (expert < n_experts).unsqueeze(-1)
        self.token, self.shape = self.order // k, (n, k)

    def sorted_weights(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flatten()[self.order].unsqueeze(1) * self.real

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        """Sum each token's K rows, accumulated in at least float32. -> [N, D]"""
        n, k = self.shape
        if rows.shape[0] == 0:
            return rows.new_zeros(n, rows.shape[1])
        if (
            self.kept is None
        ):  # embedding_bag gathers and adds in one pass, ten times as fast as the two
            return F.embedding_bag(self.place.view(n, k), rows, mode="sum")
        per_token = self.kept.view(n, k).sum(1)
        return F.embedding_bag(
            self.place[self.kept.flatten()], rows, per_token.cumsum(0) - per_token, mode="sum"
        )

    def products(self, rows: torch.Tensor, mats: torch.Tensor, out: torch.Tensor) -> None:
        """out[expert's rows] = rows[expert's rows] @ mats[expert]."""
        for a, b, m in zip(rows.split(self.counts), out.split(self.counts), mats.unbind(0)):
            if a.shape[0]:
                torch.mm(a, m, out=b)

    def outer(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
        """out[expert] = left[expert's rows]^T @ right[expert's rows]; zero for an expert without rows."""
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
        act = _swiglu(h)  # not weighted yet
        dact = torch.empty_like(act)  # gradient of the weighted activation
        plan.products(rows, w2, dact)
        dws = torch.linalg.vecdot(dact.to(ws.dtype), act.to(ws.dtype))
        dw2, dw13 = torch.empty_like(w2), torch.empty_like(w13)
        plan.outer(rows, act.mul_(ws), dw2)
        dh = _swiglu_backward(h, dact.mul_(ws))
        torch.index_select(x, 0, plan.token, out=rows)
        plan.outer(dh, rows, dw13)
        plan.products(dh, w13, rows)
        dweight = (
            dws[plan.place] if dws.shape[0] else dws.new_zeros(weight.numel())
        )  # everything may have been dropped
        if plan.kept is not None:
            dweight.masked_fill_(~plan.kept.flatten(), 0)
        return plan.combine(rows), None, dweight.view(plan.shape), dw13, dw2


def experts(x, expert, weight, w13, w2):
    return _Experts.apply(x, expert, weight, w13, w2)


# ---- loss ----------------------------------------------------------------------------------------------------------
_LOSS_ROWS = 512  # rows of logits that exist at once


class _CrossEntropy(Function):
    """The gradient is made along with the loss, chunk by chunk, so the [N, vocabulary] logits never exist at once."""

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
            rows, t, on = (
                h[a : a + _LOSS_ROWS],
                targets[a : a + _LOSS_ROWS].clamp_min(0)[:, None],
                counted[a : a + _LOSS_ROWS, None],
            )
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
