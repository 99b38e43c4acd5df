"""Compiled ops for training on CPUs (csrc/train): forward and backward passes for every layer.

Each op computes the function of the same name in ref.py, which documents its arguments. Types are
bfloat16 and float32. Sums and statistics are float32 and are rounded once, so bfloat16 results are
closer to exact arithmetic than those of ref. Results do not depend on the number of threads. They
may differ in the last bits between instruction sets.

`supports` says whether the ops can compute with given tensors. Where they cannot (another device,
float64, kernels that are not built), lamoe.kernels uses fused.py. Second derivatives are not
defined here. Use impl="ref" for them.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lamoe.kernels import fused, ref

try:
    from lamoe import _native
except ImportError:
    _native = None
lib: Any = _native
if not hasattr(lib, "train_embedding_backward"):  # no kernels, or those of an older build
    lib = None

# The types of the kernels, with their number in csrc/cpu/formats.h.
_ELEM = {torch.float32: 0, torch.bfloat16: 1}
# The instruction set of all ops, for tests. Empty means that of the process.
ISA = ""


def supports(*tensors: torch.Tensor, products: bool = True) -> bool:
    """Return whether the ops can compute with these arguments: kernels built, on the CPU, float32
    or bfloat16 like the first one. Router weights are float32, and ids are integers.

    Args:
        products: whether the op multiplies rows of the tensors.
    """
    first = tensors[0]
    if not first.numel():  # kernels do not write gradients of weights that no row uses
        return False
    known = (first.dtype, torch.float32, torch.int64, torch.int32, torch.complex64)
    return (
        lib is not None
        and first.dtype in _ELEM
        and all(t.device.type == "cpu" and t.dtype in known for t in tensors)
        and (not products or all(_in_pairs(t, t.shape[-1]) for t in tensors if t.dim() > 1))
    )


def _in_pairs(x: torch.Tensor, *sizes: int) -> bool:
    """Return whether products can read rows of these sizes: bfloat16 is read in pairs."""
    return x.dtype != torch.bfloat16 or not any(size % 2 for size in sizes)


def are_alike(*tensors: torch.Tensor) -> bool:
    """Return whether all tensors have one dtype. The kernels read raw memory and do not convert."""
    return all(t.dtype == tensors[0].dtype for t in tensors)


def _end() -> tuple[int, str]:
    """Return the last arguments of every op: the number of threads and the instruction set."""
    return torch.get_num_threads(), ISA


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """Return x [..., D] as rows, with their number and their distance in elements.

    Rows that are evenly spaced in memory, such as a slice of columns, are used in place.
    """
    x2 = x.reshape(-1, x.shape[-1])  # a view where the strides allow it
    if x2.stride(1) != 1 or x2.stride(0) < x2.shape[1]:
        x2 = x2.contiguous()
    return x2, x2.shape[0], x2.stride(0)


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, w):
        x2, m, ldx = _rows(x)
        (n, k), w = w.shape, w.contiguous()
        y = x.new_empty(*x.shape[:-1], n)
        elem = _ELEM[x.dtype]
        lib.train_linear(elem, x2.data_ptr(), ldx, m, k, w.data_ptr(), n, y.data_ptr(), n, *_end())
        ctx.save_for_backward(x2, w)
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x2, w = ctx.saved_tensors
        dy2, m, ldy = _rows(dy)
        n, k = w.shape
        need_dx, need_dw = ctx.needs_input_grad
        dx = dy.new_empty(ctx.shape) if need_dx else None
        dw = torch.empty_like(w) if need_dw else None
        lib.train_linear_backward(
            _ELEM[dy.dtype], dy2.data_ptr(), ldy, x2.data_ptr(), x2.stride(0), m, n, k,
            w.data_ptr(), _address(dx), _address(dw), *_end(),
        )  # fmt: skip
        return dx, dw


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def linear(x, w):
    known = (
        are_alike(x, w)
        and w.dim() == 2
        and w.shape[0] > 0
        and w.shape[1] == x.shape[-1]
        and _in_pairs(x, *w.shape)
    )
    return _Linear.apply(x, w) if known else ref.linear(x, w)


class _Experts(Function):
    @staticmethod
    def forward(ctx, x, expert, weight, w13, w2):
        x, expert, weight = x.contiguous(), expert.contiguous(), weight.contiguous()
        w13, w2 = w13.contiguous(), w2.contiguous()
        (n, d), (experts, _, f), k = x.shape, w2.shape, expert.shape[1]
        # offsets of the experts' rows, assignments of the rows, rows of the assignments
        plan = torch.empty(experts + 1 + 2 * n * k, dtype=torch.int32)
        lib.train_plan(expert.data_ptr(), experts, n, k, plan.data_ptr())
        h, out = x.new_empty(int(plan[experts]), 2 * f), torch.empty_like(x)
        ctx.sizes = (_ELEM[x.dtype], n, d, f, experts, k)
        lib.train_experts(
            *ctx.sizes, plan.data_ptr(), x.data_ptr(), weight.data_ptr(), w13.data_ptr(),
            w2.data_ptr(), h.data_ptr(), out.data_ptr(), *_end(),
        )  # fmt: skip
        ctx.save_for_backward(x, plan, weight, w13, w2, h)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, plan, weight, w13, w2, h = ctx.saved_tensors
        dout, dweight = dout.contiguous(), torch.empty_like(weight)
        dx, dw13, dw2 = torch.empty_like(x), torch.empty_like(w13), torch.empty_like(w2)
        lib.train_experts_backward(
            *ctx.sizes, plan.data_ptr(), x.data_ptr(), weight.data_ptr(), w13.data_ptr(),
            w2.data_ptr(), h.data_ptr(), dout.data_ptr(), dx.data_ptr(), dweight.data_ptr(),
            dw13.data_ptr(), dw2.data_ptr(), *_end(),
        )  # fmt: skip
        return dx, None, dweight, dw13, dw2


def experts(x, expert, weight, w13, w2):
    """See ref.experts, which raises for shapes that do not fit. Calls fused for other types."""
    (count, d, f), rows = w2.shape, x.shape[:1]
    fit = (
        x.shape[1:] == (d,)
        and w13.shape == (count, 2 * f, d)
        and expert.shape == weight.shape == (*rows, expert.shape[-1])
    )
    known = fit and are_alike(x, w13, w2) and weight.dtype == torch.float32 and _in_pairs(x, d)
    other = fused.experts if fit else ref.experts
    return (_Experts.apply if known else other)(x, expert.long(), weight, w13, w2)


class _RopeAttend(Function):
    """Attention that keeps the log-sum-exp of each query in place of the probabilities."""

    @staticmethod
    def forward(ctx, q, kv, k_rope, freqs, spans, interleaved, scale):
        (b, t, h, width), (g, r) = q.shape, (kv.shape[2], k_rope.shape[3])
        n = width - r
        v = kv.shape[3] - n
        out, lse = q.new_empty(b, t, h, v), torch.empty(b, h, t)
        ctx.sizes = [_ELEM[q.dtype], b, t, h, g, n, r, v, interleaved, k_rope.shape[2] == 1]
        ctx.scale = scale
        tensors = (q, kv, k_rope, freqs, spans, out, lse)
        lib.train_attention(*_attention(ctx, tensors), *_end())
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        dout = dout.contiguous()
        tensors = ctx.saved_tensors
        grads = [torch.empty(x.shape, dtype=x.dtype) for x in tensors[:3]]
        addresses = [x.data_ptr() for x in (dout, *grads)]
        lib.train_attention_backward(*_attention(ctx, tensors), *addresses, *_end())
        return *grads, None, None, None, None


def _attention(ctx, tensors) -> tuple[list[int], list[int], list[int], float]:
    """Return the arguments of the attention kernels: sizes, strides, addresses, scale."""
    q, kv, k_rope, freqs, *_ = tensors
    strides = [x.stride(i) for x in (q, kv, k_rope) for i in range(3)]
    strides.append(0 if freqs.shape[0] == 1 else 2 * freqs.stride(0))  # of floats
    return ctx.sizes, strides, [_address(x) for x in tensors], ctx.scale


def _spans(segments: torch.Tensor) -> torch.Tensor | None:
    """Return the spans of documents for the attention kernels, [2, B, T] int32.

    The spans are the first token of the document of each token, and the end of that document. The
    result is None if a document is not a contiguous run of tokens.
    """
    ids = segments.to(torch.int64).contiguous()
    spans = torch.empty(2, *ids.shape, dtype=torch.int32)
    return spans if lib.train_spans(ids.data_ptr(), *ids.shape, spans.data_ptr()) else None


_MAX_WIDTH = 1024  # of a query or value, a limit of the scratch memory of the attention kernels


def rope_attend(q, kv, k_rope, freqs, interleaved, scale, segments=None):
    """See ref.rope_attend. Calls fused for documents that are not contiguous, and for shapes that
    the kernel does not know.
    """
    r, width = k_rope.shape[-1], q.shape[-1]
    v = kv.shape[-1] - (width - r)
    spans = None if segments is None else _spans(segments)
    (b, t, h, _), g = q.shape, kv.shape[2]
    known = (
        scale > 0
        and freqs.dtype == torch.complex64
        and kv.shape[:2] == k_rope.shape[:2] == (b, t)
        and (segments is None or segments.shape == (b, t))
        and h % g == 0
        and k_rope.shape[2] in (1, g)
        and freqs.shape[0] in (1, b)
        and freqs.shape[1:] == (t, r / 2)
        and all(x.numel() and x.dtype == q.dtype for x in (q, kv, k_rope) if x.shape[-1])
        and 0 < max(width, v) <= _MAX_WIDTH
        and (q.dtype == torch.float32 or v % 2 == 0)  # bfloat16 products read pairs of elements
        and (segments is None or spans is not None)
    )
    if not known:
        return fused.rope_attend(q, kv, k_rope, freqs, interleaved, scale, segments)
    q, kv, k_rope = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, kv, k_rope))
    return _RopeAttend.apply(q, kv, k_rope, freqs.contiguous(), spans, interleaved, scale)


class _CrossEntropy(Function):
    """Cross-entropy that computes the gradients together with the loss, in chunks of rows."""

    @staticmethod
    def forward(ctx, h, head, targets):
        h, head, targets = h.contiguous(), head.contiguous(), targets.contiguous()
        (rows, hidden), vocab = h.shape, head.shape[0]
        grad = any(ctx.needs_input_grad)
        dh, dhead = (torch.empty_like(h), torch.empty_like(head)) if grad else (None, None)
        share = 1.0 / max(int((targets >= 0).sum()), 1)
        loss = lib.train_cross_entropy(
            _ELEM[h.dtype], h.data_ptr(), head.data_ptr(), targets.data_ptr(), rows, hidden,
            vocab, share, _address(dh), _address(dhead), *_end(),
        )  # fmt: skip
        if grad:
            ctx.save_for_backward(dh, dhead)
        return torch.tensor(loss, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dh, dhead = ctx.saved_tensors
        if dloss != 1:
            dh, dhead = dh * dloss, dhead * dloss
        return dh, dhead, None


def cross_entropy(h, head, targets):
    if targets.shape != h.shape[:1] or int(targets.max()) >= head.shape[0]:
        raise ValueError(
            f"targets are {tuple(targets.shape)} ids up to {int(targets.max())}; there must be one "
            f"for each of the {h.shape[0]} rows, below the vocabulary size {head.shape[0]}"
        )
    known = are_alike(h, head) and head.shape[1] == h.shape[1] and _in_pairs(h, h.shape[1])
    return (_CrossEntropy.apply if known else fused.cross_entropy)(h, head, targets.long())


# ---- norm, SwiGLU, router, AdamW -----------------------------------------------------------------
class _RMSNorm(Function):
    """RMSNorm of x, or of x + residual. Returns the normed rows, or (sum, normed rows)."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        ctx.set_materialize_grads(False)
        x2, rows, ldx = _rows(x)
        r2, _, ldr = (None, 0, 0) if residual is None else _rows(residual)
        weight, dim = weight.contiguous(), x.shape[-1]
        y, inv = x.new_empty(x.shape), torch.empty(rows, dtype=torch.float32)
        total = None if residual is None else x.new_empty(x.shape)
        lib.train_rms_norm(
            _ELEM[x.dtype], rows, dim, weight.data_ptr(), eps, x2.data_ptr(), ldx, _address(r2),
            ldr, _address(total), y.data_ptr(), inv.data_ptr(), *_end(),
        )  # fmt: skip
        ctx.save_for_backward(x2 if total is None else total, weight, inv)
        ctx.shape = x.shape
        return y if total is None else (total, y)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, weight, inv = ctx.saved_tensors
        (dsum, dy), is_sum = (None, *grads)[-2:], len(grads) == 2
        if dy is None:
            return dsum, dsum if is_sum else None, None, None
        x2, rows, ldx = _rows(x)
        dy2, _, ldy = _rows(dy)
        ds2, _, lds = (None, 0, 0) if dsum is None else _rows(dsum)
        dx, dweight = dy.new_empty(ctx.shape), torch.empty_like(weight)
        lib.train_rms_norm_backward(
            _ELEM[dy.dtype], rows, x2.shape[1], weight.data_ptr(), x2.data_ptr(), ldx,
            inv.data_ptr(), dy2.data_ptr(), ldy, _address(ds2), lds, dx.data_ptr(),
            dweight.data_ptr(), *_end(),
        )  # fmt: skip
        return dx, dx if is_sum else None, dweight, None


def rms_norm(x, weight, eps):
    known = are_alike(x, weight) and weight.shape == x.shape[-1:]
    return _RMSNorm.apply(x, None, weight, eps) if known else ref.rms_norm(x, weight, eps)


def add_rms_norm(x, residual, weight, eps):
    known = (
        are_alike(x, residual, weight)
        and x.shape == residual.shape
        and weight.shape == x.shape[-1:]
    )
    op = _RMSNorm.apply if known else ref.add_rms_norm
    return op(x, residual, weight, eps)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx, x):
        x2, rows, ldx = _rows(x)
        width = x.shape[-1] // 2
        y = x.new_empty(*x.shape[:-1], width)
        lib.train_swiglu(_ELEM[x.dtype], x2.data_ptr(), ldx, rows, width, y.data_ptr(), *_end())
        ctx.save_for_backward(x2)
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x2, rows, ldx = _rows(ctx.saved_tensors[0])
        dy2, _, ldy = _rows(dy)
        dx = dy.new_empty(ctx.shape)
        lib.train_swiglu_backward(
            _ELEM[dy.dtype], x2.data_ptr(), ldx, dy2.data_ptr(), ldy, rows, dy2.shape[1],
            dx.data_ptr(), *_end(),
        )  # fmt: skip
        return dx


def swiglu(x):
    return _SwiGLU.apply(x) if x.shape[-1] % 2 == 0 else ref.swiglu(x)


class _Embedding(Function):
    @staticmethod
    def forward(ctx, weight, ids):
        ids = ids.long().contiguous()
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        return ref.embedding(weight, ids)  # raises for ids outside of the table

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (ids,) = ctx.saved_tensors
        dy2, tokens, ldy = _rows(dy)
        dweight = dy.new_empty(ctx.shape)
        count, dim = ctx.shape
        plan = torch.empty(count + 1 + 2 * tokens, dtype=torch.int32)
        lib.train_plan(ids.data_ptr(), count, tokens, 1, plan.data_ptr())
        lib.train_embedding_backward(
            _ELEM[dy.dtype], plan.data_ptr(), count, tokens, dim, dy2.data_ptr(), ldy,
            dweight.data_ptr(), *_end(),
        )  # fmt: skip
        return dweight, None


def embedding(weight, ids):
    return _Embedding.apply(weight, ids)


class _Route(Function):
    @staticmethod
    def forward(ctx, x, gate, top_k, groups, top_groups, normalise, scale):
        ctx.set_materialize_grads(False)
        x2, rows, ldx = _rows(x)
        gate, experts = gate.contiguous(), gate.shape[0]
        scores = torch.empty(rows, experts, dtype=torch.float32)
        expert = torch.empty(rows, top_k, dtype=torch.int64)
        weight = torch.empty(rows, top_k, dtype=torch.float32)
        ctx.router = (
            _ELEM[x.dtype], rows, x.shape[1], experts, top_k, groups, top_groups, normalise, scale,
        )  # fmt: skip
        lib.train_route(
            *ctx.router, x2.data_ptr(), ldx, gate.data_ptr(), scores.data_ptr(),
            expert.data_ptr(), weight.data_ptr(), *_end(),
        )  # fmt: skip
        ctx.mark_non_differentiable(expert)
        ctx.save_for_backward(x2, gate, scores, expert)
        return scores, expert, weight

    @staticmethod
    @once_differentiable
    def backward(ctx, dscores, _, dweight):
        x, gate, scores, expert = ctx.saved_tensors
        x2, _, ldx = _rows(x)
        dscores, dweight = (None if g is None else g.contiguous() for g in (dscores, dweight))
        dx, dgate = x.new_empty(x.shape), torch.empty_like(gate)
        lib.train_route_backward(
            *ctx.router, x2.data_ptr(), ldx, gate.data_ptr(), scores.data_ptr(),
            expert.data_ptr(), _address(dscores), _address(dweight), dx.data_ptr(),
            dgate.data_ptr(), *_end(),
        )  # fmt: skip
        return dx, dgate, None, None, None, None, None


def route(x, gate, top_k, groups, top_groups, normalise, scale):
    """Compute the router of an MoE layer, model/routing.py: route.

    Equal scores are chosen in the order of their ids.

    Args:
        x: [N, D].
        gate: [E, D].
        top_k: number of experts of a row, K.
        groups: number of groups of neighbouring experts. 0 means that all experts compete.
        top_groups: number of groups whose experts compete.
        normalise: divide the weights of a row by their sum.
        scale: factor on the weights.

    Returns:
        Scores [N, E] float32, experts [N, K] int64 and weights [N, K] float32.

    Raises:
        ValueError: if the sizes do not fit together.
    """
    experts = gate.shape[0]
    competing = experts // groups * top_groups if groups else experts
    if gate.shape[1:] != x.shape[1:] or not 0 < top_k <= competing <= experts:
        raise ValueError(
            f"the router got rows {tuple(x.shape)}, a gate {tuple(gate.shape)} and the best {top_k}"
            f" of {competing} experts; rows and gate must have one width, and there must be"
            " enough experts"
        )
    return _Route.apply(x, gate, top_k, groups, top_groups, normalise, scale)


# AdamWTensor of csrc/train/ops.h
_ADAMW_TENSOR = struct.Struct("=7q3d")


def adamw_tensor(grad, master, mean=None, square=None, weight=None, decay=0.0, biases=(1.0, 1.0)):
    """Pack the addresses of one tensor of the optimizer for the functions below.

    All tensors are contiguous and of one size. `grad` is bfloat16 or float32, `weight` is bfloat16
    or None, and the others are float32. The tensors must outlive the calls.
    """
    addresses = [_address(x) for x in (grad, master, mean, square, weight)]
    return _ADAMW_TENSOR.pack(_ELEM[grad.dtype], *addresses, grad.numel(), decay, *biases)


def add_gradients(tensors: list[bytes]) -> None:
    """Add each gradient to its master tensor."""
    lib.train_add_gradients(b"".join(tensors), *_end())


def gradient_norm(tensors: list[bytes]) -> float:
    """Return the norm of all gradients together."""
    return lib.train_squared_norm(b"".join(tensors), *_end()) ** 0.5


def adamw(tensors: list[bytes], lr, beta1, beta2, eps, grad_scale) -> None:
    """Update means, squares, masters and weights as torch.optim.AdamW does.

    Gradients are multiplied by `grad_scale` first. The weights are the rounded masters.
    """
    lib.train_adamw(b"".join(tensors), lr, beta1, beta2, eps, grad_scale, *_end())
