"""Needle in a haystack beyond the training length: a small MLA model learns retrieval at 256 tokens, fails beyond, and works there with YaRN.

    python benchmarks/needle.py [--out runs/needle] [--steps 4500] [--extend-steps 200] [--lengths 64,128,256,512,1024,2048,4096] [--threads 1]

A haystack is random words; a needle is a key and the word behind it (the value, a word like any other), and other keys with other values lie about. At
the end stands the question, a mark and the key; the answer is the value. It takes two layers: one looks one token back (which word stands behind
which key), one looks through the whole haystack for the key. The first needs the quick pairs of the rotary position; and as the heads are two thirds rotary,
the second one uses the slow pairs as well, as it does in models whose heads are rotary altogether.

Four heat maps over depth x length, the same needles in each: the trained model as it is; the same weights with YaRN (only rope_scaling set); YaRN and some
training on rows of 4 x the length (the paper's extension, 3.1.4); and, to compare, that training without YaRN. Written to --out: needle.png,
needle.json and the two models. One thread is the default: the products are small. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch

import lamoe
from lamoe.measure import needle, plots
from lamoe.model.config import ModelConfig, RopeScaling
from lamoe.model.transformer import Transformer
from lamoe.train.optim import MasterAdamW, Optim

KEYS, WORDS = 32, 32  # ids: 0 the question mark, then the keys, then the words
FIRST_WORD = 1 + KEYS
LENGTH, LONG = 256, 4  # the length of the training; rows of the extension are so many times longer
DISTRACTORS = 7  # other keys in a haystack that is tested


def config(args) -> ModelConfig:
    return ModelConfig(
        vocab_size=1 + KEYS + WORDS,
        hidden_size=128,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        kv_lora_rank=64,
        qk_nope_head_dim=args.nope,
        qk_rope_head_dim=args.rope,
        v_head_dim=32,
        intermediate_size=256,
        max_position_embeddings=max(args.lengths[-1], LONG * LENGTH),
        initializer_range=0.05,
        torch_dtype="float32",
    )


def row(length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A row of training, many needles and their questions in any order, and its targets: the values, and -1 (does not count) everywhere else."""
    n = min(
        KEYS, int(length * (0.13 if length <= 64 else draw.uniform(0.03, 0.13)))
    )  # dense at first: that is what makes it learn quickly
    key, value = 1 + draw.permutation(KEYS)[:n], FIRST_WORD + draw.integers(0, WORDS, n)
    ids, targets = FIRST_WORD + draw.integers(0, WORDS, length), np.full(length, -1)
    gaps, used, known = (
        np.sort(draw.integers(0, length - 5 * n + 1, 2 * n)),
        0,
        set(),
    )  # words before each of them; a needle takes 2 places, a question 3
    for gap, j in zip(gaps, draw.permutation(np.repeat(np.arange(n), 2))):
        place = gap + used
        if j in known:
            ids[place : place + 3] = 0, key[j], value[j]
            targets[place + 1] = value[j]
        else:
            ids[place : place + 2] = key[j], value[j]
        used += 3 if j in known else 2
        known.add(j)
    return ids, targets


def make(length: int, depth: float, draw: random.Random) -> tuple[list[int], list[int]]:
    """One needle at `depth` among others, for needle.needle."""
    key, *others = draw.sample(range(1, FIRST_WORD), 1 + DISTRACTORS)
    words = [draw.randrange(FIRST_WORD, FIRST_WORD + WORDS) for _ in range(length - 3)]
    at = round(depth * (len(words) - 2))
    for other, place in zip(
        others,
        draw.sample([p for p in range(0, len(words) - 1, 2) if abs(p - at) > 1], DISTRACTORS),
    ):
        words[place] = other
    words[at] = key
    return [*words, 0, key], [words[at + 1]]


def fit(model: Transformer, o: Optim, steps: int, length_at, batch_tokens: int, seed: int) -> None:
    """Train in bfloat16 over float32 masters, and write the masters back into `model`. length_at(loss so far) -> length of the next rows."""
    draw, begin, loss = np.random.default_rng(seed), time.perf_counter(), None
    masters = [p.detach().clone() for p in model.parameters()]
    work = copy(model).to(torch.bfloat16)
    optimizer = MasterAdamW(work, o)
    torch._foreach_copy_(optimizer.masters, masters)  # unrounded
    for step in range(steps):
        length = length_at(loss)
        ids, targets = (
            torch.from_numpy(np.stack(part))
            for part in zip(*(row(length, draw) for _ in range(max(1, batch_tokens // length))))
        )
        now = work.loss(ids, targets)
        now.backward()
        optimizer.collect()
        optimizer.clip()
        optimizer.step(o.lr_at(step, step / steps))
        loss = now.item() if loss is None else 0.97 * loss + 0.03 * now.item()
        if step % 250 == 0 or step == steps - 1:
            print(
                f"step {step}/{steps}  rows of {length}  loss {loss:.3f}  {time.perf_counter() - begin:.0f} s",
                flush=True,
            )
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), optimizer.masters)


def curriculum(limit: int):
    """Longer rows as soon as those so far are mostly answered."""
    length, patience = 32, 0

    def length_at(loss: float | None) -> int:
        nonlocal length, patience
        patience += 1
        if loss is not None and loss < 0.3 and length < limit and patience > 100:
            length, patience = 2 * length, 0
        return length

    return length_at


def copy(model: Transformer, **changes) -> Transformer:
    other = Transformer(model.config.replace(**changes))
    other.load_state_dict(model.state_dict())
    return other.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/needle"))
    for name, default in dict(
        steps=4500,
        extend_steps=200,
        draws=16,
        depths=5,
        threads=1,
        layers=2,
        nope=16,
        rope=32,
        seed=0,
    ).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument(
        "--lengths",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[64, 128, 256, 512, 1024, 2048, 4096],
    )
    parser.add_argument(
        "--base",
        type=Path,
        help="a model folder that was trained before: only lengthen and test it",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    begin = time.perf_counter()
    base = (
        lamoe.load(args.base, torch.float32)
        if args.base
        else Transformer(config(args)).init_weights(args.seed)
    )
    if not args.base:
        fit(
            base,
            Optim(lr=3e-3, warmup_steps=50, weight_decay=0.01),
            args.steps,
            curriculum(LENGTH),
            2048,
            args.seed,
        )
    base = copy(base, max_position_embeddings=max(args.lengths[-1], LONG * LENGTH))
    yarn = RopeScaling(factor=args.lengths[-1] / LENGTH, original_max_position_embeddings=LENGTH)
    models = {f"trained at {LENGTH}": base, "with YaRN": copy(base, rope_scaling=yarn)}
    if args.extend_steps:
        for name, start in {
            "with YaRN, extended": "with YaRN",
            "extended without YaRN": f"trained at {LENGTH}",
        }.items():
            models[name] = copy(models[start])
            fit(
                models[name],
                Optim(lr=5e-4, warmup_steps=10, weight_decay=0.01),
                args.extend_steps,
                lambda loss: LONG * LENGTH,
                4096,
                args.seed + 1,
            )
    trained = time.perf_counter() - begin
    depths, panels = [i / (args.depths - 1) for i in range(args.depths)], {}
    for name, model in models.items():
        found = needle.needle(model.eval(), make, args.lengths, depths, args.draws, args.seed)
        panels[name] = {
            "lengths": args.lengths,
            "depths": depths,
            "draws": args.draws,
            "trained": LONG * LENGTH if "extended" in name else LENGTH,
            "found": found.tolist(),
        }
        print(
            f"{name:24s} "
            + "  ".join(f"{n}: {share:.0%}" for n, share in zip(args.lengths, found.mean(0))),
            flush=True,
        )
    args.out.mkdir(parents=True, exist_ok=True)
    plots.needle(panels, args.out / "needle.png")
    (args.out / "needle.json").write_text(json.dumps(panels, indent=1) + "\n", encoding="utf-8")
    for folder, name in (("base", f"trained at {LENGTH}"), ("extended", "with YaRN, extended")):
        if name in models:
            lamoe.save(models[name], args.out / folder, overwrite=True)
    print(
        f"wrote {args.out / 'needle.png'}; training took {trained:.0f} s, everything {time.perf_counter() - begin:.0f} s"
    )
    print(
        json.dumps(
            {
                "parameters": sum(p.numel() for p in base.parameters()),
                "seconds": trained,
                "found": {n: np.mean(p["found"], 0).tolist() for n, p in panels.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
