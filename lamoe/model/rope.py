"""Everything that depends on context length: rotary frequencies, the YaRN ramp, and the two YaRN factors.

Sources: paper 3.1.4 and eq. 39-43; YaRN, arXiv 2309.00071. All of it depends on the config alone, never on the length of a
buffer or of the text at hand: YaRN is static once configured.
"""

from __future__ import annotations

import math

import torch

from lamoe.model.config import ModelConfig, RopeScaling


def mscale(factor: float, weight: float) -> float:
    """m(s, c) = 0.1 c ln s + 1 for s > 1, else 1. With c = 0.707 this is the paper's 0.0707 ln s + 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """What attention logits are multiplied by: 1 / sqrt(query width), times m(s, mscale_all_dim)^2 under YaRN.

    The factor acts on the whole logit, nope part included, at every position. It is the part of YaRN most often forgotten.
    It belongs to MLA: other programs that load a llama checkpoint know the factor on cos and sin only.
    """
    scale = config.qk_head_dim**-0.5
    if config.is_mla and config.rope_scaling is not None and config.rope_scaling.mscale_all_dim:
        scale *= mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def amplitude(config: ModelConfig) -> float:
    """What cos and sin are multiplied by: m(s, mscale) / m(s, mscale_all_dim), exactly 1 in every released model."""
    y = config.rope_scaling
    return 1.0 if y is None else mscale(y.factor, y.mscale) / mscale(y.factor, y.mscale_all_dim)


def yarn_ramp_limits(y: RopeScaling, dim: int, theta: float) -> tuple[int, int]:
    """(low, high): pairs up to `low` keep their frequency, pairs from `high` on are slowed by `factor`. (10, 23) for V2."""

    def pair_turning(
        rotations: float,
    ) -> float:  # the pair that turns this often within the original context
        return (
            dim
            * math.log(y.original_max_position_embeddings / (rotations * 2 * math.pi))
            / (2 * math.log(theta))
        )

    return max(math.floor(pair_turning(y.beta_fast)), 0), min(
        math.ceil(pair_turning(y.beta_slow)), dim - 1
    )


def inv_freq(config: ModelConfig, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Angle per position of each rotary pair, [R / 2]. Computed in float32 unless asked otherwise, as the published code does:
    at position 100,000 the last bit of a frequency is a visible part of a turn."""
    dim = config.rope_dim
    turns = config.rope_theta ** (torch.arange(0, dim, 2, dtype=dtype) / dim)
    plain = 1.0 / turns
    y = config.rope_scaling
    if y is None:
        return plain
    low, high = yarn_ramp_limits(y, dim, config.rope_theta)
    ramp = ((torch.arange(dim // 2, dtype=dtype) - low) / max(high - low, 0.001)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (y.factor * turns) * (1 - keep) + plain * keep


def freqs(
    config: ModelConfig, positions: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Rotation of each pair at each position as unit complex numbers times `amplitude`: [..., R / 2], complex64 (complex128 for
    dtype float64). `positions`: integers of any shape."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    angle = positions.to(work)[..., None] * inv_freq(config, work).to(positions.device)
    return torch.polar(torch.full_like(angle, amplitude(config)), angle)
