"""The training run, one visible story from raw text to a saved model. Everything a run needs to go on is in its checkpoint.

A run folder holds recipe.json, tokenizer/, data/ (packed text), metrics.jsonl, tensorboard/, step-N/ (model/ is a Hugging Face
folder, state.safetensors the rest) and `latest`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import signal
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from lamoe.backends.torch_backend import TorchBackend, next_token_targets
from lamoe.checkpoints import atomic, hf, lock
from lamoe.engine.text_loss import text_loss
from lamoe.model import accounting
from lamoe.model.config import CARRIED
from lamoe.model.routing import Training
from lamoe.model.transformer import Transformer
from lamoe.text import tokenizer as tokenizers
from lamoe.text.tokenizer import Tokenizer
from lamoe.train import checkpoint, data
from lamoe.train.optim import MasterAdamW
from lamoe.train.recipe import Recipe
from lamoe.train.sources import plan_split, stamp

TOKENIZER_BYTES = (
    24 << 20
)  # a vocabulary is learnt from at most about this much of the training text


class Stopped(RuntimeError):
    """Training ended early on purpose (non-finite loss). The message says what happened, what was saved and how to go on."""


def train(recipe: Recipe, resume: bool = False, quiet: bool = False) -> Path:
    """Train as `recipe` says and return the last checkpoint's folder. ValueError for a run folder that is in the way, or a resume with
    another recipe; Stopped when the loss is not finite. Ctrl-C and SIGTERM finish the step, save, and return."""
    run = Path(recipe.run.out)
    with _locked(run), _screen(recipe, quiet) as screen:
        last = _claim(run, recipe, resume, screen.note)
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)

        # 1. text -> tokens
        tok = prepare_tokenizer(recipe, run / "tokenizer", screen.note)
        if last is not None and (run / "data" / "meta.json").exists():
            corpus = data.open_corpus(
                run / "data"
            )  # as it was packed, even if the sources have changed or gone since
        else:
            corpus = prepare_corpus(recipe, tok, run / "data", screen.note)
        screen.note(corpus.describe())
        batches = data.Batches(corpus, recipe.data.seq_len, recipe.run.seed)

        # 2. model and optimizer
        config = recipe.model.replace(
            bos_token_id=tok.bos_id, eos_token_id=tok.eos_id, pad_token_id=tok.pad_id
        )
        model = Transformer(config)
        if not recipe.run.init_from:
            model.init_weights(recipe.run.seed)
        elif last is None:
            folder = _start_folder(recipe)
            model.load_state_dict(hf.load(folder, torch.float32).state_dict())
            screen.note(f"starting from the weights of {folder}")
        optimizer = MasterAdamW(model, recipe.optim) if recipe.run.dtype == "float32" else None
        if optimizer is None:
            masters = [p.detach().clone() for p in model.parameters()]
            optimizer = MasterAdamW(model.to(torch.bfloat16), recipe.optim)
            torch._foreach_copy_(optimizer.masters, masters)  # masters start unrounded
            del masters
        step = saved = 0
        if last is not None:
            state = checkpoint.load_tensors(last / "state.safetensors")
            optimizer.load_state_dict(state["optimizer"])
            batches.load_state_dict(state["data"])
            checkpoint.set_rng_state(state["rng"])
            step = saved = state["step"]
            del state
            screen.note(f"going on from {last} at step {step}")

        # 3. the loop
        total = recipe.batch.before(recipe.run.steps) * recipe.data.seq_len
        peak = measure_peak(model.embed.weight.dtype)
        flops = accounting.training_flops(config, recipe.data.seq_len)
        screen.note(
            f"{accounting.parameters(config).total:,} parameters, {flops / 1e6:.1f} MFLOP a token; "
            f"measured {recipe.run.dtype} GEMM peak {peak / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads"
        )

        def save() -> Path:
            def write(folder: Path):
                hf.save(model, folder / "model", extras_from=run / "tokenizer")
                checkpoint.save_tensors(
                    folder / "state.safetensors",
                    {
                        "step": step,
                        "optimizer": optimizer.state_dict(),
                        "data": batches.state_dict(),
                        "rng": checkpoint.rng_state(),
                    },
                )

            return checkpoint.save(run, step, write, recipe.run.keep)

        with closing(_Log(run, step, screen)) as log, _stop_signals() as stop:
            while step < recipe.run.steps and not stop.asked:
                begin = time.perf_counter()
                seen = recipe.batch.before(step) * recipe.data.seq_len
                size = recipe.batch.size_at(step)
                ids, segments = map(torch.from_numpy, batches.next_batch(size))
                targets = next_token_targets(ids, segments)
                counted = (targets >= 0).sum().clamp_min(1)
                protected = _protected(size, recipe, step)
                parts = []  # (share of the targets, cross-entropy, balance loss, MoE records) of each micro-batch
                for at in range(0, size, recipe.batch.micro):
                    rows = slice(at, at + recipe.batch.micro)
                    training = Training(recipe.balance, protected[rows])
                    mask = segments[rows, :-1] if recipe.data.document_mask else None
                    ce = model.loss(ids[rows, :-1], targets[rows], mask, training)
                    share = (targets[rows] >= 0).sum() / counted
                    balance = training.loss() * (recipe.batch.micro / size)
                    (ce * share + balance).backward()
                    optimizer.collect()
                    parts.append((share.item(), ce.item(), balance.item(), training.records))
                loss = sum(share * ce for share, ce, _, _ in parts)
                norm = optimizer.clip()
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise Stopped(_autopsy(run, step, ids, segments, loss, norm, last))
                lr = recipe.optim.lr_at(step, seen / total)
                optimizer.step(lr)
                step += 1

                tokens = size * recipe.data.seq_len
                seconds = time.perf_counter() - begin
                log.step(
                    step,
                    recipe,
                    tokens=seen + tokens,
                    epoch=round(batches.epoch, 4),
                    loss=loss,
                    balance=sum(p[2] for p in parts),
                    lr=lr,
                    grad_norm=norm,
                    batch=size,
                    tokens_per_s=tokens / seconds,
                    mfu=tokens / seconds * flops / peak,
                    gemm_peak=peak,
                    records=[p[3] for p in parts],
                )
                if (
                    recipe.run.eval_every
                    and len(corpus.heldout)
                    and step % recipe.run.eval_every == 0
                    and step < recipe.run.steps
                ):
                    log.heldout(step, evaluate(model, corpus, recipe, recipe.run.eval_tokens))
                if (
                    recipe.run.save_every
                    and step % recipe.run.save_every == 0
                    and step < recipe.run.steps
                ):
                    last, saved = save(), step

            # 4. the end, planned or not
            if stop.asked and step < recipe.run.steps:
                last = save()
                screen.note(
                    f"stopped by {stop.asked} after step {step} of {recipe.run.steps}; saved {last}. Go on with: the same command and --resume"
                )
                return last
            if last is None or saved != step:
                last = save()
                if len(corpus.heldout):
                    log.heldout(step, evaluate(model, corpus, recipe, None))
        screen.note(f"done: {step} steps, saved {last / 'model'}")
        return last


def evaluate(
    model: Transformer, corpus: data.PackedCorpus, recipe: Recipe, max_tokens: int | None
) -> dict[str, float]:
    """Held-out bits per byte (of the whole held-out text) or, on a part of it, bits per token: {"heldout_...": value}."""
    rows = data.heldout_rows(corpus, recipe.data.seq_len)
    result = text_loss(
        TorchBackend(model), rows, recipe.batch.micro, max_tokens, recipe.data.document_mask
    )
    out = {"heldout_bits_per_token": result.bits_per_token, "heldout_perplexity": result.perplexity}
    if max_tokens is None:
        out["heldout_bits_per_byte"] = result.bits_per_byte(corpus.heldout_bytes())
    return out


def prepare_tokenizer(recipe: Recipe, folder: Path, note=print) -> Tokenizer:
    """The recipe's tokenizer, or one trained on (a sample of) the training side of the split; kept in the run folder."""
    if (folder / "tokenizer.json").exists():
        tok = Tokenizer.load(folder)
    elif recipe.data.tokenizer or recipe.run.init_from:
        tok = Tokenizer.load(recipe.data.tokenizer or _model_folder(recipe.run.init_from))
    else:
        note(f"learning a vocabulary of {recipe.model.vocab_size} tokens")
        tok = tokenizers.train(_training_texts(recipe), recipe.model.vocab_size)
    if tok.vocab_size > recipe.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tok.vocab_size} tokens, more than model.vocab_size {recipe.model.vocab_size}; raise model.vocab_size"
        )
    if tok.bos_id is None or tok.eos_id is None:
        raise ValueError(
            f"the tokenizer of {recipe.data.tokenizer} names no BOS or EOS token; documents are marked by both"
        )
    if not (folder / "tokenizer.json").exists():
        tok.save(folder)
    return tok


def _training_texts(recipe: Recipe):
    """An even sample of the training side of the split, in pieces (a source may be one large file)."""
    plan = plan_split(
        list(recipe.data.sources),
        recipe.data.holdout,
        recipe.run.seed,
        lambda done, total, what: None,
    )
    share = TOKENIZER_BYTES / max(1, sum(c.bytes for c in plan.counts.values()))
    pick = random.Random(recipe.run.seed)
    for number, doc in plan.documents():
        for split, _, text in plan.parts(number, doc):
            for at in range(0, len(text) if split == "train" else 0, data.PIECE):
                if pick.random() < share:
                    yield text[at : at + data.PIECE]


def prepare_corpus(recipe: Recipe, tok: Tokenizer, folder: Path, note=print) -> data.PackedCorpus:
    note(f"packing {', '.join(recipe.data.sources)}")
    digest = hashlib.sha256(tok.inner.to_str().encode()).hexdigest()
    return data.prepare(
        list(recipe.data.sources),
        tok.encode_batch,
        tok.bos_id,
        tok.eos_id,
        tok.vocab_size,
        digest,
        folder,
        recipe.data.holdout,
        recipe.run.seed,
    )


def measure_peak(dtype: torch.dtype, size: int = 2048, repeats: int = 8) -> float:
    """FLOP/s of the machine's best matrix product in this dtype, now: the denominator of MFU. Takes well under a second."""
    generator = torch.Generator().manual_seed(
        0
    )  # its own: a resumed run must find the global one where it left it
    a, b = (torch.randn(size, size, generator=generator).to(dtype) for _ in range(2))
    a @ b
    best = math.inf
    for _ in range(repeats):
        begin = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def _model_folder(name: str) -> Path:
    return (
        checkpoint.model_of_run(name) if (Path(name) / "recipe.json").exists() else hf.resolve(name)
    )


# What may differ from the model a run starts with: how far it reads (YaRN), and what does not change what is computed
_NOT_IN_WEIGHTS = CARRIED | {"rope_scaling", "rope_theta", "torch_dtype", "initializer_range"}


def _start_folder(recipe: Recipe) -> Path:
    """The model folder of run.init_from. ValueError when the recipe describes another model."""
    folder = _model_folder(recipe.run.init_from)
    was, mine = dataclasses.asdict(hf.read_config(folder)), dataclasses.asdict(recipe.model)
    if other := [
        f"model.{k} is {mine[k]!r}, there {was[k]!r}"
        for k in mine
        if mine[k] != was[k] and k not in _NOT_IN_WEIGHTS
    ]:
        raise ValueError(
            f"the weights of run.init_from {folder} do not fit this recipe: {'; '.join(other[:5])}. Describe the same model, or start from another"
        )
    return folder


# ---- parts of the story ----------------------------------------------------------------------------------------------------
_FREE = (
    "run.out",
    "run.threads",
    "run.log_every",
    "run.eval_every",
    "run.eval_tokens",
    "run.save_every",
    "run.keep",
)  # may change on resume
_SPOKEN = (
    "optim.lr",
    "optim.warmup_steps",
    "optim.clip",
)  # may too, the cure of a run that blew up, but it is said


@contextmanager
def _locked(run: Path):
    """Nobody else trains in this folder until we are done. Where the system has no such locks, nothing is checked."""
    made, new = not run.exists(), not (run / ".lock").exists()
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "a") as file:
        if not lock.try_lock(file):
            raise ValueError(
                f"another process trains in {run}; wait for it, or choose another --run.out"
            )
        try:
            yield
        except ValueError:  # refused: leave no trace in a folder that is not ours
            if new and not checkpoint.folders(run):
                (run / ".lock").unlink()
            if made and not any(run.iterdir()):
                run.rmdir()
            raise


def _read_recipe(file: Path) -> dict:
    """The recipe.json of a run; ValueError when the file is something else."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        known = {f.name for f in dataclasses.fields(Recipe)}
        if (
            isinstance(raw, dict)
            and set(raw) <= known
            and {"model", "run"} <= set(raw)
            and all(isinstance(v, dict) for v in raw.values())
        ):
            return raw
    except ValueError:
        pass
    raise ValueError(
        f"{file} is not the recipe of a lamoe run, so {file.parent} is left alone; choose another --run.out"
    )


def _claim(run: Path, recipe: Recipe, resume: bool, note=print) -> Path | None:
    """Take the run folder: the checkpoint to go on from, or None for a fresh start. Nothing of another run is overwritten."""
    saved, mine = run / "recipe.json", recipe.to_dict()
    was = _read_recipe(saved) if saved.exists() else None
    last = checkpoint.latest(run) if run.is_dir() else None
    if last is not None and not resume:
        raise ValueError(
            f"{run} holds a run already ({last.name}); add --resume to go on with it, or choose another --run.out"
        )
    if resume and last is None and not saved.exists():
        raise ValueError(
            f"nothing to resume: {run} holds no checkpoint; leave --resume out to start"
        )
    if last is not None or (resume and saved.exists()):
        was = was or {}
        spoken = [
            f"{s}.{k} was {was[s][k]!r}, now {mine[s][k]!r}"
            for s, k in (name.split(".") for name in _SPOKEN)
            if was.get(s, {}).get(k) != mine[s][k] and k in was.get(s, {})
        ]
        if spoken:
            note(f"from here on {'; '.join(spoken)}")
        changed = [
            f"{s}.{k} was {was.get(s, {}).get(k)!r}, now {mine.get(s, {}).get(k)!r}"
            for s in mine
            for k in {**was.get(s, {}), **mine[s]}
            if was.get(s, {}).get(k) != mine[s].get(k) and f"{s}.{k}" not in _FREE + _SPOKEN
        ]
        if changed:
            raise ValueError(
                f"cannot resume {run} with another recipe: {'; '.join(changed[:5])}. Use the same recipe, or another --run.out"
            )
    if (
        last is None
        and not saved.exists()
        and (strange := [n for n in ("tokenizer", "data", "metrics.jsonl") if (run / n).exists()])
    ):
        raise ValueError(
            f"{run} holds {', '.join(strange)} but no recipe.json, so it is not a run folder; choose another --run.out"
        )
    if last is None:
        stamp(
            list(recipe.data.sources)
        )  # a source that is not there is said before anything is touched
        if recipe.run.init_from:
            _start_folder(recipe)
    if last is None and not resume and saved.exists():
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
        ):  # of an attempt that saved nothing, perhaps with another recipe
            (run / "tokenizer" / name).unlink(missing_ok=True)
    for label in (saved.name, "metrics.jsonl"):
        atomic.remove_leftovers(run, label)
    atomic.write_text(saved, json.dumps(mine, indent=1, ensure_ascii=False) + "\n")
    return last


def _protected(size: int, recipe: Recipe, step: int) -> torch.Tensor:
    """Which sequences of this step are never dropped: drawn from (seed, step) alone, so a resumed run draws the same."""
    generator = torch.Generator().manual_seed(recipe.run.seed * 1_000_003 + step)
    return torch.rand(size, generator=generator) < recipe.balance.keep_share


def _autopsy(
    run: Path, step: int, ids, segments, loss: float, norm: float, last: Path | None
) -> str:
    file = run / f"bad-batch-{step}.safetensors"
    checkpoint.save_tensors(
        file, {"ids": ids, "segments": segments, "loss": loss, "grad_norm": norm}
    )
    back = (
        f"Go on from {last} with --resume and a lower --optim.lr, a smaller --optim.clip or a longer --optim.warmup_steps"
        if last is not None
        else "No checkpoint was saved yet: start again with a lower --optim.lr or a longer --optim.warmup_steps"
    )
    return f"step {step}: loss {loss}, gradient norm {norm}. Stopped before the weights changed; the batch is in {file}. {back}"


class _Stop:
    asked = ""


@contextmanager
def _stop_signals():
    """Ctrl-C and SIGTERM set `asked`; the loop ends after the step. A second one ends the program at once."""
    stop, old = _Stop(), {}

    def handler(number, frame):
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = signal.Signals(number).name

    if threading.current_thread() is threading.main_thread():
        old = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, h in old.items():
            signal.signal(s, h)


class _Log:
    """metrics.jsonl always, TensorBoard when it is installed, the screen. Values of all micro-batches of a step, never of the last."""

    def __init__(self, run: Path, step: int, screen: _Screen):
        self.file, self.screen = run / "metrics.jsonl", screen
        if (
            self.file.exists()
        ):  # lines after the checkpoint belong to steps that will be taken again
            lines = (
                [
                    line
                    for line in self.file.read_text(encoding="utf-8").splitlines()
                    if _step_of(line) <= step
                ]
                if step
                else []
            )
            atomic.write_text(self.file, "".join(line + "\n" for line in lines))
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        except ImportError:
            self.board = None
            screen.note(
                "TensorBoard is not installed (pip install 'lamoe[train]'); metrics go to metrics.jsonl only"
            )

    def step(self, step: int, recipe: Recipe, records, **values):
        self.screen.step(step, values)
        if step % recipe.run.log_every and step != recipe.run.steps and step != 1:
            return
        self.write(step, {**values, **router_metrics(records, recipe.balance.devices)})

    def heldout(self, step: int, values: dict[str, float]):
        self.write(step, values)
        self.screen.note(
            f"step {step}: "
            + ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in values.items())
        )

    def write(self, step: int, values: dict):
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        with open(self.file, "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, **rounded}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, step)
            for layer, load in enumerate(values.get("expert_load", [])):
                self.board.add_scalar(f"expert_load_max/moe_layer_{layer}", max(load), step)
                self.board.add_scalar(f"expert_load_min/moe_layer_{layer}", min(load), step)
            self.board.flush()

    def close(self):
        if self.board is not None:
            self.board.close()


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for a last line that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def router_metrics(records: list[list], devices: int) -> dict:
    """Of all micro-batches of one step: per MoE layer the share of assignments every expert got (expert_load, [layers][E]), the three
    unweighted balance sums, entropy of a token's scores in nats; drop_rate over all assignments."""
    if not records or not records[0]:
        return {}
    layers = list(zip(*records))
    load = torch.stack(
        [torch.stack([r.load for r in layer]).sum(0) for layer in layers]
    )  # [layers, E]
    share = load / load.sum(1, keepdim=True)
    losses = torch.stack(
        [torch.stack([r.losses.detach() for r in layer]).mean(0) for layer in layers]
    ).mean(0)
    return {
        "balance_expert": losses[0].item(),
        "balance_device": losses[1].item(),
        "balance_communication": losses[2].item(),
        "load_max_over_mean": (share.max(1).values * load.shape[1]).mean().item(),
        "router_entropy": sum(r.entropy.item() for layer in layers for r in layer)
        / sum(map(len, layers)),
        "drop_rate": (sum(int(r.dropped) for layer in layers for r in layer) / load.sum()).item(),
        "expert_load": [[round(v, 5) for v in row] for row in share.tolist()],
    }


class _Screen:
    """A progress bar on a terminal, plain lines elsewhere, nothing when quiet."""

    def __init__(self, recipe: Recipe, quiet: bool, bar=None, task=None):
        self.recipe, self.quiet, self.bar, self.task = recipe, quiet, bar, task
        self.begin, self.first = time.perf_counter(), None

    def note(self, text: str):
        if not self.quiet:
            self.bar.console.print(text, highlight=False) if self.bar else print(text, flush=True)

    def step(self, step: int, v: dict):
        if self.quiet:
            return
        total = self.recipe.run.steps
        if self.first is None:
            self.first, self.begin = step, time.perf_counter()
        left = (time.perf_counter() - self.begin) / max(1, step - self.first) * (total - step)
        line = f"loss {v['loss']:.3f}  {v['tokens_per_s']:,.0f} tok/s  MFU {v['mfu']:.0%}  lr {v['lr']:.1e}"
        if self.bar:
            self.bar.update(self.task, completed=step, info=line)
        elif step % self.recipe.run.log_every == 0 or step in (1, total):
            print(
                f"step {step}/{total}  {line}"
                + (f"  {left:.0f} s left" if step > self.first else ""),
                flush=True,
            )


@contextmanager
def _screen(recipe: Recipe, quiet: bool):
    if quiet or not sys.stderr.isatty():
        yield _Screen(recipe, quiet)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("train"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield _Screen(recipe, quiet, bar, bar.add_task("train", total=recipe.run.steps, info=""))
