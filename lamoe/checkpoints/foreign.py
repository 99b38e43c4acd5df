"""Recognises what people give instead of a model folder, and says what it is and what to do.

Adapters, quantised weights, other programs' formats, half downloads, trainer states: each is
recognised by its content, before any advice that would suit only a plain model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from lamoe.text.json_file import foreign_content, read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ADAPTER_CONFIG = "adapter_config.json"
MAX_NAMES = 10_000  # of a folder that are looked at
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
# What a trainer writes beside the weights, as pickles.
_TRAINER_STATE = re.compile(
    r"(optimizer|optim|scheduler|scaler|rng_state.*|random_states.*|training_args|trainer_state"
    r"|.*optim_states|pytorch_model_fsdp_.*)\.(pt|pth|bin|pkl|json)"
)
# (pattern of a file name, what the folder then holds, what to do). The first match counts.
_FORMATS = (
    (r"model_index\.json", "a diffusers pipeline (an image model)", "lamoe runs language models"),
    (
        r".*\.(incomplete|crdownload|part|partial|aria2|download)",
        "an unfinished download",
        "download the rest first",
    ),
    (
        r"global_step\d+|zero_to_fp32\.py",
        "a DeepSpeed checkpoint",
        "run its zero_to_fp32.py first, with --safe_serialization",
    ),
    (
        r".*\.distcp|pytorch_model_fsdp_\d+",
        "a sharded torch.distributed checkpoint",
        "merge it first (accelerate merge-weights)",
    ),
    (
        r"tf_model\.h5|.*\.h5|.*\.ckpt\.index|saved_model\.pb",
        "TensorFlow weights",
        "load it in transformers with from_tf=True and use save_pretrained",
    ),
    (
        r"flax_model.*\.msgpack",
        "Flax weights",
        "load it in transformers with from_flax=True and use save_pretrained",
    ),
    (r"onnx|.*\.onnx(_data)?", "an ONNX model", "get the safetensors files of the original model"),
    (
        r"openvino_model\.(xml|bin)|.*\.(mlpackage|mlmodelc|mlmodel|tflite|engine|llamafile|nemo)",
        "a model compiled for another program",
        "get the safetensors files of the original model",
    ),
    (
        r"dataset_(info|dict)\.json|.*\.(parquet|arrow|csv|tsv|jsonl)",
        "a dataset",
        "give the folder of a model",
    ),
)
# (pattern of a tensor name, what the tensors are, what to do)
_TENSORS = (
    (
        r"base_model\.model\..*|.*\.lora_(A|B|embedding_A|embedding_B)\b.*|.*\.base_layer\..*",
        "the tensors of a LoRA adapter",
        "merge the adapter into its base model first (peft: merge_and_unload, then "
        "save_pretrained)",
    ),
    (
        r".*\.(qweight|qzeros|g_idx)",
        "weights quantised by GPTQ or AWQ",
        "get the original, unquantised model",
    ),
    (
        r".*\.(absmax|quant_map|nested_absmax|quant_state\..*)",
        "weights quantised by bitsandbytes",
        "get the original, unquantised model",
    ),
    (
        r".*\.(weight_scale|weight_scale_inv|input_scale|weight_packed)",
        "weights quantised to FP8 or by compressed-tensors",
        "get the unquantised model",
    ),
    (
        r".*\.(scales|biases)",
        "weights quantised by MLX",
        "get the original, unquantised model",
    ),
    (
        r"tok_embeddings\.weight|layers\.\d+\.attention\.wq\.weight",
        "weights in the naming of their first release (consolidated files)",
        "get the version of the model for transformers",
    ),
    (
        r"(_orig_mod|module)\..*",
        "the tensors of a wrapped model (torch.compile or DDP)",
        "save the inner model: model._orig_mod or model.module",
    ),
    (
        r"model\.(model\..*|lm_head\.weight)",
        "the tensors of a model inside a module of a trainer",
        "save the inner model (its attribute `model`)",
    ),
    (
        r"(layers\.\d+\.self_attn\..*|embed_tokens\.weight)",
        "the tensors of a base model without its output head",
        "load it with AutoModelForCausalLM and use save_pretrained",
    ),
    (
        r"(model\.)?(vision_tower|vision_model|visual|language_model|multi_modal_projector)\..*",
        "the tensors of a multimodal model",
        "lamoe runs its language model only, which has to be saved alone",
    ),
    (
        r"(transformer\.h|gpt_neox|model\.decoder|encoder|bert|unet|first_stage_model)\..*",
        "the tensors of another architecture",
        "give a model of the families deepseek_v2, deepseek or llama",
    ),
)


def tensor_problem(names: Collection[str]) -> str | None:
    """Say what tensors are, and what to do, if their names are of a kind that lamoe cannot load."""
    for pattern, what, fix in _TENSORS:
        matching = re.compile(pattern)
        if found := [n for n in names if matching.fullmatch(n)]:
            return f"{few(found, 1)} says that these are {what}; {fix}"
    return None


def adapter_problem(folder: Path) -> str | None:
    """Say that a folder holds an adapter and no model, or return None."""
    names = _names(folder)
    adapters = [n for n in names if re.fullmatch(r"adapter_(model.*|config\.json)", n)]
    if not adapters or any(_WEIGHTS.fullmatch(n) for n in names):
        return None
    base = ""
    if ADAPTER_CONFIG in names:
        try:
            found = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        except (ValueError, OSError):
            found = None
        base = f" of the base model {found[:200]!r}" if isinstance(found, str) and found else ""
    return (
        f"{folder} holds a LoRA adapter{base} and not a model; merge the adapter into its base "
        "model first (peft: PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload()"
        ".save_pretrained(MERGED)), then give the merged folder"
    )


def folder_problem(folder: Path, lacks: str) -> str:
    """Return the message for a folder without readable weights or without config.json.

    Args:
        lacks: what the folder lacks, for the last resort: "has no weights; expected ...".
    """
    if adapter := adapter_problem(folder):
        return adapter
    names = _names(folder)
    if ggufs := [n for n in names if n.endswith(".gguf")]:
        return (
            f"{folder} holds {few(ggufs)}; make a model folder of one of them first: "
            f"lamoe convert {folder / ggufs[0]} NEW_FOLDER"
        )
    for pattern, what, fix in _FORMATS:
        matching = re.compile(pattern)
        # Files with weights beside them, for example an ONNX export, are no reason to complain.
        if found := [n for n in names if matching.fullmatch(n)]:
            return f"{folder} {lacks}. It holds {few(found)}: {what}; {fix}"
    if inner := _inner_model(folder, names):
        return f"{folder} {lacks}. The folder {inner} inside it has a config.json; name that one"
    return f"{folder} {lacks}"


def weights_problem(
    folder: Path, single: str, index: str, tensor_names: Callable[[Path], Collection[str]]
) -> str:
    """Return the message for a folder without readable weights.

    Args:
        single, index: the names of a single weight file and of the index of several.
        tensor_names: reads the names in a safetensors file.
    """
    if adapter := adapter_problem(folder):
        return adapter
    names = _names(folder)
    states = [n for n in names if _TRAINER_STATE.fullmatch(n)]
    pickles = [n for n in names if n.endswith(PICKLES) and n not in states and "openvino" not in n]
    if pickles:
        return (
            f"{folder} has weights only as {few(pickles)}: pickles, which can run any code when "
            "opened, so lamoe never opens them. Convert once where you trust the file: "
            f"safetensors.torch.save_file(torch.load('{pickles[0]}', weights_only=True), "
            f"'{single}')"
        )
    others = [n for n in names if n.endswith(".safetensors")]
    if others:
        advice = f"get the index too, or rename a single complete file to {single}"
        is_whole = len(others) == 1 and "-of-" not in others[0]
        if is_whole and (folder / others[0]).is_file():  # opening a pipe would block
            try:
                advice = tensor_problem(tensor_names(folder / others[0])) or advice
            except (ValueError, OSError) as e:
                advice = str(e)
        return f"{folder} has {few(others)} but neither {single} nor {index}; {advice}"
    problem = folder_problem(folder, f"has no weights; expected {single}, or shards with {index}")
    if states and problem.endswith(index):
        problem += (
            f". It holds {few(states)}: the state of a trainer without its model; give the folder "
            "of the saved model"
        )
    return problem


def file_problem(path: Path) -> str:
    """Return the message for a file that is given in place of a model folder."""
    with open(path, "rb") as file:
        head = file.read(200)
    if head[:4] == b"GGUF":
        fix = f"a GGUF file; make a folder of it first: lamoe convert {path} FOLDER"
    elif what := foreign_content(head):
        fix = what
    elif path.suffix in PICKLES:
        fix = "a pickle, which can run any code when opened; get the safetensors files"
    else:
        fix = "a file; give the model folder that holds config.json and the weights"
    return f"{path} is {fix}"


def is_gguf(path: Path) -> bool:
    """Return whether a file is GGUF, by its first bytes or, if it is empty or absent, its name."""
    if not path.is_file():
        return path.suffix == ".gguf" and not path.is_dir()
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF" or path.suffix == ".gguf"


def _inner_model(folder: Path, names: Iterable[str]) -> Path | None:
    """Return the folder inside `folder` that holds a config.json, the last one by number."""
    inner = [folder / n for n in names if (folder / n / "config.json").is_file()]
    snapshots = folder / "snapshots"  # the layout of the hub's cache
    if snapshots.is_dir():
        inner += [snapshots / n for n in _names(snapshots)]

    def number(path: Path) -> tuple[int, str]:
        digits = re.search(r"(\d{1,18})$", path.name)
        return (int(digits[1]) if digits else -1), path.name

    return max(inner, key=number, default=None)


def _names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for _, entry in zip(range(MAX_NAMES), entries))


def few(names: Iterable[str], show: int = 3) -> str:
    """Return the first names for a message: 'a', 'b', 'c' and 12 more."""
    names = list(names)
    return ", ".join(map(repr, names[:show])) + (
        f" and {len(names) - show} more" if len(names) > show else ""
    )
