"""Measure what low-bit weights do to a model's predictions: formats of lamoe and of llama.cpp.

    python benchmarks/weights_quality.py runs/tiny [--ggml DIR] [--tokens 20480]
                                         [--calibrate stdlib --calibrate-tokens 32768]
    python benchmarks/weights_quality.py FOLDER --text FILE ...

Every format rounds the same matrices of the same model: all linears, the experts and the head, but
not embedding, router and norms. The rounded model then predicts held-out rows of `seq` tokens with
teacher forcing, in float32. W^UK and W^UV (kv_b_proj) have 8 bits in every format, as in lamoe.
Columns:

- bits per weight of those matrices, scales included,
- relative RMS error of the weights,
- bits per byte, and its change against the unrounded model,
- mean KL(unrounded || rounded) of the next token, in nats,
- share of positions with the same top-1 token.

Rows of lamoe:

- "kernels ..." is the packed model on the compiled kernels: activations in 8 bits, attention and
  cache in bfloat16,
- "folder NAME" is the same for a folder that `lamoe quantize` made (--packed),
- "int4 + text" is calibrated as with --calibrate; "int4 + importance" uses the same importance
  matrix without error feedback,
- "int4 with int8 head" is about as large as Q4_K_M.

Rows of llama.cpp:

- Q4_0 and Q8_0 come from the `gguf` package (extra lamoe[gguf]),
- K quants come from llama.cpp's own library (--ggml: the folder of libggml-base.so). They need rows
  of 256, so shorter rows are padded with zeros; the bits stated are the format's,
- Q4_K_M is its mixture: Q6_K for the head and for half of the layers' value and down projections,
  else Q4_K,
- "+ text" uses an importance matrix from the same rows as lamoe's calibration.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from cache import single_document_rows

import lamoe
from lamoe.backends.base import Backend, Formats
from lamoe.backends.cpu import calibrate, native, packed, packed_file
from lamoe.backends.cpu.backend import CpuBackend
from lamoe.checkpoints import hf
from lamoe.train import checkpoint
from lamoe.train.data import open_corpus
from lamoe.train.sources import read_documents

GGML = {
    "Q4_0": (2, 4.5),
    "Q8_0": (8, 8.5),
    "Q4_K": (12, 4.5),
    "Q5_K": (13, 5.5),
    "Q6_K": (14, 6.5625),
}
# Function of (tensor name in the checkpoint, weights [n, k], moments [k, k]) that returns (rounded
# weights, bits per weight).
Round = Callable[[str, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, float]]


# ---- formats ----
def ours(fmt: str, feedback: bool = True) -> Round:
    def round_(name, w, moments):
        if moments is not None:
            importance, back = calibrate.solve(moments) if feedback else (moments.diagonal(), None)
        data, scale = native.pack(fmt, w, *(() if moments is None else (importance, back)))
        return native.unpack(fmt, data, *w.shape, scale), native.BITS[fmt]

    return round_


def with_int8_head(name, w, moments):
    return ours("int8")(name, w, None) if "lm_head" in name else ours("int4")(name, w, moments)


def by_gguf(name: str) -> Round:
    """Return a Round that uses the quantiser of the gguf package.

    Rows are padded to its block size.
    """
    kind = gguf.GGMLQuantizationType[name]

    def round_(_, w, moments):
        block = gguf.GGML_QUANT_SIZES[kind][0]
        x = torch.nn.functional.pad(w, (0, -w.shape[1] % block)).numpy()
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind))[
            :, : w.shape[1]
        ], GGML[name][1]

    return round_


def by_ggml(lib: ctypes.CDLL, choose: Callable[[str], str]) -> Round:
    """Return a Round that uses llama.cpp's quantiser, with an importance matrix from moments."""

    def round_(disk, w, moments):
        name = choose(disk)
        kind = gguf.GGMLQuantizationType[name]
        fill = -w.shape[1] % 256
        x = np.ascontiguousarray(torch.nn.functional.pad(w, (0, fill)).numpy())
        out = np.zeros(lib.ggml_row_size(GGML[name][0], x.shape[1]) * len(x), np.uint8)
        weigh = (
            None
            if moments is None
            else np.ascontiguousarray(
                torch.nn.functional.pad(moments.diagonal(), (0, fill)).numpy()
            )
        )
        lib.ggml_quantize_chunk(
            GGML[name][0],
            x.ctypes.data,
            out.ctypes.data,
            0,
            len(x),
            x.shape[1],
            None if weigh is None else weigh.ctypes.data,
        )
        return torch.from_numpy(gguf.quants.dequantize(out.reshape(len(x), -1), kind))[
            :, : w.shape[1]
        ], GGML[name][1]

    return round_


def open_ggml(folder: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(next(p for p in folder.rglob("libggml-base.so"))))
    lib.ggml_quantize_chunk.restype, lib.ggml_quantize_chunk.argtypes = (
        ctypes.c_size_t,
        [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p],
    )
    lib.ggml_row_size.restype, lib.ggml_row_size.argtypes = (
        ctypes.c_size_t,
        [ctypes.c_int, ctypes.c_int64],
    )
    return lib


def q4_k_m(layers: int) -> Callable[[str], str]:
    """Return llama.cpp's mixture Q4_K_M (llama-quant.cpp, use_more_bits).

    More bits go to the first and last eighth of the layers, and to every third one between them.
    """

    def choose(disk: str) -> str:
        if "lm_head" in disk:
            return "Q6_K"
        i = int(disk.split(".")[2])
        more = i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2
        return "Q6_K" if more and ("v_proj" in disk or "down_proj" in disk) else "Q4_K"

    return choose


# ---- rounding a model ----
def untied(model: lamoe.Transformer) -> lamoe.Transformer:
    """Return the same model with an untied head, so that the embedding stays unrounded."""
    if not model.config.tie_word_embeddings:
        return model
    out = lamoe.Transformer(model.config.replace(tie_word_embeddings=False)).eval()
    out.load_state_dict(model.state_dict() | {"head.weight": model.embed.weight.detach().clone()})
    return out


def moments_of(disk: str, found: dict[str, calibrate.Moments]) -> torch.Tensor | None:
    if not found:
        return None
    parts = disk.split(".")
    if disk.startswith("lm_head"):
        return found["head"](0)
    own = {
        "q_proj": "wq",
        "q_a_proj": "wq_a",
        "q_b_proj": "wq_b",
        "kv_a_proj_with_mqa": "wkv_a",
        "k_proj": "wk",
        "v_proj": "wv",
        "o_proj": "wo",
    }.get(parts[-2])
    if own is None:
        own = ("e" if "experts" in parts else "w") + ("2" if parts[-2] == "down_proj" else "13")
    return found[f"layers.{parts[2]}.{own}"](
        int(parts[parts.index("experts") + 1]) if own[0] == "e" else 0
    )


@torch.no_grad()
def rounded(
    model: lamoe.Transformer, round_: Round, found: dict[str, torch.Tensor]
) -> tuple[lamoe.Transformer, float, float]:
    """Return (a rounded copy, bits per weight, relative RMS error of the weights)."""
    out = lamoe.Transformer(model.config).eval()
    out.load_state_dict(model.state_dict())
    bits = weights = error = power = 0.0
    for disk, w in hf.views(out.config, dict(out.named_parameters())).items():
        if w.dim() != 2 or "embed_tokens" in disk or disk.endswith("mlp.gate.weight"):
            continue
        if "kv_b_proj" in disk:
            new, b = ours("int8")(disk, w, None)
        else:
            new, b = round_(disk, w.contiguous(), moments_of(disk, found))
            bits, weights = bits + b * w.numel(), weights + w.numel()
            error, power = error + float((new - w).square().sum()), power + float(w.square().sum())
        w.copy_(new)
    return out, bits / weights, math.sqrt(error / power)


def stated_bits(run: CpuBackend) -> float:
    """Return the bits per weight of the matrices that `rounded` rounds, without padding."""
    found = packed.weight_classes(
        run.config, run.formats, packed.packed_tensors(run.config, run.formats)
    )
    every = [
        found[kind]
        for kind in ("attention", "dense ffn", "experts", "shared experts", "head")
        if kind in found
    ]
    return sum(native.BITS[c.formats[0]] * c.num_weights for c in every) / sum(
        c.num_weights for c in every
    )


# ---- measurement ----
@torch.inference_mode()
def predict(model, ids: torch.Tensor, batch: int = 4):
    """Yield log-probabilities of the next token, a few rows at a time: [rows, T, vocabulary]."""
    for part in ids.split(batch):
        if isinstance(model, Backend):
            rows = (model.run_sequence(row[:-1].tolist(), 512) for row in part)
            logits = [torch.cat([result.output for result in row]) for row in rows]
            yield torch.stack(logits).log_softmax(-1)
        else:
            yield model(part[:, :-1]).log_softmax(-1)


def compare(true: list[torch.Tensor], model, ids: torch.Tensor, batch: int = 4) -> dict[str, float]:
    nats = kl = same = 0.0
    for want, got, part in zip(true, predict(model, ids, batch), ids.split(batch)):
        want = want.float()
        nats -= float(got.gather(-1, part[:, 1:, None]).double().sum())
        kl += float((want.exp() * (want - got)).sum(-1).double().sum())
        same += int((want.argmax(-1) == got.argmax(-1)).sum())
    targets = ids.shape[0] * (ids.shape[1] - 1)
    return {"nats": nats, "kl": kl / targets, "top1_percent": 100 * same / targets}


def text_rows(tokenizer: lamoe.Tokenizer, files: list[str], seq: int, tokens: int) -> torch.Tensor:
    ids = [t for d in read_documents(files) for t in tokenizer.encode(d.text, bos=False)]
    rows = torch.tensor(ids[: len(ids) // (seq + 1) * (seq + 1)]).view(-1, seq + 1)
    wanted = min(len(rows), -(-tokens // seq))
    return rows[[i * len(rows) // wanted for i in range(wanted)]]


def training_texts(run: Path, tokenizer: lamoe.Tokenizer, most: int = 400) -> list[str]:
    train = open_corpus(run / "data").train
    return [
        tokenizer.decode(train.document(i * len(train) // most)[1:-1])
        for i in range(min(most, len(train)))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "model", type=Path, help="a run folder of `lamoe train`, or a model folder with --text"
    )
    parser.add_argument(
        "--text",
        action="append",
        help="text source to predict, instead of the run's held-out text",
    )
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument(
        "--calibrate",
        action="append",
        help="text for calibration; default: the run's training text",
    )
    parser.add_argument("--calibrate-tokens", type=int, default=32768)
    parser.add_argument("--ggml", type=Path, help="build folder of llama.cpp; adds its K quants")
    parser.add_argument(
        "--packed",
        type=Path,
        action="append",
        default=[],
        help="folder that `lamoe quantize` made from this model",
    )
    parser.add_argument("--only", help="rows of the table to measure, comma separated")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    step = args.model if args.text else checkpoint.latest(args.model) / "model"
    tokenizer, model = lamoe.Tokenizer.load(step), lamoe.load(step, dtype=torch.float32)
    ids = (
        text_rows(tokenizer, args.text, args.seq, args.tokens)
        if args.text
        else single_document_rows(args.model / "data", args.seq, args.tokens)
    )
    text_bytes = sum(len(tokenizer.decode(row[1:].tolist()).encode()) for row in ids)
    wanted, found = args.only and args.only.split(","), {}
    if not wanted or any(" + " in name for name in wanted):
        texts = (
            [d.text for d in read_documents(args.calibrate)]
            if args.calibrate
            else training_texts(args.model, tokenizer)
        )
        rows = calibrate.rows_of(tokenizer, texts, model.config, args.calibrate_tokens)
        found = {
            k: v
            for part in calibrate.moments(
                model.config, packed_file.reader(step, model.config), rows, torch.float32
            )
            for k, v in part.items()
        }
    formats = {
        "int8": (ours("int8"), {}),
        "Q8_0": (by_gguf("Q8_0"), {}),
        "int4": (ours("int4"), {}),
        "int4 + importance": (ours("int4", False), found),
        "int4 + text": (ours("int4"), found),
        "int4 with int8 head": (with_int8_head, {}),
        "int4 with int8 head + text": (with_int8_head, found),
        "Q4_0": (by_gguf("Q4_0"), {}),
    }
    if args.ggml:
        lib, mix = open_ggml(args.ggml), q4_k_m(model.config.num_hidden_layers)
        formats |= {
            "Q4_K": (by_ggml(lib, lambda d: "Q4_K"), {}),
            "Q4_K + text": (by_ggml(lib, lambda d: "Q4_K"), found),
            "Q4_K_M": (by_ggml(lib, mix), {}),
            "Q4_K_M + text": (by_ggml(lib, mix), found),
        }
    kernels = {f"kernels {f}": (f, None) for f in ("bf16", "int8", "int4")} | {
        "kernels int4 with int8 head": ("int4", "int8")
    }
    folders = {f"folder {folder.name}": folder for folder in args.packed}
    plain = untied(model)
    true = list(predict(plain, ids))
    base = -sum(
        float(t.gather(-1, part[:, 1:, None]).double().sum()) for t, part in zip(true, ids.split(4))
    )
    print(
        f"{step}: {ids.shape[0] * args.seq} tokens, {text_bytes} bytes, rows of {args.seq}; "
        f"unrounded {base / math.log(2) / text_bytes:.4f} bits/byte"
    )
    print(f"{'format':27} {'bits':>5} {'rel. error':>11} {'bits/byte':>10} {'change':>10} ", end="")
    print(f"{'KL':>10} {'top-1 same':>11}")
    out = {
        "model": str(step),
        "tokens": ids.shape[0] * args.seq,
        "text_bytes": text_bytes,
        "bits_per_byte": base / math.log(2) / text_bytes,
        "formats": {},
    }
    for name in [*formats, *kernels, *folders]:
        if wanted and name not in wanted:
            continue
        if name in formats:
            run, bits, error = rounded(plain, *formats[name])
        else:
            run = (
                packed_file.load(folders[name], args.threads)
                if name in folders
                else CpuBackend.from_transformer(model, Formats(*kernels[name]), args.threads)
            )
            if run.config != model.config:
                raise ValueError(f"{folders[name]} was not made from {step}: the configs differ")
            bits, error = stated_bits(run), float("nan")
        r = compare(true, run, ids)
        r |= {
            "bits": bits,
            "relative_rms": error,
            "bits_per_byte": r["nats"] / math.log(2) / text_bytes,
            "change_percent": 100 * (r.pop("nats") / base - 1),
        }
        out["formats"][name] = r
        print(
            f"{name:27s} {bits:5.2f} {error:11.4f} {r['bits_per_byte']:10.4f} "
            f"{r['change_percent']:+9.4f}% {r['kl']:10.3e} {r['top1_percent']:10.2f}%",
            flush=True,
        )
    print(json.dumps(out))


if __name__ == "__main__":
    main()
