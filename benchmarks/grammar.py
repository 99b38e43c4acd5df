"""Measure what structured output costs: compiling a grammar, masking logits, accepting a token.

    python benchmarks/grammar.py [--tokenizer FOLDER] [--rounds 20] [--rows 0]

No model runs. The tokens of a text are accepted one by one as in the engine, in one thread. "first
mask" is the first use of a Grammar, when its lexer is still empty. The other columns cover `rounds`
further uses. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import time
from pathlib import Path

import torch

from lamoe.engine import grammar
from lamoe.engine.grammar import Grammar
from lamoe.text import tokenizer
from lamoe.text.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mail": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["new", "paid", "gone"]}},
    },
    "required": ["name", "age", "mail", "tags"],
}
WIDE = {
    "type": "object",
    "properties": {f"field_{i}": {"type": ["string", "integer", "null"]} for i in range(200)},
    "required": [f"field_{i}" for i in range(0, 200, 4)],
}
CASES = {
    "JSON object": (
        Grammar.json_object,
        json.dumps(
            {
                "title": "A day in Bern",
                "lines": ["It rained.", "Then it did not."],
                "n": [1, 2.5, -3e4],
                "ok": True,
            },
            indent=1,
        ),
    ),
    "JSON schema, 4 fields": (
        lambda: Grammar.json_schema(PERSON),
        json.dumps(
            {"name": "Jane Austen", "age": 41, "mail": "jane@example.org", "tags": ["new", "paid"]}
        ),
    ),
    "JSON schema, 200 fields": (
        lambda: Grammar.json_schema(WIDE),
        json.dumps({f"field_{i}": i if i % 8 else "text" for i in range(0, 200, 4)}),
    ),
    "regular expression": (
        lambda: Grammar.regex(r"(\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z [A-Z]+ .{1,80}\n){1,20}"),
        "2026-11-24T12:30:00Z INFO the engine took a step\n" * 5,
    ),
    "Lark, arithmetic": (
        lambda: Grammar.lark(
            'start: sum\nsum: (sum "+")? product\nproduct: (product "*")? value\n'
            'value: /[0-9]{1,6}/ | "(" sum ")"'
        ),
        "(1+22)*(333+4444*(5+6))+77*8",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="folder with tokenizer.json; default: train 8,000 tokens on the standard library",
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--rows", type=int, default=0, help="size of the logits, at least the vocabulary"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = Path(sysconfig.get_paths()["stdlib"])
    tok = (
        Tokenizer.load(args.tokenizer)
        if args.tokenizer
        else tokenizer.train((p.read_text("utf-8") for p in sorted(source.glob("[a-m]*.py"))), 8000)
    )
    logits = torch.zeros(max(args.rows, tok.vocab_size))
    start = time.perf_counter()
    grammar._vocabulary(tok)
    found = {
        "vocabulary": tok.vocab_size,
        "rows": len(logits),
        "vocabulary_ms": 1e3 * (time.perf_counter() - start),
        "cases": {},
    }
    print(
        f"{tok.vocab_size} tokens, {len(logits)} logits; "
        f"vocabulary read in {found['vocabulary_ms']:.0f} ms\n"
        f"{'':26}compile ms  first mask ms  mask ms     p99  accept ms  tokens"
    )
    for name, (make, text) in CASES.items():
        ids, times = tok.encode(text), []
        start = time.perf_counter()
        g = make()
        g.prepare(tok)
        compiled = 1e3 * (time.perf_counter() - start)
        for _ in range(args.rounds + 1):
            matcher, each = g.start(tok), []
            for token in ids:
                at = time.perf_counter()
                masked = matcher.mask(logits)
                mid = time.perf_counter()
                assert masked[token] == 0, f"{name}: {tok.decode([token])!r} does not fit"
                before = time.perf_counter()
                matcher.accept(token)
                each.append((1e3 * (mid - at), 1e3 * (time.perf_counter() - before)))
            times.append(each)
        masks, accepts = ([t[i] for each in times[1:] for t in each] for i in (0, 1))
        row = {
            "compile_ms": compiled,
            "first_mask_ms": statistics.mean(t[0] for t in times[0]),
            "mask_ms": statistics.median(masks),
            "p99_mask_ms": statistics.quantiles(masks, n=100)[98],
            "accept_ms": statistics.median(accepts),
            "tokens": len(ids),
        }
        found["cases"][name] = row
        print(
            f"{name:26}{compiled:10.1f}{row['first_mask_ms']:15.3f}{row['mask_ms']:9.3f}"
            f"{row['p99_mask_ms']:8.3f}{row['accept_ms']:11.4f}{len(ids):8}"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
