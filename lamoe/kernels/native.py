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

from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

try:
    from lamoe import _native
except ImportError:
    _native = None
lib: Any = _native
if not hasattr(lib, "train_linear"):  # no kernels, or those of an older build
    lib = None

# The types of the kernels, with their number in csrc/cpu/formats.h.
_ELEM = {torch.float32: 0, torch.bfloat16: 1}
# The instruction set of all ops, for tests. Empty means that of the process.
ISA = ""


def supports(*tensors: torch.Tensor) -> bool:
    """Return whether the ops can compute with these arguments: kernels built, on the CPU, float32
    or bfloat16 like the first one. Router weights are float32, and ids are integers.
    """
    first = tensors[0]
    known = (first.dtype, torch.float32, torch.int64, torch.int32, torch.complex64)
    return (
        lib is not None
        and first.dtype in _ELEM
        and all(t.device.type == "cpu" and t.dtype in known for t in tensors)
    )


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
    return _Linear.apply(x, w)


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
    return _Experts.apply(x, expert, weight, w13, w2)


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
    return _CrossEntropy.apply(h, head, targets)
