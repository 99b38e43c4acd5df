"""A backend that runs models with the compiled kernels (csrc/).

A `CpuBackend` holds weights in kernel layout (packed.py). It computes a whole forward pass in one
call of `lamoe._native`.
"""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from lamoe.backends import cache_codec
from lamoe.backends.base import Backend, Batch, Formats, ForwardResult, RowsLoss, next_token_targets
from lamoe.backends.cpu import native, packed
from lamoe.backends.paged_cache import PagedCache
from lamoe.checkpoints import hf
from lamoe.checkpoints.mapped import MappedFiles
from lamoe.model import rope
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer

LOSS_CHUNK = 512  # tokens per forward pass in `rows_loss`; this bounds the memory of the logits


class CpuBackend(Backend):
    """A packed model on the compiled kernels.

    Args:
        config: the config of the model.
        formats: formats of weights and head. `weights` must not be None.
        tensors: {PackedTensor.key: (bytes, scales)}. The bytes are a 1-D uint8 tensor, and there is
            one scale per matrix. The backend refers to this memory and does not copy it.
        threads: number of threads of the kernels. 0 means torch's number of threads.
        mapped: the mapped files that hold `tensors`, if any.

    Attributes:
        packed: the argument `tensors`.
        native: the lamoe._native.Model that computes.
    """

    name = "cpu"

    def __init__(
        self,
        config: ModelConfig,
        formats: Formats,
        tensors: dict[str, tuple[torch.Tensor, list[float]]],
        threads: int = 0,
        mapped: MappedFiles | None = None,
    ):
        self._mapped = mapped
        self.config, self.device = config, torch.device("cpu")
        self.element = packed.element_format(formats)
        self.weights, self.head = str(formats.weights), formats.head or str(formats.weights)
        self.dtype = torch.float32 if self.element == "fp32" else torch.bfloat16
        self.packed = tensors
        self._cos_sin = torch.empty(0, config.rope_dim)
        self.native = native.lib.Model(
            _native_config(config, self.element), threads or torch.get_num_threads()
        )
        for tensor in packed.packed_tensors(config, formats):
            self._register(tensor)

    @property
    def formats(self) -> Formats:
        """Storage formats of the weights and the output head. `cache` has no meaning here."""
        return Formats(self.weights, self.head)

    def _register(self, tensor: packed.PackedTensor) -> None:
        """Pass the memory of one packed tensor to the native model, without a copy."""
        data, scales = self.packed[tensor.key]
        array, layer, name = data.numpy(), tensor.layer, tensor.name
        if tensor.format is None:
            self.native.vector(layer, name, array.view("float32"))
            return
        if tensor.format == "raw":
            self.native.raw(layer, name, array)
            return
        matrices = (native.FORMATS[tensor.format], tensor.n, tensor.k, array, scales)
        self.native.set(layer, name, *matrices)
        if name == "uv" and self.weights in ("fp32", "bf16"):
            self.native.set(layer, "uv_elem", *matrices)  # unrounded: it needs no copy

    @classmethod
    def from_transformer(
        cls, model: Transformer, formats: Formats = Formats(), threads: int = 0
    ) -> CpuBackend:
        """Pack a Transformer's weights and return the backend.

        If `formats.weights` is None, the weights keep the dtype of the parameters and are not
        rounded.

        Raises:
            ValueError: if `formats.weights` is None and the parameters are neither float32 nor
                bfloat16.
        """
        dtype = model.embed.weight.dtype
        weights = formats.weights
        if weights is None:
            weights = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype)
        if weights is None:
            raise ValueError(
                "the compiled kernels compute in float32 and bfloat16 only, but the model is "
                f"{dtype}; use backend='torch'"
            )
        read = hf.views(model.config, dict(model.named_parameters())).__getitem__
        return cls.from_tensors(model.config, Formats(weights, formats.head), read, threads)

    @classmethod
    def from_tensors(
        cls, config: ModelConfig, formats: Formats, read: packed.Read, threads: int = 0
    ) -> CpuBackend:
        """Pack the checkpoint tensors that `read` returns, one at a time; return the backend."""
        element = packed.element_format(formats)
        tensors = {}
        for tensor in packed.packed_tensors(config, formats):
            if tensor.format in (None, "raw"):
                # If no cast is needed, the packed bytes share the memory that `read` returned.
                tensors[tensor.key] = next(packed.pack_tensor(tensor, read, element))[0], [1.0]
                continue
            data = native.allocate(packed.packed_bytes(tensor, element))
            scales, at = [], 0
            for part, scale in packed.pack_tensor(tensor, read, element):
                data[at : at + len(part)] = part
                scales.append(scale)
                at += len(part)
            tensors[tensor.key] = data, scales
        return cls(config, formats, tensors, threads)

    def forward(
        self, batch: Batch, cache: PagedCache, *, head: bool = True, experts: bool = False
    ) -> ForwardResult:
        cos_sin = self._cos_sin_table(int(batch.positions.max()) + 1)
        output, chosen = self.native.step(
            torch.tensor(batch.ids, dtype=torch.int32).numpy(),
            cos_sin.index_select(0, batch.positions).numpy(),
            batch.sequences.numpy(),
            batch.pages.numpy(),
            cache.rows.numpy(),
            cache.page_size,
            codec_numbers(cache.format, cache.widths),
            torch.tensor(batch.output_rows, dtype=torch.int32).numpy(),
            head,
            experts,
        )
        return ForwardResult(
            torch.from_numpy(output), torch.from_numpy(chosen).long() if experts else None
        )

    def _cos_sin_table(self, length: int) -> torch.Tensor:
        """Return a table of the rotary angles: cosines, then sines, float32 [rows, R].

        There are at least `length` rows, one per position. The table is kept and grows in large
        steps, because building it is slow compared to a small forward pass.
        """
        if len(self._cos_sin) < length:
            size = min(max(2 * length, 1024), self.config.max_position_embeddings)
            freqs = rope.freqs(self.config, torch.arange(size))
            pairs = torch.view_as_real(freqs).transpose(-1, -2)
            self._cos_sin = pairs.flatten(-2).contiguous()
        return self._cos_sin

    @torch.inference_mode()
    def rows_loss(
        self, ids: torch.Tensor, segments: torch.Tensor, document_mask: bool = True
    ) -> RowsLoss:
        """Compute the next-token loss of rows of text. See Backend.rows_loss.

        With `document_mask`, each segment runs as a sequence of its own, otherwise each row.
        """
        nats, num_targets = 0.0, 0
        load = np.zeros((len(self.config.moe_layers), self.config.n_routed_experts or 0))
        for row, segment, targets in zip(ids, segments, next_token_targets(ids, segments)):
            for begin, end in _spans(segment, document_mask):
                at = begin
                for output, chosen in self.run_sequence(
                    row[begin : end - 1].tolist(), LOSS_CHUNK, experts=self.config.is_moe
                ):
                    goal = targets[at : at + len(output)]
                    at += len(output)
                    nats += float(F.cross_entropy(output, goal, ignore_index=-1, reduction="sum"))
                    num_targets += int((goal >= 0).sum())
                    if chosen is not None:
                        load += _expert_counts(chosen, load.shape[1])
        return RowsLoss(nats, num_targets, load)

    def check(self) -> None:
        if self._mapped is not None:
            self._mapped.check()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {key: data for key, (data, _) in self.packed.items()}

    @staticmethod
    def state_bytes(
        config: ModelConfig, max_model_len: int, max_num_seqs: int, batch_tokens: int
    ) -> int:
        """Return the bound of Backend.state_bytes. csrc/model/cost.cpp computes it."""
        settings = _native_config(config, "bf16")
        return native.lib.max_state_bytes(settings, max_model_len, max_num_seqs, batch_tokens)


def expands(config: ModelConfig, new_tokens: int, total_tokens: int) -> bool:
    """Return whether `new_tokens` queries over `total_tokens` rows use MLA's expanded form.

    csrc/model/cost.cpp decides. A single new token always uses the absorbed form. Otherwise the
    form with fewer multiply-adds is used, as in model.costs.cheaper_form.
    """
    settings = _native_config(config, "bf16")
    return native.lib.cheaper_form(settings, new_tokens, total_tokens) == "expand"


def _spans(segment: torch.Tensor, document_mask: bool) -> list[tuple[int, int]]:
    """Return (begin, end) of each sequence in a row that has at least one token to predict.

    Args:
        segment: [T + 1] segment numbers of the row.
        document_mask: whether each segment is its own sequence, otherwise the row is one.
    """
    cuts = [0, len(segment)]
    if document_mask:
        changes = (segment[1:] != segment[:-1]).nonzero().flatten() + 1
        cuts = [0, *changes.tolist(), len(segment)]
    return [(begin, end) for begin, end in itertools.pairwise(cuts) if end - begin >= 2]


def _expert_counts(chosen: torch.Tensor, num_experts: int) -> np.ndarray:
    """Count how often each expert was chosen: [MoE layers, N, K] -> [MoE layers, E]."""
    layers = (layer.flatten() for layer in chosen.numpy())
    return np.stack([np.bincount(layer, minlength=num_experts) for layer in layers])


def _native_config(config: ModelConfig, element: str) -> dict:
    """Return the fields of the C++ struct Config (csrc/model/model.h)."""
    c = config
    settings = dict(
        layers=c.num_hidden_layers,
        vocab=c.vocab_size,
        hidden=c.hidden_size,
        heads=c.num_attention_heads,
        kv_heads=c.n_kv_heads,
        head_dim=c.qk_head_dim,
        rope=c.rope_dim,
        interleaved=c.rope_interleaved,
        eps=c.rms_norm_eps,
        softmax_scale=rope.softmax_scale(c),
        elem=native.FORMATS[element],
    )
    if c.is_mla:
        settings |= dict(
            latent=c.kv_lora_rank,
            nope=c.qk_nope_head_dim,
            value=c.v_head_dim,
            q_lora=c.q_lora_rank or 0,
        )
    if c.is_moe:
        settings |= dict(
            experts=c.n_routed_experts,
            top_k=c.num_experts_per_tok,
            groups=c.n_group,
            top_groups=c.topk_group,
            moe_width=c.moe_intermediate_size,
            group_limited=c.topk_method == "group_limited_greedy",
            normalise=c.norm_topk_prob,
            routed_scale=c.routed_scaling_factor,
        )
    return settings


@cache
def codec_numbers(name: str, widths: tuple[int, int]) -> list[int]:
    """Describe a cache format to csrc/ as [kind, widths, code bits, group size, bytes of a row]."""
    kind = {"fp32": 0, "bf16": 1}.get(name, 2)
    bits, group = cache_codec.part_bits(name, widths), cache_codec.group_of(name)
    return [kind, *widths, *bits, group, cache_codec.row_bytes(name, widths)]
