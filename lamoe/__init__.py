"""lamoe: DeepSeek-V2 (multi-head latent attention and DeepSeekMoE) to train, run and serve.

    model = lamoe.load("folder or hub id", device="cpu")      # a Transformer in eval mode
    logits = model(ids)                                       # [B, T] int64 -> [B, T, vocabulary]
    params = lamoe.SamplingParams(temperature=0.0, max_tokens=64)
    for piece in lamoe.generate(model, prompt_ids, params):   # one sequence, token by token
        print(piece.token_id)

    llm = lamoe.LLM("folder or hub id", cache="6bit")         # many sequences, paged cache
    for output in llm.generate(["text", "other text"], params):
        print(output.text, output.token_ids, output.finish_reason)

    lamoe.save(model, "folder")                               # a Hugging Face folder
    config = lamoe.ModelConfig.preset("deepseek-v2-lite")
    report = lamoe.accounting.report(config)                  # parameters, FLOPs, bytes

Names are imported on first use, so `import lamoe` alone does not import torch. Import lamoe before
torch: it bounds how long torch's threads spin (lamoe/spinning.py).
"""

from __future__ import annotations

import importlib

from lamoe.spinning import bound_spinning

__version__ = "0.1.0"

# Public name -> the module of lamoe that defines it.
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

bound_spinning()


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(f"lamoe.{_WHERE[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"lamoe.{_MODULES[name]}")
    raise AttributeError(f"module 'lamoe' has no attribute {name!r}")
