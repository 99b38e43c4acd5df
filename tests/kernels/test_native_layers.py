"""Tests of the compiled norm, SwiGLU, router, and sums over experts, on every instruction set.

Values and gradients are compared with the definitions in float64. Results do not depend on the
number of threads.
"""

import pytest
import torch

from lamoe import kernels
from lamoe.kernels import fused, native, ref
from lamoe.model import routing
from lamoe.model.config import ModelConfig
from native_training import BF16, F32, check, check_threads, draw, dtype, isa, results  # noqa: F401


def norm_of(op):
    return lambda x, w: op(x, w, 1e-6)


def sliced_norm_of(op):
    return lambda x, w: op(x[..., 2:-3], w, 1e-6)


def add_norm_of(op):
    return lambda x, r, w: op(x, r, w, 1e-6)


SHAPES = [(1, 9), (3, 7), (2, 33, 64), (70, 100)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(isa, dtype, shape):
    dim = shape[-1]
    weight, wide = 1 + 0.1 * draw(dim), (*shape[:-1], dim + 5)
    check(norm_of(native.rms_norm), norm_of(ref.rms_norm), [draw(*shape), weight], dtype)
    # Rows with a distance, as a slice of columns has them.
    check(
        sliced_norm_of(native.rms_norm), sliced_norm_of(ref.rms_norm), [draw(*wide), weight], dtype
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(isa, dtype, shape):
    inputs = [draw(*shape), draw(*shape, seed=1), 1 + 0.1 * draw(shape[-1])]
    check(add_norm_of(native.add_rms_norm), add_norm_of(ref.add_rms_norm), inputs, dtype)


def test_norm_values_are_those_of_the_definition(isa):
    """In bfloat16, the normed row is rounded before it is multiplied by the weight, as in ref.

    Only the order of float32 sums differs, so nearly all values are equal bit for bit.
    """
    x, r, w = draw(64, 96).bfloat16(), draw(64, 96, seed=1).bfloat16(), draw(96).bfloat16()
    for found, exact in zip(native.add_rms_norm(x, r, w, 1e-6), ref.add_rms_norm(x, r, w, 1e-6)):
        assert (found == exact).float().mean() > 0.99


def test_add_rms_norm_passes_gradients_of_one_output(isa):
    inputs = [draw(4, 8), draw(4, 8, seed=1), draw(8)]
    for used in (0, 1):
        op = lambda f, u=used: lambda x, r, w: f(x, r, w, 1e-6)[u] + 0 * w.sum()
        found, exact = (results(op(f), inputs) for f in (native.add_rms_norm, ref.add_rms_norm))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, exact))


@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (2, 33, 64), (70, 200)])
def test_swiglu(isa, dtype, shape):
    check(native.swiglu, ref.swiglu, [4 * draw(*shape)], dtype)
    cut = lambda op: lambda x: op(x[..., 2:])
    check(cut(native.swiglu), cut(ref.swiglu), [4 * draw(*shape[:-1], shape[-1] + 2)], dtype)


def test_swiglu_of_large_gates_is_finite(isa):
    x = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 1.0, 1.0, 1.0, 1.0]])
    value, grad = results(native.swiglu, [x])
    assert torch.allclose(value, torch.tensor([[0.0, 0.0, 100.0, 1e4]]), rtol=0, atol=1e-30)
    assert grad.isfinite().all()


# ---- router --------------------------------------------------------------------------------------
def config_of(experts, top_k, groups=1, top_groups=1, norm=False, scale=1.0):
    return ModelConfig.preset("small").replace(
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        topk_method="group_limited_greedy" if groups > 1 else "greedy",
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=norm,
        routed_scaling_factor=scale,
    )


ROUTERS = [
    config_of(2, 1),
    config_of(10, 3),
    config_of(24, 3, groups=4, top_groups=2, norm=True, scale=2.5),
    config_of(64, 6, norm=True),
    config_of(160, 6, groups=8, top_groups=3, scale=16.0),
]


def route_of(config, impl):
    def op(x, gate):
        with kernels.using(impl):
            r = routing.route(x, gate, config)
        return r.scores, r.weight

    return op


@pytest.mark.parametrize("config", ROUTERS)
def test_router(isa, dtype, config):
    for rows, hidden in ((1, 8), (67, 40), (300, 31)):
        inputs = [draw(rows, hidden), draw(config.n_routed_experts, hidden) / hidden**0.5]
        check(route_of(config, "native"), route_of(config, "ref"), inputs, dtype)
        # Scores and weights have the accuracy of float32 in a bfloat16 model too.
        inputs = [x.to(dtype).requires_grad_() for x in inputs]
        exact = route_of(config, "ref")(*(x.double() for x in inputs))
        for a, b in zip(route_of(config, "native")(*inputs), exact):
            assert a.dtype == F32 and torch.allclose(a.double(), b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("config", ROUTERS)
def test_router_chooses_the_experts_of_the_definition(isa, config):
    x = draw(200, 40).requires_grad_()
    gate = draw(config.n_routed_experts, 40)
    with kernels.using("native"):
        found = routing.route(x, gate, config)
    with kernels.using("ref"):
        exact = routing.route(x, gate, config)
    assert torch.equal(found.expert, exact.expert)


def test_gradients_of_the_router_are_exact_to_float32(isa):
    """In bfloat16 models, gradients of logits are not rounded to bfloat16 before they are summed.

    Gradients of +1 and -1 + 2^-10 on the logits of two experts with equal weights cancel except
    for 2^-10, which is below the spacing of bfloat16 numbers near 1.
    """
    x, gate = torch.zeros(1, 32, dtype=BF16), torch.ones(2, 32, dtype=BF16)
    x.requires_grad_()
    scores, _, _ = native.route(x, gate, 1, 0, 0, False, 1.0)
    (dx,) = torch.autograd.grad(scores, x, torch.tensor([[4.0, 0.0]]))
    assert torch.equal(dx, torch.zeros(1, 32, dtype=BF16))  # 1 and -1 cancel
    gate[1] += 2.0**-7
    scores, _, _ = native.route(x, gate, 1, 0, 0, False, 1.0)
    (dx,) = torch.autograd.grad(scores, x, torch.tensor([[4 + 2.0**-8, 0.0]]))
    exact = (1 + 2.0**-10) * (gate[0].float() - gate[1].float())
    assert torch.allclose(dx.float(), exact, rtol=2.0**-8)


def test_equal_scores_go_to_the_first_experts(isa):
    x, gate = torch.zeros(5, 16, requires_grad=True), torch.ones(48, 16)
    _, expert, _ = native.route(x, gate, 3, 0, 0, False, 1.0)
    assert expert.tolist() == [[0, 1, 2]] * 5
    _, expert, _ = native.route(x, gate, 3, 8, 2, False, 1.0)
    assert expert.tolist() == [[0, 1, 2]] * 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_router_shows_inputs_that_are_not_finite(isa, bad):
    """Ids stay valid, so that the next kernel reads no memory outside its tensors."""
    x, gate = draw(3, 16), draw(20, 16)
    x[1, 3] = bad
    for groups in (0, 4):
        _, expert, weight = native.route(x.requires_grad_(), gate, 4, groups, 2, False, 1.0)
        assert not weight[1].isfinite().any() and weight[[0, 2]].isfinite().all()
        assert all(len(set(row)) == 4 for row in expert.tolist())
        assert (expert >= 0).all() and (expert < 20).all()


def test_results_do_not_depend_on_the_number_of_threads(isa, dtype):
    x, weight = draw(333, 50).to(dtype), draw(50).to(dtype)
    check_threads(norm_of(native.rms_norm), [x, weight])
    check_threads(add_norm_of(native.add_rms_norm), [x, x + 1, weight])
    check_threads(native.swiglu, [x])
    check_threads(route_of(ROUTERS[2], "native"), [x, draw(24, 50).to(dtype)])


# ---- sums over experts ---------------------------------------------------------------------------
@pytest.mark.parametrize("impl", [native, fused], ids=["native", "fused"])
def test_sums_over_experts_round_ties_to_even(impl):
    """The sum of a token's rows is rounded once, to nearest even, in outputs and gradients.

    The two experts return exactly x and x / 2, whose sums are often ties, halfway between two
    bfloat16 numbers. Rounding ties away from zero would bias the output of every MoE layer.
    """
    rows, hidden = 1 << 12, 16
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, hidden, generator=generator).bfloat16()
    x[:, 0] = 64.0  # all gates read this column, and silu(64) is exactly 64
    eye, gate = torch.eye(hidden), torch.zeros(hidden, hidden)
    gate[:, 0] = 1.0
    w13 = torch.stack([torch.cat([gate, eye])] * 2).bfloat16()
    w2 = torch.stack([eye / 64, eye / 128]).bfloat16()
    expert = torch.tensor([[0, 1]]).repeat(rows, 1)
    weight = torch.ones(rows, 2)
    x.requires_grad_()
    out = impl.experts(x, expert, weight, w13, w2)
    exact = x.detach().float() * 1.5
    assert ((exact - exact.bfloat16().float()) != 0).float().mean() > 0.3  # there are many ties
    assert torch.equal(out, exact.bfloat16())
    push = torch.randn(rows, hidden, generator=generator).bfloat16()
    push[:, 0] = 0
    (dx,) = torch.autograd.grad(out, x, push)
    assert torch.equal(dx[:, 1:], (push.float() * 1.5).bfloat16()[:, 1:])


# ---- embedding -----------------------------------------------------------------------------------
def test_embedding(isa, dtype):
    """Gradients of an id's rows are summed in float32. Unused ids get 0."""
    ids = torch.randint(0, 70, (3, 101), generator=torch.Generator().manual_seed(0))
    ids[0, :40] = 5
    for dim in (3, 40):
        op, exact = (lambda w, f=m.embedding: f(w, ids) for m in (native, ref))
        check(op, exact, [draw(80, dim)], dtype)
        check_threads(op, [draw(80, dim).to(dtype)])
        strided = lambda f: lambda w: f.embedding(w, ids).transpose(0, 1)
        check(strided(native), strided(ref), [draw(80, dim)], dtype)
    grad = results(op, [draw(80, 40).to(dtype)])[1]
    assert (grad[70:] == 0).all() and grad[5].any()
    assert torch.equal(native.embedding(draw(80, 40), ids.int()), draw(80, 40)[ids])


def test_gradients_of_a_frequent_token_are_not_lost(isa):
    """In a bfloat16 sum, gradients of 2^-9 would be lost next to one of 1."""
    weight = torch.zeros(4, 16, dtype=BF16, requires_grad=True)
    ids = torch.full((257,), 2)
    push = torch.full((257, 16), 2.0**-9, dtype=BF16)
    push[0] = 1.0
    (grad,) = torch.autograd.grad(native.embedding(weight, ids), weight, push)
    assert torch.equal(grad[2], torch.full((16,), 1.5, dtype=BF16))
