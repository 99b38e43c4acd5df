"""Packed models with random weights, so that speed can be measured without a checkpoint.

Speed does not depend on the values of the weights as long as their mean is zero: routing is then
close to uniform. A nonzero mean would send all tokens to the same few experts.
"""

from __future__ import annotations

import torch

from lamoe.backends.base import Formats
from lamoe.backends.cpu import native, packed
from lamoe.backends.cpu.backend import CpuBackend
from lamoe.backends.cpu.packed import PackedTensor
from lamoe.backends.memory import available_memory
from lamoe.model.config import ModelConfig

_NOISE_BYTES = 1 << 20  # a tensor is filled with copies of this much random data
_STD = 0.02
_RMS_OF_RANDOM_CODES = {"int8": 74.0, "int4": 37.0}
_SCALE_BYTES = 64  # each block begins with its group scales


def random_model(config: ModelConfig, formats: Formats, threads: int = 0) -> CpuBackend:
    """Make a packed model of random weights with a standard deviation of about 0.02.

    Args:
        formats: of weights and head.

    Raises:
        ValueError: The weights do not fit into the available memory.
    """
    element = packed.element_format(formats)
    wanted = list(packed.packed_tensors(config, formats))
    size, free = sum(packed.packed_bytes(t, element) for t in wanted), available_memory()
    if free is not None and size > free:
        raise ValueError(
            f"the weights in {formats.weights} take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB "
            "of memory are available; take a smaller model, fewer layers (num_hidden_layers in a "
            "config.json) or a smaller format"
        )
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (_NOISE_BYTES,), dtype=torch.uint8, generator=generator)
    tensors = {t.key: _fill(t, element, noise) for t in wanted}
    return CpuBackend(config, formats, tensors, threads)


def _fill(
    tensor: PackedTensor, element: str, noise: torch.Tensor
) -> tuple[torch.Tensor, list[float]]:
    """Return the packed bytes of a tensor and the scale of each of its matrices."""
    if tensor.format is None:  # weights of a norm
        return torch.ones(tensor.n).view(torch.uint8), [1.0]
    kind = element if tensor.format == "raw" else tensor.format
    source = _normal(kind) if kind in ("fp32", "bf16") else noise
    out = native.allocate(packed.packed_bytes(tensor, element))
    for at in range(0, len(out), len(source)):
        out[at : at + len(source)] = source[: len(out) - at]
    if kind not in _RMS_OF_RANDOM_CODES:
        return out, [1.0] * tensor.num_matrices
    block_bytes = native.mat_bytes(kind, 16, native.BLOCK[kind])
    # Set all group scales to +0.5 or -0.5. int4 needs the random sign, because the mean of its
    # codebook is not zero.
    scales = out.view(-1, block_bytes)[:, :_SCALE_BYTES]
    scales.bitwise_and_(0x80).bitwise_or_(0x70)
    return out, [_STD / _RMS_OF_RANDOM_CODES[kind] / 0.5] * tensor.num_matrices


def _normal(kind: str) -> torch.Tensor:
    """Return the bytes of normally distributed numbers."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(_NOISE_BYTES // 4, generator=generator) * _STD
    return values.to(torch.float32 if kind == "fp32" else torch.bfloat16).view(torch.uint8)
