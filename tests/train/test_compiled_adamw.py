"""Tests of the compiled AdamW of bfloat16 models against torch.optim.AdamW."""

import math

import pytest
import torch
from torch import nn

from lamoe.kernels import native
from lamoe.train.optim import MasterAdamW, Optim

if native.lib is None:
    pytest.skip("the training kernels are not built", allow_module_level=True)

SHAPES = [(3, 5), (17,), (257, 301), (2, 5, 7), (4, 4)]  # the last one never has a gradient
OPTIM = Optim(clip=0.5, beta1=0.8, weight_decay=0.3)


@pytest.fixture(params=native.lib.features().split(", "))
def isa(request, monkeypatch) -> str:
    monkeypatch.setattr(native, "ISA", request.param)
    return request.param


class Net(nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(s, generator=g).to(dtype) for s in SHAPES)


def gradients(steps: int) -> list[list[torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [[torch.randn(s, generator=g).bfloat16() for s in SHAPES[:-1]] for _ in range(steps)]


def set_gradients(net: Net, grads: list[torch.Tensor]) -> None:
    for p, g in zip(net.weights, grads):
        p.grad = g.to(p.dtype)


def train(net, optimizer, steps, micro=1):
    for i, grads in enumerate(steps):
        for _ in range(micro):
            set_gradients(net, grads)
            optimizer.collect()
        optimizer.clip()
        optimizer.step(1e-2 / (1 + i))


@pytest.mark.parametrize("micro", [1, 3])
def test_twenty_steps_equal_those_of_torch(isa, micro):
    """Masters equal a float32 run of torch's AdamW up to float32 rounding, and the weights equal
    the rounded masters bit for bit."""
    net, plain = Net(), Net().float()
    ours, theirs = MasterAdamW(net, OPTIM), MasterAdamW(plain, OPTIM)
    assert ours.compiled and not theirs.compiled
    steps = gradients(20)
    train(net, ours, steps, micro)
    train(plain, theirs, steps, micro)
    for p, m, q in zip(net.weights, ours.masters, plain.weights):
        assert torch.allclose(m, q, rtol=1e-5, atol=1e-6) and torch.equal(p, m.bfloat16())
    assert torch.equal(net.weights[-1], Net().weights[-1])  # no gradient, no decay
    assert not torch.equal(net.weights[0], Net().weights[0])
    a, b = (o.state_dict()["adamw"] for o in (ours, theirs))
    assert a.keys() == b.keys() and all(a[i].keys() == b[i].keys() for i in a)
    for i in a:
        for key in a[i]:
            assert a[i][key].dtype == b[i][key].dtype
            assert torch.allclose(a[i][key], b[i][key], rtol=1e-4, atol=1e-7)


def test_gradients_of_one_micro_batch_are_not_copied():
    net = Net()
    optimizer = MasterAdamW(net, OPTIM)
    set_gradients(net, gradients(1)[0])
    address = net.weights[2].grad.data_ptr()
    optimizer.collect()
    assert optimizer.grads[2].dtype == torch.bfloat16
    assert optimizer.grads[2].data_ptr() == address and net.weights[2].grad is None
    optimizer.clip()
    assert torch.equal(optimizer.grads[2], gradients(1)[0][2])  # scaled only when they are used


def test_norm(isa):
    net = Net()
    optimizer = MasterAdamW(net, OPTIM)
    set_gradients(net, gradients(1)[0])
    optimizer.collect()
    exact = math.sqrt(sum(float(g.double().square().sum()) for g in gradients(1)[0]))
    assert optimizer.clip() == pytest.approx(exact, rel=1e-6)
    assert optimizer.clip() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_gradients_that_are_not_finite(isa, bad):
    """The norm is not finite and the gradients can be discarded. The next step is as usual."""
    net, other = Net(), Net()
    optimizer, reference = MasterAdamW(net, OPTIM), MasterAdamW(other, OPTIM)
    first, second = gradients(2)
    first[2][256, 300] = bad
    set_gradients(net, first)
    optimizer.collect()
    assert not math.isfinite(optimizer.clip())
    optimizer.discard()
    assert all(g is None for g in optimizer.grads)
    train(net, optimizer, [second])
    train(other, reference, [second])
    assert all(torch.equal(p, q) for p, q in zip(net.weights, other.weights))


def test_the_number_of_threads_changes_nothing(isa):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            net = Net()
            optimizer = MasterAdamW(net, OPTIM)
            train(net, optimizer, gradients(3), micro=2)
            results.append([*optimizer.masters, *net.weights])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_a_backward_pass_through_updated_weights_raises():
    """Autograd sees the update, as it sees torch's, and refuses gradients of other weights."""
    net = Net()
    optimizer, x = MasterAdamW(net, OPTIM), torch.ones(4, 4, requires_grad=True)
    loss = (x * net.weights[-1]).sum()
    loss.backward(retain_graph=True)
    optimizer.collect()
    optimizer.clip()
    optimizer.step(1e-2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("earlier", ["compiled", "torch"])
def test_resume(earlier, monkeypatch):
    """A run resumed from a checkpoint of either implementation continues as without a break.

    Bit for bit after the compiled one, up to float32 rounding after torch's.
    """
    steps = gradients(6)
    whole, first, second = Net(), Net(), Net()
    whole_optimizer, resumed = MasterAdamW(whole, OPTIM), MasterAdamW(second, OPTIM)
    train(whole, whole_optimizer, steps[:3])
    train(whole, whole_optimizer, steps[3:])
    if earlier == "torch":
        monkeypatch.setattr(native, "lib", None)
    first_optimizer = MasterAdamW(first, OPTIM)
    assert first_optimizer.compiled == (earlier == "compiled")
    train(first, first_optimizer, steps[:3])
    resumed.load_state_dict(first_optimizer.state_dict())
    monkeypatch.undo()
    train(second, resumed, steps[3:])
    for a, b in zip(whole_optimizer.masters, resumed.masters):
        if earlier == "compiled":
            assert torch.equal(a, b)
        else:
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
