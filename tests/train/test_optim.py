"""Tests of schedules against numbers computed by hand, and of AdamW against that of torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lamoe.train.optim import Batch, MasterAdamW, Optim


# ---- learning rate ----
def test_lr_of_v2():
    """The learning rate follows section 3.1.2 of the paper.

    It rises to 2.4e-4 in 2K warm-up steps, and is multiplied by 0.316 after 60 % and 90 % of the
    tokens.
    """
    o = Optim()
    assert o.lr_at(0, 0.0) == pytest.approx(1.2e-7)  # the first step has a rate above 0
    assert o.lr_at(999, 0.0) == pytest.approx(1.2e-4)
    assert o.lr_at(1999, 0.1) == o.lr_at(50_000, 0.5999) == 2.4e-4
    assert o.lr_at(60_000, 0.6) == o.lr_at(60_000, 0.8999) == pytest.approx(7.584e-5, rel=1e-12)
    assert o.lr_at(90_000, 0.9) == o.lr_at(99_999, 1.0) == pytest.approx(2.396544e-5, rel=1e-12)


def test_lr_against_values_by_hand():
    o = Optim(lr=1.0, warmup_steps=4, decay_at=(0.5,), decay=0.1)
    assert [o.lr_at(step, step / 8) for step in range(8)] == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, 0.1, 0.1, 0.1, 0.1]
    )
    assert Optim(lr=1.0, warmup_steps=0).lr_at(0, 0.0) == 1.0
    assert Optim(lr=1.0, warmup_steps=10, decay_at=()).lr_at(4, 0.99) == 0.5
    # Warm-up and decay apply at the same step.
    assert Optim(lr=1.0, warmup_steps=10, decay_at=(0.1,), decay=0.5).lr_at(4, 0.2) == 0.25


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(lr=0.0), "optim.lr is 0.0"),
        (dict(lr=-1.0), "optim.lr"),
        (dict(lr=math.inf), "optim.lr"),
        (dict(lr=math.nan), "optim.lr"),
        (dict(lr="fast"), "optim.lr must be float"),
        (dict(lr=True), "optim.lr must be float"),
        (dict(warmup_steps=1.5), "optim.warmup_steps"),
        (dict(warmup_steps=-1), "warmup_steps"),
        (dict(decay_at=(0.9, 0.6)), "increasing"),
        (dict(decay_at=(0.0,)), "above 0"),
        (dict(decay_at=(1.1,)), "at most 1"),
        (dict(decay=0.0), "optim.decay"),
        (dict(beta1=1.0), "beta1"),
        (dict(beta2=math.nan), "beta2"),
        (dict(eps=0.0), "eps"),
        (dict(clip=0.0), "clip"),
        (dict(clip=math.nan), "clip"),
        (dict(weight_decay=-0.1), "weight_decay"),
        (dict(weight_decay=math.nan), "weight_decay"),
        (dict(weight_decay=math.inf), "weight_decay"),
    ],
)
def test_invalid_optim_settings_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        Optim(**bad)


# ---- batch ramp ----
def test_ramp_against_values_by_hand():
    b = Batch(size=16, micro=4, ramp_from=4, ramp_steps=6)
    # The ramp 4, 6, 8, 10, 12, 14 is rounded to multiples of 4, half to even.
    assert [b.size_at(i) for i in range(9)] == [4, 8, 8, 8, 12, 16, 16, 16, 16]
    assert [b.before(i) for i in (0, 1, 2, 6, 7)] == [0, 4, 12, 56, 72]
    assert Batch(size=8, micro=8).before(10) == 80


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_ramp_sizes_are_monotone_and_add_up(data):
    micro, parts, steps = (data.draw(st.integers(1, n)) for n in (5, 12, 25))
    b = Batch(
        size=micro * parts,
        micro=micro,
        ramp_from=data.draw(st.integers(1, micro * parts)),
        ramp_steps=steps,
    )
    sizes = [b.size_at(i) for i in range(steps + 3)]
    assert sizes == sorted(sizes) and sizes[-1] == sizes[steps] == b.size and sizes[0] >= micro
    assert all(s % micro == 0 for s in sizes) and abs(sizes[0] - max(micro, b.ramp_from)) < micro
    assert [b.before(i) for i in range(len(sizes))] == [sum(sizes[:i]) for i in range(len(sizes))]


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(size=6, micro=4), "batch.size 6 is not a multiple of batch.micro 4"),
        (dict(size=0), "at least 1"),
        (dict(micro=0), "at least 1"),
        (dict(size=4, micro=8), "multiple"),
        (dict(ramp_from=4), "set both or neither"),
        (dict(ramp_steps=4), "set both or neither"),
        (dict(ramp_from=9, ramp_steps=2), "at most batch.size 8"),
        (dict(ramp_from=-4, ramp_steps=2), "set both or neither"),
        (dict(size=8.0), "batch.size"),
    ],
)
def test_invalid_batch_settings_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        Batch(**bad)


# ---- AdamW ----
class Net(nn.Module):
    """Matrices, a stack of matrices, a norm weight, and a weight that no input uses."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.a, self.b = (
            nn.Parameter(torch.randn(*s, generator=g).to(dtype)) for s in ((8, 8), (3, 8, 8))
        )
        self.gain, self.unused = (
            nn.Parameter(torch.ones(8, dtype=dtype)),
            nn.Parameter(torch.ones(4, 4, dtype=dtype)),
        )

    def loss(self, x):
        return ((x @ self.a * self.gain) @ self.b.sum(0)).square().mean()


def batches(n, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, generator=g).to(dtype) for _ in range(n)]


def test_float32_equals_adamw_of_torch_bit_for_bit():
    """In float32, training equals a plain program with torch's AdamW and clipping bit for bit."""
    o, lrs = Optim(lr=0.1, clip=0.5), [0.1, 0.05, 0.02, 0.3]
    net, plain = Net(), Net()
    ours = MasterAdamW(net, o)
    theirs = torch.optim.AdamW(
        [
            {"params": [plain.a, plain.b, plain.unused], "weight_decay": 0.1},
            {"params": [plain.gain], "weight_decay": 0.0},
        ],
        lr=1.0,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )
    for lr, x in zip(lrs, batches(4)):
        net.loss(x).backward()
        ours.collect()
        norm = ours.clip()
        ours.step(lr)
        plain.loss(x).backward()
        assert norm == torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5).item() > 0.5
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
        theirs.zero_grad()
    for p, q in zip(net.parameters(), plain.parameters()):
        assert torch.equal(p, q)
    # A weight without a gradient does not decay.
    assert not torch.equal(net.a, Net().a) and torch.equal(net.unused, Net().unused)


def test_decay_acts_on_matrices_only():
    """Weight decay acts on matrices only.

    With zero gradients a step is w * (1 - lr * weight_decay).
    """
    net = Net()
    ours = MasterAdamW(net, Optim(weight_decay=0.5))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    ours.collect()
    ours.step(0.2)
    assert (
        torch.allclose(net.a, Net().a * 0.9)
        and torch.allclose(net.b, Net().b * 0.9)
        and torch.equal(net.gain, Net().gain)
    )


def test_bf16_masters_keep_small_steps():
    """Updates that are too small for bfloat16 add up in the float32 master weights.

    An update of 1e-3 on a weight of 1 is below half of the spacing of bfloat16 (2**-9).
    """
    net = Net(torch.bfloat16)
    alone = net.gain.detach().clone()
    ours = MasterAdamW(net, Optim(eps=1e-30))
    for _ in range(16):
        net.gain.grad = torch.ones_like(net.gain)  # a constant gradient moves by exactly lr
        ours.collect()
        ours.step(1e-3)
        alone -= torch.tensor(1e-3, dtype=torch.bfloat16)
    master = ours.masters[2]
    # Without master weights, the updates are lost.
    assert torch.equal(alone, torch.ones_like(alone))
    assert master.dtype == torch.float32 and torch.allclose(
        master, torch.full((8,), 1 - 16e-3), atol=1e-5
    )
    assert torch.equal(net.gain, master.bfloat16()) and (net.gain < 1).all()


def test_bf16_gradients_add_up_in_float32():
    net = Net(torch.bfloat16)
    ours = MasterAdamW(net, Optim())
    for value in (1.0, 2.0**-10, 2.0**-10):  # the small values would be lost in a bfloat16 sum
        net.gain.grad = torch.full_like(net.gain, value)
        ours.collect()
        assert net.gain.grad is None
    assert torch.equal(ours.grads[2], torch.full((8,), 1 + 2.0**-9))


def test_clip_is_exact():
    net = Net()
    ours = MasterAdamW(net, Optim(clip=2.0))
    net.a.grad, net.gain.grad = torch.full_like(net.a, 3.0), torch.full_like(net.gain, 4.0)
    ours.collect()
    expected = math.sqrt(64 * 9 + 8 * 16)
    assert ours.clip() == pytest.approx(expected, rel=1e-6)
    assert ours.clip() == pytest.approx(2.0, rel=1e-6)  # one global factor keeps the direction
    assert (
        torch.allclose(ours.grads[0], torch.full((8, 8), 3.0 * 2 / expected))
        and ours.grads[3] is None
    )
    before = ours.grads[0].clone()
    ours.max_norm = 3.0
    # Gradients below the limit are not changed.
    assert ours.clip() == pytest.approx(2.0, rel=1e-6) and torch.equal(ours.grads[0], before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clip_reports_gradients_that_are_not_finite(bad):
    net = Net()
    ours = MasterAdamW(net, Optim())
    net.a.grad = torch.ones_like(net.a)
    net.a.grad[0, 0] = bad
    ours.collect()
    assert not math.isfinite(ours.clip())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip(dtype):
    """Six steps with saving and loading after the third equal six steps in a row, bit for bit."""

    def go(net, ours, xs):
        for x in xs:
            net.loss(x).backward()
            ours.collect()
            ours.clip()
            ours.step(0.01)

    xs = batches(6, dtype)
    whole, first, second = Net(dtype), Net(dtype), Net(dtype)
    o, first_o = MasterAdamW(whole, Optim()), MasterAdamW(first, Optim())
    go(whole, o, xs)
    go(first, first_o, xs[:3])
    with torch.no_grad():
        second.a.zero_()  # so that loading has to restore everything
    second_o = MasterAdamW(second, Optim())
    second_o.load_state_dict(first_o.state_dict())
    assert torch.equal(first.a, second.a)
    go(second, second_o, xs[3:])
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(o.masters, second_o.masters))
    assert not torch.equal(first.a, second.a)  # the state was copied, not shared
