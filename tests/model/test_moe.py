"""Tests of the module DeepSeekMoE: comparison with loops, token dropping, gradients.

test_kernels.py tests the ops.
"""

import pytest
import torch

from lamoe import kernels
from lamoe.model import rope, routing
from lamoe.model.layers import MLP
from lamoe.model.moe import MoE
from lamoe.model.routing import Balance, Training
from oracles import naive, tiny

CASES = {
    "greedy": tiny.config(),
    "limited": tiny.config(**tiny.LIMITED),
    "renormalised": tiny.config(norm_topk_prob=True, routed_scaling_factor=3.0),
    "no shared": tiny.config(n_shared_experts=0),
    "top-1": tiny.config(num_experts_per_tok=1),
    "all experts": tiny.config(num_experts_per_tok=8),
    "one expert": tiny.config(n_routed_experts=1, num_experts_per_tok=1),
}


def moe_of(c) -> tuple[MoE, dict]:
    """Return the MoE layer 1 of a random model, and its weights by their names on disk."""
    m = tiny.model(c)
    prefix = "model.layers.1."
    return m.layers[1].ffn, {
        k.removeprefix(prefix): w for k, w in tiny.weights(m).items() if k.startswith(prefix)
    }


def some_x(*shape: int, seed: int = 4) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("b, t", [(1, 1), (2, 7), (3, 65)])
def test_forward_equals_the_loops(name, b, t, impl):
    moe, weights = moe_of(CASES[name])
    x = some_x(b, t, 32)
    out = moe(x)
    assert out.shape == x.shape
    for row, expected in zip(out.flatten(0, 1)[:40].tolist(), x.flatten(0, 1)[:40].numpy()):
        assert row == pytest.approx(naive.moe(CASES[name], weights, expected).tolist(), abs=1e-12)


def test_two_shared_experts_equal_one_wide_expert():
    """Two shared experts are stored as one expert of twice the width.

    Its w13 holds the gate rows of both experts, then the up rows of both.
    """
    c = tiny.config()
    moe, _ = moe_of(c)
    f, x = c.moe_intermediate_size, some_x(1, 5, 32)
    gate, up, down = (
        moe.shared.w13.weight[: 2 * f],
        moe.shared.w13.weight[2 * f :],
        moe.shared.w2.weight,
    )
    each = []
    for half in (slice(0, f), slice(f, 2 * f)):
        one = MLP(32, f).double()
        with torch.no_grad():
            one.w13.weight.copy_(torch.cat([gate[half], up[half]]))
            one.w2.weight.copy_(down[:, half])
        each.append(one(x))
    assert torch.allclose(moe.shared(x), sum(each), rtol=0, atol=1e-13)


def test_a_token_does_not_depend_on_other_tokens():
    """The result of a token does not depend on the other tokens of the batch."""
    moe, _ = moe_of(CASES["limited"])
    x = some_x(4, 80, 32)
    whole = moe(x)
    assert torch.allclose(whole, torch.cat([moe(row[None]) for row in x]), rtol=0, atol=1e-13)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(whole[:, order], moe(x[:, order]), rtol=0, atol=1e-13)


def test_a_dropped_token_keeps_its_shared_experts(impl):
    moe, _ = moe_of(CASES["limited"])
    x = some_x(1, 24, 32)
    # Each device has a budget of one assignment.
    training = Training(Balance(devices=4, capacity_factor=1e-6))
    out, plain, shared = moe(x, training), moe(x), moe.shared(x)
    record = training.records[0]
    assert int(record.dropped) == 24 * 3 - 4
    alone = (out - shared).abs().amax(-1) == 0
    assert int(alone.sum()) >= 24 - 4 and int((~alone).sum()) >= 1
    assert (plain - shared).abs().amax(
        -1
    ).min() > 1e-3  # without dropping, routed experts change every token


def test_a_model_with_everything_dropped_is_its_residual_stream():
    """If all tokens are dropped and there are no shared experts, the MoE layer adds nothing."""
    c = tiny.config(**tiny.LIMITED, n_shared_experts=0)
    block = tiny.model(c).layers[1]
    x = some_x(2, 6, 32)
    freqs = rope.freqs(c, torch.arange(6)[None], torch.float64)
    training = Training(Balance(devices=4, capacity_factor=1e-6))
    out = block(x, freqs, routing_hook=training)
    attended = x + block.attn(block.attn_norm(x), freqs)
    kept = (out - attended).abs().amax(-1) > 0
    assert int(training.records[0].dropped) == 12 * 3 - 4 and int(kept.sum()) <= 4


def test_dropped_assignments_give_no_gradient(impl):
    moe, _ = moe_of(CASES["greedy"])
    x = some_x(2, 24, 32)
    with torch.no_grad():
        moe.gate.weight[3:] -= 100 * x.mean((0, 1))  # few tokens choose experts 3 to 7
    before = routing.route(x.flatten(0, 1), moe.gate.weight, moe.config)
    training = Training(Balance(devices=8, capacity_factor=0.2))
    after = training.after_routing(before, 2, moe.config)
    used = after.expert[after.expert < 8].bincount(minlength=8)
    moe(x, Training(training.balance)).sum().backward()
    for e in range(8):
        assert (moe.experts.w13.grad[e].abs().max() > 0) == bool(used[e] > 0), e
    assert (
        int(used.max()) == -int(-0.2 * 48 * 3 // 8)
        and int(training.records[0].load.max()) > used.max()
    )


def test_the_gate_is_float32_in_a_bfloat16_model(monkeypatch):
    seen = []
    inner = routing.choose
    monkeypatch.setattr(
        routing, "choose", lambda scores, c: seen.append(scores) or inner(scores, c)
    )
    m = tiny.model(tiny.config(**tiny.LIMITED), dtype=torch.bfloat16)
    with kernels.using("fused"):  # native never calls `choose`; test_native_layers.py checks it
        out = m(tiny.ids(m.config, 2, 9))
    assert [s.dtype for s in seen] == [torch.float32] * 2 and out.isfinite().all()
    for s in seen:
        # In bfloat16 these sums would be off by 1e-3.
        assert torch.allclose(s.sum(-1), torch.ones(18), atol=1e-5)
    h = m.layers[1].ffn(torch.randn(1, 4, 32).bfloat16())
    # The float32 weights of the router do not make the residual stream float32.
    assert h.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision_is_close_to_float64(dtype, limit, impl):
    """float32 and bfloat16 outputs are close to float64. All experts are chosen in any dtype."""
    c = CASES["all experts"]
    moe, low = tiny.model(c).layers[1].ffn, tiny.model(c, dtype=dtype).layers[1].ffn
    x = some_x(2, 33, 32)
    exact = moe(x)
    assert (low(x.to(dtype)).double() - exact).abs().max() < limit * exact.abs().max()
