"""Collect the second moments of each matrix's inputs on a text, for better int4 rounding.

With rounding errors e in one row of a matrix, the squared error of its output is e H e^T, where H
is the second moment matrix of the inputs. The weights of a row are rounded one after another, and
later ones can compensate for the errors of earlier ones. The inverse of H gives the optimal
compensation (optimal brain surgeon; GPTQ, arXiv 2210.17323). `options` makes the `weigh` argument
of packed_file.write from these moments.

The model is run layer by layer over all rows of the text at once, so only one layer's weights are
in memory. The inputs of a routed expert are those of the tokens that were routed to it, multiplied
by their router weights. For an expert with few tokens, the mean of its layer is mixed in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from lamoe import kernels
from lamoe.backends.cpu import packed_file
from lamoe.backends.cpu.packed import PackedTensor, Read
from lamoe.checkpoints import hf
from lamoe.model import rope
from lamoe.model.config import ModelConfig
from lamoe.model.layers import RMSNorm
from lamoe.model.transformer import Block, check_ids
from lamoe.text.tokenizer import Tokenizer

ROWS = 4  # number of rows per forward pass
LENGTH = 512  # number of tokens per row
CHARS = 16  # largest number of characters to tokenise per requested token
PIECE = 8192  # number of characters in one sampled piece of text
# In an expert's moments, the layer's mean counts as much as this many of the expert's own tokens.
_LAYER_MEAN_TOKENS = 128
# Damping. This fraction of each input's second moment is added to it, because other texts may have
# other moments.
_DAMP = 0.1
# This fraction of the mean second moment is added to that of every input, because some inputs are
# always zero on the calibration text.
_FLOOR = 1e-4
# Function from the index of a matrix in a tensor to the mean of x x^T over the inputs x of this
# matrix, float32 [K, K].
Moments = Callable[[int], torch.Tensor]


def rows_of(
    tokenizer: Tokenizer, texts: list[str], config: ModelConfig, tokens: int
) -> torch.Tensor:
    """Tokenise about `tokens` tokens, in rows spread evenly over the texts.

    Returns:
        Token ids, int64 [rows, T].

    Raises:
        ValueError: if the texts have fewer than 16 tokens.
    """
    ids = [
        t
        for text in _sample(texts, CHARS * tokens)
        for t in tokenizer.encode(text, bos=tokenizer.add_bos)
    ]
    length = min(LENGTH, config.max_position_embeddings, max(len(ids), 1))
    rows = np.array(ids[: len(ids) // length * length], dtype=np.int64).reshape(-1, length)
    if length < 16 or not len(rows):
        raise ValueError(
            f"the text to calibrate on has {len(ids)} tokens; give at least 16, better {tokens:,}"
        )
    wanted = max(1, min(len(rows), tokens // length))
    return torch.from_numpy(rows[[i * len(rows) // wanted for i in range(wanted)]])


def _sample(texts: list[str], limit: int) -> list[str]:
    """Return texts with about `limit` characters in all.

    Longer texts are cut to evenly spread pieces. Shorter texts are returned whole.
    """
    total = sum(map(len, texts))
    if total <= limit:
        return texts
    pieces: list[str] = []
    passed = kept = 0  # number of characters
    for piece in (text[at : at + PIECE] for text in texts for at in range(0, len(text), PIECE)):
        if kept * total <= passed * limit:
            pieces.append(piece)
            kept += len(piece)
        passed += len(piece)
    return pieces


def options(
    folder: Path,
    config: ModelConfig,
    ids: torch.Tensor,
    progress: Callable[[int], None] = lambda layer: None,
) -> dict:
    """Return the arguments `weigh` and `calibration` of packed_file.write.

    The moments of a layer are computed when `weigh` first needs them. If the packed folder is
    complete already, nothing is computed.

    Args:
        folder: the folder of the checkpoint.
        ids: token ids of the calibration text, int64 [rows, T].
        progress: called with the index of each layer before its moments are computed.
    """
    layers = moments(config, packed_file.reader(folder, config), ids, hf.DTYPES[config.torch_dtype])
    current = -1
    found: dict[str, Moments] = {}

    def weigh(tensor: PackedTensor, i: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        nonlocal current, found
        if tensor.format != "int4":
            return None
        wanted = config.num_hidden_layers if tensor.layer < 0 else tensor.layer
        while current < wanted:
            current += 1
            progress(current)
            found = {}  # frees this layer before the next one is loaded
            found = next(layers)
        return solve(found[tensor.key](i))

    return {"weigh": weigh, "calibration": hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]}


def solve(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the arguments `importance` and `feedback` of native.pack from second moments.

    With U the upper Cholesky factor of the inverse of the damped moments, the importance of input
    i is 1 / U_ii^2 and the feedback from i to j is U_ij / U_ii.

    Args:
        h: second moments of a matrix's inputs, [K, K].

    Returns:
        The importance [K] and the feedback [K, K].

    Raises:
        ValueError: if the moments are not finite.
    """
    if not torch.isfinite(h).all():
        raise ValueError(
            "the calibration text gives a matrix inputs that are not finite, so the model "
            "overflows on this text; quantize it without --calibrate, or check its weights"
        )
    h, own = h.clone(), h.diagonal().clone()
    floor = _FLOOR * own.mean()
    # Damp each input in proportion to its own moment, not to the mean. In real models some inputs
    # are a thousand times larger than the others. They dominate the mean, so damping by the mean
    # would be too strong for the others.
    h.diagonal().add_(_DAMP * own + (floor if floor > 0 else 1.0))
    # Reuse one name, so that each [K, K] matrix is freed before the next one is made. It has 480 MB
    # for V2-Lite's dense layer.
    h = torch.linalg.cholesky(h)
    h = torch.cholesky_inverse(h)
    h = torch.linalg.cholesky(h, upper=True)
    d = h.diagonal().clone()
    return d**-2, h.div_(d[:, None])


def moments(
    config: ModelConfig, read: Read, ids: torch.Tensor, dtype: torch.dtype
) -> Iterator[dict[str, Moments]]:
    """Run the model over a text and yield the second moments of its matrices' inputs.

    Args:
        config: the config of the model.
        read: returns a tensor of the checkpoint by name (see packed_file.reader).
        ids: token ids, int64 [rows, T].
        dtype: dtype of the computation.

    Yields:
        {PackedTensor.key: moments}, first for each layer, then for the output head.
    """
    check_ids(ids, config)
    rope.check_length(config, ids.shape[1])
    states = [read("model.embed_tokens.weight")[part].to(dtype) for part in ids.split(ROWS)]
    freqs = rope.freqs(config, torch.arange(ids.shape[1])[None], dtype)
    for layer in range(config.num_hidden_layers):
        block = _block(config, layer, read, dtype)
        sums = _watch(block, layer)
        # Do not use no_grad as a decorator of this generator: torch's wrapper would keep the last
        # yielded dict alive.
        with torch.inference_mode():
            states = [block(x, freqs) for x in states]
        yield {key: s.mean if isinstance(s, _Linear) else s for key, s in sums.items()}
        del block, sums  # frees this layer before the next one is loaded
    norm, head = RMSNorm(config.hidden_size, config.rms_norm_eps).to(dtype), _Linear()
    norm.weight.data.copy_(read("model.norm.weight"))
    with torch.inference_mode():
        for x in states:
            head.add(None, (norm(x),))
    yield {"head": head.mean}


def _watch(block: Block, layer: int) -> dict[str, _Linear | Moments]:
    """Register hooks on the linear layers and experts of a block that collect moments.

    Returns {PackedTensor.key: the collected moments}.
    """
    sums: dict[str, _Linear | Moments] = {}
    for name, module in block.named_modules():
        # wkv_b is always packed in 8 bits or more, so it needs no moments.
        if isinstance(module, torch.nn.Linear) and name != "attn.wkv_b":
            linear = _Linear()
            sums[f"layers.{layer}.{name.split('.')[-1]}"] = linear
            module.register_forward_pre_hook(linear.add)
        elif name == "ffn.experts":
            experts = _Experts(module)
            module.register_forward_pre_hook(experts.add)
            sums[f"layers.{layer}.e13"] = experts.inputs
            sums[f"layers.{layer}.e2"] = experts.activations
    return sums


def _block(config: ModelConfig, layer: int, read: Read, dtype: torch.dtype) -> Block:
    """Load one layer of the model and return it as a Block in `dtype`."""
    with torch.device("meta"):
        block = Block(config, layer)
    prefix = f"layers.{layer}."
    weights = {
        prefix + name: torch.empty(p.shape, dtype=dtype) for name, p in block.named_parameters()
    }
    for entry in hf.table(config):
        if entry.parameter in weights:
            weights[entry.parameter][entry.where].copy_(read(entry.disk))
    block.load_state_dict(
        {name.removeprefix(prefix): w for name, w in weights.items()}, assign=True
    )
    return block.eval()


class _Linear:
    """Accumulates the second moments of a linear layer's inputs, over all forward passes."""

    def __init__(self):
        self.total, self.count = None, 0

    def add(self, module, args) -> None:
        """Forward pre-hook: add the inputs of one call."""
        x = args[0].flatten(0, -2).float()
        self.total = x.new_zeros(x.shape[1], x.shape[1]) if self.total is None else self.total
        self.total.addmm_(x.T, x)
        self.count += len(x)

    def mean(self, i: int = 0) -> torch.Tensor:
        return self.total / self.count


class _Experts:
    """Second moments of the inputs of each routed expert of a layer.

    The moments are computed on demand, because those of all experts at once would take more memory
    than the layer.
    """

    def __init__(self, module):
        # Keep the weights, not the module. The module holds a hook to this object, so a reference
        # back would form a cycle that keeps its memory.
        self.w13 = module.w13
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.layer_means: dict[str, torch.Tensor] = {}

    def add(self, module, args) -> None:
        """Forward pre-hook: record the arguments x [N, D], expert [N, K] and weight [N, K]."""
        self.calls.append(args)

    @torch.inference_mode()
    def inputs(self, i: int) -> torch.Tensor:
        """Return the moments of the inputs of w1 and w3 of expert i."""
        return self._mixed("inputs", self._expert_rows(i))

    @torch.inference_mode()
    def activations(self, i: int) -> torch.Tensor:
        """Return the moments of the inputs of w2 of expert i."""
        return self._mixed("activations", self._expert_rows(i, activated=True))

    def _mixed(self, kind: str, rows: torch.Tensor) -> torch.Tensor:
        """Return the weighted mean of the moments of an expert's rows and those of the layer."""
        if kind not in self.layer_means:
            total = self._all_inputs() if kind == "inputs" else self._all_activations()
            assignments = sum(expert.numel() for _, expert, _ in self.calls)
            self.layer_means[kind] = total / max(1, assignments)
        layer_mean = self.layer_means[kind]
        return (rows.T @ rows + _LAYER_MEAN_TOKENS * layer_mean) / (len(rows) + _LAYER_MEAN_TOKENS)

    def _all_inputs(self) -> torch.Tensor:
        """Return the sum of the moments of all assignments of the layer.

        A token x adds w^2 x x^T for each of its K router weights w, whichever experts they belong
        to. So it is enough to scale x by sqrt(sum(w^2)).
        """
        total = torch.zeros(())
        for x, _, weight in self.calls:
            rows = x.float() * weight.float().square().sum(-1, keepdim=True).sqrt()
            total = total + rows.T @ rows
        return total

    def _all_activations(self) -> torch.Tensor:
        total = torch.zeros(())
        for e in range(len(self.w13)):  # one expert at a time: the rows of all would take gigabytes
            rows = self._expert_rows(e, activated=True)
            total = total + rows.T @ rows
        return total

    def _expert_rows(self, e: int, activated: bool = False) -> torch.Tensor:
        """Return the inputs of expert e times their router weights, float32 [tokens, D].

        Args:
            e: index of the expert.
            activated: return the inputs of w2, which are the outputs of SwiGLU, instead of those
                of w1 and w3.
        """
        rows = []
        for x, expert, weight in self.calls:
            token, k = (expert == e).nonzero(as_tuple=True)
            x = x[token]
            if activated:
                x = kernels.swiglu(torch.nn.functional.linear(x, self.w13[e]))
            rows.append(x.float() * weight[token, k].float()[:, None])
        return torch.cat(rows)
