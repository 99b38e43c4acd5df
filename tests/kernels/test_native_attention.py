"""Tests of the compiled attention of training on every instruction set, against ref in float64."""

import pytest
import torch

from lamoe import kernels
from lamoe.kernels import fused, native, ref

pytestmark = pytest.mark.skipif(native.lib is None, reason="needs the compiled kernels")
ISAS = native.lib.features().split(", ") if native.lib else []
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
LIMIT = {F64: 1e-12, F32: 4e-6, BF16: 1.5e-2}
# Letters as in ref.rope_attend: B, T, H, G, N, R, V, heads of k_rope.
SHAPES = {
    "mla": (2, 77, 3, 3, 64, 32, 64, 1),
    "mla-wide": (1, 70, 2, 2, 128, 64, 128, 1),
    "mha": (2, 65, 3, 3, 0, 32, 32, 3),
    "gqa": (1, 130, 4, 2, 0, 16, 16, 2),
    "mqa": (2, 33, 3, 1, 0, 32, 32, 1),
    "grouped, one rotary key": (1, 40, 4, 2, 8, 4, 12, 1),
    "no rotary key": (2, 33, 2, 2, 24, 0, 16, 1),
    "odd widths": (1, 50, 2, 2, 7, 6, 10, 1),
    "one token": (2, 1, 2, 2, 16, 8, 16, 1),
    "chunks": (1, 1100, 1, 1, 4, 4, 8, 1),
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def arguments(shape: tuple[int, ...], tables: int = 1) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return ([q, kv, k_rope] in float64, freqs) for a shape of SHAPES."""
    b, t, h, g, n, r, v, rotary = shape
    inputs = [draw(b, t, h, n + r), draw(b, t, g, n + v, seed=1), draw(b, t, rotary, r, seed=2)]
    angle = draw(tables, t, r // 2, seed=3) * 100
    return inputs, torch.polar(torch.full_like(angle, 1.2), angle)


def documents(b: int, t: int, seed: int = 0) -> torch.Tensor:
    """Return segments [B, T] with some documents in each row, among them one of a single token."""
    starts = torch.rand(b, t, generator=torch.Generator().manual_seed(seed)) < 4 / t
    starts[:, t // 2 : t // 2 + 2] = True
    return starts.long().cumsum(1) + 5


def run(op, inputs, freqs, dtype, interleaved=True, scale=0.3, segments=None) -> list[torch.Tensor]:
    """Run an op in `dtype`. Return [output, gradients of q, kv and k_rope]."""
    inputs = [x.to(dtype).detach().clone().requires_grad_() for x in inputs]
    freqs = freqs.to(torch.complex128 if dtype == F64 else torch.complex64)
    out = op(*inputs, freqs, interleaved, scale, segments)
    push = draw(*out.shape, seed=7).to(BF16).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, push)]


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest error relative to the largest value (at least 1), infinity for NaN."""
    assert found.shape == exact.shape
    if not found.numel():
        return 0.0
    error = (found.detach().double() - exact).abs().max() / exact.abs().max().clamp_min(1)
    return float(error.nan_to_num(float("inf")))


def check(op, inputs, freqs, dtype, *rest):
    """Compare an op in `dtype` with ref in float64 for equal inputs."""
    inputs = [x.to(dtype).double() for x in inputs]
    exact = run(ref.rope_attend, inputs, freqs, F64, *rest)
    names = ("output", "gradient of q", "gradient of kv", "gradient of k_rope")
    for name, a, b in zip(names, run(op, inputs, freqs, dtype, *rest), exact):
        assert a.dtype == dtype and distance(a, b) < LIMIT[dtype], f"{name}: {distance(a, b):.1e}"


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fused_computes_the_definition(shape, interleaved):
    for segments in (None, documents(*shape[:2])):
        check(fused.rope_attend, *arguments(shape), F64, interleaved, 0.3, segments)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("isa", ISAS)
def test_values_and_gradients(isa, shape, dtype, monkeypatch):
    monkeypatch.setattr(native, "ISA", isa)
    monkeypatch.setattr(fused, "rope_attend", None)  # the kernels support all of these shapes
    for segments in (None, documents(*shape[:2])):
        check(native.rope_attend, *arguments(shape), dtype, True, 0.3, segments)
    check(native.rope_attend, *arguments(shape, shape[0]), dtype, False, 0.1)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_packed_documents_equal_separate_ones(isa, dtype, monkeypatch):
    """Documents of many lengths around the sizes of blocks and chunks do not see each other."""
    monkeypatch.setattr(native, "ISA", isa)
    lengths = [1, 31, 32, 33, 400, 20, 100, 5, 300, 250, 2]
    inputs, freqs = arguments((1, sum(lengths), 2, 2, 8, 8, 16, 1))
    segments = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    packed = run(native.rope_attend, inputs, freqs, dtype, True, 0.3, segments)
    for begin, end in zip(*[iter(_bounds(lengths))] * 2):
        own = [x[:, begin:end].to(dtype).clone().requires_grad_() for x in inputs]
        out = native.rope_attend(*own, freqs[:, begin:end].to(torch.complex64), True, 0.3)
        push = draw(*packed[0].shape, seed=7).to(BF16).to(dtype)[:, begin:end]
        for a, b in zip(packed, (out.detach(), *torch.autograd.grad(out, own, push))):
            assert distance(a[:, begin:end], b.double()) < LIMIT[dtype]


def _bounds(lengths: list[int]) -> list[int]:
    """Return the begin and the end of each document, one after the other."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [bound for end, n in zip(ends, lengths) for bound in (end - n, end)]


def test_documents_that_come_back_use_fused():
    """An id that comes back names the same document, which the kernels do not support."""
    inputs, freqs = arguments(SHAPES["mla"])
    segments = torch.arange(77)[None].expand(2, -1) // 20 % 2
    check(native.rope_attend, inputs, freqs, F32, True, 0.3, segments)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_results_do_not_depend_on_threads(dtype):
    threads = torch.get_num_threads()
    try:
        for shape in (SHAPES["mla"], SHAPES["gqa"], SHAPES["chunks"]):
            inputs, freqs = arguments(shape)
            results = []
            for n in (1, 2, 3, 5):
                torch.set_num_threads(n)
                segments = documents(*shape[:2])
                results.append(run(native.rope_attend, inputs, freqs, dtype, True, 0.3, segments))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_inputs_are_read_with_their_strides(dtype):
    """Slices of wider tensors, as the model passes them, give the bits of contiguous tensors."""
    (q, kv, k_rope), freqs = arguments(SHAPES["mla"])
    wide = [
        torch.cat([x, x], -1)[..., x.shape[-1] :].to(dtype)  # rows with a gap between them
        for x in (q.flatten(2), kv.flatten(2), k_rope.flatten(2))
    ]
    views = [w.unflatten(-1, x.shape[2:]) for w, x in zip(wide, (q, kv, k_rope))]
    by_head = q.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    freqs = freqs.to(torch.complex64)
    plain = native.rope_attend(*(x.to(dtype) for x in (q, kv, k_rope)), freqs, True, 0.3)
    assert torch.equal(native.rope_attend(*views, freqs, True, 0.3), plain)
    assert torch.equal(native.rope_attend(by_head, *views[1:], freqs, True, 0.3), plain)


@pytest.mark.parametrize("isa", ISAS)
def test_gradients_equal_finite_differences(isa, monkeypatch):
    monkeypatch.setattr(native, "ISA", isa)
    inputs, freqs = arguments((1, 40, 4, 2, 8, 4, 12, 1))
    segments, push = documents(1, 40), draw(1, 40, 4, 12, seed=7).to(BF16).double()
    grads = run(native.rope_attend, inputs, freqs, F32, True, 0.3, segments)[1:]
    for i, grad in enumerate(grads):
        direction, step = draw(*inputs[i].shape, seed=9), 1e-5

        def loss(sign):
            moved = list(inputs)
            moved[i] = inputs[i] + sign * step * direction
            return (ref.rope_attend(*moved, freqs, True, 0.3, segments) * push).sum()

        slope = float((loss(1) - loss(-1)) / (2 * step))
        assert float((grad.double() * direction).sum()) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_large_logits(isa, dtype, monkeypatch):
    monkeypatch.setattr(native, "ISA", isa)
    inputs, freqs = arguments(SHAPES["mla"])
    inputs[0] *= 30
    out, *grads = run(native.rope_attend, inputs, freqs, dtype, True, 1.0)
    rounded = [x.to(dtype) for x in inputs]
    exact = run(ref.rope_attend, rounded, freqs, F64, True, 1.0)[0]
    error = distance(run(ref.rope_attend, rounded, freqs, dtype, True, 1.0)[0], exact)
    assert distance(out, exact) < 2 * error < 0.6
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_values_that_are_not_finite_are_not_hidden(isa, dtype, value, monkeypatch):
    monkeypatch.setattr(native, "ISA", isa)
    for tensor, element in ((0, 0), (0, -1), (1, 0), (1, -1), (2, 0)):
        for token in (0, 40, 76):
            inputs, freqs = arguments(SHAPES["mla"])
            inputs[tensor][0, token, 0, element] = value
            out, *grads = run(native.rope_attend, inputs, freqs, dtype, True, 0.3)
            assert not out[0, token:].isfinite().all()
            if (tensor, element) != (1, -1):  # a value of 0 * NaN reaches some earlier tokens
                assert out[0, :token].isfinite().all()
            assert not all(g[0].isfinite().all() for g in grads)
            assert out[1].isfinite().all() and all(g[1].isfinite().all() for g in grads)


def test_other_arguments_use_fused():
    """Complex128 tables, an odd width of bfloat16 values, and no tokens at all."""
    inputs, freqs = arguments(SHAPES["mla"])
    q, kv, k_rope = (x.to(BF16) for x in inputs)
    for args in ((q, kv, k_rope, freqs), (q, kv[..., :-1], k_rope, freqs.to(torch.complex64))):
        found = native.rope_attend(*args, True, 0.3)
        assert torch.equal(found, fused.rope_attend(*args, True, 0.3))
    empty = [x[:, :0] for x in (q, kv, k_rope)]
    assert native.rope_attend(*empty, freqs[:, :0], True, 0.3).shape == (2, 0, 3, 64)


def test_second_backward_pass_gives_equal_gradients():
    inputs, freqs = arguments(SHAPES["gqa"])
    inputs = [x.to(F32).requires_grad_() for x in inputs]
    out = kernels.rope_attend(*inputs, freqs.to(torch.complex64), True, 0.3, impl="native").sum()
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(out, inputs)))
