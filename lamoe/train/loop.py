"""The training run: from raw text to a saved model, in one function (`train`).

A checkpoint holds everything that a run needs to resume. run_folder.py lists the files of a run and
locks its folder. metrics.py logs, and checkpoint.py saves and loads checkpoints.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from lamoe.backends.base import next_token_targets
from lamoe.backends.torch_backend import TorchBackend
from lamoe.checkpoints import hf
from lamoe.engine.text_loss import text_loss
from lamoe.model import accounting
from lamoe.model.config import ModelConfig
from lamoe.model.routing import Training
from lamoe.model.transformer import Transformer, check_ids
from lamoe.train import checkpoint, data, devices, memory_plan, recompute, run_folder
from lamoe.train.allocator import keep_freed_memory
from lamoe.train.devices import MicroBatch, QueuedStep, measure_peak
from lamoe.train.metrics import MetricsLog, open_screen
from lamoe.train.optim import MasterAdamW
from lamoe.train.recipe import Recipe
from lamoe.train.run_folder import prepare_corpus, prepare_tokenizer
from lamoe.train.spikes import SpikeGuard


class Stopped(RuntimeError):
    """Raised if training ends because of spikes, or losses or gradients that are not finite.

    The message describes what happened, what was saved and how to resume.
    """


def train(recipe: Recipe, resume: bool = False, quiet: bool = False) -> Path:
    """Train as `recipe` says and return the folder of the last checkpoint.

    Ctrl-C and SIGTERM finish the current step, save a checkpoint and return.

    Args:
        resume: continue from the newest checkpoint in `run.out`.
        quiet: print nothing.

    Raises:
        ValueError: if the run folder cannot be used, the recipe differs from that of the run to
            resume, or this machine lacks `run.device`.
        Stopped: if too many steps in a row were skipped (train/spikes.py).
        memory_plan.OutOfMemory: if an allocation failed.
    """
    run = run_folder.check_place(recipe)
    device = devices.resolve(recipe.run.device)
    memory = memory_plan.available(recipe, device)
    plan = memory_plan.check(recipe, memory)
    explained = memory_plan.explain_exhaustion(recipe, plan, run)
    with run_folder.locked(run), open_screen(recipe, quiet) as screen, explained:
        last = run_folder.claim(run, recipe, resume, screen.note)
        screen.note(f"memory plan: {plan.describe(memory)}")
        keep_freed_memory()
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)

        # 1. Text -> tokens
        tokenizer = prepare_tokenizer(recipe, run / "tokenizer", screen.note)
        if last is not None and (run / "data" / "meta.json").exists():
            # Resume with the packed text, even if its source files have changed or are gone.
            corpus = data.open_corpus(run / "data")
        else:
            corpus = prepare_corpus(recipe, tokenizer, run / "data", screen.note)
        screen.note(corpus.describe())
        batches = data.Batches(
            corpus, recipe.data.seq_len, recipe.run.seed, weights=recipe.data.weights
        )
        if recipe.data.weights:
            screen.note(batches.describe_mixture(recipe.batch.before(recipe.run.steps)))

        # 2. Model and optimizer
        config = recipe.model.replace(
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
        )
        model = _build_model(recipe, config, fresh=last is None, note=screen.note).to(device)
        recompute.apply(model, plan.recomputed)
        optimizer = _build_optimizer(recipe, model)
        guard = SpikeGuard(recipe.spikes)
        step = saved_step = 0
        if last is not None:
            step = saved_step = _restore(last, optimizer, batches, guard)
            screen.note(f"resuming from {last} at step {step}")

        # 3. The loop
        total_tokens = recipe.batch.before(recipe.run.steps) * recipe.data.seq_len
        if recipe.run.compile:
            _compile(model, optimizer, recipe, screen.note)
        peak_flops = measure_peak(model.embed.weight.dtype, device=device)
        token_flops = accounting.training_flops(config, recipe.data.seq_len)
        screen.note(
            f"{accounting.parameters(config).total:,} parameters, "
            f"{token_flops / 1e6:.1f} MFLOP a token; measured {recipe.run.dtype} GEMM peak "
            f"{peak_flops / 1e9:.0f} GFLOP/s on {devices.describe(device)}"
        )

        def save() -> Path:
            guard.checkpoint_saved(step)

            def write(folder: Path) -> None:
                hf.save(model, folder / "model", extras_from=run / "tokenizer")
                state = {
                    "step": step,
                    "optimizer": optimizer.state_dict(),
                    "data": batches.state_dict(),
                    "spikes": guard.state_dict(),
                    "rng": checkpoint.rng_state(),
                }
                checkpoint.save_tensors(folder / "state.safetensors", state)

            return checkpoint.save(run, step, write, recipe.run.keep)

        with (
            closing(MetricsLog(run, step, screen, guard.restarts)) as log,
            _stop_signals() as stop,
        ):
            save_due = False
            queue: list[QueuedStep] = []  # steps whose values have not been read
            while step < recipe.run.steps and (queue or not stop.signal_name):
                if not queue:
                    begin = time.perf_counter()
                tokens_before = recipe.batch.before(step) * recipe.data.seq_len
                batch_size = recipe.batch.size_at(step)
                ids, segments = map(torch.from_numpy, batches.next_batch(batch_size))
                micro_batches = _accumulate_gradients(model, optimizer, recipe, step, ids, segments)
                lr = recipe.optim.lr_at(step, tokens_before / total_tokens)
                known = {
                    "tokens": tokens_before + batch_size * recipe.data.seq_len,
                    "epoch": round(batches.epoch, 4),
                    "lr": lr,
                    "batch": batch_size,
                    **batches.metrics(),
                }
                step += 1
                queue.append(
                    QueuedStep(step, ids, segments, micro_batches, optimizer.clip(), known)
                )
                skip = queue[-1].decide(*guard.limits())
                if isinstance(skip, torch.Tensor):
                    optimizer.step(lr, skip)
                elif skip:
                    optimizer.discard()
                else:
                    optimizer.step(lr)
                eval_due = _is_due(step, recipe.run.eval_every) and len(corpus.heldout) > 0
                save_due = save_due or _is_due(step, recipe.run.save_every)
                if not (
                    devices.is_read_at(device, step, recipe.run, len(queue))
                    or eval_due
                    or save_due
                    or stop.signal_name
                ):
                    continue

                devices.synchronize(device)
                seconds = (time.perf_counter() - begin) / len(queue)
                for done in queue:
                    fault = guard.check(done.loss, done.norm, done.skipped)
                    tokens_per_s = len(done.ids) * recipe.data.seq_len / seconds
                    log.step(
                        done.step,
                        recipe,
                        loss=done.loss,
                        balance=done.balance,
                        grad_norm=done.norm,
                        tokens_per_s=tokens_per_s,
                        mfu=tokens_per_s * token_flops / peak_flops,
                        gemm_peak=peak_flops,
                        records=[m.records for m in done.micro_batches],
                        **done.known,
                        **guard.metrics(fault),
                    )
                    if guard.must_stop:
                        break
                queue.clear()
                if guard.must_stop:
                    file = run_folder.save_bad_batch(
                        run, done.step, done.ids, done.segments, done.loss, done.norm
                    )
                    point = guard.restart_point(run)
                    if point is None:
                        raise Stopped(_stop_message(done.step, fault, guard, file, last))
                    last = point
                    step = saved_step = _restart(point, optimizer, batches, guard)
                    log.restart(done.step, step, f"{fault}; the batch is in {file.name}")
                    continue
                if step == recipe.run.steps:  # the last step is saved and evaluated below
                    break
                if eval_due:
                    log.heldout(step, evaluate(model, corpus, recipe, recipe.run.eval_tokens))
                if save_due and not guard.in_a_row:  # keep the checkpoint before skipped steps
                    last, saved_step, save_due = save(), step, False

            # 4. The end, after the last step or after a signal
            if stop.signal_name and step < recipe.run.steps:
                last = save()
                screen.note(
                    f"stopped by {stop.signal_name} after step {step} of {recipe.run.steps}; "
                    f"saved {last}. To resume, run the same command with --resume"
                )
                return last
            if last is None or saved_step != step:
                last = save()
                if len(corpus.heldout):
                    log.heldout(step, evaluate(model, corpus, recipe, None))
        screen.note(f"done: {step} steps{guard.describe()}, saved {last / 'model'}")
        return last


# ---- the steps of `train` ------------------------------------------------------------------------
def _build_model(recipe: Recipe, config: ModelConfig, fresh: bool, note) -> Transformer:
    """Build the float32 model. A fresh run loads the weights of run.init_from if it is set.

    Otherwise the weights are random. A resumed run replaces them with those of its checkpoint.
    """
    model = Transformer(config)
    if not recipe.run.init_from:
        model.init_weights(recipe.run.seed)
    elif fresh:
        folder = run_folder.start_folder(recipe)
        model.load_state_dict(hf.load(folder, torch.float32).state_dict())
        note(f"starting from the weights of {folder}")
    return model


def _build_optimizer(recipe: Recipe, model: Transformer) -> MasterAdamW:
    """Build the optimizer. For a bfloat16 run, also convert the model in place."""
    if recipe.run.dtype == "float32":
        return MasterAdamW(model, recipe.optim)
    unrounded = [p.detach().clone() for p in model.parameters()]
    optimizer = MasterAdamW(model.to(torch.bfloat16), recipe.optim)
    torch._foreach_copy_(optimizer.masters, unrounded)
    return optimizer


def _compile(model: Transformer, optimizer: MasterAdamW, recipe: Recipe, note) -> bool:
    """Compile the model in place, with one micro-batch as the trial. Return whether that worked."""
    ids = torch.zeros(recipe.batch.micro, recipe.data.seq_len + 1, dtype=torch.int64)
    worked = devices.compile_model(
        model, lambda: _accumulate_gradients(model, optimizer, recipe, 0, ids, ids.int()), note
    )
    optimizer.discard()
    model.zero_grad()  # the trial may have failed before its gradients were collected
    return worked


def _restore(last: Path, optimizer: MasterAdamW, batches: data.Batches, guard: SpikeGuard) -> int:
    """Load the state of a checkpoint, apart from the model folder. Return its step."""
    file = last / "state.safetensors"
    state = checkpoint.load_tensors(file)
    try:
        optimizer.load_state_dict(state["optimizer"])
        batches.load_state_dict(state["data"])
        guard.load_state_dict(state.get("spikes"), state["step"])
        checkpoint.set_rng_state(state["rng"])
        return state["step"]
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(
            f"{file} does not fit this version of lamoe ({type(e).__name__}: {e}); resume with the "
            f"version that wrote it, or start a new run from its weights: --run.init_from {last}"
        ) from None


def _restart(point: Path, optimizer: MasterAdamW, batches: data.Batches, guard: SpikeGuard) -> int:
    """Go back to a checkpoint, but not in the text: the batches since then are not repeated.

    A run that is killed and resumed repeats the same steps and the same restart, so it needs no
    other record of it.

    Returns:
        The step of the checkpoint.
    """
    rows, skipped, restarts = batches.rows, guard.skipped, guard.restarts
    step = _restore(point, optimizer, batches, guard)
    batches.rows, guard.skipped, guard.restarts = rows, skipped, restarts + 1
    return step


def _accumulate_gradients(
    model: Transformer,
    optimizer: MasterAdamW,
    recipe: Recipe,
    step: int,
    ids: torch.Tensor,
    segments: torch.Tensor,
) -> list[MicroBatch]:
    """Run forward and backward over the micro-batches of one step.

    Afterwards, `optimizer` holds the gradients of the mean loss over all targets of the batch.

    Args:
        ids: [B, T + 1] int64 token ids, on the host.
        segments: [B, T + 1], the number of each token's document within its row, on the host.
    """
    size, micro = len(ids), recipe.batch.micro
    device = model.embed.weight.device
    targets = next_token_targets(ids, segments)
    num_targets = (targets >= 0).sum().clamp_min(1)
    shares = [(part >= 0).sum() / num_targets for part in targets.split(micro)]
    check_ids(ids, model.config)
    inputs = devices.move(ids[:, :-1], device)
    documents = devices.move(segments[:, :-1], device) if recipe.data.document_mask else None
    targets = devices.move(targets, device)
    protected = devices.move(_draw_protected(size, recipe, step), device)
    results = []
    for i, share in enumerate(shares):
        rows = slice(i * micro, (i + 1) * micro)
        hook = Training(recipe.balance, protected[rows])
        mask = None if documents is None else documents[rows]
        cross_entropy = model.loss(inputs[rows], targets[rows], mask, hook)
        balance = hook.loss() * (micro / size)
        (cross_entropy * share + balance).backward()
        optimizer.collect()
        records = [replace(r, losses=r.losses.detach()) for r in hook.records]  # frees the graph
        results.append(MicroBatch(share.item(), cross_entropy.detach(), balance.detach(), records))
    return results


def _draw_protected(size: int, recipe: Recipe, step: int) -> torch.Tensor:
    """Draw the sequences whose tokens are never dropped in this step, as bool [size].

    The draw depends only on the seed and the step, so a resumed run draws the same sequences.
    """
    generator = torch.Generator().manual_seed(recipe.run.seed * 1_000_003 + step)
    return torch.rand(size, generator=generator) < recipe.balance.keep_share


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _stop_message(step: int, fault: str, guard: SpikeGuard, file: Path, last: Path | None) -> str:
    unchanged = (
        "Stopped before the weights changed"
        if guard.in_a_row == 1
        else f"Stopped after {guard.in_a_row} skipped steps in a row, "
        "which did not change the weights"
    )
    if last is None:
        advice = (
            "No checkpoint was saved yet: start again with a lower --optim.lr or a longer "
            "--optim.warmup_steps"
        )
    else:
        advice = (
            f"Resume from {last} with --resume and a lower --optim.lr, a smaller --optim.clip or "
            "a longer --optim.warmup_steps"
        )
        if not guard.restarts:
            advice += ", or with --spikes.restarts 1 to go on with the text after these batches"
    return f"step {step}: {fault}. {unchanged}; the batch is in {file}. {advice}"


def evaluate(
    model: Transformer, corpus: data.PackedCorpus, recipe: Recipe, max_tokens: int | None
) -> dict[str, float]:
    """Measure the loss on held-out text.

    Args:
        max_tokens: approximate number of tokens to evaluate. None means all held-out text.

    Returns:
        A dict with heldout_bits_per_token and heldout_perplexity. An evaluation of all held-out
        text adds heldout_bits_per_byte.
    """
    rows = data.heldout_rows(corpus, recipe.data.seq_len)
    with devices.uncompiled(model):
        result = text_loss(
            TorchBackend(model), rows, recipe.batch.micro, max_tokens, recipe.data.document_mask
        )
    out = {"heldout_bits_per_token": result.bits_per_token, "heldout_perplexity": result.perplexity}
    if max_tokens is None:
        out["heldout_bits_per_byte"] = result.bits_per_byte(corpus.heldout_bytes())
    return out


class _StopRequest:
    signal_name = ""  # of the signal that asked to stop


@contextmanager
def _stop_signals() -> Iterator[_StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop. A second one ends the program."""
    stop, previous = _StopRequest(), {}

    def handler(number, frame):
        if stop.signal_name:
            raise KeyboardInterrupt
        stop.signal_name = signal.Signals(number).name

    if threading.current_thread() is threading.main_thread():
        previous = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, old_handler in previous.items():
            signal.signal(number, old_handler)
