"""Tiny random models for the oracles.

Their weights are large enough that logits, attention and routing vary, and norms are not ones.
"""

from __future__ import annotations

import inspect
import itertools
import textwrap

import torch

from lamoe.checkpoints.hf import table
from lamoe.model import rope
from lamoe.model.config import ModelConfig, RopeScaling
from lamoe.model.transformer import Transformer

_BASE = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=163840,
    torch_dtype="float32",
)
_MLA = dict(
    model_type="deepseek_v2",
    kv_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
)
_MOE = dict(
    moe_intermediate_size=20,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
)
LIMITED = dict(
    n_group=4, topk_group=2, topk_method="group_limited_greedy", routed_scaling_factor=2.5
)
# A short original context puts YaRN's ramp (0, 1/2, 1, 1) inside the 4 pairs of a tiny rope.
YARN = RopeScaling(factor=40.0, original_max_position_embeddings=64)


def config(family: str = "deepseek_v2", **changes) -> ModelConfig:
    """Return a tiny config: deepseek_v2 (MLA + MoE), deepseek (MHA + MoE) or llama (dense)."""
    parts = {
        "deepseek_v2": {**_MLA, **_MOE},
        "deepseek": {"model_type": family, **_MOE},
        "llama": {"model_type": family},
    }[family]
    return ModelConfig(**{**_BASE, **parts, **changes})


# every combination of the options that the released models use
V2_CASES = {
    f"{'lora' if lora else 'plain'}-{'yarn' if yarn else 'rope'}-"
    f"{'limited' if limited else 'greedy'}-{dense}dense": config(
        q_lora_rank=24 if lora else None,
        rope_scaling=YARN if yarn else None,
        first_k_dense_replace=dense,
        **(LIMITED if limited else {}),
    )
    for lora, yarn, limited, dense in itertools.product(
        (False, True), (False, True), (False, True), (0, 1, 2)
    )
}
LLAMA_CASES = {
    "mha": config("llama"),
    "gqa": config("llama", num_key_value_heads=2),
    "mqa-tied": config("llama", num_key_value_heads=1, tie_word_embeddings=True),
    "gqa-wide-heads": config("llama", num_key_value_heads=2, head_dim=12),
    "gqa-yarn": config(
        "llama",
        num_key_value_heads=2,
        rope_scaling=RopeScaling(40.0, 64, mscale=1.0, mscale_all_dim=0.0),
    ),
    # transformers' llama scales cos and sin, but not the softmax
    "mha-yarn-two-mscales": config(
        "llama", rope_scaling=RopeScaling(40.0, 64, mscale=1.0, mscale_all_dim=0.5)
    ),
}
# All options at once: the model that mutation tests use.
HARD = V2_CASES["lora-yarn-limited-1dense"]


def model(c: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> Transformer:
    """Return an eval-mode model with matrices from N(0, 0.3) and norms from 0.5 to 1.5.

    In every dtype the weights are the same, rounded.
    """
    generator = torch.Generator().manual_seed(seed)
    m = Transformer(c).to(dtype).eval()
    with torch.no_grad():
        for p in m.parameters():
            draw = torch.rand if p.dim() == 1 else torch.randn
            p.copy_(
                draw(p.shape, generator=generator) + 0.5
                if p.dim() == 1
                else draw(p.shape, generator=generator) * 0.3
            )
    return m


def ids(c: ModelConfig, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(c.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def weights(m: Transformer) -> dict:
    """Return the parameters by name on disk as float64 arrays, the input of naive.logits."""
    parameters = dict(m.named_parameters())
    return {
        e.disk: parameters[e.parameter][e.where].detach().double().numpy() for e in table(m.config)
    }


def at_positions(
    m: Transformer, tokens: torch.Tensor, positions: list[int], form: str | None = None
) -> torch.Tensor:
    """Return the logits of tokens [B, T] at arbitrary positions.

    Unlike Transformer.hidden, the positions may have gaps.
    """
    x = m.embed(tokens)
    freqs = rope.freqs(m.config, torch.tensor([positions]), x.dtype)
    for block in m.layers:
        x = block(x, freqs, form=form)
    return m.logits(m.norm(x))


def mutate(monkeypatch, function, *changes: tuple[str, str]):
    """Replace text in the source of a function (or of a property's getter) for one test.

    Fails unless the text occurs exactly once, so that a mutation cannot silently stop working.
    """
    function = getattr(function, "fget", function)
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        assert source.count(old) == 1, (
            f"{function.__qualname__} has {source.count(old)} times {old!r}; bring the mutation "
            "up to date"
        )
        source = source.replace(old, new)
    namespace: dict = {}
    exec(
        compile(
            "from __future__ import annotations\n" + source.removeprefix("@property\n"),
            function.__qualname__,
            "exec",
        ),
        function.__globals__,
        namespace,
    )
    monkeypatch.setattr(function, "__code__", namespace[function.__name__].__code__)
