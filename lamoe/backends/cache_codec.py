"""Storage formats of cache rows: how the two parts of one token's row in one layer become bytes, and back.

Not the cache (cache.py): no pages, no lengths. A row stands alone: its bytes depend on its own numbers only, never on the batch.
The parts are (latent, rope key) under MLA, else (keys, values); `widths` are their sizes in elements, config.cache_row.

    fp32, bf16        the elements, little-endian, first part, then second part
    int8, 6bit, 4bit  two blocks, first part, then second part

A block of a part of w elements with codes of n bits in groups of g elements (W = w rounded up to a multiple of 8):

    1 byte    base >= 0, an e5m3 number: float16_from_bits(byte << 7) / 16, that is 4.8e-7 to 3840; 0xF8 and above are no number
    F bytes   one 4-bit factor f per group (element i is in group i // g), step of the group = base * (f + 1) / 16; the low half of
              byte k is group 2k, the high half group 2k + 1. A part of one group has none: F = 0, f = 15, step = base
    codes     n in 4, 5, 6, 7, 8 is stored as planes of 4, 4+1, 4+2, 4+2+1 or 8 bits: the low bits of the code first. A plane of p bits is
              S = W * p / 8 bytes; element i is in byte i % S, at bit p * (i // S). So one byte load, shift and mask gives S
              neighbours in order.
    value     (code - 2^(n-1)) * step; code 0 is not used; elements w..W hold code 2^(n-1) (zero)

The codes are symmetric integers with an exact zero. Both scales are rounded up and nothing is clipped: rounding them to nearest, which shrinks
the largest elements of half the groups, disturbs the predictions half as much again (KL) at nearly the same squared error.

Which part gets how many bits. The *fine* part is the rope key (a second part at most half as wide as the first), else the keys;
the other one is *coarse*. An error in the rope key, which all heads share, costs some 18 times as much as the same error in the latent.

    format   coarse  rope key  keys   group   bits per element at 512 + 64, at 192 | 192
    int8     8       8         8      16      8.3   8.3
    6bit     5       8         6      16      5.6   5.8    the fine part has fewer bits where the row would exceed 6.0 per element
    4bit     4       6         4      32      4.4   4.2

Rows of the low-bit formats with a NaN or an infinity, or with elements too large for base (above 3840 steps: 26,880 in 4 bits), say so: the
part decodes to NaN throughout. fp32 and bf16 hold what they are given.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lamoe.model.config import did_you_mean

# name: (bits of the coarse part, of a rope key, of keys, group, most bits per element: the fine part gives way)
_LOW_BIT = {"int8": (8, 8, 8, 16, None), "6bit": (5, 8, 6, 16, 6.0), "4bit": (4, 6, 4, 32, None)}
_PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS: tuple[str, ...] = (*_PLAIN, *_LOW_BIT)

_PLANES = {4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
_POISON = 0xFF  # as base: a NaN
_BIAS = 16  # base is a half over this: the range of halves, moved to where steps of activations are


# ---- sizes -------------------------------------------------------------------------------------------------------------
def row_bytes(name: str, widths: tuple[int, int]) -> int:
    """Bytes of one stored row of parts of `widths` elements, scales and padding included."""
    check_format(name)
    if len(widths) != 2 or min(widths) < 1:
        raise ValueError(
            f"a cache row has two parts of at least one element, found widths {tuple(widths)}"
        )
    if name in _PLAIN:
        return sum(widths) * _PLAIN[name].itemsize
    group = _LOW_BIT[name][3]
    return sum(_block_bytes(w, n, group) for w, n in zip(widths, part_bits(name, widths)))


def bits_per_element(name: str, widths: tuple[int, int]) -> float:
    """Stored bits per element of the row, scales and padding included."""
    return 8 * row_bytes(name, widths) / sum(widths)


def part_bits(name: str, widths: tuple[int, int]) -> tuple[int, int]:
    """Bits of one code of each part, without the scales; see the top of this file for the rule."""
    check_format(name)
    if name in _PLAIN:
        return (8 * _PLAIN[name].itemsize,) * 2
    coarse, of_rope_key, of_keys, group, limit = _LOW_BIT[name]
    rope_key = 2 * widths[1] <= widths[0]
    fine = of_rope_key if rope_key else of_keys
    w_coarse, w_fine = widths if rope_key else widths[::-1]
    if limit is not None:
        room = int(limit * sum(widths) / 8) - _block_bytes(w_coarse, coarse, group)
        while fine > coarse and _block_bytes(w_fine, fine, group) > room:
            fine -= 1
    return (coarse, fine) if rope_key else (fine, coarse)


def max_error(name: str, widths: tuple[int, int]) -> tuple[float, float]:
    """For each part, the largest |decoded - x| as a share of the part's largest |x| in that row. float32 on both sides; the low-bit
    formats add 2^-22 (2e-7) for the smallest step, bf16 its subnormal range. Half a step, where base is at most 1/8 too large."""
    check_format(name)
    if name in _PLAIN:
        return (0.0 if name == "fp32" else 2.0**-8,) * 2
    return tuple(9 / 8 / 2 / _half(n) for n in part_bits(name, widths))


def group_of(name: str) -> int:
    """Elements that share a scale; of the plain formats, which have none, 16."""
    return _LOW_BIT[name][3] if name in _LOW_BIT else 16


def check_format(name: str) -> None:
    if name not in FORMATS:
        raise ValueError(
            f"unknown cache format {name!r}{did_you_mean(name, FORMATS)}; known: {', '.join(FORMATS)}"
        )


# ---- encode and decode -----------------------------------------------------------------------------------------------------
def encode(name: str, parts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The rows of parts (a [N, w0], b [N, w1]), floating point. -> uint8 [N, row_bytes(name, (w0, w1))]"""
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
    at, group = 0, _LOW_BIT[name][3]
    for part, n in zip(parts, part_bits(name, widths)):
        size = _block_bytes(part.shape[1], n, group)
        _encode_block(part.to(torch.float32), n, group, out[:, at : at + size])
        at += size
    return out


def decode(
    name: str, rows: torch.Tensor, widths: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `encode` stored: rows uint8 [N, row_bytes] -> (a [N, w0], b [N, w1]) in `dtype`, computed in float32."""
    size = row_bytes(name, widths)
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != size:
        raise ValueError(
            f"rows of format {name!r} and widths {tuple(widths)} are uint8 [N, {size}], found {rows.dtype} {tuple(rows.shape)}"
        )
    if name in _PLAIN:
        stored = _PLAIN[name]
        cut = widths[0] * stored.itemsize
        # a copy of each part, which also puts it where its element type may begin
        return tuple(
            r.clone(memory_format=torch.contiguous_format).view(stored).to(dtype)
            for r in (rows[:, :cut], rows[:, cut:])
        )
    if not len(rows):
        return tuple(rows.new_empty(0, w, dtype=dtype) for w in widths)
    group, bits = _LOW_BIT[name][3], part_bits(name, widths)
    cut = _block_bytes(widths[0], bits[0], group)
    return (
        _decode_block(rows[:, :cut], widths[0], bits[0], group, dtype),
        _decode_block(rows[:, cut:], widths[1], bits[1], group, dtype),
    )


# ---- one block -------------------------------------------------------------------------------------------------------------
def _half(n: int) -> int:
    """The largest code of n bits, as a signed integer."""
    return 2 ** (n - 1) - 1


def _groups(w: int, group: int) -> int:
    return -(-w // group)


def _factor_bytes(w: int, group: int) -> int:
    return 0 if w <= group else (_groups(w, group) + 1) // 2


def _block_bytes(w: int, n: int, group: int) -> int:
    return 1 + _factor_bytes(w, group) + -(-w // 8) * n


def _encode_block(x: torch.Tensor, n: int, group: int, out: torch.Tensor) -> None:
    """x float32 [N, w] -> out [N, block bytes]."""
    w = x.shape[1]
    group, groups, factor_bytes = min(group, w), _groups(w, group), _factor_bytes(w, group)
    x = F.pad(x, (0, groups * group - w)).unflatten(1, (groups, group))
    need = x.abs().amax(-1) / _half(
        n
    )  # [N, groups]: the step that just reaches the largest element
    base = _to_e5m3(need.amax(1))
    out[:, 0] = base
    step = _from_e5m3(base)[:, None]
    if factor_bytes:
        f = (need * (16 / step)).ceil().nan_to_num(1.0, 16.0, 1.0).clamp(1, 16)
        step = step * (f / 16)
        f = F.pad((f - 1).to(torch.uint8), (0, 2 * factor_bytes - groups))
        out[:, 1 : 1 + factor_bytes] = f[:, 0::2] | f[:, 1::2] << 4
    codes = (
        (x / step[..., None])
        .nan_to_num(0.0, 0.0, 0.0)
        .round_()
        .clamp_(-_half(n), _half(n))
        .add_(2 ** (n - 1))
        .to(torch.uint8)
    )
    _pack(
        F.pad(codes.flatten(1)[:, :w], (0, -w % 8), value=2 ** (n - 1)),
        n,
        out[:, 1 + factor_bytes :],
    )


def _decode_block(
    rows: torch.Tensor, w: int, n: int, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """rows uint8 [N, block bytes] -> [N, w]"""
    group, groups, factor_bytes = min(group, w), _groups(w, group), _factor_bytes(w, group)
    step = _from_e5m3(rows[:, 0])[:, None]
    if factor_bytes:
        f = rows[:, 1 : 1 + factor_bytes]
        f = torch.stack((f & 15, f >> 4), -1).flatten(1)[:, :groups]
        step = step * ((f.to(torch.float32) + 1) / 16)
    codes = (
        _unpack(rows[:, 1 + factor_bytes :], n).view(torch.int8).sub_(2 ** (n - 1))
    )  # wraps into place at n = 8
    codes = F.pad(codes[:, :w], (0, groups * group - w)).unflatten(1, (groups, group))
    return codes.to(torch.float32).mul_(step[..., None]).flatten(1)[:, :w].to(dtype).contiguous()


def _pack(codes: torch.Tensor, n: int, out: torch.Tensor) -> None:
    """codes uint8 [N, W] -> out [N, W * n / 8], planes of low bits first."""
    at = shift = 0
    for p in _PLANES[n]:
        size = codes.shape[1] * p // 8
        pieces = ((codes >> shift) & (2**p - 1)).split(size, 1)
        for i, piece in enumerate(pieces):
            out[:, at : at + size] = piece if i == 0 else out[:, at : at + size] | piece << (p * i)
        at, shift = at + size, shift + p


def _unpack(rows: torch.Tensor, n: int) -> torch.Tensor:
    """rows uint8 [N, W * n / 8] -> codes uint8 [N, W]"""
    codes, at, shift = None, 0, 0
    for p in _PLANES[n]:
        size = rows.shape[1] * p // n
        plane = _spread(rows[:, at : at + size], p, shift)
        codes = plane if codes is None else codes.bitwise_or_(plane)
        at, shift = at + size, shift + p
    return codes


def _spread(plane: torch.Tensor, p: int, shift: int) -> torch.Tensor:
    """Fields of p bits, uint8 [N, S] -> uint8 [N, 8 S / p], each shifted left by `shift`. Eight bytes at a time where S allows it."""
    plane = plane.clone(
        memory_format=torch.contiguous_format
    )  # a slice of rows begins anywhere; an int64 may not
    if p == 8:
        return plane
    word, ones = (torch.int64, 0x0101010101010101) if plane.shape[1] % 8 == 0 else (torch.uint8, 1)
    fields = (
        plane.view(word)[:, None, :]
        >> torch.arange(0, 8, p, dtype=word, device=plane.device)[:, None]
    )
    return (
        fields.bitwise_and_(ones * (2**p - 1))
        .bitwise_left_shift_(shift)
        .view(torch.uint8)
        .flatten(1)
    )


def _to_e5m3(x: torch.Tensor) -> torch.Tensor:
    """x >= 0 float32 -> the least e5m3 number that is not smaller, as uint8; NaN, infinities and what is too large -> a NaN."""
    x = x * _BIAS
    half = x.to(torch.float16).view(torch.int16)
    half = half + (half.view(torch.float16) < x)  # the conversion rounds to nearest; up is wanted
    code = (half.to(torch.int32) + 127) >> 7
    return torch.where(x.isfinite() & (code < 0xF8), code, _POISON).to(torch.uint8)


def _from_e5m3(code: torch.Tensor) -> torch.Tensor:
    return (code.to(torch.int16) << 7).view(torch.float16).to(torch.float32) / _BIAS
