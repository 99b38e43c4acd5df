"""The presets as fields of ModelConfig: the released DeepSeek models, and two small ones to train.

`ModelConfig.preset(name)` returns a preset as a config. Sources: paper 3.1.2, App. B and the
released configs.
"""

from __future__ import annotations

from typing import Any

_YARN = dict(
    factor=40.0,
    original_max_position_embeddings=4096,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=0.707,
    mscale_all_dim=0.707,
)
# DeepSeek-V2 (paper 3.1.2).
_V2 = dict(
    model_type="deepseek_v2",
    vocab_size=102400,
    hidden_size=5120,
    num_hidden_layers=60,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    n_routed_experts=160,
    n_shared_experts=2,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    n_group=8,
    topk_group=3,
    topk_method="group_limited_greedy",
    routed_scaling_factor=16.0,
    rope_scaling=_YARN,
    max_position_embeddings=163840,
    initializer_range=0.006,
    aux_loss_alpha=0.001,
    bos_token_id=100000,
    eos_token_id=100001,
)
# DeepSeek-V2-Lite (paper, App. B).
_LITE = {
    **_V2,
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
}
# Fields that the two small models have in common.
_SMALL = dict(
    model_type="deepseek_v2",
    q_lora_rank=None,
    n_shared_experts=1,
    first_k_dense_replace=1,
    rope_scaling=None,
    torch_dtype="float32",
    aux_loss_alpha=0.003,
)

FIELDS: dict[str, dict[str, Any]] = {
    "deepseek-v2": _V2,
    "deepseek-v2.5": {**_V2, "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "deepseek-v2-lite": _LITE,
    "coder-v2-lite": _LITE,
    "deepseek-67b": dict(
        model_type="llama",
        vocab_size=102400,
        hidden_size=8192,
        num_hidden_layers=95,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=22016,
        max_position_embeddings=4096,
        bos_token_id=100000,
        eos_token_id=100001,
    ),
    "deepseek-moe-16b": dict(
        model_type="deepseek",
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=28,
        num_attention_heads=16,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        max_position_embeddings=4096,
        aux_loss_alpha=0.001,
        bos_token_id=100000,
        eos_token_id=100001,
    ),
    # The model of `make demo`. It trains in minutes on two cores.
    "tiny": dict(
        **_SMALL,
        vocab_size=4096,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        kv_lora_rank=64,
        qk_nope_head_dim=48,
        qk_rope_head_dim=16,
        v_head_dim=64,
        intermediate_size=512,
        moe_intermediate_size=96,
        n_routed_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=1024,
        initializer_range=0.02,
    ),
    # The model of the training benchmark. It has 24.6M parameters.
    "small": dict(
        **_SMALL,
        vocab_size=8192,
        hidden_size=384,
        num_hidden_layers=8,
        num_attention_heads=6,
        kv_lora_rank=96,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        intermediate_size=1024,
        moe_intermediate_size=96,
        n_routed_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=2048,
    ),
    # A larger model for benchmarks, with as many experts as Lite. It has 117M parameters.
    "medium": dict(
        **_SMALL,
        vocab_size=8192,
        hidden_size=640,
        num_hidden_layers=12,
        num_attention_heads=10,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        intermediate_size=1792,
        moe_intermediate_size=64,
        n_routed_experts=64,
        num_experts_per_tok=6,
        max_position_embeddings=2048,
    ),
}
