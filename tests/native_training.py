"""Fixtures and comparisons for the tests of the compiled training ops (lamoe/kernels/native.py)."""

import pytest
import torch

from lamoe.kernels import native

if native.lib is None:
    pytest.skip("the training kernels are not built", allow_module_level=True)

F32, BF16 = torch.float32, torch.bfloat16
LIMIT = {F32: 2e-6, BF16: 8e-3}  # of an error, relative to the largest value


@pytest.fixture(params=native.lib.features().split(", "))
def isa(request, monkeypatch) -> str:
    monkeypatch.setattr(native, "ISA", request.param)
    return request.param


@pytest.fixture(params=[F32, BF16], ids=["float32", "bfloat16"])
def dtype(request) -> torch.dtype:
    return request.param


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def results(op, inputs, push=None):
    """Return the outputs of an op and the gradients of its inputs.

    The gradient of each output is given by `push`, or random if it is None.
    """
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = op(*inputs)
    out = list(out) if isinstance(out, tuple) else [out]
    push = push or [draw(*o.shape, seed=7) for o in out]
    grads = torch.autograd.grad(out, inputs, [g.to(o.dtype) for g, o in zip(push, out)])
    return [o.detach() for o in out] + list(grads)


def check(op, definition, inputs, dtype, times: float = 1):
    """Compare `op` in `dtype` with `definition` in float64, on the same rounded inputs.

    The limit of the error is `times` that of a product that is rounded once.
    """
    inputs = [x.to(dtype) for x in inputs]
    found = results(op, inputs)
    exact = results(definition, [x.double() for x in inputs])
    assert len(found) == len(exact)
    for i, (a, b) in enumerate(zip(found, exact)):
        assert a.shape == b.shape
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error < times * LIMIT[dtype], f"tensor {i}: {error:.1e}"


def check_threads(op, inputs):
    """The results are equal bit for bit for 1, 2, 3 and 5 threads."""
    before = torch.get_num_threads()
    try:
        all_results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            all_results.append(results(op, inputs))
    finally:
        torch.set_num_threads(before)
    for other in all_results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(all_results[0], other))
