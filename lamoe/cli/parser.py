"""All verbs and options of the command line. Options that several verbs share are defined once.

Nothing here imports torch, so `lamoe --help` and `lamoe info PRESET` answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

from lamoe import __version__
from lamoe.cli import convert, generate, measure, train
from lamoe.cli.arguments import Parser, counts, lengths, num_threads, prompts, whole_number
from lamoe.model.config import PRESETS
from lamoe.serve import settings
from lamoe.serve.settings import parse_bytes

MODEL = "run folder, model folder or Hugging Face hub id"
TEXT_SOURCE = "file, folder or glob of text or .jsonl"
# Help of the options that `lamoe serve` has too; all verbs use the same words.
_SHARED = {f.name: f.metadata["help"] for f in dataclasses.fields(settings.Settings)}
WEIGHT_FORMATS = ("fp32", "bf16", "int8", "int4")
DTYPES = ("float32", "bfloat16")
Run = Callable[[argparse.Namespace], int]


def build_parser() -> Parser:
    """Build the parser of all verbs. In parsed arguments, `run` is the function of the verb."""
    return _build()[0]


def _build() -> tuple[Parser, dict[str, Parser]]:
    """Return (parser of all verbs, {verb: its parser})."""
    parser = Parser(
        "lamoe",
        description="DeepSeek-V2 (latent attention + mixture of experts) as software.",
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"lamoe {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (
        _add_train,
        _add_curves,
        _add_generate,
        _add_chat,
        _add_serve,
        _add_evaluate,
        _add_quantize,
        _add_info,
        _add_bench,
        _add_doctor,
        _add_convert,
    ):
        add(verbs)
    return parser, verbs.choices


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse a command line. Overrides of the recipe are in `overrides`.

    Raises:
        SystemExit: for --help, and with exit code 2 for arguments that are wrong.
    """
    words, overrides = split_overrides(argv)
    Parser.words = words
    parser, verbs = _build()
    args, unknown = parser.parse_known_args(words)
    if unknown:
        early = words[: words.index(args.verb)]
        place = f"; write them behind {args.verb}" if set(unknown) <= set(early) else ""
        verbs[args.verb].error(f"unrecognized arguments: {' '.join(unknown)}{place}")
    args.overrides = overrides
    return args


def split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Separate the `--section.key value` overrides of a recipe from all other words.

    argparse does not know these options and would mistake their values for the recipe.

    Returns:
        (other words, overrides).
    """
    if list(words[:1]) not in (["train"], ["info"]):
        return list(words), []
    rest, overrides, words = [], [], list(words)
    while words:
        word = words.pop(0)
        if not (word.startswith("--") and "." in word.partition("=")[0]):
            rest.append(word)
            continue
        overrides.append(word)
        if "=" not in word and words and not words[0].startswith("--"):
            overrides.append(words.pop(0))
    return rest, overrides


# ---- verbs ---------------------------------------------------------------------------------------
def _verb(verbs, name: str, run: Run, help: str) -> Parser:
    parser = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def _add_train(verbs) -> None:
    p = _verb(
        verbs,
        "train",
        train.train,
        "train a model from a recipe; --section.key VALUE overrides one entry of the recipe",
    )
    p.more_help, p.more_options = train.recipe_help, train.recipe_option
    p.add_argument("recipe", help="TOML file, for example recipes/tiny.toml")
    p.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    p.add_argument("--quiet", action="store_true", help="print no progress")
    _add_threads(p, whole_number)  # run.threads of the recipe is checked there


def _add_curves(verbs) -> None:
    p = _verb(
        verbs,
        "curves",
        measure.curves,
        "plot the training curves of a run, which may still be training: loss, gradient norm, "
        "learning rate, router entropy, expert load, dropped assignments, speed, skipped steps",
    )
    p.add_argument("run_folder", metavar="RUN", help="run folder of lamoe train")
    p.add_argument("--out", metavar="FILE", help="PNG file to write (default: RUN/curves.png)")


def _add_generate(verbs) -> None:
    p = _verb(verbs, "generate", generate.generate, "continue a prompt and stream the output")
    p.add_argument("name", nargs="?", metavar="MODEL", help=MODEL)
    p.add_argument("--model", help="the same as MODEL")
    p.add_argument("--prompt", help="text to continue; '-' or omitted: read standard input")
    _add_cache_size(p, "what the prompt and --max-tokens need", "four full contexts, at most 1 GiB")
    _add_sampling(p, max_tokens=128, what="output")
    _add_execution(p)


def _add_chat(verbs) -> None:
    p = _verb(
        verbs,
        "chat",
        generate.chat,
        "chat with a model in the terminal; with piped input each line is one message",
    )
    p.add_argument("model", help=MODEL)
    p.add_argument("--system", help="system text at the start of the conversation")
    _add_cache_size(p, "the model's context length", "four full contexts, at most 1 GiB")
    p.add_argument(
        "--max-num-seqs",
        type=whole_number,
        default=1,
        metavar="N",
        help=_shared("max_num_seqs", "1, enough for a chat"),
    )
    _add_sampling(p, max_tokens=1024, what="reply")
    _add_execution(p)


def _add_serve(verbs) -> None:
    p = _verb(
        verbs,
        "serve",
        generate.serve,
        "serve a model over HTTP with OpenAI's API and a web page at /; "
        "the variable LAMOE_OPTION sets --option",
    )
    p.add_argument(
        "name",
        nargs="?",
        metavar="MODEL",
        help=f"{MODEL} (default: the newest run under runs/) [LAMOE_MODEL]",
    )
    p.add_argument("--model", help="the same as MODEL")
    settings.add_options(p)


def _add_evaluate(verbs) -> None:
    p = _verb(
        verbs,
        "evaluate",
        measure.evaluate,
        "measure a model: bits per byte compared with gzip and xz, expert load, cache size, speed",
    )
    p.add_argument("model", help=MODEL)
    p.add_argument(
        "--data",
        action="append",
        default=[],
        help=f"text to evaluate on: {TEXT_SOURCE}; repeatable "
        "(default: the held-out text of the run)",
    )
    p.add_argument("--seq-len", type=whole_number, help="context length in tokens, with --data")
    p.add_argument(
        "--needle",
        type=lengths,
        metavar="LENGTHS",
        help="run the needle-in-a-haystack test instead, at these haystack lengths in tokens, for "
        "example 512,1024,2048. --data is the haystack (default: austen). Writes needle.md, "
        "needle.json and the heat map needle.png",
    )
    p.add_argument(
        "--needle-depths",
        type=whole_number,
        default=5,
        metavar="N",
        help="number of needle positions, evenly spaced from start to end (default: 5)",
    )
    p.add_argument(
        "--needle-draws",
        type=whole_number,
        default=8,
        metavar="N",
        help="needles per position and length (default: 8)",
    )
    p.add_argument(
        "--out",
        help="folder for report.md, report.json and report.png "
        "(default: the run folder; for other models nothing is written)",
    )
    _add_formats(p)
    _add_device(p)
    _add_threads(p)


def _add_quantize(verbs) -> None:
    p = _verb(
        verbs,
        "quantize",
        convert.quantize,
        "pack a model's weights for the compiled kernels, into a folder that loads by memory "
        "mapping; an interrupted call continues where it stopped",
    )
    p.add_argument("source", help=MODEL)
    p.add_argument("target", help="new folder")
    _add_formats(p, default="int4")
    p.add_argument(
        "--calibrate",
        metavar="TEXT",
        help=f"text used for GPTQ-style error feedback: {TEXT_SOURCE}",
    )
    p.add_argument(
        "--calibrate-tokens",
        type=whole_number,
        default=32768,
        help="tokens of that text to use, spread evenly over it (default: 32768)",
    )
    _add_threads(p)


def _add_info(verbs) -> None:
    p = _verb(
        verbs,
        "info",
        measure.info,
        "show parameters, FLOPs, cache bytes and memory of a model, from its config alone; "
        "--train: the memory plan of a training run",
    )
    p.add_argument("model", nargs="?", help=f"preset ({', '.join(PRESETS)}), config.json, {MODEL}")
    p.add_argument(
        "--train",
        metavar="RECIPE",
        help="show what `lamoe train RECIPE` needs and whether it fits here, with the same "
        "--section.key VALUE. Exit code 1 if it does not fit",
    )
    p.add_argument("--context", type=whole_number, help="cached tokens that the figures are for")
    p.add_argument(
        "--weight-bits",
        type=float,
        help="bits per stored weight (default: 16, or those of a packed model)",
    )
    p.add_argument(
        "--cache-bits", type=float, default=6.0, help="bits per cached value (default: 6)"
    )
    p.add_argument(
        "--memory",
        type=parse_bytes,
        help="show what fits into this memory, for example 16GB (default with --train: what this "
        "machine has available)",
    )
    _add_json(p)


def _add_bench(verbs) -> None:
    p = _verb(
        verbs,
        "bench",
        measure.bench,
        "measure speed against this machine's limits: loading, prefill, decode at several context "
        "lengths, batches; a preset runs with random weights. The last line is JSON, with units",
    )
    p.add_argument(
        "model",
        help=f"preset ({', '.join(PRESETS)}) or config.json, with random weights; or a {MODEL}",
    )
    _add_formats(p, default="int4")
    _add_cache(p)
    p.add_argument(
        "--prefill",
        type=prompts,
        default="512,2048,512@4096",
        metavar="N,N@D",
        help="prompt lengths in tokens; N@D: with D cached tokens before them "
        "(default: %(default)s)",
    )
    p.add_argument(
        "--depth",
        type=counts,
        default="0,4096,16384",
        metavar="N,N",
        help="context lengths at which one token is decoded (default: %(default)s)",
    )
    p.add_argument(
        "--batch",
        type=counts,
        default="4,16,32",
        metavar="N,N",
        help="numbers of sequences that decode together (default: %(default)s)",
    )
    p.add_argument(
        "--rounds", type=whole_number, default=3, help="repetitions; medians are shown (default: 3)"
    )
    p.add_argument(
        "--peer",
        choices=("llama.cpp",),
        help="also measure llama.cpp in interleaved runs and print the ratios; "
        "llama-bench and llama-batched-bench must be on PATH",
    )
    p.add_argument("--peer-model", help="the model for llama.cpp, as a GGUF file")
    _add_threads(p)


def _add_doctor(verbs) -> None:
    p = _verb(
        verbs,
        "doctor",
        measure.doctor,
        "describe this machine and installation, say which kernels run, and check their results; "
        "or check every byte of a model. Exit code 1 if something is wrong",
    )
    p.add_argument(
        "model",
        nargs="?",
        help=f"{MODEL}, .gguf file or saved prefix to check (default: check the machine)",
    )
    _add_json(p)


def _add_convert(verbs) -> None:
    p = _verb(
        verbs,
        "convert",
        convert.convert,
        "check a model and write it as a new Hugging Face folder (with another dtype or shard "
        "size), or convert a GGUF file to such a folder",
    )
    p.add_argument(
        "source",
        help=f"{MODEL}, or a .gguf file of the llama architecture (needs the extra lamoe[gguf])",
    )
    p.add_argument("target", help="new folder")
    p.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="take tokenizer and chat template from this folder (default: from the source)",
    )
    p.add_argument(
        "--dtype",
        choices=(*DTYPES, "float16"),
        help="dtype of the written weights (default: that of the source)",
    )
    p.add_argument(
        "--max-shard-size",
        type=parse_bytes,
        default=5_000_000_000,
        help="largest size of one weight file (default: 5GB)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace files in the target folder")


# ---- options that several verbs share ------------------------------------------------------------
def _shared(option: str, default: object = None) -> str:
    """Return the help of a shared option, with this verb's default if it has its own."""
    words = _SHARED[option]
    if default is None:
        return words
    return f"{words.partition('; default:')[0]} (default: {default})"


def _add_formats(p: argparse.ArgumentParser, default: str | None = None) -> None:
    p.add_argument(
        "--weights",
        choices=WEIGHT_FORMATS,
        default=default,
        metavar="FORMAT",
        help=_shared("weights", default),
    )
    p.add_argument("--head", choices=WEIGHT_FORMATS, metavar="FORMAT", help=_shared("head"))


def _add_cache(p: argparse.ArgumentParser) -> None:
    p.add_argument("--cache", default="bf16", metavar="FORMAT", help=_shared("cache", "bf16"))


def _add_cache_size(p: argparse.ArgumentParser, length: str, memory: str) -> None:
    _add_cache(p)
    p.add_argument(
        "--max-model-len", type=whole_number, metavar="N", help=_shared("max_model_len", length)
    )
    p.add_argument(
        "--kv-cache-memory",
        type=parse_bytes,
        metavar="BYTES",
        help=_shared("kv_cache_memory", memory),
    )


def _add_threads(p: argparse.ArgumentParser, kind: Callable[[str], int] = num_threads) -> None:
    p.add_argument("--threads", type=kind, default=0, metavar="N", help=_shared("threads"))


def _add_device(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", metavar="DEVICE", help=_shared("device"))


def _add_execution(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dtype", choices=DTYPES, metavar="DTYPE", help=_shared("dtype"))
    _add_formats(p)
    _add_device(p)
    _add_threads(p)


def _add_sampling(p: argparse.ArgumentParser, max_tokens: int, what: str) -> None:
    p.add_argument(
        "--max-tokens",
        type=whole_number,
        default=max_tokens,
        help=f"longest {what}, in tokens (default: {max_tokens})",
    )
    p.add_argument(
        "--temperature", type=float, default=0.8, help="0 means greedy decoding (default: 0.8)"
    )
    p.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        help="sample from the most likely tokens that together reach this probability "
        "(default: 0.95)",
    )
    p.add_argument(
        "--top-k", type=whole_number, default=0, help="sample from the K most likely tokens; 0: all"
    )
    p.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="drop tokens less likely than this share of the most likely one (default: 0)",
    )
    p.add_argument("--seed", type=whole_number, help="sampling seed (default: a random one)")
    p.add_argument(
        "--stop", action="append", default=[], help=f"text that ends the {what}; repeatable"
    )


def _add_json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
