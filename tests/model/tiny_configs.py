"""Two tiny configs, one with and one without MLA and experts, for the tests of configs."""

from lamoe.model.config import ModelConfig, RopeScaling

YARN = RopeScaling(factor=4.0, mscale=0.8, mscale_all_dim=0.7)
# initializer_range is large, so that every change of the numerics shows in the logits.
MOE = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    q_lora_rank=20,
    kv_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=16,
    v_head_dim=10,
    intermediate_size=48,
    moe_intermediate_size=16,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    topk_method="group_limited_greedy",
    routed_scaling_factor=2.0,
    rope_scaling=YARN,
    max_position_embeddings=64,
    initializer_range=0.3,
    torch_dtype="float32",
)
DENSE = ModelConfig(
    model_type="llama",
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    initializer_range=0.3,
    torch_dtype="float32",
)
