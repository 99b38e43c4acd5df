"""Tests of the compiled products, experts and cross-entropy, on every instruction set.

Values and gradients are compared with the definitions in float64. Results do not depend on the
number of threads.
"""

import pytest
import torch

from lamoe import kernels
from lamoe.kernels import native, ref
from native_training import BF16, F32, check, check_threads, draw, dtype, isa, results  # noqa: F401


# ---- linear --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "m, k, n",
    [(1, 1, 1), (2, 3, 5), (33, 16, 17), (77, 50, 33), (128, 64, 96), (600, 96, 1040)],
)
def test_linear(isa, dtype, m, k, n):
    check(native.linear, ref.linear, [draw(m, k), draw(n, k)], dtype)


def test_linear_reads_strided_rows(isa, dtype):
    cut = lambda op: lambda x, w: op(x[:, :, 3:35], w)
    check(cut(native.linear), cut(ref.linear), [draw(2, 9, 40), draw(20, 32)], dtype)
    turned = lambda op: lambda x, w: op(x.transpose(0, 1), w.t())
    check(turned(native.linear), turned(ref.linear), [draw(7, 5, 8), draw(8, 6)], dtype)


def test_linear_takes_gradients_with_strides(isa):
    """The gradient of a transposed output has other strides than the output."""
    turned = lambda op: lambda x, w: op(x, w).transpose(-1, -2) * 2
    check(turned(native.linear), turned(ref.linear), [draw(3, 5, 8), draw(6, 8)], F32)


def test_linear_computes_only_the_gradients_that_are_needed(isa):
    x, w = draw(5, 4), draw(3, 4)
    for used in (0, 1):
        inputs = [x.clone(), w.clone()]
        inputs[used].requires_grad_()
        native.linear(*inputs).sum().backward()
        assert inputs[used].grad is not None and inputs[1 - used].grad is None


def test_linear_does_not_depend_on_the_number_of_threads(isa, dtype):
    check_threads(native.linear, [draw(1100, 48).to(dtype), draw(200, 48).to(dtype)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_linear_does_not_hide_bad_values(isa, dtype, bad):
    """A bad input spoils its own row, and a bad gradient the gradients that depend on it."""
    x, w = draw(40, 32).to(dtype), draw(24, 32).to(dtype)
    x[3, 5] = bad
    y = native.linear(x, w)
    assert not y[3].isfinite().any() and y[4:].isfinite().all()
    push = torch.zeros(40, 24)
    push[7, 2] = bad
    _, dx, dw = results(native.linear, [draw(40, 32).to(dtype), w], [push])
    assert not dx[7].isfinite().any() and not dw[2].isfinite().any()
    assert dx[:7].isfinite().all()


def test_sums_of_bfloat16_rows_are_float32(isa):
    """300 + 1 + 1 + ... would stay 300 in bfloat16."""
    x, w = torch.ones(2, 1001), torch.ones(1, 1001)
    x[:, 0] = 300
    y, dx, dw = results(native.linear, [x.to(BF16), w.to(BF16)], [torch.ones(2, 1)])
    assert (y == 1296).all()  # 1300 rounded to 8 bits, to nearest even


# ---- experts -------------------------------------------------------------------------------------
def assignments(n: int, experts: int, k: int, dropped: float = 0.1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    chosen = torch.rand(n, experts, generator=generator).argsort(1)[:, :k]
    return chosen.masked_fill(torch.rand(n, k, generator=generator) < dropped, experts)


def expert_inputs(n, d, f, e, k):
    return [draw(n, d), draw(n, k).sigmoid(), draw(e, 2 * f, d) / d**0.5, draw(e, d, f) / f**0.5]


def with_assignments(op, expert):
    return lambda x, weight, w13, w2: op(
        x, expert, weight.to(torch.promote_types(x.dtype, F32)), w13, w2
    )


@pytest.mark.parametrize(
    "n, d, f, e, k",
    [
        (1, 2, 1, 2, 1),
        (9, 24, 8, 4, 2),
        (70, 40, 33, 5, 3),
        (300, 64, 96, 4, 4),
        (1700, 16, 16, 2, 2),
    ],
)
def test_experts(isa, dtype, n, d, f, e, k):
    expert = assignments(n, e, k)
    check(
        with_assignments(native.experts, expert),
        with_assignments(ref.experts, expert),
        expert_inputs(n, d, f, e, k),
        dtype,
    )


def test_an_expert_without_tokens_gets_no_gradient(isa, dtype):
    expert = torch.zeros(5, 1, dtype=torch.int64)
    op = with_assignments(native.experts, expert)
    *_, dw13, dw2 = results(op, [x.to(dtype) for x in expert_inputs(5, 8, 4, 3, 1)])
    assert dw13[0].abs().sum() > 0 and not dw13[1:].any() and not dw2[1:].any()


def test_tokens_without_experts_get_zero(isa, dtype):
    """Dropping can leave a token, or a whole layer, without any expert."""
    inputs = [x.to(dtype) for x in expert_inputs(6, 8, 4, 3, 2)]
    expert = assignments(6, 3, 2, dropped=0)
    expert[2] = 3
    out, dx, dweight, *_ = results(with_assignments(native.experts, expert), inputs)
    assert not out[2].any() and not dx[2].any() and not dweight[2].any() and out[3].any()
    none = torch.full((6, 2), 3)
    assert all(not x.any() for x in results(with_assignments(native.experts, none), inputs))


def test_experts_do_not_depend_on_the_number_of_threads(isa, dtype):
    """One expert has more rows than fit in one item of the backward pass."""
    expert = assignments(2000, 3, 2)
    expert[:1600, 0], expert[:1600, 1] = 1, 2
    inputs = [x.to(dtype) for x in expert_inputs(2000, 32, 16, 3, 2)]
    check_threads(with_assignments(native.experts, expert), inputs)


def test_experts_do_not_hide_bad_values(isa, dtype):
    expert = assignments(40, 4, 2, dropped=0)
    inputs = [x.to(dtype) for x in expert_inputs(40, 32, 16, 4, 2)]
    inputs[0][5, 0] = float("nan")
    out = with_assignments(native.experts, expert)(*inputs)
    assert out[5].isnan().all() and out[6:].isfinite().all()


# ---- cross-entropy -------------------------------------------------------------------------------
def with_targets(op, targets):
    return lambda h, head: op(h, head, targets)


def draw_targets(n: int, vocabulary: int, least: int = -1) -> torch.Tensor:
    return torch.randint(least, vocabulary, (n,), generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("n, d, v", [(1, 1, 2), (7, 24, 33), (130, 40, 600), (1100, 16, 530)])
def test_cross_entropy(isa, dtype, n, d, v):
    targets = draw_targets(n, v)
    targets[0] = v - 1
    check(
        with_targets(native.cross_entropy, targets),
        with_targets(ref.cross_entropy, targets),
        [draw(n, d), draw(v, d)],
        dtype,
        times=2,  # logits are rounded too, as in the definition
    )


def test_cross_entropy_without_targets_is_zero(isa, dtype):
    inputs = [draw(5, 8).to(dtype), draw(20, 8).to(dtype)]
    for x in results(with_targets(native.cross_entropy, torch.full((5,), -1)), inputs):
        assert not x.any()


def test_cross_entropy_of_large_logits_is_exact(isa, dtype):
    h, head = torch.tensor([[1e4], [-1e4], [1.0]]), torch.tensor([[1.0], [-1.0]])
    op = with_targets(native.cross_entropy, torch.tensor([0, 1, 1]))
    loss, dh, dhead = results(op, [h.to(dtype), head.to(dtype)])
    assert loss == pytest.approx(2.126928 / 3, rel=1e-5) and dh.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 18])
def test_cross_entropy_does_not_hide_bad_values(isa, dtype, bad, column):
    """Column 18 is among the last columns, which do not fill a vector."""
    head = draw(20, 8).to(dtype)
    head[column, 0] = bad
    op = with_targets(native.cross_entropy, torch.tensor([1, 2, 3]))
    assert not results(op, [draw(3, 8).abs().to(dtype), head])[0].isfinite()


def test_cross_entropy_is_multiplied_by_the_gradient_of_the_loss(isa):
    targets = draw_targets(5, 20)
    check(
        lambda h, w: native.cross_entropy(h, w, targets) * 3,
        lambda h, w: ref.cross_entropy(h, w, targets) * 3,
        [draw(5, 8), draw(20, 8)],
        F32,
    )


def test_cross_entropy_does_not_depend_on_the_number_of_threads(isa, dtype):
    inputs = [draw(700, 16).to(dtype), draw(1100, 16).to(dtype)]
    check_threads(with_targets(native.cross_entropy, draw_targets(700, 1100)), inputs)


# ---- choice --------------------------------------------------------------------------------------
def test_training_uses_native_and_inference_does_not(monkeypatch):
    seen = []
    inner = native.linear
    monkeypatch.setattr(native, "linear", lambda x, w: seen.append(x.dtype) or inner(x, w))
    x, w = draw(4, 8), draw(3, 8)
    kernels.linear(x, w)
    assert not seen
    w.requires_grad_()
    with torch.no_grad():
        kernels.linear(x, w)
    kernels.linear(x.double(), w.double())
    kernels.linear(x, w, impl="ref")
    assert not seen
    kernels.linear(x, w)
    with kernels.using("native"):
        kernels.linear(x.to(BF16), w.detach().to(BF16))
    assert seen == [F32, BF16]


def test_using_ends_with_its_block():
    with pytest.raises(ValueError, match="impl is 'fast'; known: ref, fused, native, device"):
        with kernels.using("fast"):
            pass
    with pytest.raises(ZeroDivisionError), kernels.using("ref"):
        assert kernels._DEFAULT == "ref"
        1 / 0
    assert kernels._DEFAULT != "ref"
