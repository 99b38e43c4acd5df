"""lamoe: DeepSeek-V2 (multi-head latent attention + DeepSeekMoE) as software.

    model = lamoe.load("folder or hub id")          # model.Transformer in eval mode
    logits = model(ids)                             # ids [B, T] int64 -> logits [B, T, vocabulary]
    for piece in lamoe.generate(model, prompt_ids, lamoe.SamplingParams(temperature=0.0)): ...
    llm = lamoe.LLM("folder or hub id", cache="6bit")  # many sequences at once over a paged cache
    outs = llm.generate(["text", ...], lamoe.SamplingParams(max_tokens=64))   # outs[i].text, .token_ids, .finish_reason
    lamoe.save(model, "folder")                     # a Hugging Face folder
    lamoe.ModelConfig.preset("deepseek-v2-lite"); lamoe.accounting.report(config)

Imported on first use: `import lamoe` alone does not import torch.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"
_WHERE = {
    "ModelConfig": "model.config",
    "RopeScaling": "model.config",
    "Transformer": "model.transformer",
    "KVCache": "model.cache",
    "Tokenizer": "text.tokenizer",
    "SamplingParams": "engine.sampler",
    "LLM": "engine.llm",
    "AsyncLLM": "engine.async_llm",
    "generate": "engine.generate",
    "load": "checkpoints.hf",
    "save": "checkpoints.hf",
}
_MODULES = {"accounting": "model.accounting"}
__all__ = [*_WHERE, *_MODULES]


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(f"lamoe.{_WHERE[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"lamoe.{_MODULES[name]}")
    raise AttributeError(f"module 'lamoe' has no attribute {name!r}")
