"""Tests of the compiled kernels on every instruction set: weight formats, linear, cache rows.

test_native_ops.py tests other operations, test_native_model.py whole models, and
test_native_hostile.py invalid arguments.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lamoe.backends import cache_codec
from lamoe.backends.cpu import native
from lamoe.backends.cpu.backend import codec_numbers

pytestmark = pytest.mark.skipif(native.lib is None, reason="needs the compiled kernels")
ISAS = native.lib.features().split(", ") if native.lib else []
SIZES = [1, 3, 15, 16, 17, 63, 64, 65, 127]
# The INT4 codebook, stored + 64.
LEVELS = torch.tensor([1, 12, 23, 32, 40, 48, 54, 60, 65, 71, 76, 82, 89, 97, 106, 120]) - 64
EPS = 2.0**-24  # largest relative rounding error of float32
isas = pytest.mark.parametrize("isa", ISAS)
formats = pytest.mark.parametrize("fmt", native.FORMATS)


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Return a tensor of normally distributed random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """Split [..., k] into zero-padded blocks [..., ceil(k / size), size]."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def rounded_inputs(fmt: str, x: torch.Tensor) -> torch.Tensor:
    """Round inputs x [m, k] as `native.linear` does for weights in format `fmt`. Return float64."""
    if fmt == "fp32":
        return x.double()
    if fmt == "bf16":
        return x.bfloat16().double()
    b = blocks(x, 64)
    scale = (b.abs().amax(-1, keepdim=True) / 127).float()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return ((b * inverse).round().double() * scale.double()).flatten(-2)[:, : x.shape[1]]


def product(
    fmt: str, w: torch.Tensor, x: torch.Tensor, isa: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Multiply x by packed weights.

    Returns:
        the product by the kernel, the product of the same rounded numbers in float64, and the sum
            of the absolute values of the terms of each result.
    """
    data, scale = native.pack(fmt, w)
    stored, inputs = native.unpack(fmt, data, *w.shape, scale).double(), rounded_inputs(fmt, x)
    return (
        native.linear(fmt, data, scale, w.shape[0], x, isa),
        inputs @ stored.t(),
        inputs.abs() @ stored.abs().t(),
    )


# ---- weights ----
@isas
@formats
@pytest.mark.parametrize(
    "n, k", [(n, k) for n in (1, 15, 17, 65) for k in SIZES] + [(48, 1408), (3, 10944)]
)
def test_stored_weights_keep_the_error_bound_of_their_format(fmt, isa, n, k):
    # The magnitudes of rows differ widely.
    w = draw(n, k, seed=k) * torch.exp(2 * draw(n, 1, seed=n))
    data, scale = native.pack(fmt, w, isa=isa)
    assert len(data) == native.mat_bytes(fmt, n, k)
    error = blocks(native.unpack(fmt, data, n, k, scale, isa) - w, 16).abs()
    group_max, matrix_max = blocks(w, 16).abs().amax(-1, keepdim=True), w.abs().max()
    if fmt in ("fp32", "bf16"):
        expected = w if fmt == "fp32" else w.bfloat16().float()
        assert torch.equal(native.unpack(fmt, data, n, k, scale, isa), expected)
    elif fmt == "int8":
        assert (error <= group_max * (9 / 16 / 127) * (1 + 1e-6) + matrix_max * 2.0**-23).all()
    else:
        assert (
            error.square().mean(-1, keepdim=True).sqrt()
            <= group_max * (9 / 64) * (1 + 1e-6) + matrix_max * 2.0**-20
        ).all()


@isas
def test_every_isa_packs_the_same_bytes(isa):
    w = draw(33, 130)
    for fmt in native.FORMATS:
        for importance in (None, draw(130, seed=3).square()):
            (a, s), (b, t) = (
                native.pack(fmt, w, importance, isa=isa),
                native.pack(fmt, w, importance, isa="scalar"),
            )
            assert torch.equal(a, b) and s == t


def test_bits_per_weight_include_scales():
    for fmt, bits in native.BITS.items():
        assert 8 * native.mat_bytes(fmt, 64, 1408) == bits * 64 * 1408


@pytest.mark.parametrize("size", [1e-42, 1e-37, 1e-25, 1e-8, 1e8, 1e25, 1e37])
@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_relative_errors_do_not_depend_on_the_magnitude_of_weights(fmt, size):
    """Scaling all weights up or down keeps the relative error, except for denormal weights."""
    w = draw(16, 64) / draw(16, 64).abs().max() * size
    data, scale = native.pack(fmt, w)
    got = native.unpack(fmt, data, 16, 64, scale)
    assert got.isfinite().all()
    plain = native.unpack(
        fmt, *native.pack(fmt, w / size)[:1], 16, 64, native.pack(fmt, w / size)[1]
    )
    error = (got - w).double().norm() / w.double().norm()
    plain_error = (plain - w / size).double().norm() / (w / size).double().norm()
    assert error <= plain_error * 1.05 + (0.05 if size < 1e-36 else 0)


def test_int4_stores_codebook_values_exactly():
    """Weights that are codebook values times representable group scales are stored exactly.

    Group scales have either sign. The largest weight is chosen so that the matrix scale is 1.
    """
    levels = LEVELS.float()
    w = torch.stack(
        [
            levels,
            -levels,
            levels.flip(0),
            levels * 1.25,
            levels * -0.375,
            levels / 1024,
            torch.full((16,), 84.0),
        ]
    )
    data, scale = native.pack("int4", w)
    assert scale == 1 and torch.equal(native.unpack("int4", data, len(w), 16, scale), w)


def test_allocations_for_weights_may_have_huge_pages():
    """Allocations for weights are eligible for huge pages if the system gives them on request."""
    switch, maps = Path("/sys/kernel/mm/transparent_hugepage/enabled"), Path("/proc/self/smaps")
    if not (switch.is_file() and maps.is_file()) or "[never]" in switch.read_text():
        pytest.skip("this system has no huge pages on request")
    data = native.allocate(8 << 20)
    data.fill_(1)
    for entry in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", maps.read_text())[1:]:
        begin, end = (int(x, 16) for x in entry.split()[0].split("-"))
        if begin <= data.data_ptr() < end:
            assert re.search(r"^THPeligible: +1", entry, re.M) or int(
                re.search(r"^AnonHugePages: +(\d+)", entry, re.M)[1]
            ), entry


@formats
def test_zeros_stay_zeros(fmt):
    data, scale = native.pack(fmt, torch.zeros(17, 65))
    for isa in ISAS:
        assert torch.equal(
            native.linear(fmt, data, scale, 17, draw(3, 65), isa), torch.zeros(3, 17)
        )
        full, s = native.pack(fmt, draw(17, 65))
        assert torch.equal(
            native.linear(fmt, full, s, 17, torch.zeros(3, 65), isa), torch.zeros(3, 17)
        )


def test_importance_reduces_the_error_of_important_inputs():
    w, importance = draw(64, 256), torch.ones(256)
    importance[::4] = 1000.0
    errors = []
    for i in (None, importance):
        data, scale = native.pack("int4", w, i)
        errors.append((native.unpack("int4", data, 64, 256, scale) - w)[:, ::4].square().mean())
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    w = torch.zeros(2, 2)
    w[1, 1] = bad
    with pytest.raises(ValueError, match="not finite"):
        native.pack("int8", w)


# ---- linear ----
@isas
@formats
@pytest.mark.parametrize("k", SIZES + [1408])
def test_linear_multiplies_the_stored_numbers(fmt, isa, k):
    for n, m in [
        (1, 1),
        (3, 2),
        (15, 3),
        (16, 5),
        (17, 13),
        (63, 12),
        (64, 23),
        (65, 24),
        (127, 25),
    ]:
        got, want, size = product(fmt, draw(n, k, seed=n), draw(m, k, seed=m), isa)
        assert ((got.double() - want).abs() <= (k + 8) * EPS * size + 1e-37).all(), (n, m)


@isas
@pytest.mark.parametrize(
    "fmt, weights, inputs",
    [("bf16", 2.0**-8, 2.0**-8), ("int8", 9 / 16 / 127, 1 / 254), ("int4", None, 1 / 254)],
)
def test_linear_keeps_the_error_bound_relative_to_the_original_weights(fmt, weights, inputs, isa):
    w, x = draw(33, 1408), draw(7, 1408, seed=1)
    got, _, _ = product(fmt, w, x, isa)
    exact = x.double() @ w.double().t()
    # For INT4 only squared errors are bounded. Normally distributed weights gave about 6 %.
    if weights is None:
        return torch.testing.assert_close(
            ((got - exact).norm() / exact.norm()).item(), 0.064, atol=0.01, rtol=0
        )
    if fmt == "bf16":
        limit = (weights + inputs) * 1.01 * (x.abs().double() @ w.abs().double().t())
    else:
        group_max = blocks(w, 16).abs().amax(-1, keepdim=True).expand(-1, -1, 16)
        block_max = blocks(x, 64).abs().amax(-1, keepdim=True).expand(-1, -1, 64)
        limit = 1.01 * (
            weights * (x.abs().double() @ group_max.flatten(1).double().t())
            + inputs * (block_max.flatten(1).double() @ w.abs().double().t())
        )
    assert ((got - exact).abs() <= limit).all()


@isas
@formats
def test_a_row_does_not_depend_on_its_batch(fmt, isa):
    for n, k in [(130, 65), (16, 1408), (17, 64)]:
        data, scale = native.pack(fmt, draw(n, k))
        x = draw(61, k, seed=5)
        alone = torch.cat([native.linear(fmt, data, scale, n, row[None], isa) for row in x])
        for m in (2, 3, 4, 7, 8, 11, 12, 13, 23, 24, 25, 36, 47, 61):
            assert torch.equal(native.linear(fmt, data, scale, n, x[:m], isa), alone[:m]), m
        assert torch.equal(native.linear(fmt, data, scale, n, x.flip(0), isa), alone.flip(0))


@pytest.mark.skipif("amx" not in ISAS, reason="needs a CPU with AMX")
@pytest.mark.parametrize("fmt", ["int8", "int4"])
@pytest.mark.parametrize("m", [16, 17, 22, 23, 31, 48, 192, 193, 199, 208, 215])
def test_amx_tiles_give_the_bits_of_avx512(fmt, m):
    """AMX gives the same bits as AVX-512 for row counts around the block limits of the kernel.

    A block has 16 rows, one call has up to 192 rows, and up to 6 remaining rows use no tiles.
    """
    for n, k in [(130, 65), (17, 320)]:
        data, scale = native.pack(fmt, draw(n, k))
        x = draw(m, k, seed=m)
        assert torch.equal(
            native.linear(fmt, data, scale, n, x, "amx"),
            native.linear(fmt, data, scale, n, x, "avx512"),
        )


@isas
@formats
def test_torch_matmuls_on_the_same_thread_do_not_change_results(fmt, isa):
    """Kernel results do not change if torch uses AMX tiles of other shapes on the same thread."""
    data, scale = native.pack(fmt, draw(130, 320))
    x, other = draw(37, 320), draw(64, 64).bfloat16()
    want, product = native.linear(fmt, data, scale, 130, x, isa), other @ other
    for _ in range(3):
        assert torch.equal(native.linear(fmt, data, scale, 130, x, isa), want)
        assert torch.equal(other @ other, product)


@isas
@formats
def test_bytes_outside_a_matrix_and_its_inputs_are_not_read(fmt, isa):
    for n, k in [(1, 1), (17, 3), (15, 65), (33, 127)]:
        data, scale = native.pack(fmt, draw(n, k))
        want = native.linear(fmt, data, scale, n, draw(5, k), isa)
        around = torch.full((len(data) + 8192,), 0xFF, dtype=torch.uint8)
        for at in (4096, 4097):  # once aligned to cache lines, once not
            around[at : at + len(data)] = data
            rows = torch.full((5 * k + 2048,), float("nan"))
            rows[1024 : 1024 + 5 * k] = draw(5, k).flatten()
            got = native.linear(
                fmt,
                around[at : at + len(data)],
                scale,
                n,
                rows[1024 : 1024 + 5 * k].view(5, k),
                isa,
            )
            assert torch.equal(got, want)
            assert torch.equal(
                native.unpack(fmt, around[at : at + len(data)], n, k, scale, isa),
                native.unpack(fmt, data, n, k, scale),
            )


@isas
@formats
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_affect_only_their_row(fmt, isa, bad):
    data, scale = native.pack(fmt, draw(33, 130) + 5)
    x = draw(30, 130)
    want = native.linear(fmt, data, scale, 33, x, isa)
    for row, at in [(0, 0), (7, 63), (12, 64), (29, 129)]:
        changed = x.clone()
        changed[row, at] = bad
        got = native.linear(fmt, data, scale, 33, changed, isa)
        assert not got[row].isfinite().any()
        assert torch.equal(got[:row], want[:row]) and torch.equal(got[row + 1 :], want[row + 1 :])


@isas
@formats
@pytest.mark.parametrize("size", [1e-44, 1e-37, 1e-30, 1e-20, 1e20, 1e30])
def test_inputs_of_any_size(fmt, isa, size):
    """`linear` is accurate for inputs of any magnitude.

    The magnitudes reach from denormals, which some instructions treat as zero, to far beyond any
    activation.
    """
    w, x = draw(17, 65, scale=0.1), draw(3, 65, seed=1) * size
    data, scale = native.pack(fmt, w)
    want = x.double() @ native.unpack(fmt, data, 17, 65, scale).double().t()
    got = native.linear(fmt, data, scale, 17, x, isa)
    assert got.isfinite().all()
    limit = 0.02 * (x.abs().double() @ w.abs().double().t()) + 65 * 2.0**-126
    assert ((got - want).abs() <= limit).all()


@isas
@formats
@pytest.mark.parametrize("k", [64, 1408])
@pytest.mark.parametrize("weights", [1e-6, 1.0, 50.0])
def test_huge_inputs_never_give_a_wrong_finite_result(fmt, isa, k, weights):
    """Every finite result is right, for inputs up to the largest float.

    Every result is finite for inputs up to the limit that native.py documents.
    """
    for w in (draw(17, k) * weights, torch.full((17, k), weights), -torch.full((17, k), weights)):
        data, scale = native.pack(fmt, w)
        stored = native.unpack(fmt, data, 17, k, scale).double()
        for total in (1e30, 1e34, 1.7e36, 1e37, 1e38, 3e38, 1e41):
            for x in (
                torch.full((1, k), total / k, dtype=torch.float64).float(),
                draw(1, k).abs() / draw(1, k).abs().sum() * total,
                draw(1, k) / draw(1, k).abs().sum() * total,
            ):
                if not x.isfinite().all():
                    continue
                want, got = x.double() @ stored.t(), native.linear(fmt, data, scale, 17, x, isa)
                limit = 0.02 * (x.double().abs() @ stored.abs().t())
                finite = got.isfinite()
                assert ((got.double() - want).abs() <= limit)[finite].all()
                if total <= 1.7e36 or fmt in ("fp32", "bf16"):
                    assert finite[limit / 0.02 < 3e38].all(), total


@isas
def test_no_rows_give_no_results(isa):
    for fmt in native.FORMATS:
        data, scale = native.pack(fmt, draw(17, 65))
        assert native.linear(fmt, data, scale, 17, torch.empty(0, 65), isa).shape == (0, 17)


# ---- cache rows ----
WIDTHS = [
    (1, 1),
    (3, 15),
    (16, 17),
    (17, 2),
    (63, 64),
    (65, 127),
    (127, 1),
    (40, 8),
    (128, 16),
    (192, 192),
    (512, 64),
    (1408, 64),
    (8192, 8192),
]


def rows_of(widths: tuple[int, int]) -> torch.Tensor:
    """Return cache rows [N, w0 + w1] of normal, extreme and invalid numbers."""
    w = sum(widths)
    x = draw(24, w, seed=w) * torch.exp(draw(24, 1, seed=1))
    x[1], x[2], x[3], x[4] = 0, 1e-42, 3e38, -7e-6
    x[5, : widths[0]] = 0
    x[6, widths[0] :] = 0
    for row, at, bad in [
        (7, 0, float("nan")),
        (8, w - 1, float("nan")),
        (9, w // 2, float("nan")),
        (10, 0, float("inf")),
        (11, w - 1, float("-inf")),
        (12, w // 3, 1e9),
    ]:
        x[row, at] = bad
    x[13] = float("nan")
    x[14, :] = torch.linspace(-1, 1, w)
    return x


@isas
@pytest.mark.parametrize("name", cache_codec.FORMATS)
@pytest.mark.parametrize("widths", WIDTHS)
def test_cache_rows_equal_those_of_cache_codec_bit_for_bit(name, widths, isa):
    x, numbers = rows_of(widths), codec_numbers(name, widths)
    want = cache_codec.encode(name, x.split(widths, 1))
    got = torch.from_numpy(native.lib.encode(numbers, x.numpy(), isa))
    if name == "bf16":  # NaN may have different bits
        assert torch.equal(
            got.view(torch.bfloat16).float().nan_to_num(7),
            want.view(torch.bfloat16).float().nan_to_num(7),
        )
    else:
        assert torch.equal(got, want), (got != want).nonzero()[:4]
    back = torch.from_numpy(native.lib.decode(numbers, want.numpy(), isa))
    assert torch.equal(
        back.nan_to_num(7e7),
        torch.cat(cache_codec.decode(name, want, widths, torch.float32), 1).nan_to_num(7e7),
    )


@isas
@pytest.mark.parametrize("name", ["int8", "6bit", "4bit"])
def test_any_bytes_decode_as_in_cache_codec(name, isa):
    for widths in WIDTHS[:-1]:
        rows = torch.randint(
            256,
            (64, cache_codec.row_bytes(name, widths)),
            generator=torch.Generator().manual_seed(1),
            dtype=torch.uint8,
        )
        got = torch.from_numpy(native.lib.decode(codec_numbers(name, widths), rows.numpy(), isa))
        want = torch.cat(cache_codec.decode(name, rows, widths, torch.float32), 1)
        # A base from 0xF8 on is NaN or infinity, so both decoders give values that are not finite.
        finite = want.isfinite()
        assert torch.equal(got[finite], want[finite]) and not got[~finite].isfinite().any()


@isas
@pytest.mark.parametrize("name", cache_codec.FORMATS)
def test_bytes_outside_cache_rows_are_not_read(name, isa):
    widths = (40, 24)
    numbers, x = codec_numbers(name, widths), rows_of(widths)
    stored = native.lib.encode(numbers, x.numpy(), isa)
    around = np.full(stored.size + 4097, 0xFF, np.uint8)
    inside = around[2049 : 2049 + stored.size].reshape(stored.shape)
    inside[:] = stored
    assert np.array_equal(
        native.lib.decode(numbers, inside, isa),
        native.lib.decode(numbers, stored, isa),
        equal_nan=True,
    )
