"""Measure tokens per second with and without prompt-lookup drafts (engine/lookup.py).

    python benchmarks/drafts.py runs/tiny [--rounds 3] [--tokens 128] [--dtype float32]
    python benchmarks/drafts.py FOLDER      uses the chat template of the model if it has one

The prompts ask for code editing and for summaries. The third kind, "sampled", draws at temperature
1 from the same prompts. There the text so far says little about the next token, so drafts must
switch themselves off.

Two engines over the same weights run interleaved, prompt by prompt. Figures are medians. Ratios are
taken between the two runs of one prompt. Time runs from the first token to the last, so the prompt
does not count. "same output" is the share of outputs that equal those without drafts token for
token. It must be 100 % in float32. In bfloat16 a pass over several tokens may round a near tie the
other way. The last line is JSON.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import textwrap
import time
from pathlib import Path

import lamoe
from lamoe.checkpoints import resolve
from lamoe.train.sources import read_documents

FUNCTIONS = (
    (textwrap, "shorten", "placeholder", "ending"),
    (statistics, "median_low", "data", "values"),
    (json, "loads", "kw", "options"),
)


def prompts(tok: lamoe.Tokenizer) -> dict[str, list[list[int]]]:
    """Return {kind: prompts}. Chat models get questions, other models the beginning of a text."""
    edits, summaries, chat = [], [], tok.chat_template is not None
    for module, name, old, new in FUNCTIONS:
        code = inspect.getsource(getattr(module, name))
        if chat:
            edits.append(
                tok.apply_chat(
                    [
                        {
                            "role": "user",
                            "content": f"Rename `{old}` to `{new}` in this function. "
                            f"Answer with the whole function.\n\n```python\n{code}```",
                        }
                    ]
                )
            )
        else:
            edits.append(
                tok.encode(
                    f"{code}\n\n# the same function, {old} is now called {new}\n"
                    f"{code.splitlines()[0].replace(old, new)}\n",
                    bos=tok.add_bos,
                )
            )
    novel = next(read_documents(["austen"])).text
    for at in (len(novel) // 4, len(novel) // 2, 3 * len(novel) // 4):
        text = novel[novel.index("\n\n", at) + 2 :][:1200].rsplit(".", 1)[0] + "."
        if chat:
            summaries.append(
                tok.apply_chat(
                    [
                        {
                            "role": "user",
                            "content": "Summarise this text in a few sentences, in its own words."
                            f"\n\n{text}",
                        }
                    ]
                )
            )
        else:
            summaries.append(tok.encode(f"{text}\n\nIn short:", bos=tok.add_bos))
    return {"code editing": edits, "summarising": summaries}


def run(llm: lamoe.LLM, prompt: list[int], params: lamoe.SamplingParams) -> dict:
    steps, drafted, accepted, tokens, first = 0, llm.drafted, llm.accepted, [], None
    [id] = llm.add(prompt, params)
    output = None
    while output is None:
        deltas = llm.step()
        steps += 1
        if first is None and deltas:
            first, steps = time.perf_counter(), 0
        tokens += [d.token_id for d in deltas]
        output = deltas[-1].output if deltas else None
    seconds = time.perf_counter() - first
    return {
        "tokens": tokens,
        "tokens_per_s": (len(tokens) - 1) / seconds,
        "steps": steps,
        "drafted": llm.drafted - drafted,
        "accepted": llm.accepted - accepted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a run folder, a model folder or a hub id")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--cache", default="bf16")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    folder = resolve(args.model)
    model = lamoe.load(folder, args.dtype)
    length = min(2048, model.config.max_position_embeddings)
    options = dict(
        tokenizer=lamoe.Tokenizer.load(folder),
        cache=args.cache,
        max_model_len=length,
        threads=args.threads,
    )
    without, drafts = lamoe.LLM(model, speculate=0, **options), lamoe.LLM(model, **options)
    kinds = {
        k: [p[-(length - args.tokens - 1) :] for p in ps]
        for k, ps in prompts(without.tokenizer).items()
    }
    work = [
        (k, p, lamoe.SamplingParams(temperature=0.0, max_tokens=args.tokens))
        for k, ps in kinds.items()
        for p in ps
    ]
    work += [
        (
            "sampled",
            p,
            lamoe.SamplingParams(temperature=1.0, seed=i, max_tokens=args.tokens, ignore_eos=True),
        )
        for i, p in enumerate(p for ps in kinds.values() for p in ps)
    ]
    found: dict[str, list] = {}
    for turn in range(args.rounds + 1):
        for i, (kind, prompt, params) in enumerate(work):
            pair = [
                run(llm, prompt, params)
                for llm in ((without, drafts) if (turn + i) % 2 else (drafts, without))
            ]
            plain, quick = pair if (turn + i) % 2 else pair[::-1]
            if turn:  # the first round only warms up
                found.setdefault(kind, []).append((plain, quick))
    print(
        f"{args.model}, {args.dtype}, {args.cache} cache, {args.threads} threads; "
        f"{args.rounds} rounds, up to {args.tokens} tokens"
    )
    print(
        "| | tokens/s without | with drafts | faster by (range) | tokens per step "
        "| draft tokens per token | of them accepted | same output |\n" + "|---" * 8 + "|"
    )
    result = {}
    for kind, pairs in found.items():
        gain = sorted(
            q["tokens_per_s"] / p["tokens_per_s"] for p, q in pairs if len(p["tokens"]) > 1
        )
        total = {k: sum(q[k] for _, q in pairs) for k in ("steps", "drafted", "accepted")}
        tokens = sum(len(q["tokens"]) - 1 for _, q in pairs)
        r = {
            "without": statistics.median(p["tokens_per_s"] for p, _ in pairs),
            "with": statistics.median(q["tokens_per_s"] for _, q in pairs),
            "gain": statistics.median(gain),
            "low": gain[0],
            "high": gain[-1],
            "tokens_per_step": tokens / max(1, total["steps"]),
            "drafted_per_token": total["drafted"] / tokens,
            "acceptance": total["accepted"] / max(1, total["drafted"]),
            "same": statistics.mean(p["tokens"] == q["tokens"] for p, q in pairs),
        }
        result[kind] = r
        print(
            f"| {kind} | {r['without']:.1f} | {r['with']:.1f} "
            f"| {r['gain']:.2f} x ({r['low']:.2f} to {r['high']:.2f}) "
            f"| {r['tokens_per_step']:.2f} | {r['drafted_per_token']:.2f} "
            f"| {r['acceptance']:.0%} | {r['same']:.0%} |"
        )
    print(
        json.dumps(
            {
                "model": Path(args.model).name,
                "dtype": args.dtype,
                "threads": args.threads,
                "kinds": result,
            }
        )
    )


if __name__ == "__main__":
    main()
