"""The definition of every op: plain differentiable torch, as short as it can be said. Slow on purpose; tests and new kernels
are held against these. Letters: B batch, T query tokens, S cached tokens, H heads, G kv heads, D model, C latent, R rope,
N nope, V value, E experts, K top-k, F ffn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last axis; statistics in float32 (at least), cast back, then times weight."""
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    return (work * torch.rsqrt(work.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rope(x: torch.Tensor, freqs: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Turn the pairs of x [B, T, heads, R] by freqs [B or 1, T, R/2] (unit complex). Interleaved: a pair is (2k, 2k+1), else
    (k, k + R/2); the output keeps the input's order."""
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    freqs = freqs[:, :, None]
    if interleaved:
        z = torch.view_as_complex(work.unflatten(-1, (-1, 2)).contiguous()) * freqs
        return torch.view_as_real(z).flatten(-2).to(x.dtype)
    z = torch.complex(*work.chunk(2, -1)) * freqs
    return torch.cat([z.real, z.imag], -1).to(x.dtype)


def visible(t: int, s: int, segments: torch.Tensor | None, device=None) -> torch.Tensor:
    """[1 or B, T, S] bool: query i (position s - t + i) sees key j when j is not later and of the same segment [B, S]."""
    mask = torch.ones(t, s, dtype=torch.bool, device=device).tril(s - t)[None]
    if segments is not None:
        mask = mask & (segments[:, s - t :, None] == segments[:, None, :])
    return mask


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention: q [B, T, H, d], k [B, S, G, d], v [B, S, G, V] -> [B, T, H, V]; queries are the last T of S positions.
    Logits in the dtype of q, softmax in float32 (at least)."""
    t, s, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    logits = torch.einsum("bthd,bshd->bhts", q, k) * scale
    logits = logits.masked_fill(~visible(t, s, segments, q.device)[:, None], float("-inf"))
    p = logits.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.einsum("bhts,bshv->bthv", p, v)


def mla_attend(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    scale: float,
    first: torch.Tensor | None = None,
) -> torch.Tensor:
    """Absorbed attention over the latent cache itself: q_latent [B, T, H, C], q_rope [B, T, H, R], latent [B, S, C],
    k_rope [B, S, R] -> [B, T, H, C] (weighted sums of latents). Queries are the last T of S positions; rows before `first` [B] are
    padding. `scale` is that of the full query, never 1/sqrt(C + R)."""
    t, s = q_latent.shape[1], latent.shape[1]
    logits = (
        torch.einsum("bthc,bsc->bhts", q_latent, latent)
        + torch.einsum("bthr,bsr->bhts", q_rope, k_rope)
    ) * scale
    if t > 1:
        logits = logits.masked_fill(~visible(t, s, None, latent.device)[:, None], float("-inf"))
    if first is not None:
        logits = logits.masked_fill(
            (torch.arange(s, device=first.device) < first[:, None])[:, None, None], float("-inf")
        )
    p = logits.softmax(-1, dtype=torch.promote_types(latent.dtype, torch.float32)).to(latent.dtype)
    return torch.einsum("bhts,bsc->bthc", p, latent)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for x [..., 2F] = gate | up."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def experts(
    x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    """sum_k weight[n, k] * FFN_expert[n, k](x[n]): x [N, D], expert [N, K] (id E: nobody), weight [N, K] float32,
    w13 [E, 2F, D], w2 [E, D, F] -> [N, D]. The weight multiplies the F-wide activation; the sum over k is in float32."""
    out = torch.zeros(x.shape, dtype=weight.dtype, device=x.device)
    for e in range(w13.shape[0]):
        token, slot = torch.where(expert == e)
        act = swiglu(F.linear(x[token], w13[e]))
        act = (act * weight[token, slot, None]).to(x.dtype)
        out = out.index_add(0, token, F.linear(act, w2[e]).to(weight.dtype))
    return out.to(x.dtype)


def cross_entropy(h: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean of -log softmax(h head^T)[target] over targets >= 0, at least float32 (0 when there is none): h [N, D],
    head [vocabulary, D], targets [N] int64, negative where a position does not count."""
    logits = F.linear(h, head).to(torch.promote_types(h.dtype, torch.float32))
    total = F.cross_entropy(logits, targets.clamp_min(-1), ignore_index=-1, reduction="sum")
    return total / (targets >= 0).sum().clamp_min(1)
