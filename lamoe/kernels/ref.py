"""The definition of every op: plain differentiable torch, as short as possible, slow on purpose.

Tests compare every other implementation with these functions. Shapes use the letters of
model/transformer.py. "At least float32" means float32, or float64 if the input is float64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply rows by a matrix: x weight^T.

    Args:
        x: [..., D].
        weight: [F, D].

    Returns:
        [..., F].
    """
    return F.linear(x, weight)


def embedding(weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the rows [..., D] of weight [vocabulary, D] for ids [...]."""
    return F.embedding(ids, weight)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise rows: x / sqrt(mean(x^2) + eps) * weight.

    Statistics are in at least float32. The normalised row is cast back to the dtype of x before it
    is multiplied by weight.

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean square.

    Returns:
        [..., D].
    """
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    return (work * torch.rsqrt(work.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (x + residual, rms_norm(x + residual)). The arguments are those of rms_norm."""
    total = x + residual
    return total, rms_norm(total, weight, eps)


def rope(x: torch.Tensor, freqs: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate pairs of elements by position (paper eq. 39, 43).

    Args:
        x: [B, T, heads, R].
        freqs: [B or 1, T, R / 2] complex rotations; see model/rope.py.
        interleaved: True if the elements (2k, 2k + 1) form pairs, False if (k, k + R / 2) do.

    Returns:
        [B, T, heads, R] in the dtype and element order of x.
    """
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    freqs = freqs[:, :, None]
    if interleaved:
        z = torch.view_as_complex(work.unflatten(-1, (-1, 2)).contiguous()) * freqs
        return torch.view_as_real(z).flatten(-2).to(x.dtype)
    z = torch.complex(*work.chunk(2, -1)) * freqs
    return torch.cat([z.real, z.imag], -1).to(x.dtype)


def visible(
    t: int, s: int, segments: torch.Tensor | None, device: torch.device | None = None
) -> torch.Tensor:
    """Return which keys each query may attend to, [1 or B, T, S] bool.

    Query i is at position S - T + i. It may attend to key j if position j is not later and belongs
    to the same segment.

    Args:
        t: number of queries T.
        s: number of keys S.
        segments: [B, S] integers. None means one segment.
        device: device of the result.
    """
    mask = torch.ones(t, s, dtype=torch.bool, device=device).tril(s - t)[None]
    if segments is not None:
        mask = mask & (segments[:, s - t :, None] == segments[:, None, :])
    return mask


def document_mask(segments: torch.Tensor) -> Any:
    """Prepare the `segments` argument of `attend` once for all layers of a pass.

    Here it stays as it is. Other implementations return what their `attend` reads faster.

    Args:
        segments: [B, T] integers.
    """
    return segments


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend causally with queries at the last T of S positions (paper eq. 46).

    Attention logits have the dtype of q. The softmax is in at least float32.

    Args:
        q: [B, T, H, width].
        k: [B, S, G, width]. Each of the G heads serves H / G query heads.
        v: [B, S, G, V].
        scale: factor on the attention logits.
        segments: [B, S] integers. A query attends only to keys of its own segment. None means one
            segment.

    Returns:
        [B, T, H, V].
    """
    t, s, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    logits = torch.einsum("bthd,bshd->bhts", q, k) * scale
    logits = logits.masked_fill(~visible(t, s, segments, q.device)[:, None], float("-inf"))
    p = logits.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.einsum("bhts,bshv->bthv", p, v)


def rope_attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    k_rope: torch.Tensor,
    freqs: torch.Tensor,
    interleaved: bool,
    scale: float,
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate the last R elements of queries and keys, then attend causally (paper eq. 39-46).

    This is the attention of training, where queries and keys have the same T positions.

    Args:
        q: [B, T, H, N + R] queries.
        kv: [B, T, G, N + V], the elements of the keys without rotation, then the values. Each of
            the G heads serves H / G query heads. N may be 0.
        k_rope: [B, T, G or 1, R], the rotary elements of the keys. With 1, all heads share them.
        freqs: as in `rope`.
        interleaved: as in `rope`.
        scale: factor on the attention logits.
        segments: as in `attend`.

    Returns:
        [B, T, H, V].
    """
    q, k, v = rotated_heads(q, kv, k_rope, freqs, interleaved)
    return attend(q, k, v, scale, segments)


def rotated_heads(
    q: torch.Tensor,
    kv: torch.Tensor,
    k_rope: torch.Tensor,
    freqs: torch.Tensor,
    interleaved: bool,
    rope=rope,
    join=lambda nope, rope: torch.cat([nope, rope], -1),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the arguments (q, k, v) of `attend` for the arguments of `rope_attend`.

    `rope` rotates rotary elements, and `join` puts them after the elements without rotation.
    """
    r = k_rope.shape[-1]
    n = q.shape[-1] - r
    q_nope, q_rope = q.split([n, r], -1)
    k_nope, v = kv.split([n, kv.shape[-1] - n], -1)
    k_rope = rope(k_rope, freqs, interleaved).expand(-1, -1, kv.shape[2], -1)
    return join(q_nope, rope(q_rope, freqs, interleaved)), join(k_nope, k_rope), v


def mla_attend(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    scale: float,
    first: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend causally over latents, which serve as keys and values of all heads (paper App. C).

    Args:
        q_latent: [B, T, H, C] queries multiplied by W^UK.
        q_rope: [B, T, H, R] rotated queries.
        latent: [B, S, C]. The queries are at the last T of S positions.
        k_rope: [B, S, R] rotated keys.
        scale: factor on the attention logits. It is computed from the width N + R of a full query
            head, not from C + R.
        first: [B] int64, index of each sequence's first row that is not padding. None means no
            padding.

    Returns:
        [B, T, H, C], the weighted sums of latents.
    """
    t, s = q_latent.shape[1], latent.shape[1]
    content = torch.einsum("bthc,bsc->bhts", q_latent, latent)
    rotary = torch.einsum("bthr,bsr->bhts", q_rope, k_rope)
    logits = (content + rotary) * scale
    if t > 1:
        logits = logits.masked_fill(~visible(t, s, None, latent.device)[:, None], float("-inf"))
    if first is not None:
        padding = torch.arange(s, device=first.device) < first[:, None]  # [B, S]
        logits = logits.masked_fill(padding[:, None, None], float("-inf"))
    p = logits.softmax(-1, dtype=torch.promote_types(latent.dtype, torch.float32)).to(latent.dtype)
    return torch.einsum("bhts,bsc->bthc", p, latent)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up [..., F] for x = gate | up [..., 2 F]."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def experts(
    x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    """Sum the weighted outputs of the chosen experts of each row (paper eq. 20).

    The router weight multiplies the activation of width F. The sum over experts is computed in the
    dtype of weight.

    Args:
        x: [N, D].
        expert: [N, K] int64 expert ids. Id E means no expert.
        weight: [N, K] router weights, float32 or float64.
        w13: [E, 2 F, D], for each expert the rows of gate, then the rows of up.
        w2: [E, D, F], the matrix of the second product of each expert.

    Returns:
        [N, D] in the dtype of x.
    """
    out = torch.zeros(x.shape, dtype=weight.dtype, device=x.device)
    for e in range(w13.shape[0]):
        token, slot = torch.where(expert == e)
        act = swiglu(F.linear(x[token], w13[e]))
        act = (act * weight[token, slot, None]).to(x.dtype)
        out = out.index_add(0, token, F.linear(act, w2[e]).to(weight.dtype))
    return out.to(x.dtype)


def cross_entropy(h: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the mean of -log softmax(h head^T)[target] in nats, in at least float32.

    Args:
        h: [N, D] normed states.
        head: [vocabulary, D].
        targets: [N] int64. Rows with a negative target do not count.

    Returns:
        A scalar. It is 0 if no row counts.
    """
    logits = F.linear(h, head).to(torch.promote_types(h.dtype, torch.float32))
    total = F.cross_entropy(logits, targets.clamp_min(-1), ignore_index=-1, reduction="sum")
    return total / (targets >= 0).sum().clamp_min(1)
