"""Tests of the storage formats of cache rows: bytes, error bounds, independence of rows, NaN."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamoe.backends import cache_codec
from lamoe.model.config import ModelConfig

LOW_BIT = ("int8", "6bit", "4bit")
# Largest absolute error of very small numbers. It is half of the smallest step in the
# low-bit formats (True), and 0 in the other formats (False).
FLOOR = {True: 2.0**-22, False: 0.0}
WIDTHS = [
    (512, 64),
    (64, 16),
    (96, 32),
    (192, 192),
    (576, 576),
    (64, 64),
    (37, 17),
    (5, 3),
    (1, 1),
    (65, 63),
    (127, 1),
]


def parts(widths, rows=33, seed=0, scale=1.0):
    """Return both parts of random rows, with very different magnitudes and a few outliers."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for w in widths:
        x = torch.randn(rows, w, generator=g) * torch.logspace(-2, 2, rows)[:, None] * scale
        out.append(torch.where(torch.rand(rows, w, generator=g) < 0.02, x * 20, x))
    return tuple(out)


def largest(x):
    return x.abs().amax(1, keepdim=True).double()


# ---- sizes ----
def test_six_bits_give_the_933_percent_of_the_paper():
    """The 6-bit cache of DeepSeek-V2 is 93.3 % smaller than the 16-bit GQA cache of DeepSeek 67B.

    Source: paper, sections 2.1.4 and 3.2.3 (6 bits per element on average).
    """
    v2, dense = ModelConfig.preset("deepseek-v2"), ModelConfig.preset("deepseek-67b")
    stored = cache_codec.row_bytes("6bit", v2.cache_row)
    assert stored <= 432
    assert (
        1
        - v2.num_hidden_layers
        * stored
        / (dense.num_hidden_layers * cache_codec.row_bytes("bf16", dense.cache_row))
        >= 0.9333
    )


@pytest.mark.parametrize(
    "widths",
    [
        (512, 64),
        (64, 16),
        (96, 32),
        (256, 64),
        (192, 192),
        (576, 576),
        (1024, 1024),
        (64, 64),
        (32, 32),
    ],
)
def test_6bit_takes_at_most_six_bits_per_element(widths):
    assert cache_codec.bits_per_element("6bit", widths) <= 6.0


def test_row_sizes_equal_stated_ones():
    """Row sizes equal fixed numbers, because README, memory plan and kernels rely on them."""
    assert [cache_codec.row_bytes(name, (512, 64)) for name in cache_codec.FORMATS] == [
        2304,
        1152,
        596,
        404,
        315,
    ]
    assert [cache_codec.row_bytes(name, (64, 16)) for name in cache_codec.FORMATS] == [
        320,
        160,
        84,
        60,
        47,
    ]
    assert cache_codec.part_bits("6bit", (512, 64)) == (5, 8)  # the rope key gets more bits
    assert cache_codec.part_bits("6bit", (192, 192)) == (6, 5)  # without MLA the keys get more bits
    assert cache_codec.part_bits("6bit", (96, 32)) == (5, 7)  # 8 bits would exceed 6.0 per element
    assert (
        cache_codec.part_bits("4bit", (192, 192)) == (4, 4)
        and cache_codec.row_bytes("4bit", (192, 192)) == 200
    )
    assert cache_codec.part_bits("bf16", (512, 64)) == (16, 16)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("name", cache_codec.FORMATS)
def test_encoded_rows_have_row_bytes(name, widths):
    rows = cache_codec.encode(name, parts(widths))
    assert rows.dtype == torch.uint8 and rows.shape == (33, cache_codec.row_bytes(name, widths))
    assert cache_codec.bits_per_element(name, widths) == 8 * rows.shape[1] / sum(widths)


# ---- errors ----
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("name", cache_codec.FORMATS)
def test_error_bound(name, widths):
    original = parts(widths)
    decoded = cache_codec.decode(name, cache_codec.encode(name, original), widths, torch.float32)
    for x, y, bound in zip(original, decoded, cache_codec.max_error(name, widths)):
        assert y.shape == x.shape and y.dtype == torch.float32
        assert (
            (y.double() - x.double()).abs() <= bound * largest(x) + FLOOR[name in LOW_BIT]
        ).all()
    assert name != "fp32" or all(torch.equal(x, y) for x, y in zip(original, decoded))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(LOW_BIT),
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(-40, 1),
    st.integers(0, 10**6),
)
def test_error_bound_at_any_size(name, w0, w1, exponent, seed):
    """The relative error bound holds at any magnitude, plus an absolute error of up to 2^-22."""
    original = parts((w0, w1), rows=5, seed=seed, scale=2.0**exponent)
    decoded = cache_codec.decode(name, cache_codec.encode(name, original), (w0, w1), torch.float32)
    for x, y, bound in zip(original, decoded, cache_codec.max_error(name, (w0, w1))):
        assert ((y.double() - x.double()).abs() <= bound * largest(x) + FLOOR[True]).all()


def test_the_error_bound_is_tight():
    """Some row reaches 90 % of the error bound, so a coarser code would exceed it."""
    x = torch.randn(20000, 16, generator=torch.Generator().manual_seed(0))
    for name in LOW_BIT:
        decoded = cache_codec.decode(
            name, cache_codec.encode(name, (x, x)), (16, 16), torch.float32
        )
        for y, bound in zip(decoded, cache_codec.max_error(name, (16, 16))):
            assert ((y - x).abs() / largest(x)).max() > 0.9 * bound


@pytest.mark.parametrize("name", LOW_BIT)
def test_groups_have_their_own_scale(name):
    """An outlier in the first group does not reduce the precision of the second group."""
    group = cache_codec._LOW_BIT[name].group
    x = torch.randn(8, 2 * group, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    x[:, 0] = 20.0
    y, _ = cache_codec.decode(
        name, cache_codec.encode(name, (x, x)), (2 * group, 2 * group), torch.float32
    )
    bits = cache_codec.part_bits(name, (2 * group, 2 * group))[0]
    step = 20 / (2 ** (bits - 1) - 1)
    # A group with |x| <= 2 needs 2/16 of the step for 20. Base and factor are rounded up.
    assert (y - x)[:, group:].abs().max() < 0.6 * step * 3 / 16


@pytest.mark.parametrize("name", cache_codec.FORMATS)
def test_zero_rows_are_exact(name):
    original = (torch.zeros(3, 64), torch.zeros(3, 16))
    original[0][1, 5] = 1.0
    a, b = cache_codec.decode(name, cache_codec.encode(name, original), (64, 16), torch.float32)
    assert (
        not b.any()
        and not a[[0, 2]].any()
        and a[1, 5] == pytest.approx(1.0, rel=cache_codec.max_error(name, (64, 16))[0])
        and not a[1, 16:].any()
    )


@pytest.mark.parametrize("name", LOW_BIT)
def test_codes_are_symmetric(name):
    a, b = parts((96, 32))
    minus = cache_codec.decode(name, cache_codec.encode(name, (-a, -b)), (96, 32), torch.float32)
    for x, y in zip(
        minus, cache_codec.decode(name, cache_codec.encode(name, (a, b)), (96, 32), torch.float32)
    ):
        assert torch.equal(x, -y)


# ---- independence of rows ----
@pytest.mark.parametrize("widths", [(512, 64), (64, 16), (37, 17)])
@pytest.mark.parametrize("name", cache_codec.FORMATS)
def test_a_row_does_not_depend_on_its_batch(name, widths):
    a, b = parts(widths, rows=65)
    together = cache_codec.encode(name, (a, b))
    order = torch.randperm(65, generator=torch.Generator().manual_seed(1))
    assert torch.equal(cache_codec.encode(name, (a[order], b[order])), together[order])
    alone = torch.cat([cache_codec.encode(name, (a[i : i + 1], b[i : i + 1])) for i in range(65)])
    assert torch.equal(alone, together)
    # Rows inside wider pages, at an odd offset.
    wide = torch.full((65, together.shape[1] + 3), 0xEE, dtype=torch.uint8)
    wide[:, 3:] = together
    for x, y in zip(
        cache_codec.decode(name, wide[:, 3:], widths, torch.float32),
        cache_codec.decode(name, together, widths, torch.float32),
    ):
        assert torch.equal(x, y)
        assert torch.equal(
            x[7:8],
            cache_codec.decode(name, wide[7:8, 3:], widths, torch.float32)[
                0 if x.shape[1] == widths[0] else 1
            ],
        )


@pytest.mark.parametrize("name", cache_codec.FORMATS)
def test_input_types_and_views(name):
    """`encode` accepts bfloat16, float64, transposed views, and inputs without rows."""
    a, b = (p.bfloat16() for p in parts((64, 16)))
    rows = cache_codec.encode(name, (a, b))
    assert torch.equal(rows, cache_codec.encode(name, (a.double(), b.float())))
    assert torch.equal(
        rows, cache_codec.encode(name, (a.t().contiguous().t(), torch.cat([b, b], 1)[:, 16:]))
    )
    as_double = cache_codec.decode(name, rows, (64, 16), torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        for x, y in zip(cache_codec.decode(name, rows, (64, 16), dtype), as_double):
            assert x.dtype == dtype and x.is_contiguous() and torch.equal(x, y.to(dtype))
    none = cache_codec.encode(name, (a[:0], b[:0]))
    assert none.shape == (0, rows.shape[1]) and cache_codec.decode(
        name, none, (64, 16), torch.float32
    )[1].shape == (0, 16)


# ---- documented layout, read by an independent decoder ----
def read_block(data: bytes, w: int, n: int, group: int) -> tuple[np.ndarray, int]:
    """Decode a block element by element, following the docstring of cache_codec.py.

    Returns:
        the values, and the number of bytes read.
    """
    base = float(np.array([data[0] << 7], np.uint16).view(np.float16)[0]) / 16
    groups = -(-w // group)
    factor_bytes = (groups + 1) // 2 if groups > 1 else 0
    padded, out = -(-w // 8) * 8, np.zeros(w)
    for i in range(w):
        factor = 15
        if factor_bytes:
            k = i // group
            factor = data[1 + k // 2] >> (4 * (k % 2)) & 15
        code, shift, at = 0, 0, 1 + factor_bytes
        for p in {4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[n]:
            size = padded * p // 8
            code |= (data[at + i % size] >> (p * (i // size)) & (2**p - 1)) << shift
            at, shift = at + size, shift + p
        assert code > 0
        out[i] = (code - 2 ** (n - 1)) * base * (factor + 1) / 16
    return out, 1 + factor_bytes + padded * n // 8


@pytest.mark.parametrize("widths", [(512, 64), (64, 16), (96, 32), (192, 192), (37, 17)])
@pytest.mark.parametrize("name", LOW_BIT)
def test_layout(name, widths):
    rows = cache_codec.encode(name, parts(widths, rows=4))
    decoded = cache_codec.decode(name, rows, widths, torch.float64)
    for i, row in enumerate(rows):
        data, group = bytes(row.tolist()), cache_codec._LOW_BIT[name].group
        for y, w, n in zip(decoded, widths, cache_codec.part_bits(name, widths)):
            values, used = read_block(data, w, n, group)
            np.testing.assert_allclose(y[i].numpy(), values, rtol=1e-6)
            data = data[used:]
        assert not data


def test_plain_layout():
    a, b = parts((5, 3), rows=2)
    both = torch.cat([a, b], 1)
    assert (
        bytes(cache_codec.encode("fp32", (a, b))[1].tolist())
        == both[1].numpy().astype("<f4").tobytes()
    )
    high = both.bfloat16().float()[1].numpy().view(np.uint32) >> 16
    assert bytes(cache_codec.encode("bf16", (a, b))[1].tolist()) == high.astype("<u2").tobytes()


def test_golden_row():
    """The bytes of a fixed row equal recorded ones.

    They must not change: saved prefixes contain them.
    """
    a = torch.arange(-8.0, 9.0)[None] / 4
    b = torch.tensor([[1.0, -0.5, 0.25]])
    assert {
        name: cache_codec.encode(name, (a, b))[0].numpy().tobytes().hex() for name in LOW_BIT
    } == GOLDEN


GOLDEN = {
    "int8": "69ee0716253443526271808f9eaebdccdbeaf98080808080808061f2479c8080808080",
    "6bit": "81ff7294b5c7e90b0c0e00020405f8f8fc790e090400fd",
    "4bit": "8ab2c2d3e4e586868788898a8a710c020700aba9",
}


# ---- NaN, infinity and huge numbers ----
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("name", LOW_BIT)
def test_a_part_with_a_bad_number_decodes_to_nan(name, bad):
    """A NaN, infinite or huge element turns its part of its row into NaN, and nothing else."""
    a, b = parts((64, 16))
    good = cache_codec.encode(name, (a, b))
    a[3, 63] = bad
    rows = cache_codec.encode(name, (a, b))
    x, y = cache_codec.decode(name, rows, (64, 16), torch.float32)
    assert x[3].isnan().all() and not y.isnan().any()
    rest = torch.arange(33) != 3
    assert torch.equal(rows[rest], good[rest]) and not x[rest].isnan().any()
    assert torch.equal(y, cache_codec.decode(name, good, (64, 16), torch.float32)[1])


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_plain_formats_store_nan_and_infinity(name):
    a = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]])
    x, _ = cache_codec.decode(name, cache_codec.encode(name, (a, a[:, :2])), (4, 2), torch.float32)
    assert torch.equal(x.nan_to_num(7.0, 8.0, -8.0), torch.tensor([[7.0, 8.0, -8.0, 1.0]]))


def test_largest_number():
    """The largest step is 3840. Numbers that need a larger step become NaN."""
    x = torch.full((1, 16), 3840.0 * 7)
    assert torch.equal(
        cache_codec.decode(
            "4bit", cache_codec.encode("4bit", (x, x[:, :8])), (16, 8), torch.float32
        )[0],
        x,
    )
    assert (
        cache_codec.decode(
            "4bit", cache_codec.encode("4bit", (x * 1.001, x[:, :8])), (16, 8), torch.float32
        )[0]
        .isnan()
        .all()
    )


def test_e5m3_rounds_up():
    every = torch.arange(0xF8, dtype=torch.uint8)
    values = cache_codec._from_e5m3(every)
    assert (
        torch.equal(cache_codec._to_e5m3(values), every)
        and values[0] == 0
        and values[-1] == 3840
        and (values.diff() > 0).all()
    )
    x = torch.cat([values[1:] * (1 - 1e-6), values[:-1] * (1 + 1e-6), torch.tensor([1e-12])])
    up = cache_codec._from_e5m3(cache_codec._to_e5m3(x))
    assert (up >= x).all()
    assert torch.equal(cache_codec._to_e5m3(x), torch.searchsorted(values, x).to(torch.uint8))


# ---- user errors ----
@pytest.mark.parametrize(
    "call",
    [
        lambda name: cache_codec.row_bytes(name, (64, 16)),
        lambda name: cache_codec.max_error(name, (64, 16)),
        lambda name: cache_codec.bits_per_element(name, (64, 16)),
        lambda name: cache_codec.encode(name, parts((64, 16))),
        lambda name: cache_codec.decode(
            name, torch.zeros(1, 60, dtype=torch.uint8), (64, 16), torch.float32
        ),
        lambda name: cache_codec.part_bits(name, (64, 16)),
    ],
)
def test_unknown_format(call):
    with pytest.raises(
        ValueError,
        match=r"unknown cache format '6bits', did you mean '6bit'\?; known: fp32, bf16, int8, "
        r"6bit, 4bit",
    ):
        call("6bits")


@pytest.mark.parametrize(
    "bad, text",
    [
        ((torch.zeros(2, 4), torch.zeros(3, 4)), r"\(2, 4\).*\(3, 4\)"),
        ((torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4)), "int64"),
        ((torch.zeros(2, 4, 4), torch.zeros(2, 4)), r"\(2, 4, 4\)"),
        ((torch.zeros(2, 4), torch.zeros(2, 0)), "at least one element"),
    ],
)
def test_bad_parts(bad, text):
    with pytest.raises(ValueError, match=text):
        cache_codec.encode("6bit", bad)


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(2, 59, dtype=torch.uint8), torch.zeros(60, dtype=torch.uint8), torch.zeros(2, 60)],
)
def test_rows_of_the_wrong_shape(rows):
    with pytest.raises(ValueError, match=r"uint8 \[N, 60\]"):
        cache_codec.decode("6bit", rows, (64, 16), torch.float32)
