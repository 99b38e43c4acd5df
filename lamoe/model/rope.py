"""Rotary position embedding and its extension YaRN: frequencies, rotations, the two YaRN factors.

Everything depends on the config alone, never on the length of a buffer or of the current text.

Sources: paper 3.1.4 and eq. 39-43; YaRN, arXiv 2309.00071.
"""

from __future__ import annotations

import math

import torch

from lamoe.model.config import ModelConfig, RopeScaling


def mscale(factor: float, weight: float) -> float:
    """Return YaRN's m(s, c), which is 0.1 c ln s + 1 for s > 1, else 1.

    s is `factor` and c is `weight`. With c = 0.707 this is the 0.0707 ln s + 1 of paper 3.1.4.
    """
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Return the factor on attention logits: 1 / sqrt(width of a query head), times YaRN's factor.

    YaRN's factor is m(s, mscale_all_dim) squared. It scales the whole logit at every position, also
    the part without rotation. It applies to MLA only, because programs that load llama checkpoints
    scale cos and sin instead.
    """
    scale = config.qk_head_dim**-0.5
    if config.is_mla and config.rope_scaling is not None and config.rope_scaling.mscale_all_dim:
        scale *= mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def amplitude(config: ModelConfig) -> float:
    """Return YaRN's factor on cos and sin, m(s, mscale) / m(s, mscale_all_dim).

    It is exactly 1 in every released model, because mscale equals mscale_all_dim there.
    """
    y = config.rope_scaling
    return 1.0 if y is None else mscale(y.factor, y.mscale) / mscale(y.factor, y.mscale_all_dim)


def yarn_ramp_limits(y: RopeScaling, dim: int, theta: float) -> tuple[int, int]:
    """Return the indices (low, high) of the rotary pairs between which YaRN blends frequencies.

    Pairs up to `low` keep their frequency. From pair `high` on, the frequency is divided by
    `factor`. The result is (10, 23) for V2.
    """

    def pair_with(rotations: float) -> float:
        """Return the fractional index of the pair that rotates so often in the original context."""
        period = y.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(period) / (2 * math.log(theta))

    low, high = math.floor(pair_with(y.beta_fast)), math.ceil(pair_with(y.beta_slow))
    return max(low, 0), min(high, dim - 1)


def inv_freq(config: ModelConfig, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the angle in radians per position of each rotary pair, [R / 2], on the host.

    The default float32 reproduces the frequencies of the published code bit by bit. This matters
    because at position 100,000 the last bit of a frequency visibly changes the angle. Computing on
    the host gives every device the same bits.
    """
    dim = config.rope_dim
    positions_per_radian = config.rope_theta ** (torch.arange(0, dim, 2, dtype=dtype) / dim)
    plain = 1.0 / positions_per_radian
    y = config.rope_scaling
    if y is None:
        return plain
    low, high = yarn_ramp_limits(y, dim, config.rope_theta)
    ramp = ((torch.arange(dim // 2, dtype=dtype) - low) / max(high - low, 0.001)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (y.factor * positions_per_radian) * (1 - keep) + plain * keep


def freqs(
    config: ModelConfig, positions: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the rotation of each pair at each position as a complex number.

    Args:
        config: gives the frequencies and the factor on cos and sin.
        positions: integers of any shape [...]. The result is on the same device.
        dtype: the dtype of the model. float64 gives complex128, every other dtype complex64.

    Returns:
        [..., R / 2] complex, of magnitude `amplitude(config)`.
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    table = inv_freq(config, work)
    if positions.is_cuda:
        table = table.pin_memory()  # the host would wait for a copy from other memory
    angle = positions.to(work)[..., None] * table.to(positions.device, non_blocking=True)
    return torch.polar(torch.full_like(angle, amplitude(config)), angle)


def check_length(config: ModelConfig, length: int) -> None:
    """Raise ValueError if `length`, the tokens of a sequence, exceeds max_position_embeddings."""
    if length > config.max_position_embeddings:
        raise ValueError(
            f"{length} positions are more than the model's max_position_embeddings "
            f"{config.max_position_embeddings}; shorten the text"
        )
