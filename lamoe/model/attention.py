"""Two attention layers with one call signature: Attention (MHA, GQA, MQA) and MLA.

Multi-head latent attention has two forms that are equal in exact arithmetic (paper 2.1, App. C):

    expand   computes the keys and values of all heads from the latents, then attends as usual
    absorb   multiplies the query by W^UK and the output by W^UV, and attends over the latents
             themselves, as if they were one key / value head of width C + R shared by all heads

Both forms read and write the same cache rows. A row is the latent after its norm, followed by the
rotary key after rotation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lamoe import kernels
from lamoe.model.cache import Cache, View
from lamoe.model.config import ModelConfig
from lamoe.model.costs import cheaper_form
from lamoe.model.layers import RMSNorm, linear
from lamoe.model.rope import softmax_scale


class Attention(nn.Module):
    """Multi-head attention with G key / value heads, [B, T, D] -> [B, T, D].

    With G = H this is MHA, with G = 1 MQA, and with any G between GQA.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer, self.scale = config, layer, softmax_scale(config)
        h, g, d = config.num_attention_heads, config.n_kv_heads, config.qk_head_dim
        self.wq = linear(config.hidden_size, h * d)
        self.wk = linear(config.hidden_size, g * d)
        self.wv = linear(config.hidden_size, g * d)
        self.wo = linear(h * d, config.hidden_size)

    def forward(
        self,
        x: torch.Tensor,
        freqs: torch.Tensor,
        cache: Cache | None = None,
        segments: torch.Tensor | None = None,
        form: str | None = None,
    ) -> torch.Tensor:
        """Attend from the tokens of x to themselves and the cached tokens.

        x and the result are [B, T, D]. `freqs` is the result of rope.freqs, the other arguments are
        those of Transformer.hidden. `form` has no effect, because only MLA has two forms.
        """
        width, interleaved = self.config.qk_head_dim, self.config.rope_interleaved
        # [B, T, H, width], [B, T, G, width], [B, T, G, width]
        q, k, v = (w(x).unflatten(-1, (-1, width)) for w in (self.wq, self.wk, self.wv))
        if cache is None:
            out = kernels.rope_attend(q, v, k, freqs, interleaved, self.scale, segments)
            return self.wo(out.flatten(2))
        q, k = (kernels.rope(rows, freqs, interleaved) for rows in (q, k))

        def attend(q, k, v, first):
            k, v = (rows.unflatten(-1, (-1, width)) for rows in (k, v))
            return kernels.attend(q, k, v, self.scale, _padding_segments(first, k.shape[1]))

        views = cache.views(self.layer, k.flatten(2), v.flatten(2))
        return self.wo(_attend_views(views, (q,), attend).flatten(2))


class MLA(nn.Module):
    """Multi-head latent attention, [B, T, D] -> [B, T, D] (paper eq. 37-47)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer, self.scale = config, layer, softmax_scale(config)
        d, h, c = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        if config.q_lora_rank is None:
            self.wq = linear(d, h * config.qk_head_dim)
        else:
            self.wq_a = linear(d, config.q_lora_rank)
            self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.wq_b = linear(config.q_lora_rank, h * config.qk_head_dim)
        self.wkv_a = linear(d, c + config.qk_rope_head_dim)
        self.kv_norm = RMSNorm(c, config.rms_norm_eps)
        self.wkv_b = linear(c, h * (config.qk_nope_head_dim + config.v_head_dim))
        self.wo = linear(h * config.v_head_dim, d)

    def forward(
        self,
        x: torch.Tensor,
        freqs: torch.Tensor,
        cache: Cache | None = None,
        segments: torch.Tensor | None = None,
        form: str | None = None,
    ) -> torch.Tensor:
        """Attend from the tokens of x to themselves and the cached tokens.

        `form` is "expand", "absorb", or None for the form with fewer multiply-adds. The other
        arguments and the result are those of Attention.forward.
        """
        c = self.config
        q = self.wq(x) if c.q_lora_rank is None else self.wq_b(self.q_norm(self.wq_a(x)))
        q = q.unflatten(-1, (c.num_attention_heads, c.qk_head_dim))  # [B, T, H, N + R]
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_rope = self.wkv_a(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        latent = self.kv_norm(latent)  # [B, T, C]; the rotary key gets no norm
        k_rope = k_rope[:, :, None]  # [B, T, 1, R], shared by all heads
        if cache is None and self._expands(x.shape[1], segments, form):
            kv = self.wkv_b(latent).unflatten(-1, (c.num_attention_heads, -1))
            out = kernels.rope_attend(
                q, kv, k_rope, freqs, c.rope_interleaved, self.scale, segments
            )
            return self.wo(out.flatten(2))
        q_rope = kernels.rope(q_rope, freqs, c.rope_interleaved)
        k_rope = kernels.rope(k_rope, freqs, c.rope_interleaved).squeeze(2)  # [B, T, R]

        def attend(q_nope, q_rope, latent, k_rope, first):
            s = latent.shape[1]
            if (form or cheaper_form(c, q_nope.shape[1], s)) == "expand":
                return self.expand(q_nope, q_rope, latent, k_rope, _padding_segments(first, s))
            return self.absorb(q_nope, q_rope, latent, k_rope, first)

        if cache is None:
            out = self.absorb(q_nope, q_rope, latent, k_rope)
        else:
            views = cache.views(self.layer, latent, k_rope)
            out = _attend_views(views, (q_nope, q_rope), attend)
        return self.wo(out.flatten(2))

    def _expands(self, t: int, segments: torch.Tensor | None, form: str | None) -> bool:
        """Return whether T tokens without a cache use the expanded form. Segments need it."""
        if segments is None:
            return (form or cheaper_form(self.config, t, t)) == "expand"
        if form == "absorb":
            raise ValueError(
                "segments were given, but the absorbed form of MLA is for decoding and does not "
                "support them; use form='expand' for packed documents"
            )
        return True

    def expand(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        segments: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend over the keys and values computed from the latents (eq. 42, 44-46).

        Args:
            q_nope: [B, T, H, N] queries without rotation.
            q_rope: [B, T, H, R] rotated queries.
            latent: [B, S, C] latents after their norm.
            k_rope: [B, S, R] rotary keys after rotation.
            segments: [B, S] integers as in Transformer.hidden. None means one segment.

        Returns:
            [B, T, H, V].
        """
        c = self.config
        kv = self.wkv_b(latent).unflatten(-1, (c.num_attention_heads, -1))  # [B, S, H, N + V]
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k_rope = k_rope[:, :, None].expand(-1, -1, c.num_attention_heads, -1)
        q, k = _concat_by_head(q_nope, q_rope), _concat_by_head(k_nope, k_rope)
        return kernels.attend(q, k, v, self.scale, segments)

    def absorb(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        first: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend over the latents themselves (App. C). Arguments and result are those of `expand`.

        Args:
            first: [B] int64, index of each sequence's first latent that is not padding. None means
                no padding.
        """
        c = self.config
        w = self.wkv_b.weight.unflatten(0, (c.num_attention_heads, -1))  # [H, N + V, C]
        w_uk, w_uv = w.split([c.qk_nope_head_dim, c.v_head_dim], 1)
        q_latent = torch.einsum("bthn,hnc->bthc", q_nope, w_uk)
        o_latent = kernels.mla_attend(q_latent, q_rope, latent, k_rope, self.scale, first)
        return torch.einsum("bthc,hvc->bthv", o_latent, w_uv)


def _attend_views(
    views: list[View],
    queries: tuple[torch.Tensor, ...],
    attend: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Call `attend(*queries, *rows, first)` for each view and concatenate the results.

    The queries are [B, T, H, ...], and each view gets its part of them as [b, t, H, ...]. The
    concatenated result is [B, T, H, V].
    """
    parts = []
    for tokens, rows, first in views:
        own = queries
        if tokens is not None:  # the engine's batch is one row; this view is b x t tokens
            own = tuple(q[0, tokens].unflatten(0, (rows[0].shape[0], -1)) for q in queries)
        parts.append(attend(*own, *rows, first).flatten(0, 1))
    return torch.cat(parts).unflatten(0, queries[0].shape[:2])


def _padding_segments(first: torch.Tensor | None, s: int) -> torch.Tensor | None:
    """Return segments [b, S] that hide the padding, the rows before `first` [b], from all queries.

    Returns None if `first` is None.
    """
    return None if first is None else (torch.arange(s, device=first.device) < first[:, None]).int()


def _concat_by_head(nope: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Concatenate [B, S, H, N] and [B, S, H, R] to [B, S, H, N + R].

    In memory, heads come before tokens. Attention reads one head after the other, so this layout
    avoids a transposed copy.
    """
    return torch.cat([nope.transpose(1, 2), rope.transpose(1, 2)], -1).transpose(1, 2)
