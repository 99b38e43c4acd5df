"""The model, read top to bottom: embedding, blocks of (norm, attention, norm, feed-forward), norm, head.

READ THIS FIRST. No distribution, quantisation or file paths here: those are applied to a finished model from outside.
Parameter names are the paper's; convert/hf.py maps the public checkpoints onto them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lamoe import kernels
from lamoe.model import rope, routing
from lamoe.model.attention import MLA, Attention
from lamoe.model.cache import Cache
from lamoe.model.config import ModelConfig
from lamoe.model.layers import MLP, RMSNorm, linear
from lamoe.model.moe import MoE


class Block(nn.Module):
    """Pre-norm residual block. x [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = (MLA if config.is_mla else Attention)(config, layer)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = (
            MoE(config)
            if config.is_moe_layer(layer)
            else MLP(config.hidden_size, config.intermediate_size)
        )

    def forward(self, x, freqs, cache=None, segments=None, routing_hook=None, form=None):
        x = x + self.attn(self.attn_norm(x), freqs, cache, segments, form)
        h = self.ffn_norm(x)
        return x + (self.ffn(h, routing_hook) if isinstance(self.ffn, MoE) else self.ffn(h))


class Transformer(nn.Module):
    """`model(ids)` -> logits. ids [B, T] int64.

    cache: earlier tokens; the new ones are appended (and `advance`d) and ids continue from there.
    segments: [B, T] integers; a token sees only earlier tokens of its own segment (documents packed into one row).
    routing_hook: called by every MoE layer after routing. routing.Training records balance losses and drops tokens;
        routing.Chosen records the chosen experts.
    form: forces MLA's "expand" or "absorb"; for tests and measurements.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head = linear(config.hidden_size, config.vocab_size)

    @property
    def head_weight(self) -> torch.Tensor:
        """[vocabulary, D]."""
        return self.embed.weight if self.config.tie_word_embeddings else self.head.weight

    def hidden(
        self,
        ids,
        cache: Cache | None = None,
        segments=None,
        routing_hook: routing.RoutingHook | None = None,
        form=None,
    ):
        """Final normed states [B, T, D]: what the head reads."""
        positions = (
            torch.arange(ids.shape[-1])[None] if cache is None else cache.positions(ids.shape[-1])
        )
        check_ids(ids, self.config, positions)
        if segments is not None and (cache is not None or segments.shape != ids.shape):
            raise ValueError(
                f"segments must have the shape of ids {tuple(ids.shape)} and go without a cache, found {tuple(segments.shape)}"
                + (" and a cache" if cache is not None else "")
            )
        if form not in (None, "expand", "absorb"):
            raise ValueError(f"form is {form!r}; known: expand, absorb")
        x = self.embed(ids)
        freqs = rope.freqs(
            self.config, positions.to(ids.device), x.dtype
        )  # [1, T, R / 2], one table for all layers
        for block in self.layers:
            x = block(x, freqs, cache, segments, routing_hook, form)
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.norm(x)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., vocabulary], at least float32."""
        out = F.linear(h, self.head_weight) if self.config.tie_word_embeddings else self.head(h)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def forward(self, ids, cache=None, segments=None, routing_hook=None, form=None) -> torch.Tensor:
        return self.logits(self.hidden(ids, cache, segments, routing_hook, form))

    def loss(self, ids, targets, segments=None, routing_hook=None) -> torch.Tensor:
        """Mean cross-entropy in nats (float32) of targets [B, T] (negative: does not count), without the balance losses.
        The [B T, vocabulary] logits never exist at once."""
        h = self.hidden(ids, None, segments, routing_hook)
        return kernels.cross_entropy(h.flatten(0, 1), self.head_weight, targets.flatten())

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> Transformer:
        """N(0, initializer_range) for every matrix, gate included (paper 3.1.2: std 0.006 for all learnable parameters); ones for
        norms. Drawn in float32 in the order of the parameters, so a seed means the same weights in every dtype."""
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            if p.dim() == 1:
                p.fill_(1.0)
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * self.config.initializer_range)
        return self


def check_ids(ids: torch.Tensor, config: ModelConfig, positions: torch.Tensor) -> None:
    if ids.dim() != 2 or ids.numel() == 0 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"ids must be integers of shape [batch, tokens] with at least one of each, found {ids.dtype} {tuple(ids.shape)}"
        )
    low, high = ids.aminmax()
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"token id {int(low if low < 0 else high)} is outside the vocabulary of {config.vocab_size} tokens"
        )
    if (end := int(positions.max()) + 1) > config.max_position_embeddings:
        raise ValueError(
            f"{end} positions are more than the model's max_position_embeddings {config.max_position_embeddings}; shorten the text"
        )
