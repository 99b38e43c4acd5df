"""The command line: verbs only, each a few lines over the Python API."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from lamoe import __version__
from lamoe.model.config import PRESETS, ModelConfig, did_you_mean
from lamoe.serve import settings
from lamoe.serve.settings import parse_bytes


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code. User errors are one line on stderr and exit code 2."""
    parser = _parser()
    words, overrides = _overrides(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    try:
        args.overrides = overrides
        code = args.run(args) or 0
        sys.stdout.flush()  # a closed pipe should be noticed here, not when Python ends
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, RuntimeError) as e:
        if os.environ.get("LAMOE_TRACEBACK"):
            raise
        print(f"lamoe {args.verb}: {' '.join(str(e).splitlines())}", file=sys.stderr)
        return 2


def _overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """`train`'s words without, and only, its `--section.key value` pairs: argparse would take the value for the recipe."""
    if list(words[:1]) != ["train"]:
        return list(words), []
    rest, found, words = [], [], list(words)
    while words:
        word = words.pop(0)
        if not (word.startswith("--") and "." in word.partition("=")[0]):
            rest.append(word)
            continue
        found.append(word)
        if "=" not in word and words:
            found.append(words.pop(0))
    return rest, found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lamoe",
        description="DeepSeek-V2 (latent attention + mixture of experts) as software.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lamoe {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(run, help: str) -> argparse.ArgumentParser:
        p = verbs.add_parser(run.__name__, help=help, description=help, allow_abbrev=False)
        p.set_defaults(run=run)
        return p

    p = verb(train, "train a model as a recipe says; --section.key VALUE overrides a line of it")
    p.add_argument("recipe", help="a TOML file, for example recipes/tiny.toml")
    p.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint of run.out"
    )
    p.add_argument("--quiet", action="store_true")

    p = verb(generate, "continue a prompt, streaming")
    p.add_argument("--model", required=True, help="a run folder, a model folder or a hub id")
    p.add_argument("--prompt", help="the text to continue; '-' or nothing: read standard input")
    _memory(
        p,
        "prompt and output in tokens; default: what prompt and --max-tokens need",
        "what the longest text needs",
    )
    _sampling(p, max_tokens=128, what="the output")

    p = verb(chat, "talk to a model in the terminal; every line of a piped input is a turn")
    p.add_argument("model", help="a run folder, a model folder or a hub id")
    p.add_argument("--system", help="a text that comes before the conversation")
    _memory(
        p,
        "conversation in tokens, reply included; default: the model's limit",
        "four full contexts, at most 1 GiB",
    )
    p.add_argument(
        "--max-num-seqs", type=int, default=1, metavar="N", help="sequences at once; a chat has one"
    )
    _sampling(p, max_tokens=1024, what="one reply")

    p = verb(
        serve,
        "serve a model over HTTP as OpenAI's API does, with a page at /; every option is also a variable LAMOE_OPTION",
    )
    p.add_argument(
        "name",
        nargs="?",
        metavar="MODEL",
        help="a run folder, a model folder or a hub id; default: the newest run under runs/ [LAMOE_MODEL]",
    )
    p.add_argument("--model", help="the same")
    settings.add_options(p)

    p = verb(
        evaluate,
        "measure a model: bits per byte beside gzip and xz, expert load, cache bytes, speed",
    )
    p.add_argument("model", help="a run folder, a model folder or a hub id")
    p.add_argument(
        "--data",
        action="append",
        default=[],
        help="a text source (file, folder, glob, .jsonl); default: what the run held out",
    )
    p.add_argument("--seq-len", type=int, help="context in tokens, with --data")
    p.add_argument(
        "--needle",
        type=_lengths,
        metavar="LENGTHS",
        help="instead: needles in haystacks of these many tokens, for example 512,1024,2048 "
        "(--data: the haystack, default austen); writes needle.md, needle.json and the heat map needle.png",
    )
    p.add_argument(
        "--needle-depths",
        type=int,
        default=5,
        metavar="N",
        help="at so many depths, from the beginning to the end",
    )
    p.add_argument(
        "--needle-draws", type=int, default=8, metavar="N", help="needles per depth and length"
    )
    p.add_argument(
        "--out",
        help="folder for report.md, report.json and report.png; default: the run folder, else nothing is written",
    )
    p.add_argument(
        "--weights",
        choices=("fp32", "bf16", "int8", "int4"),
        help="measure the model with its weights in this format, on the compiled kernels",
    )
    _head(p)

    p = verb(
        quantize,
        "pack a model's weights for the compiled kernels, into a folder that is memory-mapped; goes on where an interrupted call stopped",
    )
    p.add_argument("source", help="a run folder, a model folder or a hub id")
    p.add_argument("target", help="a new folder")
    p.add_argument(
        "--weights",
        choices=("fp32", "bf16", "int8", "int4"),
        default="int4",
        help="int4: 4.5 bits a weight with all scales, int8: 8.5 (default: int4)",
    )
    _head(p)
    p.add_argument(
        "--calibrate",
        metavar="TEXT",
        help="a text source (file, folder, glob, .jsonl): the error of each weight is made up for by those after it, as inputs on that text go together",
    )
    p.add_argument(
        "--calibrate-tokens", type=int, default=32768, help="tokens of it, spread evenly"
    )
    p.add_argument("--threads", type=int, default=0)

    p = verb(info, "parameters, FLOPs, cache bytes and memory of a model, from its config alone")
    p.add_argument(
        "model",
        help=f"a preset ({', '.join(PRESETS)}), a run or model folder, a config.json or a hub id",
    )
    p.add_argument("--context", type=int, help="cached tokens the figures are for")
    p.add_argument(
        "--weight-bits",
        type=float,
        help="bits of a stored weight; default: 16, or what a packed model has",
    )
    p.add_argument("--cache-bits", type=float, default=6.0)
    p.add_argument("--memory", type=parse_bytes, help="plan for this much memory, for example 16GB")
    p.add_argument("--json", action="store_true")

    p = verb(
        bench,
        "measure speed beside the machine's limits: load, prompts, decoding at depth, batches; a preset runs on random weights",
    )
    p.add_argument(
        "model",
        help=f"a preset ({', '.join(PRESETS)}) or a config.json, on random weights; or a packed folder, a run or a model folder",
    )
    p.add_argument(
        "--weights", default="int4", help="fp32, bf16, int8 or int4; a packed folder has its own"
    )
    _head(p)
    p.add_argument(
        "--cache",
        default="bf16",
        help="storage format of the cache: fp32, bf16, int8, 6bit or 4bit",
    )
    p.add_argument("--threads", type=int, default=0)
    p.add_argument(
        "--prefill",
        type=_prompts,
        default="512,2048,512@4096",
        metavar="N,N@D",
        help="lengths of prompts; N@D: behind D cached tokens (default: %(default)s)",
    )
    p.add_argument(
        "--depth",
        type=_ints,
        default="0,4096,16384",
        metavar="N,N",
        help="cached tokens behind which one token is decoded (default: %(default)s)",
    )
    p.add_argument(
        "--batch",
        type=_ints,
        default="4,16,32",
        metavar="N,N",
        help="sequences that decode together (default: %(default)s)",
    )
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument(
        "--peer",
        choices=("llama.cpp",),
        help="measure it too, in turn, and print ratios; llama-bench and llama-batched-bench must be on PATH",
    )
    p.add_argument("--peer-model", help="the GGUF file for the peer")

    p = verb(
        doctor,
        "what this machine and installation are, which kernels run, and whether they compute what they should; exit code 1 when something is wrong",
    )
    p.add_argument("--json", action="store_true")

    p = verb(
        convert,
        "read a Hugging Face model folder and write it anew (checked, another dtype or shard size), or make one of a GGUF file",
    )
    p.add_argument(
        "source",
        help="a run folder, a model folder, a hub id, or a .gguf file of the llama architecture (needs the extra lamoe[gguf])",
    )
    p.add_argument("target")
    p.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="take tokenizer and chat template from here instead of from the source",
    )
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    p.add_argument("--max-shard-size", type=parse_bytes, default=5_000_000_000)
    p.add_argument("--overwrite", action="store_true")
    return parser


def _head(p: argparse.ArgumentParser) -> None:
    """The format of the output head, beside --weights."""
    p.add_argument(
        "--head",
        choices=("fp32", "bf16", "int8", "int4"),
        help="another format for the output head alone, for example int8 with int4 weights (default: that of the weights)",
    )


def _memory(p: argparse.ArgumentParser, length: str, memory: str) -> None:
    """How much a cache may hold."""
    p.add_argument(
        "--cache",
        default="bf16",
        help="storage format of the cache: fp32, bf16, int8, 6bit or 4bit",
    )
    p.add_argument("--max-model-len", type=int, metavar="N", help=f"longest {length}")
    p.add_argument(
        "--kv-cache-memory",
        type=parse_bytes,
        metavar="BYTES",
        help=f"memory of the cache, for example 2GB; default: {memory}",
    )


def _sampling(p: argparse.ArgumentParser, max_tokens: int, what: str) -> None:
    """The options of everything that speaks."""
    p.add_argument("--max-tokens", type=int, default=max_tokens, help=f"most tokens of {what}")
    p.add_argument("--temperature", type=float, default=0.8, help="0: greedy")
    p.add_argument("--top-p", type=float, default=0.95)
    p.add_argument("--top-k", type=int, default=0)
    p.add_argument("--min-p", type=float, default=0.0)
    p.add_argument("--seed", type=int)
    p.add_argument(
        "--stop",
        action="append",
        default=[],
        help=f"a text that ends {what}; may be given more than once",
    )
    p.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the computation; default: the model's own",
    )
    p.add_argument(
        "--weights",
        choices=("fp32", "bf16", "int8", "int4"),
        help="quantise while loading; `lamoe quantize` does it once, for good",
    )
    _head(p)
    p.add_argument("--threads", type=int, default=0)


def train(args) -> int:
    from lamoe.train import checkpoint
    from lamoe.train.loop import Stopped
    from lamoe.train.loop import train as run
    from lamoe.train.recipe import Recipe

    recipe = Recipe.load(args.recipe, args.overrides)
    try:
        last = run(recipe, resume=args.resume, quiet=args.quiet)
    except Stopped as e:
        print(f"lamoe train: {e}", file=sys.stderr)
        return 3
    return (
        0 if checkpoint.step_of(last) == recipe.run.steps else 130
    )  # stopped by a signal: what comes after && must not run


def generate(args) -> int:
    from lamoe.backends.cpu import packed_file
    from lamoe.checkpoints import resolve
    from lamoe.engine.llm import LLM
    from lamoe.engine.sampler import SamplingParams
    from lamoe.text.tokenizer import Tokenizer

    params = SamplingParams(
        args.temperature,
        args.top_p,
        args.top_k,
        args.min_p,
        args.seed,
        args.max_tokens,
        tuple(args.stop),
    )
    folder = resolve(find_model(args.model))
    tok = Tokenizer.load(folder)
    prompt = sys.stdin.read() if args.prompt in (None, "-") else args.prompt
    ids = tok.encode(prompt, bos=tok.add_bos)
    needed = max(
        2, min(len(ids) + args.max_tokens, packed_file.any_config(folder).max_position_embeddings)
    )
    llm = LLM(
        folder,
        tok,
        cache=args.cache,
        cache_memory=args.kv_cache_memory,
        max_model_len=needed if args.max_model_len is None else args.max_model_len,
        max_num_seqs=1,
        dtype=args.dtype,
        weights=args.weights,
        head=args.head,
        threads=args.threads,
    )
    deltas = llm.stream(ids, params)
    print(prompt, end="", flush=True)
    for delta in deltas:
        print(delta.text, end="", flush=True)
    print()
    if delta.output.error:
        raise RuntimeError(delta.output.error)
    return 0


def chat(args) -> int:
    from lamoe.cli.chat import run
    from lamoe.engine.llm import LLM
    from lamoe.engine.sampler import SamplingParams

    params = SamplingParams(
        args.temperature,
        args.top_p,
        args.top_k,
        args.min_p,
        args.seed,
        args.max_tokens,
        tuple(args.stop),
    )
    llm = LLM(
        find_model(args.model),
        cache=args.cache,
        dtype=args.dtype,
        weights=args.weights,
        head=args.head,
        threads=args.threads,
        max_model_len=args.max_model_len,
        cache_memory=args.kv_cache_memory,
        max_num_seqs=args.max_num_seqs,
    )
    return run(llm, params, args.system, name=args.model)


def serve(args) -> int:
    chosen = settings.from_options(args)
    if args.name and args.model and args.name != args.model:
        raise ValueError(f"two models are named, {args.name} and --model {args.model}; name one")
    name = args.name or args.model or os.environ.get("LAMOE_MODEL") or newest_run()
    try:
        from lamoe.serve.run import run
    except ImportError as e:
        raise ValueError(
            f"serving needs packages that are not installed ({e.name}); pip install 'lamoe[serve]'"
        ) from None
    return run(
        find_model(name), Path(os.path.abspath(name)).name if Path(name).exists() else name, chosen
    )


def evaluate(args) -> int:
    from lamoe.measure import report

    if args.seq_len is not None and not args.data:
        raise ValueError(
            "--seq-len needs --data; a run is measured at the length it was trained with"
        )
    if args.needle and args.seq_len is not None:
        raise ValueError(
            "--seq-len goes with text; the lengths of a needle test are those of --needle"
        )
    model, tok = _load(args.model, None, 0, args.weights, args.head)
    run = Path(args.model)
    if args.needle:
        result = report.evaluate_needle(
            model,
            tok,
            args.needle,
            args.data or ["austen"],
            args.needle_depths,
            args.needle_draws,
            note=lambda text: print(text, file=sys.stderr, flush=True),
        )
    elif args.data:
        recipe = run / "recipe.json"  # a run is measured at the length it was trained with
        trained = (
            json.loads(recipe.read_text(encoding="utf-8"))["data"]["seq_len"]
            if recipe.exists()
            else None
        )
        result = report.evaluate_texts(model, tok, args.data, args.seq_len or trained)
    elif (run / "recipe.json").exists() and (run / "data").is_dir():
        result = report.evaluate_run(model, tok, run)
    else:
        raise ValueError(
            f"{args.model} is not a run folder, so there is no held-out text; name some with --data"
        )
    out = (
        Path(args.out)
        if args.out
        else run
        if not args.data and not args.weights and not args.head and (run / "recipe.json").exists()
        else None
    )
    name = f"lamoe: {run.name or args.model}"
    text = report.needle_markdown(result, name) if args.needle else report.markdown(result, name)
    print(text)
    if out is not None:
        kind = "needle" if args.needle else "report"
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{kind}.md").write_text(text, encoding="utf-8")
        (out / f"{kind}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        try:
            report.plot_needle({name: result}, out / "needle.png") if args.needle else report.plot(
                result, name, out / "report.png"
            )
            print(f"wrote {out / kind}.md, {kind}.json, {kind}.png")
        except ImportError:
            print(
                f"wrote {out / kind}.md, {kind}.json; no {kind}.png, because matplotlib is not installed (pip install 'lamoe[train]')"
            )
    return 0


def info(args) -> int:
    from lamoe.model import accounting

    config, name, bits = _config(args.model)
    options = dict(
        name=name,
        context=args.context,
        weight_bits=bits if args.weight_bits is None else args.weight_bits,
        cache_bits=args.cache_bits,
        memory_bytes=args.memory,
    )
    if args.json:
        print(json.dumps(accounting.report(config, **options), indent=1))
    else:
        from rich.console import Console

        console = Console()
        console.width = max(100, console.width)  # narrower, the tables lose columns
        console.print(accounting.render(config, **options))
    return 0


def bench(args) -> int:
    import time

    import torch

    from lamoe.backends.cpu import native, packed_file
    from lamoe.checkpoints import resolve
    from lamoe.engine import llm
    from lamoe.measure import bench as b

    if not native.available():
        raise ValueError(
            "the compiled kernels are not there, and bench measures them; install lamoe with a C++ compiler"
        )
    if args.rounds < 1 or args.threads < 0 or min(args.batch, default=1) < 1:
        raise ValueError(
            f"--rounds is {args.rounds}, --threads {args.threads}, --batch {args.batch}; rounds and batches must be at least 1, threads at least 0 (0: all cores)"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    threads, begin = torch.get_num_threads(), time.perf_counter()
    peer = b.Peer(args.peer_model or "", threads) if args.peer else None
    b.progress(f"{args.model}: weights")
    if args.model in PRESETS or args.model.endswith(".json"):
        model = b.random_model(_config(args.model)[0], args.weights, threads, args.head)
    else:
        folder = resolve(find_model(args.model))
        model = llm.load_runnable(
            folder,
            None if packed_file.is_packed(folder) else args.weights,
            None,
            threads,
            head=args.head,
        )
    loaded, limit = time.perf_counter() - begin, model.config.max_position_embeddings
    depths, prefills = (
        [d for d in args.depth if d < limit],
        [(n, d) for n, d in args.prefill if n + d <= limit],
    )
    if beyond := [f"--depth {d}" for d in args.depth if d not in depths] + [
        f"--prefill {n}@{d}" for n, d in args.prefill if (n, d) not in prefills
    ]:
        b.progress(f"left out, beyond the {limit:,} positions of the model: {', '.join(beyond)}")
    run = b.Bench(
        model,
        args.cache,
        max(
            [n + d for n, d in prefills]
            + [d + 1 for d in depths]
            + [32 * x for x in args.batch]
            + [1]
        ),
    )
    largest = max(model.tensors.values(), key=lambda t: t[0].numel())[0]
    buffer = largest if largest.numel() > 1 << 28 else torch.zeros(1 << 29, dtype=torch.uint8)
    machine, lines = b.Machine.probe(threads, buffer), run.lines(prefills, depths, args.batch)
    if peer:
        b.in_turn(
            run, peer, lines, args.rounds, lambda: b.Machine.probe(threads, buffer).read, b.progress
        )
    else:
        b.measure(run, lines, args.rounds, b.progress)
    weights = sum(model.nbytes.values())
    print(
        f"{args.model}: weights {model.weights}, head {model.head}, {weights / 1e9:.3g} GB, ready in {loaded:.1f} s; cache {args.cache}; {threads} threads, {native.lib.isa()}; "
        f"peak memory {b.peak_rss() / 1e9:.2f} GB\n"
        f"probed: {machine.read / 1e9:.1f} GB/s read, {2 * machine.int8 / 1e9:.0f} Gop/s int8, {2 * machine.bf16 / 1e9:.0f} GFLOP/s bf16\n"
    )
    print(b.table(lines, machine, model.weights) + (f"\n\n{b.peer_table(lines)}" if peer else ""))
    result = {
        "model": args.model,
        "weights": model.weights,
        "head": model.head,
        "cache": args.cache,
        "load_s": loaded,
        "weight_bytes": weights,
        "peak_rss": b.peak_rss(),
        "probe": vars(machine),
        **b.versions(threads),
        "lines": {x.name: b.figures(x) for x in lines},
    }
    print(json.dumps(result))
    return 0


def doctor(args) -> int:
    from lamoe.measure import doctor as d

    found = d.examine()
    print(json.dumps(found, indent=1) if args.json else d.render(found))
    return d.exit_code(found)


def quantize(args) -> int:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from lamoe.backends.cpu import calibrate, packed, packed_file
    from lamoe.checkpoints import read_config, resolve
    from lamoe.model.accounting import human_bytes

    if args.threads:
        torch.set_num_threads(args.threads)
    source = resolve(find_model(args.source))
    config, options, done = read_config(source), {}, []
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(
            f"packing as {args.weights}",
            total=sum(
                packed.piece_bytes(p, packed.element(args.weights))
                for p in packed.pieces(config, args.weights, args.head)
            ),
        )
        if args.calibrate:
            from lamoe.text.tokenizer import Tokenizer
            from lamoe.train.sources import read_documents

            if "int4" not in (args.weights, args.head):
                raise ValueError(
                    f"--calibrate concerns int4; {args.weights} rounds every weight to the nearest value whatever its inputs are"
                )
            rows = calibrate.rows_of(
                Tokenizer.load(source),
                [d.text for d in read_documents([args.calibrate])],
                config,
                args.calibrate_tokens,
            )
            options = calibrate.options(
                source,
                config,
                rows,
                lambda layer: bar.update(task, description=f"calibrating, layer {layer}"),
            )
        for piece, size in packed_file.write(
            source, args.target, args.weights, head=args.head, **options
        ):
            bar.update(task, advance=size, description=f"packing as {args.weights}")
            done.append(piece)
    print(f"{'class':<20} {'weights':>16} {'bytes':>16} {'bits a weight':>14}  format")
    for kind, c in packed.classes(config, args.weights, done, args.head).items():
        print(
            f"{kind:<20} {c.elements:>16,} {c.bytes:>16,} {f'{8 * c.bytes / c.elements:.2f}' if c.elements else '-':>14}  {', '.join(c.formats)}"
        )
    total = sum(packed.piece_bytes(p, packed.element(args.weights)) for p in done)
    print(
        f"{args.target} is complete: {human_bytes(total)}, {packed_file.bits(args.target):.2f} bits a weight in all"
    )
    return 0


def convert(args) -> int:
    from lamoe.checkpoints import gguf, load, resolve, save

    if args.source.endswith(".gguf"):
        gguf.to_folder(
            args.source,
            args.target,
            dtype=args.dtype,
            tokenizer=args.tokenizer,
            max_shard_bytes=args.max_shard_size,
            overwrite=args.overwrite,
        )
    else:
        folder = resolve(find_model(args.source))
        save(
            load(folder, args.dtype),
            args.target,
            max_shard_bytes=args.max_shard_size,
            extras_from=args.tokenizer or folder,
            overwrite=args.overwrite,
        )
    print(f"wrote {args.target}")
    return 0


def find_model(name: str) -> str:
    """The model folder behind a name: that of a run's last checkpoint, or the name itself (a model folder or hub id)."""
    path = Path(name)
    if (path / "recipe.json").exists():
        from lamoe.train import checkpoint

        return str(checkpoint.model_of_run(path))
    if (path / "model" / "config.json").exists() and not (path / "config.json").exists():
        return str(path / "model")
    return name


def newest_run(folder: str = "runs") -> str:
    """The run under `folder` whose last checkpoint is the newest."""
    from lamoe.train import checkpoint

    runs = {}
    for recipe in Path(folder).glob("*/recipe.json"):
        configs = [f / "model/config.json" for f in checkpoint.folders(recipe.parent)]
        times = [c.stat().st_mtime for c in configs if c.is_file()]
        runs[recipe.parent] = max(times, default=0.0)
    newest = max(runs, key=runs.get, default=None)
    if newest is None or not runs[newest]:
        raise ValueError(
            f"there is no trained model under {folder}/; name a run folder, a model folder or a hub id, or make one with `make demo`"
        )
    return str(newest)


def _prompts(text: str) -> list[tuple[int, int]]:
    """'512,512@4096' -> [(512, 0), (512, 4096)]: prompts of so many tokens, behind so many; nothing -> []."""
    try:
        found = [
            (int(n), int(d or 0))
            for n, _, d in (x.partition("@") for x in text.split(",") if x.strip())
        ]
    except ValueError:
        found = [(-1, 0)]
    if any(n < 2 or d < 0 for n, d in found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of prompts of at least 2 tokens; write it like 512,2048,512@4096"
        )
    return found


def _ints(text: str) -> list[int]:
    """'16,32' -> [16, 32]; nothing -> []."""
    try:
        found = [int(x) for x in text.split(",") if x.strip()]
    except ValueError:
        found = [-1]
    if any(x < 0 for x in found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers; write it like 512,2048"
        )
    return found


def _load(name: str, dtype: str | None, threads: int, weights: str | None, head: str | None):
    """(Transformer, or PackedModel of a packed folder or where `weights` or `head` asks for one; tokenizer)."""
    import torch

    from lamoe.backends.cpu import packed_file
    from lamoe.checkpoints import load, resolve
    from lamoe.engine import llm
    from lamoe.text.tokenizer import Tokenizer

    if threads:
        torch.set_num_threads(threads)
    folder = resolve(find_model(name))
    if weights is None and head is None and not packed_file.is_packed(folder):
        return load(folder, dtype), Tokenizer.load(folder)
    return llm.load_runnable(folder, weights, dtype, threads, head=head), Tokenizer.load(folder)


def _config(name: str) -> tuple[ModelConfig, str, float]:
    """(config, name to show, bits of a stored weight)."""
    if name in PRESETS:
        return ModelConfig.preset(name), name, 16.0
    path = Path(find_model(name))
    if path.is_file():
        return ModelConfig.from_file(path), str(path), 16.0
    if not path.is_dir() and name.count("/") != 1:
        raise ValueError(
            f"{name!r} is neither a preset{did_you_mean(name, PRESETS)} nor a folder, a config.json or a hub id; presets: {', '.join(PRESETS)}"
        )
    from lamoe.backends.cpu import packed_file
    from lamoe.checkpoints import read_config, resolve

    folder = path if path.is_dir() else resolve(name)
    shown = str(path) if path.is_dir() else name
    return (
        (*packed_file.read_config(folder)[:1], shown, packed_file.bits(folder))
        if packed_file.is_packed(folder)
        else (read_config(folder), shown, 16.0)
    )


def _lengths(text: str) -> list[int]:
    """'512,1024' -> [512, 1024]."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of lengths; write it like 512,1024,2048"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
