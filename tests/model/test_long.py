"""Tests of a YaRN model at 128K positions in the engine, with a cache that grows page by page.

The 128K test takes a minute or two and runs with `make long`.
"""

import math

import numpy as np
import pytest

from lamoe.engine.llm import LLM
from lamoe.engine.sampler import SamplingParams
from lamoe.model.config import RopeScaling
from oracles import naive, tiny

POSITIONS = 131072


def last_logits(c, w, ids, at):
    """Compute the logits at position `at` of a one-layer model by the paper's equations.

    The keys and values are rows 0 to `at`.
    """
    w = {k.removeprefix("model.layers.0."): v for k, v in w.items()}
    n, r, v, heads = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.num_attention_heads
    x = w["model.embed_tokens.weight"]
    # Normalised embeddings of the whole vocabulary.
    normed = np.stack([naive.norm(row, w["input_layernorm.weight"], c.rms_norm_eps) for row in x])
    down = normed @ w["self_attn.kv_a_proj_with_mqa.weight"].T
    latent = np.stack(
        [
            naive.norm(row[: c.kv_lora_rank], w["self_attn.kv_a_layernorm.weight"], 1e-6)
            for row in down
        ]
    )
    up = (latent @ w["self_attn.kv_b_proj.weight"].T).reshape(-1, heads, n + v)
    shared = np.stack(
        [naive.rotate(c, down[token, c.kv_lora_rank :], p) for p, token in enumerate(ids[: at + 1])]
    )
    query = (w["self_attn.q_proj.weight"] @ normed[ids[at]]).reshape(heads, n + r)
    scale = (
        naive.yarn_m(c, c.rope_scaling.mscale_all_dim) ** 2 / math.sqrt(n + r)
        if c.rope_scaling
        else 1 / math.sqrt(n + r)
    )
    out = []
    for head in range(heads):
        key = np.concatenate([up[ids[: at + 1], head, :n], shared], 1)
        logit = (
            scale * key @ np.concatenate([query[head, :n], naive.rotate(c, query[head, n:], at)])
        )
        p = np.exp(logit - logit.max())
        out.append(p / p.sum() @ up[ids[: at + 1], head, n:])
    h = x[ids[at]] + w["self_attn.o_proj.weight"] @ np.concatenate(out)
    h = h + naive.swiglu(
        w, "mlp.", naive.norm(h, w["post_attention_layernorm.weight"], c.rms_norm_eps)
    )
    logits = w["lm_head.weight"] @ naive.norm(h, w["model.norm.weight"], c.rms_norm_eps)
    return logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())


def config(**changes):
    return tiny.config(
        "deepseek_v2",
        vocab_size=20,
        num_hidden_layers=1,
        num_attention_heads=1,
        hidden_size=16,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=0,
        moe_intermediate_size=None,
        n_routed_experts=None,
        n_shared_experts=0,
        num_experts_per_tok=None,
        intermediate_size=24,
        max_position_embeddings=POSITIONS,
        rope_scaling=RopeScaling(32.0, 4096),
        **changes,
    )


def run(positions: int):
    """Fill the whole context of a one-layer model.

    Checks the pages after every step, the last log-probabilities against the paper's equations, and
    that a second request finds the whole text in the cache.
    """
    c = config()
    m, generated = tiny.model(c).float(), 8
    engine = LLM(
        m,
        cache="fp32",
        max_model_len=positions,
        cache_memory=None,
        max_num_batched_tokens=2048,
        max_num_seqs=1,
    )
    prompt = tiny.ids(c, positions - generated).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=100, logprobs=c.vocab_size)
    [id] = engine.add(prompt, params)
    owned, output = [], None
    while output is None:
        for delta in engine.step():
            output = delta.output or output
        if engine.scheduler.running:
            [seq] = engine.scheduler.running
            # No page is allocated before it is needed.
            assert len(seq.pages) == engine.pool.owned == -(-seq.computed // engine.pool.page_size)
            owned.append(len(seq.pages))
    assert (
        owned[0] == 128
        and owned == sorted(owned)
        and owned[-1] == positions // 16
        and len(set(owned)) >= positions // 2048
    )
    assert output.finish_reason == "length" and len(output.token_ids) == generated
    ids = np.array(prompt + output.token_ids)
    w = tiny.weights(m.double())
    for k in (0, generated - 1):
        got = np.array([output.logprobs[k][i] for i in range(c.vocab_size)])
        want = last_logits(c, w, ids, len(prompt) - 1 + k)
        assert np.abs(got - want).max() < 1e-3
        without = last_logits(c.replace(rope_scaling=None), w, ids, len(prompt) - 1 + k)
        # The rotation matters, so a wrong one would be noticed.
        assert np.abs(got - without).max() > 1e-2
    m.float()
    again = engine.generate([prompt], params)[0]
    assert (
        again.token_ids == output.token_ids and again.cached_tokens == (len(prompt) - 1) // 16 * 16
    )


def test_4k_positions():
    run(4096 + 2048)


@pytest.mark.slow
def test_128k_positions():
    run(POSITIONS)
