"""Tests of the ops for accelerators, run on the CPU.

Values and gradients equal the definitions in `ref`, no op reads a value on the host, and
FlexAttention's mask is the one of the definition. FlexAttention trains on GPUs only. Here its own
reference implementation runs instead of its kernels.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from test_kernels import BF16, F32, F64, distance, draw, expert_args, run
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode

from lamoe import kernels
from lamoe.kernels import device, ref
from lamoe.model.routing import Balance, Training
from lamoe.train.devices import MicroBatch, QueuedStep
from lamoe.train.optim import MasterAdamW, Optim
from oracles import tiny

aten = torch.ops.aten


class NoWait(TorchDispatchMode):
    """Raises RuntimeError for every operation that would make the host wait for an accelerator."""

    WAITS = {
        aten._local_scalar_dense.default,  # Tensor.item, int(tensor), tolist
        aten.nonzero.default,
        aten.masked_select.default,
        aten.bincount.default,
        aten.equal.default,
        aten.repeat_interleave.Tensor,
        aten._unique2.default,
    }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func in (aten.index.Tensor, aten.index_put_.default) else ()
        if func in self.WAITS or any(i is not None and i.dtype == torch.bool for i in indices):
            raise RuntimeError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def check(op: str, *args, f64: float = 1e-12) -> None:
    """Compare value and gradients with the definition in float64, float32 and bfloat16."""
    for dtype, limit in ((F64, f64), (F32, 1e-5), (BF16, 2e-2)):
        rounded = [
            a.to(dtype).double() if torch.is_tensor(a) and a.is_floating_point() else a
            for a in args
        ]
        found, same = run(op, "device", rounded, dtype), run(op, "ref", rounded, dtype)
        for i, (a, r, b) in enumerate(zip(found, same, run(op, "ref", rounded, F64))):
            assert a.dtype == r.dtype, f"{op} {dtype}, tensor {i}: {a.dtype}"
            assert distance(a, b) < max(limit, 2 * distance(r, b)), (
                f"{op} {dtype}, tensor {i}: {distance(a, b):.1e}, ref {distance(r, b):.1e}"
            )


# ---- parity with the definitions ----
def test_rms_norm_and_swiglu():
    check("rms_norm", draw(2, 3, 130), draw(130, seed=1) * 0.3 + 1, 1e-6)
    check("swiglu", draw(2, 5, 18) * 3)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope(interleaved):
    angle = draw(2, 65, 4, seed=2) * 100
    freqs = torch.polar(torch.full_like(angle, 1.3), angle)
    check("rope", draw(2, 65, 3, 8), freqs, interleaved)
    check("rope", draw(2, 65, 3, 8), freqs[:1], interleaved)


def draw_segments(batch: int, t: int) -> torch.Tensor:
    """Draw segments of documents. The second row counts downwards, the third repeats numbers."""
    starts = torch.rand(batch, t, generator=torch.Generator().manual_seed(t)) < 0.02
    number = starts.long().cumsum(1)
    if batch > 1:
        number[1] *= -3
    if batch > 2:
        number[2] %= 2
    return number


@pytest.mark.parametrize(
    "t, s, h, g, v", [(130, 130, 4, 2, 5), (1, 65, 2, 2, 8), (5, 64, 3, 1, 12), (64, 64, 2, 2, 8)]
)
@pytest.mark.parametrize("packed", [False, True])
def test_attend(t, s, h, g, v, packed):
    segments = draw_segments(3, s) if packed else None
    q, k, v = draw(3, t, h, 8), draw(3, s, g, 8, seed=1), draw(3, s, g, v, seed=2)
    check("attend", q, k, v, 0.4, segments)


@pytest.mark.parametrize("n, k, e", [(65, 3, 8), (130, 2, 4), (3, 2, 6), (1, 1, 1)])
@pytest.mark.parametrize("nobody", [0.0, 0.3, 1.0])
def test_experts(n, k, e, nobody):
    check("experts", *expert_args(n, k, e, nobody=nobody))
    check("experts", *expert_args(n, k, e, d=16, f=8, nobody=nobody))


def test_experts_without_tokens_have_gradient_zero():
    args = expert_args(65, 2, 6, d=16, f=8)
    args[1] = torch.tensor([[1, 4]]).expand(65, 2)
    check("experts", *args)
    _, _, _, dw13, dw2 = run("experts", "device", args, BF16)
    for grad in (dw13, dw2):
        used = grad.flatten(1).abs().sum(1) > 0
        assert used.tolist() == [False, True, False, False, True, False]


def test_expert_outputs_are_rounded_once_to_nearest_even():
    """Half-way sums of two outputs round up and down equally often: the result has no bias."""
    x = torch.zeros(256, 8, dtype=BF16)
    x[:, 0] = 1
    w13 = torch.zeros(2, 16, 8, dtype=BF16)
    w13[:, 0], w13[:, 8] = torch.tensor([100.0, 0, 0, 0, 0, 0, 0, 0]), torch.eye(8)[0]
    w2 = torch.zeros(2, 8, 8, dtype=BF16)
    w2[0, 0, 0], w2[1, 0, 0] = 1, 2**-8  # the sum lies half-way between 1 and the next number
    expert = torch.tensor([[0, 1]]).expand(256, 2)
    weight = torch.full((256, 2), 0.01)
    out = kernels.experts(x, expert, weight, w13, w2, impl="device")
    exact = torch.tensor(1 + 2**-8).to(BF16)
    assert exact == 1 and (out[:, 0] == exact).all()


@pytest.mark.parametrize("n", [1, 70, 513])
def test_cross_entropy(n, monkeypatch):
    monkeypatch.setattr(device, "_LOSS_ELEMENTS", 37 * 128)  # several chunks
    targets = torch.randint(-2, 37, (n,), generator=torch.Generator().manual_seed(n))
    check("cross_entropy", draw(n, 8), draw(37, 8, seed=1), targets)
    nothing = run("cross_entropy", "device", [draw(n, 8), draw(37, 8), targets * 0 - 1], F64)
    assert all(t.abs().sum() == 0 for t in nothing)


# ---- FlexAttention ----
@pytest.mark.parametrize("t", [1, 127, 128, 300, 512])
def test_the_block_mask_covers_the_visible_pairs(t):
    """No visible pair lies outside the mask's blocks, and every pair in a full block is visible."""
    segments = draw_segments(3, t)
    segments[0] = 0
    mask = device.block_mask(segments)
    size = -t % 128 + t
    visible = torch.zeros(3, size, size, dtype=torch.bool)
    visible[:, :t, :t] = ref.visible(t, t, segments)
    tiles = visible.unflatten(1, (-1, 128)).unflatten(3, (-1, 128))
    full = flex._ordered_to_dense(mask.full_kv_num_blocks, mask.full_kv_indices, size // 128)[:, 0]
    part = flex._ordered_to_dense(mask.kv_num_blocks, mask.kv_indices, size // 128)[:, 0]
    assert not (full * part).any()
    assert torch.equal(tiles.any(4).any(2) & ~(full + part).bool(), torch.zeros_like(full).bool())
    assert torch.equal(tiles.all(4).all(2) & full.bool(), full.bool())
    if t == 512:  # only the third row, whose numbers repeat, may visit blocks in vain
        assert torch.equal(tiles.any(4).any(2)[:2], (full + part).bool()[:2])
        assert full[0].sum() == 6


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """Run FlexAttention's reference implementation, with gradients, where its kernels would run."""
    monkeypatch.setattr(device, "_has_flex", lambda _: True)
    monkeypatch.setattr(device, "_flex", lambda: flex.flex_attention)
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("t, h, g, v", [(300, 4, 2, 16), (128, 2, 2, 24)])
def test_attend_through_flex_attention(t, h, g, v, flex_on_cpu, monkeypatch):
    segments = draw_segments(3, t)
    q, k, v = draw(3, t, h, 24), draw(3, t, g, 24, seed=1), draw(3, t, g, v, seed=2)
    monkeypatch.setattr(device, "_fits_flex", lambda q, v: True)  # also float64, for exactness
    calls = []
    monkeypatch.setattr(
        device, "_flex", lambda: lambda *a, **b: (calls.append(1), flex.flex_attention(*a, **b))[1]
    )
    packed = run("attend", "device", [q, k, v, 0.2, device.document_mask(segments)], F64)
    assert calls
    for a, b in zip(packed, run("attend", "ref", [q, k, v, 0.2, segments], F64)):
        assert distance(a, b) < 1e-12


def test_heads_that_flex_attention_cannot_run(flex_on_cpu):
    """Narrow heads and float64 use SDPA, although the mask was prepared for FlexAttention."""
    segments = draw_segments(2, 130)
    q, k, v = draw(2, 130, 2, 8), draw(2, 130, 2, 8, seed=1), draw(2, 130, 2, 8, seed=2)
    mask = device.document_mask(segments)
    assert mask.dense is None
    for a, b in zip(
        run("attend", "device", [q, k, v, 0.2, mask], F64),
        run("attend", "ref", [q, k, v, 0.2, segments], F64),
    ):
        assert distance(a, b) < 1e-12


# ---- the host never waits ----
def test_the_check_detects_operations_that_wait():
    x = torch.arange(3)
    for wait in (
        lambda: x[0].item(),
        lambda: x[x > 1],
        lambda: x.bincount(),
        lambda: x.nonzero(),
        lambda: x.repeat_interleave(x),
        lambda: x.index_put_((x > 1,), x[0]),
    ):
        with NoWait(), pytest.raises(RuntimeError, match="waits for the device"):
            wait()
    fused_args = expert_args(65, 3, 8)
    with NoWait(), pytest.raises(RuntimeError, match="waits for the device"):
        kernels.experts(*fused_args, impl="fused")


def test_copies_to_the_host_are_not_written_down():
    """tolist and the like are no operations that NoWait could see on the CPU."""
    source = Path(device.__file__).read_text()
    assert not re.search(r"\.(tolist|numpy|cpu|item)\(", source)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.parametrize("name", ["mla", "gqa"])
def test_a_training_step_never_waits(name, attention, monkeypatch, request):
    """Forward, losses, dropping, backward, clipping and AdamW read no value on the host."""
    if attention == "flex":
        request.getfixturevalue("flex_on_cpu")
    monkeypatch.setattr(kernels, "_DEFAULT", "device")
    config = {
        "mla": tiny.HARD,
        "gqa": tiny.config("deepseek", num_key_value_heads=2),
    }[name]
    model = tiny.model(config, dtype=F32).to(BF16)
    optimizer = MasterAdamW(model, Optim(warmup_steps=0))
    optimizer.host_never_waits = True
    ids = tiny.ids(config, 2, 33)
    segments = (torch.arange(33) >= 17).long().expand(2, -1)
    balance = Balance(devices=4, capacity_factor=0.8)
    monkeypatch.setattr("lamoe.model.transformer.check_ids", lambda *_: None)  # on the host only
    with NoWait():
        hook = Training(balance, torch.tensor([True, False]))
        loss = model.loss(ids, ids.roll(-1, 1), segments, hook)
        (loss + hook.loss()).backward()
        optimizer.collect()
        micro_batch = MicroBatch(1.0, loss.detach(), hook.loss().detach(), hook.records)
        step = QueuedStep(1, ids, segments, [micro_batch], optimizer.clip(), {})
        optimizer.step(1e-3, step.decide(math.inf, math.inf))
    assert all(int(record.dropped) for record in hook.records)
    assert math.isfinite(step.loss) and step.norm > 0 and not step.skipped
