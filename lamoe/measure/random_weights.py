"""Packed models with random weights, so that speed can be measured without a checkpoint.

Speed does not depend on the values of the weights as long as their mean is zero: routing is then
close to uniform. A nonzero mean would send all tokens to the same few experts.
"""

from __future__ import annotations

import torch

from lamoe.backends.cpu import native, packed
from lamoe.backends.cpu.packed import PackedModel, Piece
from lamoe.engine.plan import available_memory
from lamoe.model.config import ModelConfig

_NOISE_BYTES = 1 << 20  # this much random data is repeated over a tensor
_STD = 0.02
# Per quantised format: bytes of a block, and the root mean square of its codes if they are random.
_BLOCKS = {"int8": (1088, 74.0), "int4": (576, 37.0)}


def random_model(
    config: ModelConfig, weights: str, threads: int = 0, head: str | None = None
) -> PackedModel:
    """Make a packed model of random weights with a standard deviation of about 0.02.

    Args:
        weights, head: storage formats, as in packed.pieces.

    Raises:
        ValueError: The weights do not fit into the available memory.
    """
    elem = packed.element(weights)
    pieces = list(packed.pieces(config, weights, head))
    size, free = sum(packed.piece_bytes(p, elem) for p in pieces), available_memory()
    if free is not None and size > free:
        raise ValueError(
            f"the weights in {weights} take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory "
            "are available; take a smaller model, fewer layers (num_hidden_layers in a "
            "config.json) or a smaller format"
        )
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (_NOISE_BYTES,), dtype=torch.uint8, generator=generator)
    tensors = {p.key: _fill(p, elem, noise) for p in pieces}
    return PackedModel(config, weights, tensors, threads, head)


def _fill(piece: Piece, elem: str, noise: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """The packed bytes of a piece and the scale of each of its matrices."""
    if piece.format is None:  # a norm
        return torch.ones(piece.n).view(torch.uint8), [1.0]
    kind = elem if piece.format == "raw" else piece.format
    source = _normal(kind) if kind in ("fp32", "bf16") else noise
    out = native.room(packed.piece_bytes(piece, elem))
    for at in range(0, len(out), len(source)):
        out[at : at + len(source)] = source[: len(out) - at]
    if kind not in _BLOCKS:
        return out, [1.0] * piece.count
    block, rms = _BLOCKS[kind]
    # Group scales of +-0.5. The random sign matters for int4: its codebook has a nonzero mean.
    out.view(-1, block)[:, :64].bitwise_and_(0x80).bitwise_or_(0x70)
    return out, [_STD / rms / 0.5] * piece.count


def _normal(kind: str) -> torch.Tensor:
    """Bytes of normally distributed numbers."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(_NOISE_BYTES // 4, generator=generator) * _STD
    return values.to(torch.float32 if kind == "fp32" else torch.bfloat16).view(torch.uint8)
