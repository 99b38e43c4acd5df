"""Storage formats of cache rows: encode the two parts of a token's row in one layer, and decode.

The parts are (latent, rope key) under MLA, else (keys, values). ModelConfig.cache_row gives their
`widths` in elements. The bytes of a row depend on its own numbers only, never on the batch.
paged_cache.py handles pages and sequence lengths.

    fp32, bf16        elements of part 1, elements of part 2 (little-endian)
    int8, 6bit, 4bit  block of part 1, block of part 2

A block stores w elements as n-bit codes. Each group of g consecutive elements has one scale. W is
w rounded up to a multiple of 8.

    +------+----------------+-------------------+
    | base | group factors  | codes             |
    | 1 B  | F bytes        | W * n / 8 bytes   |
    +------+----------------+-------------------+

base: a number >= 0 in e5m3 format: float16_from_bits(byte << 7) / 16, from 4.8e-7 to 3840. Bytes
    from 0xF8 are NaN.
group factors: a 4-bit factor f for each group; element i is in group i // g. The scale of the
    group is base * (f + 1) / 16. Byte k holds group 2k in its low half and group 2k + 1 in its
    high half. A part with a single group has no factors: F = 0 and the scale is base.
codes: stored as bit planes, low bits of the code first:

    n       4      5        6        7            8
    planes  4      4 + 1    4 + 2    4 + 2 + 1    8      (bits each)

    A plane of p bits takes S = W * p / 8 bytes. Element i is in byte i % S, at bit p * (i // S).
    So one byte load, shift and mask gives S neighbouring elements in order.
value of an element: (code - 2^(n-1)) * scale. Code 0 is unused. Elements w to W - 1 are padding
    with code 2^(n-1), which is zero.

The codes are symmetric integers with an exact zero. Base and factors are rounded up, so nothing is
clipped. Rounding them to nearest would shrink the largest elements of half of the groups. The
squared error would stay about the same, but the KL divergence of predictions would grow by half.

Bits of each part. The *fine* part is the rope key (a second part at most half as wide as the
first), or the keys if there is no rope key. The other part is *coarse*. An error in the rope key,
which all heads share, costs about 18 times as much as the same error in the latent.

    format   coarse   fine: rope key   fine: keys   group   bits per element at
                                                            512 + 64    192 + 192
    int8     8        8                8            16      8.3         8.3
    6bit     5        8                6            16      5.6         5.8
    4bit     4        6                4            32      4.4         4.2

In format 6bit the fine part gets fewer bits if the row would otherwise exceed 6.0 bits per element.

In the low-bit formats a part with a NaN, an infinity, or elements too large for base (above 3840
times the largest code: 26,880 in 4 bits) decodes to NaN throughout. fp32 and bf16 store any value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from lamoe.model.config import did_you_mean


class _LowBit(NamedTuple):
    """Parameters of a low-bit format: code bits, group size, and the limit on bits per element."""

    coarse_bits: int
    rope_key_bits: int
    keys_bits: int
    group: int
    max_bits_per_element: float | None = None


_LOW_BIT = {
    "int8": _LowBit(8, 8, 8, 16),
    "6bit": _LowBit(5, 8, 6, 16, 6.0),
    "4bit": _LowBit(4, 6, 4, 32),
}
_PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS: tuple[str, ...] = (*_PLAIN, *_LOW_BIT)

_PLANES = {4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
_NAN_BASE = 0xFF
# Divisor of the float16 value in an e5m3 number. It shifts the range to that of activation scales.
_BASE_DIVISOR = 16


# ---- sizes ---------------------------------------------------------------------------------------
def row_bytes(name: str, widths: tuple[int, int]) -> int:
    """Return the stored bytes of one row, scales and padding included.

    Args:
        name: name of the storage format.
        widths: number of elements of each of the two parts.
    """
    check_format(name)
    if len(widths) != 2 or min(widths) < 1:
        raise ValueError(
            f"a cache row has two parts of at least one element, found widths {tuple(widths)}"
        )
    if name in _PLAIN:
        return sum(widths) * _PLAIN[name].itemsize
    group = _LOW_BIT[name].group
    return sum(_block_bytes(w, n, group) for w, n in zip(widths, part_bits(name, widths)))


def bits_per_element(name: str, widths: tuple[int, int]) -> float:
    """Return the mean stored bits per element of a row, scales and padding included."""
    return 8 * row_bytes(name, widths) / sum(widths)


def part_bits(name: str, widths: tuple[int, int]) -> tuple[int, int]:
    """Return the bits per code of each part, without scales.

    The module docstring explains how the bits are chosen.
    """
    check_format(name)
    if name in _PLAIN:
        bits = 8 * _PLAIN[name].itemsize
        return bits, bits
    spec = _LOW_BIT[name]
    has_rope_key = 2 * widths[1] <= widths[0]
    fine = spec.rope_key_bits if has_rope_key else spec.keys_bits
    coarse_width, fine_width = widths if has_rope_key else widths[::-1]
    if spec.max_bits_per_element is not None:
        max_row_bytes = int(spec.max_bits_per_element * sum(widths) / 8)
        available = max_row_bytes - _block_bytes(coarse_width, spec.coarse_bits, spec.group)
        while fine > spec.coarse_bits and _block_bytes(fine_width, fine, spec.group) > available:
            fine -= 1
    return (spec.coarse_bits, fine) if has_rope_key else (fine, spec.coarse_bits)


def max_error(name: str, widths: tuple[int, int]) -> tuple[float, float]:
    """Return an upper bound on the error |decoded - x| of each part.

    The bound is relative to the largest |x| of the part in its row. It holds for float32 input and
    output. In the low-bit formats the bound is half a quantisation step, and the step may be up to
    1/8 too large, because its base is rounded up. Very small numbers have an extra absolute error.
    In the low-bit formats it is 2^-22 (2e-7). In bf16 it is the rounding error of subnormals.
    """
    check_format(name)
    if name in _PLAIN:
        error = 0.0 if name == "fp32" else 2.0**-8
        return error, error
    first, second = part_bits(name, widths)
    return 9 / 8 / 2 / _max_code(first), 9 / 8 / 2 / _max_code(second)


def group_of(name: str) -> int:
    """Return how many elements share a scale. For fp32 and bf16, without scales, this is 16."""
    return _LOW_BIT[name].group if name in _LOW_BIT else 16


def check_format(name: str) -> None:
    """Raise ValueError if `name` is not a storage format of cache rows."""
    if name not in FORMATS:
        raise ValueError(
            f"unknown cache format {name!r}{did_you_mean(name, FORMATS)}; "
            f"known: {', '.join(FORMATS)}"
        )


# ---- encode and decode ---------------------------------------------------------------------------
def encode(name: str, parts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Encode cache rows to bytes.

    Args:
        name: name of the storage format.
        parts: the two parts of N rows, [N, w0] and [N, w1], of any floating-point dtype.

    Returns:
        uint8 [N, row_bytes(name, (w0, w1))].
    """
    a, b = parts
    if (
        a.dim() != 2
        or b.dim() != 2
        or len(a) != len(b)
        or not (a.is_floating_point() and b.is_floating_point())
    ):
        raise ValueError(
            "encode takes two floating-point tensors [N, w0] and [N, w1], found "
            + " and ".join(f"{x.dtype} {tuple(x.shape)}" for x in parts)
        )
    widths = (a.shape[1], b.shape[1])
    out = torch.empty(len(a), row_bytes(name, widths), dtype=torch.uint8, device=a.device)
    if name in _PLAIN:
        out.copy_(torch.cat([p.to(_PLAIN[name]) for p in parts], 1).view(torch.uint8))
        return out
    at, group = 0, _LOW_BIT[name].group
    for part, n in zip(parts, part_bits(name, widths)):
        size = _block_bytes(part.shape[1], n, group)
        _encode_block(part.to(torch.float32), n, group, out[:, at : at + size])
        at += size
    return out


def decode(
    name: str, rows: torch.Tensor, widths: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode cache rows from bytes.

    Args:
        name: name of the storage format.
        rows: uint8 [N, row_bytes(name, widths)], made by `encode`.
        widths: (w0, w1), the number of elements of each part.
        dtype: dtype of the result. Values are computed in float32 and then converted.

    Returns:
        The two parts, [N, w0] and [N, w1].
    """
    size = row_bytes(name, widths)
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != size:
        raise ValueError(
            f"rows of format {name!r} and widths {tuple(widths)} are uint8 [N, {size}], found "
            f"{rows.dtype} {tuple(rows.shape)}"
        )
    w0, w1 = widths
    if name in _PLAIN:
        stored = _PLAIN[name]
        cut = w0 * stored.itemsize
        return _plain_part(rows[:, :cut], stored, dtype), _plain_part(rows[:, cut:], stored, dtype)
    if not len(rows):
        return rows.new_empty(0, w0, dtype=dtype), rows.new_empty(0, w1, dtype=dtype)
    group, bits = _LOW_BIT[name].group, part_bits(name, widths)
    cut = _block_bytes(w0, bits[0], group)
    return (
        _decode_block(rows[:, :cut], w0, bits[0], group, dtype),
        _decode_block(rows[:, cut:], w1, bits[1], group, dtype),
    )


def _plain_part(part: torch.Tensor, stored: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    # Copy the slice: `view` to a wider dtype needs aligned, contiguous bytes.
    return part.clone(memory_format=torch.contiguous_format).view(stored).to(dtype)


# ---- one block -----------------------------------------------------------------------------------
def _max_code(n: int) -> int:
    """Return the largest value of a signed n-bit code, 2^(n-1) - 1."""
    return 2 ** (n - 1) - 1


def _groups(w: int, group: int) -> int:
    return -(-w // group)


def _factor_bytes(w: int, group: int) -> int:
    return 0 if w <= group else (_groups(w, group) + 1) // 2


def _block_bytes(w: int, n: int, group: int) -> int:
    return 1 + _factor_bytes(w, group) + -(-w // 8) * n


def _encode_block(x: torch.Tensor, n: int, group: int, out: torch.Tensor) -> None:
    """Encode x, float32 [N, w], into out, uint8 [N, block bytes]."""
    w = x.shape[1]
    group, groups, factor_bytes = min(group, w), _groups(w, group), _factor_bytes(w, group)
    x = F.pad(x, (0, groups * group - w)).unflatten(1, (groups, group))
    # Smallest scale with which the largest element of each group is not clipped, [N, groups].
    needed = x.abs().amax(-1) / _max_code(n)
    base = _to_e5m3(needed.amax(1))
    out[:, 0] = base
    scale = _from_e5m3(base)[:, None]
    if factor_bytes:
        f = (needed * (16 / scale)).ceil().nan_to_num(1.0, 16.0, 1.0).clamp(1, 16)
        scale = scale * (f / 16)
        f = F.pad((f - 1).to(torch.uint8), (0, 2 * factor_bytes - groups))
        out[:, 1 : 1 + factor_bytes] = f[:, 0::2] | f[:, 1::2] << 4
    codes = (
        (x / scale[..., None])
        .nan_to_num(0.0, 0.0, 0.0)
        .round_()
        .clamp_(-_max_code(n), _max_code(n))
        .add_(2 ** (n - 1))
        .to(torch.uint8)
    )
    padded = F.pad(codes.flatten(1)[:, :w], (0, -w % 8), value=2 ** (n - 1))
    _pack(padded, n, out[:, 1 + factor_bytes :])


def _decode_block(
    rows: torch.Tensor, w: int, n: int, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """Decode rows, uint8 [N, block bytes], to [N, w]."""
    group, groups, factor_bytes = min(group, w), _groups(w, group), _factor_bytes(w, group)
    scale = _from_e5m3(rows[:, 0])[:, None]
    if factor_bytes:
        f = rows[:, 1 : 1 + factor_bytes]
        f = torch.stack((f & 15, f >> 4), -1).flatten(1)[:, :groups]
        scale = scale * ((f.to(torch.float32) + 1) / 16)
    # 8-bit codes above 127 are negative as int8. The subtraction wraps them to the right value.
    codes = _unpack(rows[:, 1 + factor_bytes :], n).view(torch.int8).sub_(2 ** (n - 1))
    codes = F.pad(codes[:, :w], (0, groups * group - w)).unflatten(1, (groups, group))
    return codes.to(torch.float32).mul_(scale[..., None]).flatten(1)[:, :w].to(dtype).contiguous()


def _pack(codes: torch.Tensor, n: int, out: torch.Tensor) -> None:
    """Store n-bit codes, uint8 [N, W], as bit planes in out, uint8 [N, W * n / 8]."""
    at = shift = 0
    for p in _PLANES[n]:
        size = codes.shape[1] * p // 8
        pieces = ((codes >> shift) & (2**p - 1)).split(size, 1)
        for i, piece in enumerate(pieces):
            out[:, at : at + size] = piece if i == 0 else out[:, at : at + size] | piece << (p * i)
        at, shift = at + size, shift + p


def _unpack(rows: torch.Tensor, n: int) -> torch.Tensor:
    """Read n-bit codes, uint8 [N, W], from bit planes, uint8 [N, W * n / 8]."""
    codes, at, shift = None, 0, 0
    for p in _PLANES[n]:
        size = rows.shape[1] * p // n
        plane = _spread(rows[:, at : at + size], p, shift)
        codes = plane if codes is None else codes.bitwise_or_(plane)
        at, shift = at + size, shift + p
    return codes


def _spread(plane: torch.Tensor, p: int, shift: int) -> torch.Tensor:
    """Extract the p-bit fields of a plane, uint8 [N, S], to uint8 [N, 8 S / p].

    Each field is shifted left by `shift` bits. If S is a multiple of 8, the function processes
    eight bytes at once.
    """
    # Copy the plane, because a view as int64 needs aligned bytes.
    plane = plane.clone(memory_format=torch.contiguous_format)
    if p == 8:
        return plane
    word, ones = (torch.int64, 0x0101010101010101) if plane.shape[1] % 8 == 0 else (torch.uint8, 1)
    shifts = torch.arange(0, 8, p, dtype=word, device=plane.device)[:, None]
    fields = (plane.view(word)[:, None, :] >> shifts).bitwise_and_(ones * (2**p - 1))
    return fields.bitwise_left_shift_(shift).view(torch.uint8).flatten(1)


def _to_e5m3(x: torch.Tensor) -> torch.Tensor:
    """Round x, float32 >= 0, up to the next e5m3 number and return its byte, uint8.

    NaN, infinities and numbers above the largest e5m3 number become NaN.
    """
    x = x * _BASE_DIVISOR
    half = x.to(torch.float16).view(torch.int16)
    # The conversion rounds to nearest. Increase by one step where it has rounded down.
    half = half + (half.view(torch.float16) < x)
    code = (half.to(torch.int32) + 127) >> 7
    return torch.where(x.isfinite() & (code < 0xF8), code, _NAN_BASE).to(torch.uint8)


def _from_e5m3(code: torch.Tensor) -> torch.Tensor:
    return (code.to(torch.int16) << 7).view(torch.float16).to(torch.float32) / _BASE_DIVISOR
