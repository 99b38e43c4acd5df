"""What the inputs of each matrix look like on a text, and what that means for rounding it: `weigh` of packed_file.write.

The squared error of a matrix's output is e H e^T over the errors e of its rows, with H the second moments of its inputs. Rounding input by input, the
error of one can be made up for by those that are rounded after it; the inverse of H says how (optimal brain surgeon; GPTQ, arXiv 2210.17323).

The model walks layer by layer over all rows of the text at once, so one layer's weights are in memory and not the model. An expert's inputs
are those of the tokens that were routed to it, weighted as the router weighted them; an expert that saw few tokens leans on what all
tokens of its layer looked like.
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

ROWS, LENGTH = 4, 512  # rows of a pass, tokens of a row
CHARS, PIECE = (
    16,
    8192,
)  # characters that are tokenised for a token that is wanted, at most about; of a piece
_LEAN = 128  # an expert's own mean counts as many tokens as it saw, its layer's as many as these
_DAMP = (
    0.1  # of each input's own second moment, added to it: what a text does not show may still come
)
_FLOOR = 1e-4  # of the mean one, added to all: for inputs that this text never moved
Moments = Callable[
    [int], torch.Tensor
]  # of matrix i: mean of x x^T over its inputs x, float32 [K, K]


def rows_of(
    tokenizer: Tokenizer, texts: list[str], config: ModelConfig, tokens: int
) -> torch.Tensor:
    """About `tokens` tokens of the texts as ids [rows, T], rows spread evenly over them. ValueError for a text of less than 16."""
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
    """The texts, or where they have more than `limit` characters, pieces of them that have about as many, spread evenly: the rest need not be tokenised."""
    total, seen, kept, out = sum(map(len, texts)), 0, 0, []
    if total <= limit:
        return texts
    for piece in (text[at : at + PIECE] for text in texts for at in range(0, len(text), PIECE)):
        if kept * total <= seen * limit:
            out.append(piece)
            kept += len(piece)
        seen += len(piece)
    return out


def options(
    folder: Path,
    config: ModelConfig,
    ids: torch.Tensor,
    progress: Callable[[int], None] = lambda layer: None,
) -> dict:
    """`weigh` and `calibration` of packed_file.write for the checkpoint `folder` over rows `ids`. The model walks as far as it is asked for (a finished
    folder asks for nothing); progress(layer) is called before each layer."""
    walk, now = (
        moments(config, packed_file.reader(folder, config), ids, hf.DTYPES[config.torch_dtype]),
        {"at": -1, "found": {}},
    )

    def weigh(piece: PackedTensor, i: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        if piece.format != "int4":
            return None
        wanted = config.num_hidden_layers if piece.layer < 0 else piece.layer
        while now["at"] < wanted:
            now["at"] += 1
            progress(now["at"])
            now["found"] = {}  # before the next layer is there
            now["found"] = next(walk)
        return solve(now["found"][piece.key](i))

    return {"weigh": weigh, "calibration": hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]}


def solve(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moments [K, K] -> (importance [K], feedback [K, K]) of native.pack: with U the upper Cholesky factor of the damped inverse, 1 / U_ii^2 and
    U_ij / U_ii. ValueError for moments that are not finite."""
    if not torch.isfinite(h).all():
        raise ValueError(
            "the inputs of a matrix on the text to calibrate on are not finite: the model overflows there; quantize it without --calibrate, or check its weights"
        )
    h, own = h.clone(), h.diagonal().clone()
    floor = _FLOOR * own.mean()
    # Not a share of the mean: real models have inputs a thousand times larger than the others, and their mean would drown what the others tell.
    h.diagonal().add_(
        _DAMP * own + (floor if floor > 0 else 1.0)
    )  # one [K, K] at a time is freed: 480 MB each for the dense layer of V2-Lite
    h = torch.linalg.cholesky(h)
    h = torch.cholesky_inverse(h)
    h = torch.linalg.cholesky(h, upper=True)
    d = h.diagonal().clone()
    return d**-2, h.div_(d[:, None])


def moments(
    config: ModelConfig, read: Read, ids: torch.Tensor, dtype: torch.dtype
) -> Iterator[dict[str, Moments]]:
    """One dict for each layer, then one for the head: {piece key: second moments of its inputs}. read: the tensors of a checkpoint by name
    (packed_file.reader); ids [rows, T]."""
    check_ids(ids, config)
    rope.check_length(config, ids.shape[1])
    states = [read("model.embed_tokens.weight")[part].to(dtype) for part in ids.split(ROWS)]
    freqs = rope.freqs(config, torch.arange(ids.shape[1])[None], dtype)
    for layer in range(config.num_hidden_layers):
        block = _block(config, layer, read, dtype)
        sums = _watch(block, layer)
        with (
            torch.inference_mode()
        ):  # not around the generator: torch's wrapper would keep what was yielded last
            states = [block(x, freqs) for x in states]
        yield {key: s.mean if isinstance(s, _Linear) else s for key, s in sums.items()}
        del block, sums  # before the next layer's weights are there
    norm, head = RMSNorm(config.hidden_size, config.rms_norm_eps).to(dtype), _Linear()
    norm.weight.data.copy_(read("model.norm.weight"))
    with torch.inference_mode():
        for x in states:
            head.add(None, (norm(x),))
    yield {"head": head.mean}


def _watch(block: Block, layer: int) -> dict[str, _Linear | Moments]:
    """{piece key: what will gather the moments of its inputs while the block runs}."""
    sums = {}
    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "attn.wkv_b":  # stays at 8 bits or more
            module.register_forward_pre_hook(
                sums.setdefault(f"layers.{layer}.{name.split('.')[-1]}", _Linear()).add
            )
        elif name == "ffn.experts":
            experts = _Experts(module)
            module.register_forward_pre_hook(experts.add)
            sums |= {
                f"layers.{layer}.e13": experts.inputs,
                f"layers.{layer}.e2": experts.activations,
            }
    return sums


def _block(config: ModelConfig, layer: int, read: Read, dtype: torch.dtype) -> Block:
    with torch.device("meta"):
        block = Block(config, layer)
    own = f"layers.{layer}."
    weights = {
        own + name: torch.empty(p.shape, dtype=dtype) for name, p in block.named_parameters()
    }
    for entry in hf.table(config):
        if entry.parameter in weights:
            weights[entry.parameter][entry.where].copy_(read(entry.disk))
    block.load_state_dict({name.removeprefix(own): w for name, w in weights.items()}, assign=True)
    return block.eval()


class _Linear:
    """Second moments of a linear's inputs."""

    def __init__(self):
        self.total, self.count = None, 0

    def add(self, module, args) -> None:
        x = args[0].flatten(0, -2).float()
        self.total = x.new_zeros(x.shape[1], x.shape[1]) if self.total is None else self.total
        self.total.addmm_(x.T, x)
        self.count += len(x)

    def mean(self, i: int = 0) -> torch.Tensor:
        return self.total / self.count


class _Experts:
    """Second moments of what each expert sees, made when asked for: those of all at once would be larger than the layer."""

    def __init__(self, module):
        self.w13, self.seen, self.whole = (
            module.w13,
            [],
            {},
        )  # not the module: it holds this hook, and a circle would keep its weights

    def add(self, module, args) -> None:
        self.seen.append(args)  # x [N, D], expert [N, K], weight [N, K]

    @torch.inference_mode()
    def inputs(self, i: int) -> torch.Tensor:
        return self._leaning("inputs", self._weighted(i))

    @torch.inference_mode()
    def activations(self, i: int) -> torch.Tensor:
        return self._leaning("activations", self._weighted(i, through=True))

    def _leaning(self, what: str, mine: torch.Tensor) -> torch.Tensor:
        if what not in self.whole:  # the mean over all assignments of the layer
            total = self._all_inputs() if what == "inputs" else self._all_activations()
            self.whole[what] = total / max(1, sum(expert.numel() for _, expert, _ in self.seen))
        return (mine.T @ mine + _LEAN * self.whole[what]) / (len(mine) + _LEAN)

    def _all_inputs(self) -> torch.Tensor:
        """A token that went to K experts counts K times, each time weighted: once with the sum of the squares, without asking where it went."""
        total = 0
        for x, _, weight in self.seen:
            rows = x.float() * weight.float().square().sum(-1, keepdim=True).sqrt()
            total = total + rows.T @ rows
        return total

    def _all_activations(self) -> torch.Tensor:
        total = 0
        for e in range(len(self.w13)):  # one expert's rows at a time: all of them are gigabytes
            rows = self._weighted(e, through=True)
            total = total + rows.T @ rows
        return total

    def _weighted(self, e: int, through: bool = False) -> torch.Tensor:
        out = []
        for x, expert, weight in self.seen:
            token, k = (expert == e).nonzero(as_tuple=True)
            mine = x[token]
            if through:
                mine = kernels.swiglu(torch.nn.functional.linear(mine, self.w13[e]))
            out.append(mine.float() * weight[token, k].float()[:, None])
        return torch.cat(out)
