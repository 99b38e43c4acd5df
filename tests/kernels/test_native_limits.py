"""Arguments that the compiled training ops cannot compute: the definition runs, or an error is
raised. The kernels read raw memory, so without these checks they would read or write beyond it."""

import pytest
import torch
from torch.nn import functional as F

from lamoe import kernels
from lamoe.kernels import fused, native, ref
from native_training import BF16, draw, results


def dirty_scratch() -> None:
    """Leave large numbers in the memory that the kernels keep between calls."""
    h, w = draw(600, 64) * 1e3, draw(48, 64)
    for op in (
        lambda h, w: native.linear(h, w),
        lambda h, w: native.route(h, w, 2, 0, 0, False, 1.0)[0],
        lambda h, w: native.cross_entropy(h, w, torch.zeros(600, dtype=torch.int64)),
    ):
        results(op, [h, w])


NO_IDS = torch.empty(0, dtype=torch.int64)
EMPTY = {
    "linear": (lambda x, w: kernels.linear(x, w), [(48, 64)]),
    "cross_entropy": (lambda x, w: kernels.cross_entropy(x, w, NO_IDS), [(48, 64)]),
    "rms_norm": (lambda x, w: kernels.rms_norm(x, w, 1e-6), [(64,)]),
    "experts": (
        lambda x, a, b: kernels.experts(x, NO_IDS.view(0, 2), torch.empty(0, 2), a, b),
        [(4, 32, 64), (4, 64, 16)],
    ),
}


@pytest.mark.parametrize("name", EMPTY)
def test_no_rows_give_weights_no_gradient(name):
    op, shapes = EMPTY[name]
    dirty_scratch()
    _, _, *grads = results(op, [torch.empty(0, 64), *(draw(*s) for s in shapes)])
    assert len(grads) == len(shapes) and all((g == 0).all() for g in grads)


def test_a_router_without_rows_is_not_compiled():
    assert kernels.compiled("route", torch.empty(0, 64), draw(8, 64).requires_grad_()) is None


def test_mixed_dtypes_follow_the_definition():
    x, residual, weight = draw(5, 64).to(BF16).requires_grad_(), draw(5, 64), draw(64)
    assert torch.equal(kernels.rms_norm(x, weight, 1e-6), ref.rms_norm(x, weight, 1e-6))
    for a, b in zip(*(f.add_rms_norm(x, residual, weight, 1e-6) for f in (kernels, ref))):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="dtype"):
        kernels.linear(x, draw(8, 64))
    assert kernels.compiled("route", x, draw(8, 64)) is None
    # Router weights in the dtype of the states, expert ids in 32 bits
    w13, w2 = draw(4, 32, 64).to(BF16), draw(4, 64, 16).to(BF16)
    expert = torch.tensor([[0, 1], [3, 2], [1, 0], [2, 2], [0, 4]])
    router = draw(5, 2)
    exact = native.experts(x, expert, router, w13, w2)
    assert torch.equal(native.experts(x, expert.int(), router, w13, w2), exact)
    rounded = kernels.experts(x, expert, router.to(BF16), w13, w2)
    assert torch.equal(rounded, fused.experts(x, expert, router.to(BF16), w13, w2))


def test_shapes_that_do_not_fit_raise():
    x = draw(5, 64).requires_grad_()
    ids, router = torch.zeros(5, 2, dtype=torch.int64), draw(5, 2)
    w13, w2 = draw(4, 32, 64), draw(4, 64, 16)
    for call in (
        lambda: kernels.linear(x, draw(8, 66)),
        lambda: kernels.rms_norm(x, draw(66), 1e-6),
        lambda: kernels.add_rms_norm(x, draw(4, 64), draw(64), 1e-6),
        lambda: kernels.swiglu(draw(5, 7).requires_grad_()),
        lambda: kernels.experts(x, ids, router, draw(4, 32, 66), w2),
        lambda: kernels.experts(x, ids, router, w13, draw(4, 66, 16)),
        lambda: kernels.cross_entropy(x, draw(8, 66), ids[:, 0]),
    ):
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            call()
    with pytest.raises(ValueError, match="router got rows"):
        native.route(x, draw(8, 66), 2, 0, 0, False, 1.0)
    with pytest.raises(ValueError, match="the best 3 of 2 experts"):
        native.route(x, draw(8, 64), 3, 4, 1, False, 1.0)


def test_attention_with_other_sizes_follows_the_definition():
    """Tables of rotations for more tokens than there are must not be read with a wrong width."""
    b, t, h, n, r, v = 2, 6, 4, 8, 4, 8
    q, kv = draw(b, t, h, n + r).requires_grad_(), draw(b, t, 2, n + v)
    freqs = torch.polar(torch.ones(1, t, r // 2), draw(1, t, r // 2))
    keys = draw(b, t, 1, r)
    assert native.rope_attend(q, kv, keys, freqs, True, 1.0).shape == (b, t, h, v)
    for args in (
        (q, kv, keys, freqs[:, :-1]),
        (q, kv, keys, torch.cat([freqs, freqs], -1)),
        (q, kv[:, :-1], keys, freqs),
        (q[:, :, :3], kv, keys, freqs),
        (q, kv, draw(b, t, 3, r), freqs),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            kernels.rope_attend(*args, True, 1.0)


@pytest.mark.parametrize("target", [48, 1 << 40])
def test_targets_outside_the_vocabulary_raise(target):
    """The kernel would write the gradient of such a logit beyond its memory."""
    targets = torch.tensor([3, target, -1])
    with pytest.raises(ValueError, match="below the vocabulary size 48"):
        kernels.cross_entropy(draw(3, 64).requires_grad_(), draw(48, 64), targets)
    with pytest.raises(ValueError, match="one for each of the 3 rows"):
        kernels.cross_entropy(draw(3, 64).requires_grad_(), draw(48, 64), targets[:1] * 0)


def test_targets_of_32_bits():
    h, head, targets = draw(3, 64).requires_grad_(), draw(48, 64), torch.tensor([3, 7, -1])
    found = native.cross_entropy(h, head, targets.int())
    assert torch.equal(found, native.cross_entropy(h, head, targets))


@pytest.mark.parametrize("bad", [-1, 10])
def test_ids_outside_the_table_raise(bad):
    weight = draw(10, 8).requires_grad_()
    with pytest.raises(IndexError):
        F.embedding(torch.tensor([bad]), weight)
    with pytest.raises(IndexError):
        kernels.embedding(weight, torch.tensor([bad]))
