"""Tests that compare every op of `fused` with its definition in `ref`.

In float64, values and all gradients agree up to rounding. In float32 and bfloat16, the error of
`fused` is at most that of `ref`. Odd sizes and the memory that an op may use are tested too.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lamoe import kernels
from lamoe.kernels import fused, ref
from oracles import tiny

SIZES = [1, 3, 63, 64, 65, 127, 130]
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def draw(*shape: int, seed: int = 0, dtype=F64) -> torch.Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=F64
    ).to(dtype)


def run(op: str, impl: str, args: list, dtype) -> list[torch.Tensor]:
    """Run an op in `dtype`. Return [output, gradient of each float input].

    Integer, bool and complex arguments are passed unchanged.
    """
    cast = lambda a: (
        a.to(dtype).requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a
    )
    args = [cast(a.detach().clone()) if torch.is_tensor(a) else a for a in args]
    if op == "rope":  # the table is float32 unless the model is float64
        args[1] = args[1].to(torch.complex128 if dtype == F64 else torch.complex64)
    if op == "experts":  # routing weights are at least float32
        args[2] = args[2].detach().to(torch.promote_types(dtype, F32)).requires_grad_()
    out = getattr(kernels, op)(*args, impl=impl)
    push = draw(*out.shape, seed=7).to(out.dtype)
    (out * push).sum().backward()
    return [out.detach()] + [a.grad for a in args if torch.is_tensor(a) and a.requires_grad]


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest error relative to the largest value, and infinity for NaN or infinity."""
    assert found.shape == exact.shape
    error = (
        (found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)
        if found.numel()
        else torch.zeros(())
    )
    return float(error.nan_to_num(float("inf")))


def check(op: str, *args, bf16: float = 2e-2):
    exact = run(op, "ref", list(args), F64)
    for i, (a, b) in enumerate(zip(run(op, "fused", list(args), F64), exact)):
        assert a.dtype == b.dtype == F64 and distance(a, b) < 1e-12, (
            f"{op} float64, tensor {i}: {distance(a, b):.1e}"
        )
    for dtype, limit in ((F32, 1e-5), (BF16, bf16)):
        rounded = [
            a.to(dtype).double()
            if torch.is_tensor(a) and a.is_floating_point() and not (op == "experts" and j == 2)
            else a
            for j, a in enumerate(args)
        ]
        exact = run(op, "ref", rounded, F64)
        for i, (a, r, b) in enumerate(
            zip(run(op, "fused", rounded, dtype), run(op, "ref", rounded, dtype), exact)
        ):
            assert a.dtype == r.dtype, (
                f"{op} {dtype}, tensor {i}: {a.dtype} is not the definition's {r.dtype}"
            )
            assert distance(a, b) < max(limit, 2 * distance(r, b)), (
                f"{op} {dtype}, tensor {i}: {distance(a, b):.1e}, ref {distance(r, b):.1e}"
            )


# ---- pointwise ----
@pytest.mark.parametrize("d", SIZES[1:])
@pytest.mark.parametrize("lead", [(1,), (2, 5), (2, 3, 4)])
def test_rms_norm(lead, d):
    check("rms_norm", draw(*lead, d), draw(d, seed=1) * 0.3 + 1, 1e-6)


def test_rms_norm_of_width_1():
    """RMSNorm of width 1 gives signs, and gradients near zero, so absolute errors are compared."""
    for dtype, limit in ((F64, 1e-14), (F32, 1e-6)):
        for a, b in zip(
            run("rms_norm", "fused", [draw(9, 1), draw(1), 1e-6], dtype),
            run("rms_norm", "ref", [draw(9, 1), draw(1), 1e-6], F64),
        ):
            assert (a - b).abs().max() < limit


def test_rms_norm_of_zeros_large_and_small_values():
    for scale in (0.0, 1e-4, 1e4):
        x = draw(4, 65) * scale
        for impl in ("ref", "fused"):
            out = run("rms_norm", impl, [x, torch.ones(65, dtype=F64), 1e-6], F32)
            assert all(t.isfinite().all() for t in out)
            assert torch.allclose(
                out[0].double(), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(), atol=1e-6
            )


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("t, r, batch", [(1, 2, 1), (3, 64, 2), (65, 6, 1), (130, 32, 2)])
def test_rope(t, r, batch, interleaved):
    angle = draw(batch, t, r // 2, seed=2) * 100
    freqs = torch.polar(torch.full_like(angle, 1.3), angle)
    check("rope", draw(2, t, 3, r), freqs, interleaved)
    check("rope", draw(2, t, 3, r), freqs[:1], interleaved)  # all sequences share one table


@pytest.mark.parametrize("f", SIZES)
def test_swiglu(f):
    check("swiglu", draw(2, 5, 2 * f) * 3)
    check("swiglu", draw(7, 2 * f) * 3)


def test_swiglu_of_extreme_gates():
    x = torch.tensor([[-200.0, 200.0, 0.0, 2.0, 3.0, 4.0]])
    for impl in ("ref", "fused"):
        out, grad = run("swiglu", impl, [x], F32)
        assert torch.equal(out, torch.tensor([[0.0, 600.0, 0.0]])) and grad.isfinite().all()


# ---- attention ----
@pytest.mark.parametrize("t", SIZES)
def test_attend(t):
    check("attend", draw(2, t, 2, 12), draw(2, t, 2, 12, seed=1), draw(2, t, 2, 7, seed=2), 0.3)


@pytest.mark.parametrize(
    "t, s", [(1, 2), (1, 130), (2, 65), (63, 64), (64, 130), (127, 130), (129, 300), (5, 64)]
)
@pytest.mark.parametrize("h, g", [(4, 4), (4, 2), (4, 1), (3, 1)])
def test_attend_after_a_cache_with_shared_heads(t, s, h, g):
    check("attend", draw(2, t, h, 8), draw(2, s, g, 8, seed=1), draw(2, s, g, 8, seed=2), 0.4)


@pytest.mark.parametrize(
    "t, s", [(1, 1), (3, 3), (65, 65), (130, 130), (257, 257), (1, 64), (64, 130), (130, 200)]
)
def test_attend_with_segments(t, s):
    generator = torch.Generator().manual_seed(t + s)
    starts = torch.rand(2, s, generator=generator) < 0.05
    segments = starts.long().cumsum(1) * torch.tensor([[1], [-3]])
    check(
        "attend",
        draw(2, t, 2, 8),
        draw(2, s, 2, 8, seed=1),
        draw(2, s, 2, 5, seed=2),
        0.4,
        segments,
    )


def test_attend_when_every_token_is_its_own_document():
    """If every token is its own document, the output of a token is its value."""
    q, k, v = draw(1, 130, 2, 8), draw(1, 130, 2, 8, seed=1), draw(1, 130, 2, 5, seed=2)
    for impl in ("ref", "fused"):
        assert torch.allclose(
            kernels.attend(q, k, v, 0.4, torch.arange(130)[None], impl=impl), v, rtol=0, atol=1e-14
        )


def test_attend_with_logits_that_overflow_without_a_maximum():
    q, k, v = draw(1, 65, 2, 8) * 100, draw(1, 65, 2, 8, seed=1) * 100, draw(1, 65, 2, 8, seed=2)
    # Neighbouring bfloat16 values near 1e5 differ by 500: bfloat16 is only checked for finiteness.
    check("attend", q, k, v, 1.0, bf16=2.0)


def test_attend_recomputes_probabilities_of_long_texts(monkeypatch):
    """Gradients are right for long texts, where the backward pass recomputes the probabilities."""
    kept = run(
        "attend",
        "fused",
        args := [draw(1, 200, 2, 8), draw(1, 200, 2, 8, seed=1), draw(1, 200, 2, 8, seed=2), 0.3],
        F64,
    )
    if hasattr(fused, "_KEEP_BYTES"):
        monkeypatch.setattr(fused, "_KEEP_BYTES", 0)
    for a, b in zip(run("attend", "fused", args, F64), kept):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)


def test_attend_ignores_later_positions():
    q, k, v = draw(1, 130, 2, 8), draw(1, 130, 2, 8, seed=1), draw(1, 130, 2, 8, seed=2)
    k[:, 100:], v[:, 100:] = 1e30, float("inf")
    for impl in ("ref", "fused"):
        out = kernels.attend(q, k.clone(), v.clone().clamp_max(1e30), 0.3, impl=impl)
        assert torch.allclose(
            out[:, :100],
            kernels.attend(q[:, :100], k[:, :100], v[:, :100], 0.3, impl="ref"),
            rtol=0,
            atol=1e-13,
        )


@pytest.mark.parametrize("t, s", [(1, 1), (1, 65), (3, 130), (64, 64), (65, 127)])
def test_mla_attend(t, s):
    check(
        "mla_attend",
        draw(2, t, 3, 16),
        draw(2, t, 3, 6, seed=1),
        draw(2, s, 16, seed=2),
        draw(2, s, 6, seed=3),
        0.2,
    )


def test_mla_attend_is_attention_with_one_wide_key_head(impl):
    q, q_rope, latent, k_rope = (
        draw(2, 5, 3, 16),
        draw(2, 5, 3, 6, seed=1),
        draw(2, 9, 16, seed=2),
        draw(2, 9, 6, seed=3),
    )
    wide = kernels.attend(
        torch.cat([q, q_rope], -1),
        torch.cat([latent, k_rope], -1)[:, :, None],
        latent[:, :, None],
        0.2,
    )
    assert torch.allclose(
        kernels.mla_attend(q, q_rope, latent, k_rope, 0.2), wide, rtol=0, atol=1e-13
    )


def test_attend_against_torch(impl):
    q, k, v = draw(2, 65, 4, 8), draw(2, 65, 2, 8, seed=1), draw(2, 65, 2, 8, seed=2)
    theirs = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        scale=0.3,
        enable_gqa=True,
    )
    assert torch.allclose(kernels.attend(q, k, v, 0.3), theirs.transpose(1, 2), rtol=0, atol=1e-13)


# ---- experts ----
def expert_args(n: int, k: int, e: int, d: int = 8, f: int = 5, nobody: float = 0.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed + n)
    expert = torch.rand(n, e, generator=generator).topk(k, -1).indices
    expert = expert.masked_fill(torch.rand(n, k, generator=generator) < nobody, e)
    return [
        draw(n, d),
        expert,
        torch.rand(n, k, generator=generator, dtype=F64),
        draw(e, 2 * f, d, seed=1),
        draw(e, d, f, seed=2),
    ]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("k, nobody", [(1, 0.0), (3, 0.0), (3, 0.3)])
def test_experts(n, k, nobody):
    check("experts", *expert_args(n, k, 8, nobody=nobody))


@pytest.mark.parametrize(
    "n", [62, 63, 64, 65, 66, 126, 127, 128, 129, 130, 191, 192, 193, 255, 256, 257]
)
@pytest.mark.parametrize("nobody", [0.0, 0.02])
def test_experts_around_the_padding_threshold(n, nobody):
    """Experts with about 64 rows are right for every size of the last, partial block."""
    check("experts", *expert_args(n, 2, 4, nobody=nobody))


@pytest.mark.parametrize("n", [3, 65, 300])
def test_experts_when_one_takes_all_or_some_get_nothing(n):
    args = expert_args(n, 2, 6)
    for expert in (
        torch.zeros(n, 2),
        torch.full((n, 2), 5),
        torch.tensor([[1, 4]]).expand(n, 2),
        torch.arange(n)[:, None] % 2 * torch.tensor([[2, 3]]),
    ):
        args[1] = expert.long()
        check("experts", *args)
    exact = run("experts", "fused", args[:1] + [torch.zeros(n, 2).long()] + args[2:], F64)
    # The gradient of an expert without tokens is exactly zero.
    assert exact[3].abs().sum() > 0 and exact[3][1:].abs().sum() == 0


@pytest.mark.parametrize("n", [1, 130])
def test_experts_when_all_assignments_are_dropped(n):
    """If all assignments are dropped, output and gradients are zero."""
    args = expert_args(n, 3, 8)
    args[1] = torch.full_like(args[1], 8)
    for impl in ("ref", "fused"):
        for tensor in run("experts", impl, args, F64):
            assert tensor.abs().sum() == 0


def test_experts_equal_loops(impl):
    x, expert, weight, w13, w2 = expert_args(65, 3, 8, nobody=0.2)
    out = kernels.experts(x, expert, weight, w13, w2)
    for n in range(65):
        row = torch.zeros(8, dtype=F64)
        for e, w in zip(expert[n].tolist(), weight[n]):
            if e < 8:
                gate, up = (w13[e] @ x[n]).chunk(2)
                row += w * (w2[e] @ (gate * torch.sigmoid(gate) * up))
        assert torch.allclose(out[n], row, rtol=0, atol=1e-12)


def test_weights_of_unused_experts_are_not_read(impl):
    """NaN in the weights of dropped assignments and of unused experts has no effect."""
    x, expert, weight, w13, w2 = expert_args(130, 3, 8, nobody=0.3)
    clean = kernels.experts(x, expert.masked_fill(expert == 2, 8), weight, w13, w2)
    expert = expert.masked_fill(expert == 2, 8)
    w13, w2 = w13.clone(), w2.clone()
    w13[2], w2[2] = float("nan"), float("nan")
    weight = weight.masked_fill(expert == 8, float("nan"))
    assert torch.equal(kernels.experts(x, expert, weight, w13, w2), clean)


# ---- cross-entropy ----
@pytest.mark.parametrize("n", [*SIZES, 511, 512, 513, 1100])
def test_cross_entropy(n):
    generator = torch.Generator().manual_seed(n)
    targets = torch.randint(-2, 37, (n,), generator=generator)
    check("cross_entropy", draw(n, 8), draw(37, 8, seed=1), targets, bf16=5e-2)


def test_cross_entropy_equals_that_of_torch(impl):
    h, head, targets = draw(70, 8), draw(37, 8, seed=1), torch.arange(70) % 37
    targets[::5] = -1
    assert torch.allclose(
        kernels.cross_entropy(h, head, targets),
        F.cross_entropy(h @ head.t(), targets, ignore_index=-1),
        rtol=1e-14,
    )


def test_cross_entropy_ignores_every_negative_target(impl):
    h, head = draw(70, 8), draw(37, 8, seed=1)
    targets = torch.arange(70) % 37
    some = targets.clone()
    some[10:] = torch.tensor([-1, -100, -7]).repeat(20)
    kept = kernels.cross_entropy(h[:10], head, targets[:10])
    assert torch.allclose(kernels.cross_entropy(h, head, some), kept, rtol=1e-14)
    h[10:] = 1e6  # ignored positions may hold any finite value
    assert torch.allclose(kernels.cross_entropy(h, head, some), kept, rtol=1e-14)


def test_cross_entropy_without_targets_is_zero_in_fused():
    """If all targets are ignored, loss and gradients are 0, so that a run does not stop.

    The mean of torch over an empty set would be NaN.
    """
    out = run(
        "cross_entropy", "fused", [draw(70, 8), draw(37, 8, seed=1), torch.full((70,), -1)], F64
    )
    assert all(t.abs().sum() == 0 for t in out)


def test_cross_entropy_of_confident_predictions():
    h, head = torch.eye(4, dtype=F64) * 1000, torch.eye(4, dtype=F64)
    for impl in ("ref", "fused"):
        loss, dh, dhead = run("cross_entropy", impl, [h, head, torch.tensor([0, 1, 3, 3])], F64)
        assert loss == pytest.approx(250.0)
        assert dh.isfinite().all() and dhead.isfinite().all()


class Largest(TorchDispatchMode):
    """Record the largest tensor that any op returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(t):
                self.numel = max(self.numel, t.numel())
        return out


def largest(run_it) -> int:
    with Largest() as mode:
        run_it()
    return mode.numel


def test_cross_entropy_never_holds_all_logits():
    n, vocabulary = 4096, 600
    h, head, targets = (
        draw(n, 8, dtype=F32).requires_grad_(),
        draw(vocabulary, 8, dtype=F32).requires_grad_(),
        torch.zeros(n, dtype=torch.long),
    )
    assert (
        largest(lambda: kernels.cross_entropy(h, head, targets, impl="fused").backward())
        <= n * vocabulary // 4
    )
    # The reference op holds all logits, and the recorder detects that.
    assert (
        largest(lambda: kernels.cross_entropy(h, head, targets, impl="ref").backward())
        >= n * vocabulary
    )


def test_the_loss_of_a_model_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr(kernels, "_DEFAULT", "fused")
    c = tiny.config(vocab_size=2000, num_hidden_layers=2)
    m, tokens = tiny.model(c, dtype=F32), tiny.ids(tiny.config(), 32, 64)
    assert largest(lambda: m.loss(tokens, tokens).backward()) <= tokens.numel() * c.vocab_size // 2


def test_attention_never_holds_more_than_the_batch_needs():
    """Attention skips blocks above the causal diagonal, and it never builds a [T, T] mask."""
    q = draw(1, 1024, 1, 4, dtype=F32)
    assert largest(lambda: kernels.attend(q, q, q, 0.5, impl="fused")) < 1024 * 1024 // 2


# ---- finite differences, and the choice of implementations ----
def gradcheck(op: str, *args):
    args = [a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    assert torch.autograd.gradcheck(getattr(fused, op), args, atol=1e-7, rtol=1e-5)


def test_gradcheck():
    gradcheck("rms_norm", draw(2, 3, 5), draw(5), 1e-3)
    gradcheck("swiglu", draw(3, 6))
    for interleaved in (True, False):
        gradcheck(
            "rope",
            draw(1, 3, 2, 4),
            torch.polar(torch.full((1, 3, 2), 1.2, dtype=F64), draw(1, 3, 2)),
            interleaved,
        )
    gradcheck("attend", draw(1, 3, 2, 4), draw(1, 5, 1, 4, seed=1), draw(1, 5, 1, 3, seed=2), 0.4)
    gradcheck(
        "attend",
        draw(1, 4, 1, 4),
        draw(1, 4, 1, 4, seed=1),
        draw(1, 4, 1, 3, seed=2),
        0.4,
        torch.tensor([[0, 0, 1, 1]]),
    )
    gradcheck("experts", *expert_args(5, 2, 3, d=3, f=2, nobody=0.3))
    gradcheck("cross_entropy", draw(5, 3), draw(4, 3, seed=1), torch.tensor([0, 3, -1, 2, 1]))


def test_inputs_are_never_written_to(impl):
    def untouched(op, *args):
        before = [a.clone() if torch.is_tensor(a) else a for a in args]
        leaves = [
            a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args
        ]
        getattr(kernels, op)(*leaves).sum().backward()
        for a, b in zip(leaves, before):
            assert not torch.is_tensor(a) or torch.equal(a, b), op

    untouched("rms_norm", draw(2, 3, 5), draw(5), 1e-3)
    untouched("swiglu", draw(3, 6))
    untouched(
        "rope", draw(1, 3, 2, 4), torch.polar(torch.ones(1, 3, 2, dtype=F64), draw(1, 3, 2)), True
    )
    for t, h, g in ((130, 2, 2), (1, 2, 1), (5, 1, 1)):
        untouched(
            "attend", draw(1, t, h, 4), draw(1, 130, g, 4, seed=1), draw(1, 130, g, 3, seed=2), 0.4
        )
    untouched("mla_attend", draw(1, 2, 3, 4), draw(1, 2, 3, 2), draw(1, 5, 4), draw(1, 5, 2), 0.4)
    untouched("experts", *expert_args(130, 2, 3, nobody=0.3))
    untouched("cross_entropy", draw(5, 3), draw(4, 3, seed=1), torch.tensor([0, 3, -1, 2, 1]))


def test_second_backward_pass_gives_equal_gradients():
    """Two backward passes over one graph agree, so that no saved tensor is overwritten."""
    for op, args in (
        (
            "attend",
            [draw(1, 130, 2, 4), draw(1, 130, 2, 4, seed=1), draw(1, 130, 2, 3, seed=2), 0.4],
        ),
        ("experts", expert_args(130, 2, 3, nobody=0.1)),
        ("swiglu", [draw(3, 6)]),
        ("rms_norm", [draw(3, 6), draw(6), 1e-6]),
        ("cross_entropy", [draw(5, 3), draw(4, 3, seed=1), torch.tensor([0, 3, -1, 2, 1])]),
    ):
        leaves = [
            a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args
        ]
        out = getattr(kernels, op)(*leaves, impl="fused").sum()
        wanted = [a for a in leaves if torch.is_tensor(a) and a.requires_grad]
        for a, b in zip(
            torch.autograd.grad(out, wanted, retain_graph=True), torch.autograd.grad(out, wanted)
        ):
            assert torch.equal(a, b), op


def test_only_some_inputs_need_gradients():
    x, expert, weight, w13, w2 = expert_args(70, 2, 3)
    full = run("experts", "fused", [x, expert, weight, w13, w2], F64)
    x.requires_grad_()
    out = kernels.experts(x, expert, weight, w13, w2, impl="fused")
    (out * draw(*out.shape, seed=7)).sum().backward()
    assert torch.allclose(x.grad, full[1], rtol=0, atol=1e-13)
    h, head = draw(20, 8).requires_grad_(), draw(9, 8)
    kernels.cross_entropy(h, head, torch.arange(20) % 9, impl="fused").backward()
    assert h.grad.abs().sum() > 0


def test_every_fused_op_has_a_reference_and_its_docstring():
    ops = [name for name in dir(kernels) if hasattr(ref, name) and callable(getattr(kernels, name))]
    assert sorted(ops) == [
        "add_rms_norm",
        "attend",
        "cross_entropy",
        "document_mask",
        "embedding",
        "experts",
        "linear",
        "mla_attend",
        "rms_norm",
        "rope",
        "rope_attend",
        "swiglu",
    ]
    for name in ops:
        assert (
            getattr(kernels, name).__doc__ == getattr(ref, name).__doc__
            and getattr(ref, name).__doc__
        )


BROKEN = {
    "rms_norm": (
        lambda x, w, eps: x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * w,
        lambda: test_rms_norm((1,), 3),
    ),
    "rope": (lambda x, f, i: ref.rope(x, f.conj(), i), lambda: test_rope(3, 64, 2, True)),
    "swiglu": (lambda x: ref.swiglu(x.roll(x.shape[-1] // 2, -1)), lambda: test_swiglu(3)),
    "attend": (
        lambda q, k, v, s, seg=None: ref.attend(q, k, v, s),
        lambda: test_attend_with_segments(65, 65),
    ),
    "experts": (
        lambda x, e, w, a, b: ref.experts(x, e % a.shape[0], w, a, b),
        lambda: test_experts(65, 3, 0.3),
    ),
    "cross_entropy": (
        lambda h, w, t: ref.cross_entropy(h, w, t.clamp_min(0)),
        lambda: test_cross_entropy(65),
    ),
}


@pytest.mark.parametrize("op", BROKEN)
def test_comparison_fails_for_broken_ops(op, monkeypatch):
    wrong, test = BROKEN[op]
    monkeypatch.setattr(fused, op, wrong)
    with pytest.raises(AssertionError):
        test()


class _HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy / 2


def test_comparison_fails_for_a_wrong_gradient(monkeypatch):
    monkeypatch.setattr(fused, "swiglu", lambda x: ref.swiglu(_HalfGradient.apply(x)))
    with pytest.raises(AssertionError, match="tensor 1"):
        test_swiglu(3)
