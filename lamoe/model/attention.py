"""Attention(MHA, GQA, MQA: only head counts differ) and MLA, with one call signature.

MLA has two forms that are equal in exact arithmetic (paper 2.1, App. C): *expand* makes keys and values of the latents and
attends as usual; *absorb* moves W^UK to the query and W^UV to the output and attends over the latents themselves, as if they
were one shared 576-wide key head. Both read and write the same cache rows: normed latent | rotated rope key.
"""

from __future__ import annotations

import torch
from torch import nn

from lamoe import kernels
from lamoe.model.cache import Cache, View
from lamoe.model.config import ModelConfig
from lamoe.model.layers import RMSNorm, linear
from lamoe.model.rope import softmax_scale


class Attention(nn.Module):
    """Multi-head attention with `num_key_value_heads` key / value heads. x [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer, self.scale = config, layer, softmax_scale(config)
        h, g, d = config.num_attention_heads, config.n_kv_heads, config.qk_head_dim
        self.wq = linear(config.hidden_size, h * d)
        self.wk = linear(config.hidden_size, g * d)
        self.wv = linear(config.hidden_size, g * d)
        self.wo = linear(h * d, config.hidden_size)

    def forward(self, x, freqs, cache: Cache | None = None, segments=None, form: str | None = None):
        width = self.config.qk_head_dim
        q, k, v = (
            w(x).unflatten(-1, (-1, width)) for w in (self.wq, self.wk, self.wv)
        )  # [B, T, heads, d]
        q = kernels.rope(q, freqs, self.config.rope_interleaved)
        k = kernels.rope(k, freqs, self.config.rope_interleaved)

        def attend(q, k, v, first):
            k, v = (rows.unflatten(-1, (-1, width)) for rows in (k, v))
            return kernels.attend(q, k, v, self.scale, _padding(first, k.shape[1]))

        if cache is None:
            return self.wo(kernels.attend(q, k, v, self.scale, segments).flatten(2))
        return self.wo(
            over_views(cache.views(self.layer, k.flatten(2), v.flatten(2)), (q,), attend).flatten(2)
        )


class MLA(nn.Module):
    """Multi-head latent attention. x [B, T, D] -> [B, T, D]. `form`: "expand" | "absorb"; None takes the cheaper."""

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

    def forward(self, x, freqs, cache: Cache | None = None, segments=None, form: str | None = None):
        c = self.config
        q = self.wq(x) if c.q_lora_rank is None else self.wq_b(self.q_norm(self.wq_a(x)))
        q = q.unflatten(-1, (c.num_attention_heads, c.qk_head_dim))  # [B, T, H, N + R]
        latent, k_rope = self.wkv_a(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        latent = self.kv_norm(latent)  # [B, T, C]; the rope key gets no norm
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        q_rope = kernels.rope(q_rope, freqs, c.rope_interleaved)
        k_rope = kernels.rope(k_rope[:, :, None], freqs, c.rope_interleaved)[
            :, :, 0
        ]  # [B, T, R], one for all heads

        def attend(q_nope, q_rope, latent, k_rope, first):
            if (form or cheaper_form(c, q_nope.shape[1], latent.shape[1])) == "expand":
                return self.expand(q_nope, q_rope, latent, k_rope, _padding(first, latent.shape[1]))
            return self.absorb(q_nope, q_rope, latent, k_rope, first)

        if cache is not None:
            views = cache.views(self.layer, latent, k_rope)
            out = over_views(views, (q_nope, q_rope), attend)
        elif segments is None:
            out = attend(q_nope, q_rope, latent, k_rope, None)
        elif form == "absorb":
            raise ValueError(
                "the absorbed form is for decoding and takes no segments; use form='expand' for packed documents"
            )
        else:
            out = self.expand(q_nope, q_rope, latent, k_rope, segments)
        return self.wo(out.flatten(2))

    def expand(self, q_nope, q_rope, latent, k_rope, segments):
        """Keys and values of every latent, then ordinary attention (eq. 40-46). -> [B, T, H, V]"""
        c = self.config
        kv = self.wkv_b(latent).unflatten(-1, (c.num_attention_heads, -1))  # [B, S, H, N + V]
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k_rope = k_rope[:, :, None].expand(-1, -1, c.num_attention_heads, -1)
        # heads before tokens in memory, the order in which attention reads them
        q, k = (
            torch.cat([a.transpose(1, 2), b.transpose(1, 2)], -1).transpose(1, 2)
            for a, b in ((q_nope, q_rope), (k_nope, k_rope))
        )
        return kernels.attend(q, k, v, self.scale, segments)

    def absorb(self, q_nope, q_rope, latent, k_rope, first=None):
        """Attention over the latents themselves (App. C); rows before `first` [B] are padding. -> [B, T, H, V]"""
        c = self.config
        w = self.wkv_b.weight.unflatten(0, (c.num_attention_heads, -1))  # [H, N + V, C]
        w_uk, w_uv = w.split([c.qk_nope_head_dim, c.v_head_dim], 1)
        q_latent = torch.einsum("bthn,hnc->bthc", q_nope, w_uk)
        o_latent = kernels.mla_attend(q_latent, q_rope, latent, k_rope, self.scale, first)
        return torch.einsum("bthc,hvc->bthv", o_latent, w_uv)


def over_views(views: list[View], queries: tuple[torch.Tensor, ...], attend) -> torch.Tensor:
    """Attend group by group: queries [B, T, H, ...] are cut as the views say, `attend(*queries, *rows, first)` gives [b, t, H, V] of each
    group. -> [B, T, H, V]"""
    parts = []
    for tokens, rows, first in views:
        mine = (
            queries
            if tokens is None
            else [q[0, tokens].unflatten(0, (rows[0].shape[0], -1)) for q in queries]
        )
        parts.append(attend(*mine, *rows, first).flatten(0, 1))
    return torch.cat(parts).unflatten(0, queries[0].shape[:2])


def _padding(first: torch.Tensor | None, s: int) -> torch.Tensor | None:
    """Rows before `first` [b] as a segment of their own, [b, S]: queries, being last, do not see them."""
    return None if first is None else (torch.arange(s, device=first.device) < first[:, None]).int()


def cheaper_form(c: ModelConfig, t: int, s: int) -> str:
    """The form with fewer multiply-adds per head for T queries over S cached tokens (all of them expanded by "expand")."""
    up = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
    expand = s * up + t * s * (c.qk_head_dim + c.v_head_dim)
    absorb = t * up + t * s * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
    return "expand" if expand < absorb else "absorb"
