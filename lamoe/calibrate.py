"""How much each input of each matrix matters: mean squared activations over a text, for packed.build's `importance`.

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

from lamoe import kernels, packed_file, rope
from lamoe.attention import RMSNorm
from lamoe.config import ModelConfig
from lamoe.convert import hf
from lamoe.model import Block, check_ids
from lamoe.packed import Piece, Read
from lamoe.tokenizer import Tokenizer

ROWS, LENGTH = 4, 512  # rows of a pass, tokens of a row
_LEAN = 64  # an expert's own mean counts as many tokens as it saw, its layer's as many as these


def rows_of(tokenizer: Tokenizer, texts: list[str], config: ModelConfig, tokens: int) -> torch.Tensor:
    """About `tokens` tokens of the texts as ids [rows, T], rows spread evenly over them. ValueError when there is not one whole row of 16."""
    ids = [t for text in texts for t in tokenizer.encode(text, bos=tokenizer.add_bos)]
    length = min(LENGTH, config.max_position_embeddings, max(len(ids), 1))
    rows = np.array(ids[: len(ids) // length * length], dtype=np.int64).reshape(-1, length)
    if length < 16 or not len(rows):
        raise ValueError(f"the text to calibrate on has {len(ids)} tokens; give at least 16, better {tokens:,}")
    wanted = max(1, min(len(rows), tokens // length))
    return torch.from_numpy(rows[[i * len(rows) // wanted for i in range(wanted)]])


def options(folder: Path, config: ModelConfig, ids: torch.Tensor, progress: Callable[[int], None]) -> dict:
    """`importance` and `calibration` of packed_file.write for the checkpoint `folder` over rows `ids`. The model walks when the first importance is asked
    for (a finished folder asks for none); progress(layer) is called before each layer."""
    found: dict[str, torch.Tensor] = {}

    def importance(piece: Piece, i: int) -> torch.Tensor | None:
        if not found:
            dtype = hf.DTYPES[config.torch_dtype]
            for layer, means in enumerate(moments(config, packed_file.reader(folder, config), ids, dtype)):
                found.update(means)
                progress(layer + 1)
        m = found.get(piece.key)
        return m if m is None or m.dim() == 1 else m[i]

    return {"importance": importance, "calibration": hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]}


@torch.inference_mode()
def moments(config: ModelConfig, read: Read, ids: torch.Tensor, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    """One dict for each layer, then one for the head: {piece key: mean squared inputs, float32 [K] or, of experts, [E, K]}. read: the tensors of a
    checkpoint by name (packed_file.reader); ids [rows, T]."""
    check_ids(ids, config, torch.arange(ids.shape[1]))
    states = [read("model.embed_tokens.weight")[part].to(dtype) for part in ids.split(ROWS)]
    freqs = rope.freqs(config, torch.arange(ids.shape[1])[None], dtype)
    for layer in range(config.num_hidden_layers):
        block, sums = _block(config, layer, read, dtype), _Sums()
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "attn.wkv_b":  # at least 8 bits, whose scales are not searched
                module.register_forward_pre_hook(sums.linear(f"layers.{layer}.{name.split('.')[-1]}"))
            elif name == "ffn.experts":
                module.register_forward_pre_hook(sums.experts(f"layers.{layer}."))
        states = [block(x, freqs) for x in states]
        yield sums.means()
    norm, sums = RMSNorm(config.hidden_size, config.rms_norm_eps).to(dtype), _Sums()
    norm.weight.data.copy_(read("model.norm.weight"))
    for x in states:
        sums.linear("head")(None, (norm(x),))
    yield sums.means()


def _block(config: ModelConfig, layer: int, read: Read, dtype: torch.dtype) -> Block:
    with torch.device("meta"):
        block = Block(config, layer)
    own = f"layers.{layer}."
    weights = {own + name: torch.empty(p.shape, dtype=dtype) for name, p in block.named_parameters()}
    for entry in hf.table(config):
        if entry.parameter in weights:
            weights[entry.parameter][entry.where].copy_(read(entry.disk))
    block.load_state_dict({name.removeprefix(own): w for name, w in weights.items()}, assign=True)
    return block.eval()


class _Sums:
    """Weighted sums of squares and their weights, by piece key."""

    def __init__(self):
        self.total: dict[str, torch.Tensor] = {}
        self.count: dict[str, torch.Tensor] = {}

    def linear(self, key: str):
        def hook(module, args):
            x = args[0].flatten(0, -2).float()
            self._add(key, x.square().sum(0), torch.tensor(float(len(x))))

        return hook

    def experts(self, own: str):
        def hook(module, args):
            x, expert, weight = args  # [N, D], [N, K], [N, K]
            e = len(module.w13)
            for i in range(e):
                token, k = (expert == i).nonzero(as_tuple=True)
                mine, w = x[token], weight[token, k].float()[:, None]
                act = kernels.swiglu(torch.nn.functional.linear(mine, module.w13[i])).float() * w
                for name, total in (("e13", (mine.float() * w).square().sum(0)), ("e2", act.square().sum(0))):
                    if own + name not in self.total:
                        self.total[own + name], self.count[own + name] = torch.zeros(e, len(total)), torch.zeros(e, 1)
                    self.total[own + name][i] += total
                    self.count[own + name][i] += len(token)

        return hook

    def _add(self, key: str, total: torch.Tensor, count: torch.Tensor):
        self.total[key], self.count[key] = self.total.get(key, 0) + total, self.count.get(key, 0) + count

    def means(self) -> dict[str, torch.Tensor]:
        """Linears: the mean. Experts: the mean, leaning on that of all experts of the layer by _LEAN tokens."""
        out = {}
        for key, total in self.total.items():
            count = self.count[key]
            if total.dim() == 2:
                total, count = total + _LEAN * total.sum(0) / count.sum().clamp(min=1), count + _LEAN
            out[key] = total / count
        return out
