"""Make the golden files in tests/oracles/goldens: tiny random models and what they compute.

    python tools/make_goldens.py        # all of them; needs transformers >= 5.17
    python tools/make_goldens.py run    # only lamoe's ten losses, after an intended numeric change

The files of transformers do not involve lamoe: config classes, weights and save_pretrained are its
own. Each file holds the checkpoint (weights in bfloat16, computation in float32), ids, logits at
positions 0 .. T - 1, logits at far positions, greedy tokens, and two numbers per gradient. The
metadata holds config.json and the versions. The same versions make the same bytes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "tests" / "oracles" / "goldens"
TOKENS, NEW = 12, 8
FAR = [0, 1, 2, 50, 4095, 4096, 4097, 30000, 39999, 40000, 40001, 100000]

_BASE = dict(
    vocab_size=48,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    rms_norm_eps=1e-6,
    max_position_embeddings=163840,
    bos_token_id=0,
    eos_token_id=1,
)
_V2 = dict(
    _BASE,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=8,
    v_head_dim=10,
    moe_intermediate_size=6,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    num_key_value_heads=2,
)
_YARN = dict(
    rope_theta=10000.0,
    rope_type="yarn",
    factor=40.0,
    original_max_position_embeddings=4096,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=0.707,
    mscale_all_dim=0.707,
)
MODELS = {
    "v2": (
        "DeepseekV2",
        dict(
            _V2,
            q_lora_rank=12,
            rope_parameters=_YARN,
            n_group=4,
            topk_group=2,
            topk_method="group_limited_greedy",
            routed_scaling_factor=16.0,
        ),
    ),
    "v2-lite": (
        "DeepseekV2",
        dict(
            _V2,
            q_lora_rank=None,
            rope_parameters=_YARN,
            n_group=1,
            topk_group=1,
            topk_method="greedy",
        ),
    ),
    "v2-no-yarn": (
        "DeepseekV2",
        dict(
            _V2,
            q_lora_rank=12,
            rope_parameters=dict(rope_theta=10000.0, rope_type="default"),
            n_group=1,
            topk_group=1,
            topk_method="greedy",
            first_k_dense_replace=0,
        ),
    ),
    "llama-gqa": ("Llama", dict(_BASE, num_attention_heads=4, num_key_value_heads=2, head_dim=8)),
    "llama-mha-tied": ("Llama", dict(_BASE, num_key_value_heads=2, tie_word_embeddings=True)),
}


def summary(gradient: torch.Tensor) -> torch.Tensor:
    """Return [norm, weighted sum] of a gradient in float64.

    The weights of the sum differ at every position, so that permuted values change the sum.
    """
    g = gradient.detach().double().flatten()
    return torch.stack(
        [g.norm(), g @ torch.cos(torch.arange(g.numel(), dtype=torch.float64) * 0.7)]
    )


def per_disk_name(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename gradients to the tensor names on disk, where experts are not stacked as in memory."""
    out = {}
    for name, g in gradients.items():
        stem = name.removesuffix("experts.gate_up_proj").removesuffix("experts.down_proj")
        for e in range(g.shape[0] if stem != name else 0):
            if name.endswith("down_proj"):
                out[f"{stem}experts.{e}.down_proj.weight"] = g[e]
            else:
                (
                    out[f"{stem}experts.{e}.gate_proj.weight"],
                    out[f"{stem}experts.{e}.up_proj.weight"],
                ) = g[e].chunk(2)
        if stem == name:
            out[name] = g
    return out


def golden(name: str):
    import transformers
    from safetensors.torch import load_file, save_file

    family, arguments = MODELS[name]
    config = getattr(transformers, f"{family}Config")(
        **arguments, attn_implementation="eager", experts_implementation="eager"
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            draw = (
                torch.rand(p.shape, generator=generator) + 0.5
                if p.dim() == 1
                else torch.randn(p.shape, generator=generator) * 0.4
            )
            p.copy_(draw.bfloat16())
    ids = torch.randint(2, config.vocab_size, (2, TOKENS), generator=generator)
    logits = model(ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {
        n: summary(g)
        for n, g in per_disk_name({n: p.grad for n, p in model.named_parameters()}).items()
    }
    with torch.no_grad():
        # without the mask of ones, transformers takes position jumps for document borders
        far = model(
            ids, position_ids=torch.tensor([FAR, FAR]), attention_mask=torch.ones_like(ids)
        ).logits
        greedy = ids
        for _ in range(NEW):
            greedy = torch.cat([greedy, model(greedy).logits[:, -1:].argmax(-1)], 1)
    with tempfile.TemporaryDirectory() as folder:
        model.bfloat16().save_pretrained(folder)
        tensors = {f"weights.{n}": t for n, t in load_file(f"{folder}/model.safetensors").items()}
        config_json = json.loads((Path(folder) / "config.json").read_text())
        about = {
            "config": config_json,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }
    tensors |= {
        "ids": ids,
        "logits": logits.detach(),
        "far": far,
        "greedy": greedy[:, TOKENS:].contiguous(),
    }
    tensors |= {f"gradients.{n}": g for n, g in gradients.items()}
    # a single metadata entry, because safetensors has no fixed order of several
    save_file(tensors, OUT / f"{name}.safetensors", {"about": json.dumps(about)})
    print(f"{name}: {(OUT / f'{name}.safetensors').stat().st_size:,} bytes")


def golden_run():
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from oracles import run

    content = {"torch": torch.__version__, **run.ten_steps()}
    (OUT / "run.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"run: {content['losses']}")


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if sys.argv[1:] != ["run"]:
        for each in MODELS:
            golden(each)
    golden_run()
