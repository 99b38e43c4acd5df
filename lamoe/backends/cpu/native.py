"""The compiled kernels (csrc/, `lamoe._native`) as functions of torch tensors.

`available` says whether the kernels are built and switched on. Without them models run on torch
ops, and `announce` prints a warning once. The environment variable LAMOE_ISA = scalar | avx2 |
avxvnni | avx512vnni | avx512 | amx forces an instruction set.

Weight formats. Quantisation is group-wise. A group is 16 consecutive inputs of one output.
csrc/cpu/formats.h documents the byte layouts.

    fp32, bf16   plain values
    int8         code -127..127 times an 8-bit scale                       8.5 bits per weight
    int4         codebook of 16 non-uniform values times a signed 8-bit    4.5 bits per weight
                 scale

Error bounds, which tests/backends/test_native.py checks for every instruction set. `g` is the
largest |weight| of a group and `w` that of the matrix.

    all formats  float32 accumulation: k products have an error <= k * 2^-24 * sum(abs(products))
    fp32         weights and inputs are exact
    bf16         weights and inputs have a relative error <= 2^-8
    int8         error of a weight <= max(g / 225, w / 2^23); error of an input <= 1/254 of the
                 largest |input| of its block of 64
    int4         RMS error of the weights of a group <= 9/64 g (on normally distributed weights,
                 about 6 % was measured); inputs have the same error as in int8

Special values:

- A NaN or infinity in an input row makes the results of this row NaN or infinite. Other rows are
  not affected.
- int8 and int4 read a block of inputs below 1.5e-36 as zero.
- int8 and int4 results are finite if sum(abs(inputs)) <= 1.7e36. Larger inputs may overflow to
  infinity or NaN, but never produce a wrong finite value.

A result depends on its row and the weights alone. It does not depend on the other rows of the
batch, on the number of threads, or on other work of the process.
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
# A packed matrix stores blocks of 16 outputs x BLOCK inputs. Both dimensions are padded.
BLOCK: dict[str, int] = {"fp32": 1, "bf16": 2, "int8": 64, "int4": 64}
_announced = False


def available() -> bool:
    """Whether the compiled kernels are built and switched on.

    LAMOE_BACKEND=torch switches them off. So does LAMOE_IMPL (see kernels/__init__.py), because it
    selects an implementation of the torch ops.
    """
    return lib is not None and not switched_off()


def switched_off() -> bool:
    """Whether an environment variable disables the compiled kernels in favour of torch ops."""
    return os.environ.get("LAMOE_BACKEND") == "torch" or bool(os.environ.get("LAMOE_IMPL"))


def why_switched_off() -> str:
    """Return which environment variable switches the compiled kernels off, as a sentence, or ""."""
    if impl := os.environ.get("LAMOE_IMPL"):
        return f"LAMOE_IMPL={impl} switches them off"
    return "LAMOE_BACKEND=torch switches them off" if switched_off() else ""


def missing() -> str:
    """Return why the compiled kernels could not be imported, or "" if the import succeeded."""
    return _why


def announce() -> None:
    """Print once, on stderr, that the compiled kernels are missing and why."""
    global _announced
    if lib is None and not _announced and not switched_off():
        print(
            f"lamoe: the compiled kernels could not be imported ({_why}). Models run on torch ops, "
            "which is many times slower. Reinstall lamoe with a C++ compiler installed.",
            file=sys.stderr,
        )
    _announced = True


def allocate(size: int) -> torch.Tensor:
    """Allocate uint8 [size], in huge pages where the system has them.

    Every forward pass reads all weights from memory. Small pages would cost at least a seventh of
    the memory bandwidth.
    """
    if size < 1 << 21 or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(size, dtype=torch.uint8)
    # Make the map private. Python's default is shared memory, for which most systems give no huge
    # pages.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    request_huge_pages(pages)
    return torch.frombuffer(pages, dtype=torch.uint8)


def request_huge_pages(pages: mmap.mmap) -> None:
    """Ask the operating system to use huge pages for a memory map. Do nothing if it has none."""
    with contextlib.suppress(OSError, AttributeError):
        pages.madvise(mmap.MADV_HUGEPAGE)


def mat_bytes(fmt: str, n: int, k: int) -> int:
    """Return the bytes of a packed matrix of n outputs and k inputs.

    The function also works without the compiled kernels. The kernels refuse a matrix of any other
    size.
    """
    return -(-n // 16) * -(-k // BLOCK[fmt]) * int(16 * BLOCK[fmt] * BITS[fmt] / 8)


def pack(
    fmt: str,
    w: torch.Tensor,
    importance: torch.Tensor | None = None,
    feedback: torch.Tensor | None = None,
    isa: str = "",
) -> tuple[torch.Tensor, float]:
    """Pack a weight matrix in kernel layout, quantised if the format says so.

    Args:
        fmt: the weight format, a key of FORMATS.
        w: [n, k], n outputs and k inputs.
        importance: [k], the weight of each input in the squared error that int4 scales minimise.
        feedback: [k, k], unit upper triangular, made by calibrate.py. If the weight of input i has
            the rounding error e, the weight of each later input j changes by -e * feedback[i, j]
            before it is rounded.
        isa: the instruction set to use. "" means the best one of this CPU.

    Returns:
        The packed bytes, uint8 [mat_bytes(fmt, n, k)], and the scale of the matrix.

    Raises:
        ValueError: if a weight is not finite, or the compiled kernels are missing.
    """
    if lib is None:
        raise ValueError(
            f"packing needs the compiled kernels, which could not be imported ({_why}); install "
            "lamoe with a C++ compiler"
        )
    w = w.detach().to(torch.float32).contiguous()
    if not w.isfinite().all():
        raise ValueError(
            f"a weight matrix of shape {tuple(w.shape)} has values that are not finite, so it "
            "cannot be packed; check the checkpoint"
        )

    def array(t: torch.Tensor | None):
        return None if t is None else t.to(torch.float32).contiguous().numpy()

    data, scale = lib.pack(
        FORMATS[fmt], w.numpy(), array(importance), array(feedback), torch.get_num_threads(), isa
    )
    return torch.from_numpy(data), scale


def unpack(
    fmt: str, data: torch.Tensor, n: int, k: int, scale: float, isa: str = ""
) -> torch.Tensor:
    """Return the values of a packed matrix, float32 [n, k]."""
    return torch.from_numpy(lib.unpack(FORMATS[fmt], data.numpy(), n, k, scale, isa))


def linear(
    fmt: str, data: torch.Tensor, scale: float, n: int, x: torch.Tensor, isa: str = ""
) -> torch.Tensor:
    """Multiply x by the transpose of a packed matrix [n, k].

    For int8 and int4 matrices, x is first rounded to 8 bits, with one scale per block of 64 inputs.
    The sums within a group are then exact integers, and the rest is computed in float32. For bf16
    matrices, x is rounded to bfloat16.

    Args:
        data, scale: the packed matrix, from `pack`.
        x: float32 [m, k].

    Returns:
        float32 [m, n].
    """
    return torch.from_numpy(
        lib.linear(FORMATS[fmt], data.numpy(), scale, n, x.contiguous().numpy(), isa)
    )
