"""`lamoe generate`, `lamoe chat` and `lamoe serve`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from lamoe.cli.models import newest_run
from lamoe.cli.text_input import check
from lamoe.serve import settings


def generate(args: argparse.Namespace) -> int:
    """Print the prompt and, as it is generated, its continuation."""
    from lamoe.backends.cpu import packed_file
    from lamoe.checkpoints import resolve
    from lamoe.engine.llm import LLM
    from lamoe.text.tokenizer import Tokenizer

    params = _sampling_params(args)
    name = _named_model(args)
    if name is None:
        raise ValueError("no model is named; write lamoe generate MODEL --prompt TEXT")
    folder = resolve(name)
    tok = Tokenizer.load(folder)
    prompt = sys.stdin.read() if args.prompt in (None, "-") else args.prompt
    prompt = check(prompt, "the prompt").removeprefix("\ufeff")
    ids = tok.encode(prompt, bos=tok.add_bos)
    if args.max_model_len is None:
        limit = packed_file.any_config(folder).max_position_embeddings
        args.max_model_len = max(2, min(len(ids) + args.max_tokens, limit))
    llm = LLM(folder, tok, max_num_seqs=1, **_engine_options(args))
    deltas = llm.stream(ids, params)
    print(prompt, end="", flush=True)
    output = None
    for delta in deltas:
        print(delta.text, end="", flush=True)
        output = delta.output or output
    print()
    if output and output.error:
        raise RuntimeError(output.error)
    num_tokens = len(output.token_ids) if output else 0
    if output and output.finish_reason == "length" and num_tokens < args.max_tokens:
        print(
            f"lamoe generate: the context of {llm.max_model_len} tokens is full after {num_tokens} "
            f"of --max-tokens {args.max_tokens}",
            file=sys.stderr,
        )
    return 0


def chat(args: argparse.Namespace) -> int:
    """Chat in the terminal until the input ends."""
    from lamoe.cli import chat as terminal
    from lamoe.engine.llm import LLM

    params = _sampling_params(args)
    system = None if args.system is None else check(args.system, "--system")
    options = _engine_options(args)
    llm = LLM(args.model, max_num_seqs=args.max_num_seqs, **options)
    return terminal.run(llm, params, system, name=args.model)


def serve(args: argparse.Namespace) -> int:
    """Serve one model over HTTP until a signal stops the process."""
    chosen = settings.from_options(args)
    name = _named_model(args) or os.environ.get("LAMOE_MODEL") or newest_run()
    try:
        from lamoe.serve import run
    except ImportError as e:
        raise ValueError(
            f"serving needs packages that are not installed ({e.name}); pip install 'lamoe[serve]'"
        ) from None
    shown = Path(os.path.abspath(name)).name if Path(name).exists() else name
    return run.run(name, shown, chosen)


def _named_model(args: argparse.Namespace) -> str | None:
    """Return the model that the command line names, as MODEL or as --model."""
    if args.name and args.model and args.name != args.model:
        raise ValueError(f"two models are named, {args.name} and --model {args.model}; name one")
    return args.name or args.model


def _sampling_params(args: argparse.Namespace):
    from lamoe.engine.sampler import SamplingParams

    return SamplingParams(
        args.temperature,
        args.top_p,
        args.top_k,
        args.min_p,
        args.seed,
        args.max_tokens,
        tuple(check(text, "--stop") for text in args.stop),
    )


def _engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of LLM for the options that generate and chat share."""
    return dict(
        cache=args.cache,
        cache_memory=args.kv_cache_memory,
        max_model_len=args.max_model_len,
        dtype=args.dtype,
        weights=args.weights,
        head=args.head,
        device=args.device,
        threads=args.threads,
    )
