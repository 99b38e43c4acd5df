"""Train a small MLA model for retrieval, extend its context with YaRN, and test both.

    python benchmarks/needle.py [--out runs/needle] [--steps 4500] [--extend-steps 200]
                                [--lengths 64,128,256,512,1024,2048,4096] [--threads 1]

The task is a needle in a haystack. The haystack is random words. The needle is a key followed by
its value, which is a word like any other. Further keys with other values are distractors. The
question at the end is a mark and the key, and the answer is the value.

Two layers suffice. The first attends to the previous token and so learns which value follows which
key. It needs the fast pairs of the rotary embedding. The second searches the whole haystack for the
key. As two thirds of each head are rotary, it also uses the slow pairs, as models do whose heads
are fully rotary. So it fails beyond the training length of 256 tokens.

Four heat maps over depth x length use the same needles: the trained model; the same weights with
YaRN (only rope_scaling set); YaRN and some training on rows of 4 x the length (section 3.1.4 of the
paper); and that training without YaRN. --out receives needle.png, needle.json and two models. One
thread is the default, because the products are small. The last line is JSON.
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
from lamoe.backends.torch_backend import TorchBackend
from lamoe.measure import needle, plots
from lamoe.model.config import ModelConfig, RopeScaling
from lamoe.model.transformer import Transformer
from lamoe.train.optim import MasterAdamW, Optim

KEYS, WORDS = 32, 32  # token ids: 0 is the question mark, then KEYS keys, then WORDS words
FIRST_WORD = 1 + KEYS
# LENGTH is the row length in training. The context extension uses rows LONG times as long.
LENGTH, LONG = 256, 4
DISTRACTORS = 7  # other keys in a test haystack


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
    """Return a training row (ids, targets) with many needles and their questions in random order.

    Targets are the values after the questions, and -1 (ignored) everywhere else.
    """
    # Short rows have many needles, so that the model learns the task sooner.
    n = min(KEYS, int(length * (0.13 if length <= 64 else draw.uniform(0.03, 0.13))))
    key, value = 1 + draw.permutation(KEYS)[:n], FIRST_WORD + draw.integers(0, WORDS, n)
    ids, targets = FIRST_WORD + draw.integers(0, WORDS, length), np.full(length, -1)
    # gaps: number of words before each item. A needle takes 2 tokens, a question 3.
    gaps, used, known = np.sort(draw.integers(0, length - 5 * n + 1, 2 * n)), 0, set()
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
    """Return (prompt ids, answer ids) with one needle at `depth` (0 to 1) among distractors."""
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
    """Train in bfloat16 with float32 master weights, and write the masters back into `model`.

    length_at(running mean of the loss) returns the length of the next rows.
    """
    draw, begin, loss = np.random.default_rng(seed), time.perf_counter(), None
    masters = [p.detach().clone() for p in model.parameters()]
    work = copy(model).to(torch.bfloat16)
    optimizer = MasterAdamW(work, o)
    # Write the float32 masters back, not rounded to bfloat16.
    torch._foreach_copy_(optimizer.masters, masters)
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
                f"step {step}/{steps}  rows of {length}  loss {loss:.3f}  "
                f"{time.perf_counter() - begin:.0f} s",
                flush=True,
            )
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), optimizer.masters)


def curriculum(limit: int):
    """Double the row length whenever the model has learnt the current one."""
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
        help="model folder from an earlier run: only extend and test it",
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
        found = needle.needle(
            TorchBackend(model.eval()), make, args.lengths, depths, args.draws, args.seed
        )
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
        f"wrote {args.out / 'needle.png'}; training took {trained:.0f} s, "
        f"everything {time.perf_counter() - begin:.0f} s"
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
