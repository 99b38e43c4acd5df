"""A second, independent implementation of the model: the paper's equations as plain loops.

It loops over tokens, heads, keys and experts in float64 numpy, for one sequence, without cache or
batching. It shares nothing with lamoe except the tensor names on disk. Equation numbers refer to
arXiv 2405.04434. YaRN is section 3.1.4 there and arXiv 2309.00071.
"""

from __future__ import annotations

import math

import numpy as np


def logits(
    c, weights: dict[str, np.ndarray], ids: list[int], positions: list[int] | None = None
) -> np.ndarray:
    """Return logits [T, vocabulary].

    `positions` default to 0 .. T - 1. Only the Hugging Face fields of `c` are read.
    """
    positions = list(range(len(ids))) if positions is None else positions
    h = [weights["model.embed_tokens.weight"][i] for i in ids]
    for layer in range(c.num_hidden_layers):
        w = {
            k.removeprefix(f"model.layers.{layer}."): v
            for k, v in weights.items()
            if k.startswith(f"model.layers.{layer}.")
        }
        normed = [norm(x, w["input_layernorm.weight"], c.rms_norm_eps) for x in h]
        attended = (
            latent_attention(c, w, normed, positions)
            if c.kv_lora_rank
            else plain_attention(c, w, normed, positions)
        )
        h = [x + a for x, a in zip(h, attended)]
        normed = [norm(x, w["post_attention_layernorm.weight"], c.rms_norm_eps) for x in h]
        sparse = (
            c.n_routed_experts is not None
            and layer >= c.first_k_dense_replace
            and layer % c.moe_layer_freq == 0
        )
        h = [x + (moe(c, w, u) if sparse else swiglu(w, "mlp.", u)) for x, u in zip(h, normed)]
    head = weights["model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"]
    return np.stack([head @ norm(x, weights["model.norm.weight"], c.rms_norm_eps) for x in h])


def norm(x, gain, eps):
    return x / math.sqrt(sum(v * v for v in x) / len(x) + eps) * gain


# ---- rotary embedding ----
def angles(c, position: int, width: int) -> list[float]:
    """Return the rotation angle of each of the width / 2 pairs."""
    out = []
    for i in range(width // 2):
        theta = c.rope_theta ** (-2 * i / width)
        y = c.rope_scaling
        if y is not None:
            # Index of the pair that rotates `turns` times within the original context.
            def pair(turns):
                return (
                    width
                    * math.log(y.original_max_position_embeddings / (turns * 2 * math.pi))
                    / (2 * math.log(c.rope_theta))
                )

            low, high = (
                max(math.floor(pair(y.beta_fast)), 0),
                min(math.ceil(pair(y.beta_slow)), width - 1),
            )
            r = min(max((i - low) / (high - low), 0), 1)
            theta = (1 - r) * theta + r * theta / y.factor
        out.append(position * theta)
    return out


def yarn_m(c, weight: float) -> float:
    return 1 + 0.1 * weight * math.log(c.rope_scaling.factor) if c.rope_scaling is not None else 1.0


def rotate(c, x, position: int):
    """Rotate pairs of elements. V2 pairs neighbours, llama and MoE-v1 pair the two halves."""
    out, half = np.empty_like(x), len(x) // 2
    size = (
        1.0
        if c.rope_scaling is None
        else yarn_m(c, c.rope_scaling.mscale) / yarn_m(c, c.rope_scaling.mscale_all_dim)
    )
    for i, a in enumerate(angles(c, position, len(x))):
        p, q = (2 * i, 2 * i + 1) if c.model_type == "deepseek_v2" else (i, i + half)
        out[p] = size * (x[p] * math.cos(a) - x[q] * math.sin(a))
        out[q] = size * (x[p] * math.sin(a) + x[q] * math.cos(a))
    return out


# ---- attention ----
def mix(q, keys, values, scale):
    """Return the sum of v_j weighted by softmax(q . k_j * scale) (eq. 46)."""
    logit = [scale * float(np.dot(q, k)) for k in keys]
    top = max(logit)
    e = [math.exp(v - top) for v in logit]
    return sum(w / sum(e) * v for w, v in zip(e, values))


def latent_attention(c, w, h, positions):
    """Compute eq. 37-47 for every token of the sequence."""
    nope, rot, value = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    scale = 1 / math.sqrt(nope + rot)
    if c.rope_scaling is not None:
        scale *= yarn_m(c, c.rope_scaling.mscale_all_dim) ** 2
    keys, values, out = [], [], []  # lists indexed [token][head]
    for x, position in zip(h, positions):
        down = w["self_attn.kv_a_proj_with_mqa.weight"] @ x
        latent = norm(down[: c.kv_lora_rank], w["self_attn.kv_a_layernorm.weight"], 1e-6)  # eq. 41
        shared_key = rotate(c, down[c.kv_lora_rank :], position)  # eq. 43
        up = (w["self_attn.kv_b_proj.weight"] @ latent).reshape(c.num_attention_heads, nope + value)
        # eq. 42, 44
        keys.append(
            [np.concatenate([up[i, :nope], shared_key]) for i in range(c.num_attention_heads)]
        )
        values.append([up[i, nope:] for i in range(c.num_attention_heads)])  # eq. 45
        if c.q_lora_rank is None:
            q = w["self_attn.q_proj.weight"] @ x
        else:
            q = w["self_attn.q_b_proj.weight"] @ norm(
                w["self_attn.q_a_proj.weight"] @ x, w["self_attn.q_a_layernorm.weight"], 1e-6
            )
        q = q.reshape(c.num_attention_heads, nope + rot)  # eq. 37-40
        heads = []
        for i in range(c.num_attention_heads):
            query = np.concatenate([q[i, :nope], rotate(c, q[i, nope:], position)])
            heads.append(mix(query, [k[i] for k in keys], [v[i] for v in values], scale))
        out.append(w["self_attn.o_proj.weight"] @ np.concatenate(heads))  # eq. 47
    return out


def plain_attention(c, w, h, positions):
    """Compute multi-head attention. Several query heads may share one key / value head."""
    groups = c.num_key_value_heads or c.num_attention_heads
    width = c.head_dim or c.hidden_size // c.num_attention_heads
    keys, values, out = [], [], []
    for x, position in zip(h, positions):
        q, k, v = ((w[f"self_attn.{n}_proj.weight"] @ x).reshape(-1, width) for n in "qkv")
        keys.append([rotate(c, k[g], position) for g in range(groups)])
        values.append(v)
        heads = []
        for i in range(c.num_attention_heads):
            g = i * groups // c.num_attention_heads
            heads.append(
                mix(
                    rotate(c, q[i], position),
                    [k[g] for k in keys],
                    [v[g] for v in values],
                    1 / math.sqrt(width),
                )
            )
        out.append(w["self_attn.o_proj.weight"] @ np.concatenate(heads))
    return out


# ---- feed-forward ----
def swiglu(w, name, x):
    gate, up = w[f"{name}gate_proj.weight"] @ x, w[f"{name}up_proj.weight"] @ x
    return w[f"{name}down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)


def affinities(w, u):
    """Return s_i = softmax_i(u . e_i) over all experts (eq. 22)."""
    z = w["mlp.gate.weight"] @ u
    e = np.exp(z - z.max())
    return e / e.sum()


def choose(c, s) -> list[int]:
    """Return the K experts of a token.

    They are the best ones, or the best ones within its `topk_group` best groups (section 2.2.2).
    """
    allowed = list(range(c.n_routed_experts))
    if c.topk_method == "group_limited_greedy":
        size = c.n_routed_experts // c.n_group
        best = [max(s[g * size : (g + 1) * size]) for g in range(c.n_group)]
        kept = sorted(range(c.n_group), key=lambda g: -best[g])[: c.topk_group]
        allowed = [i for i in allowed if i // size in kept]
    return sorted(allowed, key=lambda i: -s[i])[: c.num_experts_per_tok]


def moe(c, w, u):
    """Compute eq. 20 without the residual.

    It is the shared experts plus the chosen experts, weighted by their affinity (eq. 21).
    """
    s = affinities(w, u)
    chosen = choose(c, s)
    total = sum(s[i] for i in chosen) if c.norm_topk_prob else 1.0
    out = sum(
        c.routed_scaling_factor * s[i] / total * swiglu(w, f"mlp.experts.{i}.", u) for i in chosen
    )
    return out + swiglu(w, "mlp.shared_experts.", u) if c.n_shared_experts else out
