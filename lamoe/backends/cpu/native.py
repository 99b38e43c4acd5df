"""The compiled kernels (csrc/, `lamoe._native`) as functions of torch tensors, when they are there. `available()` says whether; without them
everything runs on torch ops, and `announce` says so once. LAMOE_ISA = scalar | avx2 | avxvnni | avx512vnni | avx512 | amx forces an instruction set.

Weight formats, group-wise over 16 inputs of one output (csrc/cpu/formats.h has the bytes):
    fp32, bf16   as they are
    int8         code -127..127 x an 8-bit scale: 8.5 bits a weight
    int4         16 uneven levels x an 8-bit scale with a sign: 4.5 bits a weight
How far from exact (tests/backends/test_native.py holds every instruction set to it; g: the largest weight of a group of 16, w: of the matrix)
    fp32         weights and inputs exact; a sum of k products within k 2^-24 of the sum of their absolute values, as in all formats
    bf16         weights and inputs within 2^-8 of themselves
    int8         a weight within g / 225 or w / 2^23, whichever is more; an input within 1/254 of the largest of its block of 64
    int4         the root mean square error of a group at most 9/64 g (6 % of a normal weight was measured); inputs as int8
A NaN or an infinity in an input row makes that row's results NaN or infinite, and no other's. int8 and int4 read a block of inputs below 1.5e-36 as zero; their
results are finite while the inputs' absolute values add up to at most 1.7e36, and beyond that right or not finite, never finite and wrong.
A result depends on its row and its weights alone, not on the other rows of a batch, the number of threads or what else runs.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys

import torch

try:
    from lamoe import _native as lib
except ImportError as e:
    lib, _why = None, str(e)
else:
    _why = ""

FORMATS: dict[str, int] = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
BITS: dict[str, float] = {"fp32": 32.0, "bf16": 16.0, "int8": 8.5, "int4": 4.5}
BLOCK: dict[str, int] = {
    "fp32": 1,
    "bf16": 2,
    "int8": 64,
    "int4": 64,
}  # inputs that are stored together, for 16 outputs; both are filled up
_said = False


def available() -> bool:
    """Whether the compiled kernels are built and switched on.

    LAMOE_BACKEND=torch switches them off. So does LAMOE_IMPL (kernels/__init__.py), which names
    torch ops.
    """
    return lib is not None and not switched_off()


def switched_off() -> bool:
    """Whether the environment says that torch ops should run models."""
    return os.environ.get("LAMOE_BACKEND") == "torch" or bool(os.environ.get("LAMOE_IMPL"))


def why_switched_off() -> str:
    """Name the environment variable that switches the compiled kernels off; "" if none does."""
    if impl := os.environ.get("LAMOE_IMPL"):
        return f"LAMOE_IMPL={impl} switches them off"
    return "LAMOE_BACKEND=torch switches them off" if switched_off() else ""


def missing() -> str:
    """Why the compiled kernels are not there; "" when they are."""
    return _why


def announce() -> None:
    """Say once, on stderr, that the compiled kernels are missing and why."""
    global _said
    if lib is None and not _said and not switched_off():
        print(
            f"lamoe: the compiled kernels are not there ({_why}); running on torch ops, many times slower. Install with a C++ compiler at hand.",
            file=sys.stderr,
        )
    _said = True


def allocate(size: int) -> torch.Tensor:
    """uint8 [size], in huge pages where the system has them: weights are read from end to end, and small pages cost a seventh of the bandwidth and more."""
    if size < 1 << 21 or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(
        -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # not shared, as is the default: that has small pages on most systems
    request_huge_pages(pages)
    return torch.frombuffer(pages, dtype=torch.uint8)


def request_huge_pages(pages: mmap.mmap) -> None:
    """Ask for huge pages, where the system has them."""
    with contextlib.suppress(OSError, AttributeError):
        pages.madvise(mmap.MADV_HUGEPAGE)


def mat_bytes(fmt: str, n: int, k: int) -> int:
    """Bytes of a packed matrix of n outputs and k inputs; known without the kernels, which refuse a matrix of any other size."""
    return -(-n // 16) * -(-k // BLOCK[fmt]) * int(16 * BLOCK[fmt] * BITS[fmt] / 8)


def pack(
    fmt: str,
    w: torch.Tensor,
    importance: torch.Tensor | None = None,
    feedback: torch.Tensor | None = None,
    isa: str = "",
) -> tuple[torch.Tensor, float]:
    """w [n, k] -> (uint8 [mat_bytes], scale of the matrix). importance [k]: how much a squared error of each input counts where scales are searched (int4).
    feedback [k, k], unit upper triangular: the rounding error e of input i moves each later input j by -e * feedback[i, j] before that is rounded
    (calibrate.py makes it). ValueError for a weight that is not finite, and without the compiled kernels."""
    if lib is None:
        raise ValueError(
            f"packing needs the compiled kernels, which are not there ({_why}); install lamoe with a C++ compiler"
        )
    w = w.detach().to(torch.float32).contiguous()
    if not w.isfinite().all():
        raise ValueError(
            f"a weight matrix of shape {tuple(w.shape)} has values that are not finite; it cannot be packed"
        )
    extra = [
        None if t is None else t.to(torch.float32).contiguous().numpy()
        for t in (importance, feedback)
    ]
    data, scale = lib.pack(FORMATS[fmt], w.numpy(), *extra, torch.get_num_threads(), isa)
    return torch.from_numpy(data), scale


def unpack(
    fmt: str, data: torch.Tensor, n: int, k: int, scale: float, isa: str = ""
) -> torch.Tensor:
    """What `pack` stored, float32 [n, k]."""
    return torch.from_numpy(lib.unpack(FORMATS[fmt], data.numpy(), n, k, scale, isa))


def linear(
    fmt: str, data: torch.Tensor, scale: float, n: int, x: torch.Tensor, isa: str = ""
) -> torch.Tensor:
    """x [m, k] float32 times the packed matrix [n, k] transposed -> float32 [m, n]. int8 and int4 round x to 8 bits in blocks of 64 with a scale
    each, bf16 to bfloat16; sums are exact integers per group, then float32."""
    return torch.from_numpy(
        lib.linear(FORMATS[fmt], data.numpy(), scale, n, x.contiguous().numpy(), isa)
    )
