"""Single operations of the compiled kernels (`lamoe._native_test`) as functions of torch tensors.

Builds by hand and editable installs have this module. Wheels do not.
"""

import torch

from lamoe.backends.cpu.native import FORMATS

try:
    from lamoe import _native_test as lib
except ImportError:
    lib = None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, isa: str = "") -> torch.Tensor:
    """Like ref.rms_norm, for float32 rows x [n, D] and weight [D]."""
    return torch.from_numpy(
        lib.rms_norm(x.contiguous().numpy(), weight.contiguous().numpy(), eps, isa)
    )


def rope(x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool, isa: str = "") -> torch.Tensor:
    """Rotate float32 rows x [n, R] by cos_sin [n, R]: R / 2 cosines, then R / 2 sines."""
    return torch.from_numpy(
        lib.rope(x.contiguous().numpy(), cos_sin.contiguous().numpy(), interleaved, isa)
    )


def swiglu(
    fmt: str,
    w13: torch.Tensor,
    scale: float,
    f: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    isa: str = "",
) -> torch.Tensor:
    """Compute silu(gate) * up * weight.

    Args:
        fmt: format of `w13`.
        w13: a packed matrix of f gates and f ups, each padded to whole tiles of 16.
        scale: scale of the packed matrix.
        f: number of gates.
        x: float32 [m, D].
        weight: float32 [m], a factor for each row.
        isa: instruction set, "" for the one in use.

    Returns:
        float32 [m, f padded to 64 with zeros].
    """
    x, weight = x.contiguous().numpy(), weight.contiguous().numpy()
    return torch.from_numpy(lib.swiglu(FORMATS[fmt], w13.numpy(), scale, f, x, weight, isa))


def attend(
    rows: torch.Tensor,
    q: torch.Tensor,
    last: torch.Tensor,
    k0: int,
    v0: int,
    vw: int,
    scale: float,
    chunk: int,
    isa: str = "",
) -> torch.Tensor:
    """Attend with up to 16 queries to cache rows.

    Args:
        rows: [S, W] float32 or bfloat16.
        q: float32 [L, kw].
        last: int32 [L]; query i sees rows 0 .. last[i].
        k0: first column of the keys, which are kw wide.
        v0: first column of the values.
        vw: width of the values.
        scale: factor of the scores.
        chunk: cache rows per attention state.
        isa: instruction set, "" for the one in use.

    Returns:
        float32 [L, vw].
    """
    elem = FORMATS["fp32" if rows.dtype == torch.float32 else "bf16"]
    raw, q = rows.contiguous().view(torch.uint8).numpy(), q.contiguous().numpy()
    return torch.from_numpy(lib.attend(elem, raw, q, last.numpy(), k0, v0, vw, scale, chunk, isa))


def attend_ints(
    codec: list[int],
    rows: torch.Tensor,
    q: torch.Tensor,
    last: torch.Tensor,
    scale: float,
    chunk: int,
    isa: str = "",
) -> torch.Tensor:
    """Attend with up to 16 queries to stored low-bit rows as integers (absorbed MLA).

    The latent is read as signed bytes with one step size per row. Queries, and the softmax weights
    of each tile of 64 rows, are rounded to 8 bits. The rope key is bfloat16.

    Args:
        codec: packed.codec_numbers of the cache format.
        rows: uint8 [S, row bytes].
        q: float32 [L, latent + rope].
        last: int32 [L]; query i sees rows 0 .. last[i].
        scale: factor of the scores.
        chunk: cache rows per attention state, a multiple of 64.
        isa: instruction set, "" for the one in use.

    Returns:
        float32 [L, latent].
    """
    rows, q = rows.contiguous().numpy(), q.contiguous().numpy()
    return torch.from_numpy(lib.attend_ints(codec, rows, q, last.numpy(), scale, chunk, isa))
