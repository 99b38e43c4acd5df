"""Tests of compiled RMSNorm, RoPE, SwiGLU and attention on every instruction set.

The reference is ref.py in float64. Sizes include odd ones. Memory that must not be read holds NaN.
"""

import pytest
import torch
from test_native import EPS, ISAS, draw, formats, isas, rounded_inputs

import native_ops
from lamoe.backends import cache_codec
from lamoe.backends.cpu import native
from lamoe.backends.cpu.backend import codec_numbers
from lamoe.kernels import ref

pytestmark = pytest.mark.skipif(native_ops.lib is None, reason="needs lamoe._native_test")
NAN = float("nan")


@isas
@pytest.mark.parametrize("n", [1, 3, 15, 16, 17, 63, 64, 65, 127, 5120])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e15])
def test_rms_norm(isa, n, size):
    x, w = draw(7, n, seed=n) * size, draw(n, seed=1)
    x[1], x[3] = NAN, 0
    x[5, n // 2] = float("inf")
    got, want = native_ops.rms_norm(x, w, 1e-6, isa), ref.rms_norm(x.double(), w.double(), 1e-6)
    good = [0, 2, 3, 4, 6]  # rows without NaN or infinity
    assert (
        ((got - want).abs() <= (n + 8) * EPS * want.abs() + 1e-37)[good].all()
        and not got[1].isfinite().any()
        and not got[5, n // 2].isfinite()
    )
    assert torch.equal(native_ops.rms_norm(x[:1], w, 1e-6, isa), got[:1])


@isas
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("r", [2, 6, 14, 16, 34, 64, 126])
def test_rope(isa, interleaved, r):
    x, angle = draw(5, r, seed=r), 1000 * draw(5, r // 2, seed=1)
    x[2] = NAN
    got = native_ops.rope(x, torch.cat([angle.cos(), angle.sin()], 1), interleaved, isa)
    want = ref.rope(
        x.double()[None, :, None],
        torch.complex(angle.cos().double(), angle.sin().double())[None],
        interleaved,
    )[0, :, 0]
    good = [0, 1, 3, 4]
    assert ((got - want).abs() <= 4 * EPS * x[good].abs().amax())[good].all()
    assert got[2].isnan().all()


@isas
@formats
@pytest.mark.parametrize("f", [1, 15, 16, 17, 63, 64, 65, 130])
def test_swiglu(fmt, isa, f):
    full = -(-f // 16) * 16
    # The kernel processes blocks of 192 rows.
    for m, d in [(1, 1), (3, 65), (13, 17), (25, 64), (200, 127)]:
        w13 = torch.zeros(2, full, d)
        w13[:, :f] = draw(2, f, d, seed=d)
        data, scale = native.pack(fmt, w13.flatten(0, 1))
        stored = (
            native.unpack(fmt, data, 2 * full, d, scale)
            .double()
            .unflatten(0, (2, full))[:, :f]
            .flatten(0, 1)
        )
        x, weight = draw(m, d, seed=m), draw(m, seed=2)
        got = native_ops.swiglu(fmt, data, scale, f, x, weight, isa)
        inputs = rounded_inputs(fmt, x)
        both, error = inputs @ stored.t(), (d + 8) * EPS * (inputs.abs() @ stored.abs().t())
        want = ref.swiglu(both) * weight[:, None].double()
        (gate, up), (gate_error, up_error) = both.abs().chunk(2, -1), error.chunk(2, -1)
        limit = (
            (1.1 * gate_error * (up + up_error) + gate * up_error) * weight[:, None].abs()
            + 1e-6 * want.abs()
            + 1e-30
        )
        assert (
            got.shape == (m, -(-f // 64) * 64)
            and not got[:, f:].any()
            and ((got[:, :f] - want).abs() <= limit).all()
        )
        if m > 2:
            x[1, d - 1], weight[2] = NAN, NAN
            changed = native_ops.swiglu(fmt, data, scale, f, x, weight, isa)
            others = [i for i in range(m) if i not in (1, 2)]
            assert (
                torch.equal(changed[others], got[others])
                and not changed[1:3, :f].isfinite().any()
                and not changed[:, f:].any()
            )


@isas
def test_swiglu_of_extreme_gates(isa):
    """SwiGLU is right for gates that make exp overflow.

    The only input is 1, so gate and up are the weights themselves.
    """

    def silu(gates: torch.Tensor) -> torch.Tensor:
        w13 = torch.stack(
            [torch.nn.functional.pad(g, (0, -len(g) % 16)) for g in (gates, torch.ones(len(gates)))]
        )
        data, scale = native.pack("fp32", w13.flatten()[:, None])
        return native_ops.swiglu(
            "fp32", data, scale, len(gates), torch.ones(1, 1), torch.ones(1), isa
        )[0, : len(gates)]

    gates = torch.cat(
        [
            torch.tensor([-0.0, 0.0, 20.0, 88.0, 89.0, 100.0, 1e10, 1e30, 3e38]),
            -torch.linspace(1, 100, 400),
        ]
    )
    got, want = silu(gates), torch.nn.functional.silu(gates.double())
    # The error grows with |x|, because exp(x) is computed from the rounded x log2(e).
    limit = (1e-6 + 1e-7 * gates.abs().clamp(max=100)) * want.abs() + 1e-36
    assert ((got - want).abs() <= limit).all()
    far = silu(-torch.tensor([89.0, 100.0, 1000.0, 1e10, 1e30, 1e34, 1e36, 3e38]))
    assert (far == 0).all() and far.signbit().all()
    beyond = native_ops.swiglu(
        "fp32",
        native.pack("fp32", -torch.ones(32, 1) * 1e30)[0],
        1.0,
        16,
        torch.tensor([[1e30]]),
        torch.ones(1),
        isa,
    )[0, :16]
    # A gate that overflows must not give 0, because 0 would look like a valid result.
    assert not beyond.isfinite().any()


# ---- attention in lanes ----
def attended(rows, q, last, k0, v0, vw, scale):
    """Apply ref.attend in float64, for each query over the rows that it sees.

    Returns:
        the outputs, and the same weighted sums of absolute values (the scale of rounding errors).
    """
    k, v = rows[:, k0 : k0 + q.shape[1]].double(), rows[:, v0 : v0 + vw].double()

    def one(q, n, v):
        return ref.attend(
            q.double()[None, None, None], k[None, : n + 1, None], v[None, : n + 1, None], scale
        )[0, 0, 0]

    return tuple(
        torch.stack([one(x, int(n), values) for x, n in zip(q, last)]) for values in (v, v.abs())
    )


SHAPES = [  # (lanes, key width, value width, rows, chunk)
    (1, 2, 1, 1, 64),
    (2, 6, 15, 3, 64),
    (3, 18, 17, 63, 64),
    (5, 34, 16, 64, 64),
    (7, 64, 33, 65, 64),
    (8, 66, 63, 127, 1000),
    (15, 16, 64, 129, 33),
    (16, 576, 512, 200, 128),
    (4, 128, 127, 300, 64),
]


@isas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lanes, kw, vw, n, chunk", SHAPES)
@pytest.mark.parametrize("sharp", [0.3, 30.0])
def test_attention_in_lanes(isa, dtype, lanes, kw, vw, n, chunk, sharp):
    """Attention in lanes equals ref.attend.

    Rows are laid out as in MLA (values are the first key columns) or MHA (separate columns). All
    other columns hold NaN.
    """
    q, scale = draw(lanes, kw, seed=1).to(dtype).float(), sharp / kw**0.5
    last = torch.tensor(
        [n - 1 - (i * 7) % n if i else n - 1 for i in range(lanes)], dtype=torch.int32
    )
    for k0, v0 in ((0, 0), (4, 4 + kw + 3)) if vw <= kw else ((4, 4 + kw + 3),):
        rows = torch.full((n, max(k0 + kw, v0 + vw) + 5 + (k0 + kw + v0 + vw) % 2), NAN)
        rows = torch.nn.functional.pad(rows, (0, rows.shape[1] % 2), value=NAN)
        rows[:, k0 : k0 + kw] = draw(n, kw, seed=2)
        if v0 != k0:
            rows[:, v0 : v0 + vw] = draw(n, vw, seed=3)
        rows = rows.to(dtype)
        got = native_ops.attend(rows, q, last, k0, v0, vw, scale, chunk, isa)
        want, size = attended(rows, q, last, k0, v0, vw, scale)
        # The absolute error of a score is the relative error of its softmax weight.
        products = q.double().abs() @ rows[:, k0 : k0 + kw].double().abs().t()
        score_error = (kw + 8) * EPS * scale * products.max()
        relative = 2 * score_error + (n + 20) * EPS + (2.0**-8 if dtype == torch.bfloat16 else 0)
        assert ((got - want).abs() <= relative * size).all(), (k0, v0)
        for i in range(lanes):  # a lane does not depend on the others
            assert torch.equal(
                native_ops.attend(
                    rows, q[i : i + 1], last[i : i + 1], k0, v0, vw, scale, chunk, isa
                ),
                got[i : i + 1],
            )


@isas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_masked_rows_do_not_change_results(isa, dtype):
    """Any number of masked rows, with huge scores or NaN keys, does not change results.

    A NaN query affects only its own result.
    """
    rows, q = draw(100, 40).to(dtype), draw(3, 16, seed=1)
    want = native_ops.attend(
        rows, q, torch.tensor([9, 69, 9], dtype=torch.int32), 0, 20, 20, 0.3, 64, isa
    )
    huge = rows.clone()
    huge[70:, :16], huge[80, :16] = 1e4, NAN
    q[2] = NAN
    got = native_ops.attend(
        huge, q, torch.tensor([9, 69, 9], dtype=torch.int32), 0, 20, 20, 0.3, 64, isa
    )
    assert torch.equal(got[:2], want[:2]) and got[2].isnan().all()
    short = native_ops.attend(
        rows[:10], q[:1], torch.tensor([9], dtype=torch.int32), 0, 20, 20, 0.3, 64, isa
    )
    torch.testing.assert_close(
        got[:1], short, rtol=2.0**-7, atol=1e-3
    ) if dtype == torch.bfloat16 else torch.testing.assert_close(got[:1], short)


@isas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_masked_rows_have_weight_zero(isa, dtype):
    """If all visible values are zero, the result is exactly zero.

    Widths of 32 also test AMX tiles.
    """
    rows = draw(5, 96).to(dtype)
    rows[:2, 32:] = 0
    got = native_ops.attend(
        rows, draw(1, 32, seed=1), torch.tensor([1], dtype=torch.int32), 0, 32, 64, 0.3, 64, isa
    )
    assert torch.equal(got, torch.zeros(1, 64))


# ---- attention over rows as integers ----
WIDTHS = (512, 64)


def integers(name: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decode stored rows as attend_ints reads them.

    Returns:
        integer latents [n, 512], the scale of each row [n, 1] and rope keys [n, 64], all in
        float64.
    """
    latent, key = cache_codec.decode(name, rows, WIDTHS, torch.float64)
    unit = cache_codec._from_e5m3(rows[:, 0]).double()[:, None] / 16
    whole = latent / unit
    assert torch.equal(whole, whole.round()) and whole.abs().max() <= 240
    if name == "6bit":
        up = (torch.arange(len(rows))[:, None] + torch.arange(512)) % 2
        whole, unit = ((whole + up) / 2).floor(), 2 * unit
    return whole, unit, key


def attended_ints(name, rows, q, last, scale, most=255):
    """Compute native_ops.attend_ints by its definition, with one chunk.

    Args:
        most: the largest quantised softmax weight.

    Returns:
        the outputs, and how much the rounding of one softmax weight may change each of them.
    """
    whole, step, key = integers(name, rows)
    out, quantum = [], []
    for query, n in zip(q, last):
        s = query[:512].abs().max() / 127
        codes = (query[:512] * (1 / s)).round().double()
        score = (
            (key[: n + 1] @ query[512:].bfloat16().double())
            + (whole[: n + 1] @ codes) * step[: n + 1, 0] * s
        ) * scale
        p = (score - score.max()).exp()
        o, moved = torch.zeros(512, dtype=torch.float64), 0.0
        for t in range(0, int(n) + 1, 64):
            w = p[t : t + 64] * step[t : min(t + 64, int(n) + 1), 0]
            rest, largest = 0.0, w.max()
            for i, x in enumerate(w * most / largest):
                r = float((x + rest).round().clamp(0, most))
                rest = float(x) + rest - r
                o += r * largest / most * whole[t + i]
            moved += float(largest) / most * 127
        out.append(o / p.sum()), quantum.append(moved / float(p.sum()))
    return torch.stack(out), torch.tensor(quantum)[:, None]


def stored_rows(name: str, n: int, keys: torch.Tensor | None = None) -> torch.Tensor:
    """Encode n random cache rows. The magnitudes of rows and groups differ widely."""
    x = draw(n, 512, seed=3) * torch.exp(draw(n, 1, seed=4)) * torch.exp(draw(1, 512, seed=5))
    return cache_codec.encode(name, (x, draw(n, 64, seed=6) if keys is None else keys))


@isas
@pytest.mark.parametrize("name", ["6bit", "4bit"])
@pytest.mark.parametrize("lanes, n", [(1, 1), (3, 3), (16, 64), (5, 65), (16, 190), (8, 130)])
@pytest.mark.parametrize("sharp", [0.003, 0.03, 0.3])
def test_attention_over_integers(isa, name, lanes, n, sharp):
    rows, q, numbers = stored_rows(name, n), draw(lanes, 576, seed=1), codec_numbers(name, WIDTHS)
    last = torch.tensor(
        [n - 1 - (i * 7) % n if i else n - 1 for i in range(lanes)], dtype=torch.int32
    )
    got = native_ops.attend_ints(numbers, rows, q, last, sharp, 1 << 20, isa)
    want, quantum = attended_ints(name, rows, q, last, sharp, 127 if isa == "avx2" else 255)
    # float32 rounding may move some softmax weights to the neighbouring 8-bit code.
    limit = 6 * quantum + 1e-3 * want.abs().amax(1, keepdim=True)
    assert ((got - want).abs() <= limit).all()
    assert (got - want).norm() < 0.01 * want.norm()
    for i in range(lanes):  # a lane does not depend on the others
        assert torch.equal(
            native_ops.attend_ints(
                numbers, rows, q[i : i + 1], last[i : i + 1], sharp, 1 << 20, isa
            ),
            got[i : i + 1],
        )


@isas
@pytest.mark.parametrize("name", ["6bit", "4bit"])
def test_a_row_with_all_the_weight_is_returned_exactly(isa, name):
    """A row with all the softmax weight is returned exactly.

    Queries select each row of a tile once.
    """
    rows = stored_rows(name, 64, 30 * torch.eye(64))
    whole, step, _ = integers(name, rows)
    for first in range(0, 64, 16):
        q = torch.zeros(16, 576)
        q[range(16), range(512 + first, 528 + first)] = 30.0
        got = native_ops.attend_ints(
            codec_numbers(name, WIDTHS),
            rows,
            q,
            torch.full((16,), 63, dtype=torch.int32),
            1.0,
            64,
            isa,
        )
        want = (whole * step)[first : first + 16]
        assert ((got - want).abs() <= 1e-6 * want.abs().amax(1, keepdim=True)).all()


@isas
@pytest.mark.parametrize("name", ["6bit", "4bit"])
def test_nan_in_integer_attention(isa, name):
    """A masked NaN row changes nothing. A visible NaN row or an infinite query gives NaN.

    The rows span several chunks, so combining the chunks is tested too.
    """
    rows, q, numbers = stored_rows(name, 200), draw(3, 576, seed=1), codec_numbers(name, WIDTHS)
    last = torch.tensor([130, 190, 130], dtype=torch.int32)
    want = native_ops.attend_ints(numbers, rows, q, last, 0.05, 64, isa)
    whole = native_ops.attend_ints(numbers, rows, q, last, 0.05, 1 << 20, isa)
    assert (whole - want).norm() < 0.01 * want.norm()
    bad = rows.clone()
    bad[140, 0] = 0xFF
    q[2, 100] = float("inf")
    got = native_ops.attend_ints(numbers, bad, q, last, 0.05, 64, isa)
    assert torch.equal(got[0], want[0]) and got[1:].isnan().all()
    q[2] = 0
    got = native_ops.attend_ints(numbers, rows, q, last, 0.05, 64, isa)
    assert torch.equal(got[:2], want[:2]) and got[2].isfinite().all()
    for wrong in (
        lambda: native_ops.attend_ints(codec_numbers("int8", WIDTHS), rows, q, last, 1.0, 64),
        lambda: native_ops.attend_ints(numbers, rows, q, last, 1.0, 33),
        lambda: native_ops.attend_ints(numbers, rows[:, 1:], q, last, 1.0, 64),
        lambda: native_ops.attend_ints(numbers, rows, q[:, 1:], last, 1.0, 64),
        lambda: native_ops.attend_ints(codec_numbers(name, (384, 64)), rows, q, last, 1.0, 64),
    ):
        with pytest.raises(ValueError):
            wrong()


@isas
def test_carried_rounding_errors_do_not_reach_masked_rows(isa):
    """A carried rounding error does not give a masked row a nonzero weight.

    The largest softmax weight may be a little above 255. Clamping it leaves an error above one
    half, which is carried over to the next row.
    """
    latent = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    key, q = torch.zeros(3, 64), torch.zeros(1, 576)
    latent[1] *= 3
    key[0, 0] = key[1, 1] = 1
    q[0, 512] = 0.1796875
    rows, last = cache_codec.encode("4bit", (latent, key)), torch.tensor([1], dtype=torch.int32)
    alone, with_masked_row = (
        native_ops.attend_ints(
            codec_numbers("4bit", WIDTHS), rows[:n], q, last, 0.11800399422645569, 64, isa
        )
        for n in (2, 3)
    )
    assert torch.equal(alone, with_masked_row)


def test_arguments_of_the_wrong_size_are_refused():
    x, rows, last = draw(2, 6), draw(3, 8), torch.tensor([2, 2], dtype=torch.int32)
    for call in (
        lambda: native_ops.rms_norm(x, draw(5), 1e-6),
        lambda: native_ops.rope(draw(2, 5), draw(2, 5), True),
        lambda: native_ops.rope(x, draw(1, 6), True),
        lambda: native_ops.swiglu(
            "fp32", torch.zeros(64 * 6 * 2, dtype=torch.uint8), 1.0, 16, x, draw(1)
        ),
        lambda: native_ops.swiglu("fp32", torch.zeros(7, dtype=torch.uint8), 1.0, 16, x, draw(2)),
        lambda: native_ops.attend(rows, x, last, 3, 0, 2, 1.0, 64),
        lambda: native_ops.attend(rows, x, last, -1, 0, 2, 1.0, 64),
        lambda: native_ops.attend(rows, x, last, 0, 7, 2, 1.0, 64),
        lambda: native_ops.attend(rows, x, last[:1], 0, 0, 2, 1.0, 64),
        lambda: native_ops.attend(rows, x, last, 0, 0, 2, 1.0, 0),
        lambda: native_ops.attend(rows[:0], x, last, 0, 0, 2, 1.0, 64),
        lambda: native_ops.attend(rows, draw(17, 6), last, 0, 0, 2, 1.0, 64),
        lambda: native_ops.rms_norm(x, draw(6), 1e-6, "mmx"),
    ):
        with pytest.raises(ValueError):
            call()
    assert ISAS
