"""The tensors that the compiled kernels need, and how they are made from a checkpoint.

Every linear layer and every expert is stored in the format of the weights, quantised or not. The
output head may have a format of its own. If it is tied to the embedding, the head is a copy of it.
Three kinds are never quantised: the embedding, the norms, and the router, which stays in float32
because near ties must not flip.

MLA's W^UK and W^UV are stored per head. W^UK is transposed, because the absorbed form multiplies
the query by it. Both are stored with at least 8 bits. The expanded form reads 16-bit copies that
hold the same rounded values, so both forms compute the same model.

packed_file.py stores these tensors in a folder, and backend.py runs the model from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lamoe.backends.base import Formats
from lamoe.backends.cpu import native
from lamoe.model.config import ModelConfig

COPY = "kv_b, 16-bit copies"  # name of the class of weights that only the expanded form reads
MAX_ROW_PART = 8192  # largest number of elements of each of the two parts of a cache row

# Function from the Hugging Face name of a checkpoint tensor to the tensor.
Read = Callable[[str], torch.Tensor]
# Function from a packed tensor and the index of one of its matrices to the arguments (importance,
# feedback) of native.pack, or None.
Weigh = Callable[["PackedTensor", int], tuple[torch.Tensor, torch.Tensor] | None]


class PackedTensor(NamedTuple):
    """Description of one tensor of a packed model. `build(read, i)` makes its i-th matrix.

    layer: index of the layer, or -1 for tensors outside the layers.
    format: fp32 | bf16 | int8 | int4 for `num_matrices` matrices [n outputs, k inputs] in kernel
        layout. "raw" for plain elements [n, k]. None for a float32 vector [n].
    """

    layer: int
    name: str
    format: str | None
    n: int
    k: int
    num_matrices: int
    build: Callable[[Read, int], torch.Tensor]

    @property
    def key(self) -> str:
        """Name of the tensor in the packed model, for example "layers.3.wo"."""
        return self.name if self.layer < 0 else f"layers.{self.layer}.{self.name}"

    def weight_class(self, config: ModelConfig) -> str:
        """Return the class of weights of this tensor, for example "attention" or "experts"."""
        if self.name in ("w13", "w2"):
            return "shared experts" if config.is_moe_layer(self.layer) else "dense ffn"
        if self.format is None:
            return "norms"
        return _CLASS_OF_NAME.get(self.name, "attention")

    def num_weights(self, config: ModelConfig) -> int:
        """Count the checkpoint weights in this tensor, without padding.

        A copy of weights that another tensor also holds counts as 0.
        """
        if self.name in ("uk_rows", "uv_elem"):
            return 0
        if self.name == "e13":
            return 2 * config.moe_intermediate_size * self.k * self.num_matrices
        if self.name == "w13":
            shared = config.is_moe_layer(self.layer)
            width = (
                config.n_shared_experts * config.moe_intermediate_size
                if shared
                else config.intermediate_size
            )
            return 2 * width * self.k * self.num_matrices
        return self.n * self.k * self.num_matrices


_CLASS_OF_NAME = {
    "embed": "embedding",
    "head": "head",
    "gate": "router",
    "e13": "experts",
    "e2": "experts",
    "uk": "kv_b",
    "uv": "kv_b",
    "uk_rows": COPY,
    "uv_elem": COPY,
}


def packed_tensors(config: ModelConfig, formats: Formats) -> Iterator[PackedTensor]:
    """Yield all tensors of a packed model in the order in which a forward pass reads them.

    Raises:
        ValueError: if a format is unknown, or the kernels do not support the model's geometry.
    """
    if reason := unsupported(config):
        raise ValueError(reason)
    element, weights = element_format(formats), str(formats.weights)
    head = formats.head or weights
    if head not in native.FORMATS:
        raise ValueError(
            f"unknown format {head!r} of the output head; known: {', '.join(native.FORMATS)}"
        )
    vocab, hidden = config.vocab_size, config.hidden_size
    embedding = "model.embed_tokens.weight"
    yield PackedTensor(-1, "embed", "raw", vocab, hidden, 1, lambda read, i: read(embedding))
    for layer in range(config.num_hidden_layers):
        yield from _layer(config, layer, weights, element)
    yield _vector(-1, "norm", hidden, "model.norm")
    source = embedding if config.tie_word_embeddings else "lm_head.weight"
    yield PackedTensor(-1, "head", head, vocab, hidden, 1, lambda read, i: read(source))


def element_format(formats: Formats) -> str:
    """Return the format of raw tensors and of attention: fp32 for fp32 weights, else bf16.

    Raises:
        ValueError: if the weight format is unknown.
    """
    if formats.weights not in native.FORMATS:
        raise ValueError(
            f"unknown weight format {formats.weights!r}; known: {', '.join(native.FORMATS)}"
        )
    return "fp32" if formats.weights == "fp32" else "bf16"


def unsupported(config: ModelConfig) -> str | None:
    """Return why the compiled kernels cannot run this geometry, or None if they can.

    Torch ops run every geometry. csrc/model/validate.cpp repeats the check and is authoritative.
    """
    c = config
    widths = [c.qk_head_dim, c.value_head_dim, c.rope_dim]
    if c.is_mla:
        widths += [c.kv_lora_rank, c.qk_nope_head_dim]
    if any(w % 2 for w in widths):
        return (
            f"the compiled kernels need even head and latent widths, found {widths}; "
            "use backend='torch'"
        )
    if max(c.cache_row) > MAX_ROW_PART:
        return (
            f"the compiled kernels take cache rows of two parts of at most {MAX_ROW_PART:,} "
            f"elements, found {c.cache_row}; use backend='torch'"
        )
    return None


def _vector(layer: int, name: str, n: int, source: str) -> PackedTensor:
    return PackedTensor(layer, name, None, n, 1, 1, lambda read, i: read(f"{source}.weight"))


def _layer(config: ModelConfig, layer: int, weights: str, element: str) -> Iterator[PackedTensor]:
    prefix = f"model.layers.{layer}."
    yield _vector(layer, "attn_norm", config.hidden_size, f"{prefix}input_layernorm")
    attention = _mla if config.is_mla else _attention
    yield from attention(config, layer, weights, element, f"{prefix}self_attn.")
    yield _vector(layer, "ffn_norm", config.hidden_size, f"{prefix}post_attention_layernorm")
    yield from _feed_forward(config, layer, weights, f"{prefix}mlp.")


def _linear(layer: int, name: str, weights: str, n: int, k: int, source: str) -> PackedTensor:
    return PackedTensor(layer, name, weights, n, k, 1, lambda read, i: read(f"{source}.weight"))


def _attention(
    c: ModelConfig, layer: int, weights: str, element: str, prefix: str
) -> Iterator[PackedTensor]:
    d, queries = c.hidden_size, c.num_attention_heads * c.qk_head_dim
    keys = c.n_kv_heads * c.qk_head_dim
    yield _linear(layer, "wq", weights, queries, d, f"{prefix}q_proj")
    yield _linear(layer, "wk", weights, keys, d, f"{prefix}k_proj")
    yield _linear(layer, "wv", weights, keys, d, f"{prefix}v_proj")
    yield _linear(layer, "wo", weights, d, queries, f"{prefix}o_proj")


def _mla(
    c: ModelConfig, layer: int, weights: str, element: str, prefix: str
) -> Iterator[PackedTensor]:
    d, h, n, v = c.hidden_size, c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim
    latent = c.kv_lora_rank
    if c.q_lora_rank is None:
        yield _linear(layer, "wq", weights, h * c.qk_head_dim, d, f"{prefix}q_proj")
    else:
        yield _linear(layer, "wq_a", weights, c.q_lora_rank, d, f"{prefix}q_a_proj")
        yield _vector(layer, "q_norm", c.q_lora_rank, f"{prefix}q_a_layernorm")
        yield _linear(layer, "wq_b", weights, h * c.qk_head_dim, c.q_lora_rank, f"{prefix}q_b_proj")
    row = latent + c.qk_rope_head_dim
    yield _linear(layer, "wkv_a", weights, row, d, f"{prefix}kv_a_proj_with_mqa")
    yield _vector(layer, "kv_norm", latent, f"{prefix}kv_a_layernorm")

    kv_b = f"{prefix}kv_b_proj.weight"  # [h * (n + v), latent]; per head first W^UK, then W^UV
    fine = _fine(weights)

    def key_up(read: Read, i: int) -> torch.Tensor:
        return read(kv_b)[i * (n + v) : i * (n + v) + n].t()

    def value_up(read: Read, i: int) -> torch.Tensor:
        return read(kv_b)[i * (n + v) + n : (i + 1) * (n + v)]

    yield PackedTensor(layer, "uk", fine, latent, n, h, key_up)
    yield PackedTensor(layer, "uv", fine, v, latent, h, value_up)
    yield PackedTensor(
        layer,
        "uk_rows",
        "raw",
        h * n,
        _padded(latent, 64),
        1,
        lambda read, i: _key_up_rows(read(kv_b), c, fine),
    )
    if weights in ("int8", "int4"):
        yield PackedTensor(
            layer,
            "uv_elem",
            element,
            v,
            latent,
            h,
            lambda read, i: _rounded(fine, value_up(read, i)),
        )
    yield _linear(layer, "wo", weights, d, h * v, f"{prefix}o_proj")


def _feed_forward(c: ModelConfig, layer: int, weights: str, prefix: str) -> Iterator[PackedTensor]:
    d, f = c.hidden_size, c.moe_intermediate_size
    if not c.is_moe_layer(layer):
        yield from _swiglu(layer, "w", weights, d, c.intermediate_size, 1, lambda i: prefix)
        return
    gate = f"{prefix}gate.weight"
    yield PackedTensor(layer, "gate", "fp32", c.n_routed_experts, d, 1, lambda read, i: read(gate))
    if c.n_shared_experts:
        width, shared = c.n_shared_experts * f, f"{prefix}shared_experts."
        yield from _swiglu(layer, "w", weights, d, width, 1, lambda i: shared)
    yield from _swiglu(
        layer, "e", weights, d, f, c.n_routed_experts, lambda i: f"{prefix}experts.{i}."
    )


def _swiglu(
    layer: int, letter: str, weights: str, d: int, f: int, count: int, prefix: Callable[[int], str]
) -> Iterator[PackedTensor]:
    """Yield the two tensors of SwiGLU layers.

    The first stacks gate and up in one matrix, each padded to a multiple of 16 rows. The second is
    down.
    """
    padded = _padded(f, 16)

    def gate_up(read: Read, i: int) -> torch.Tensor:
        parts = (read(f"{prefix(i)}{name}_proj.weight") for name in ("gate", "up"))
        return torch.cat([F.pad(part, (0, 0, 0, padded - f)) for part in parts])

    def down(read: Read, i: int) -> torch.Tensor:
        return read(f"{prefix(i)}down_proj.weight")

    yield PackedTensor(layer, f"{letter}13", weights, 2 * padded, d, count, gate_up)
    yield PackedTensor(layer, f"{letter}2", weights, d, f, count, down)


def _fine(weights: str) -> str:
    """Return the format of W^UK and W^UV, which always have at least 8 bits."""
    return "int8" if weights == "int4" else weights


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _rounded(fmt: str, w: torch.Tensor) -> torch.Tensor:
    """Return `w` rounded to the values that it has when packed in format `fmt`."""
    data, scale = native.pack(fmt, w)
    n, k = w.shape
    return native.unpack(fmt, data, n, k, scale)


def _key_up_rows(kv_b: torch.Tensor, config: ModelConfig, fmt: str) -> torch.Tensor:
    """Return W^UK of all heads, [H * N, C padded to a multiple of 64].

    The values are rounded exactly as those of the packed tensor.
    """
    key_up = kv_b.unflatten(0, (config.num_attention_heads, -1))[:, : config.qk_nope_head_dim]
    rows = torch.cat([_rounded(fmt, head.t()).t() for head in key_up])
    return F.pad(rows, (0, -rows.shape[1] % 64))


def pack_tensor(
    tensor: PackedTensor, read: Read, element: str, weigh: Weigh = lambda tensor, i: None
) -> Iterator[tuple[torch.Tensor, float]]:
    """Yield (bytes, scale) of each matrix of a tensor. The bytes are a uint8 tensor.

    Vectors and raw tensors yield one matrix with scale 1.

    Args:
        tensor: the tensor to pack.
        read: returns a checkpoint tensor by name.
        element: storage format of raw tensors, fp32 or bf16.
        weigh: returns the (importance, feedback) of matrix i of a tensor. None means plain
            rounding.
    """
    for i in range(tensor.num_matrices):
        w = tensor.build(read, i)
        if tensor.format is None or tensor.format == "raw":
            narrow = tensor.format == "raw" and element == "bf16"
            plain = w.detach().to(torch.bfloat16 if narrow else torch.float32).contiguous()
            yield plain.view(torch.uint8).flatten(), 1.0
        else:
            yield native.pack(tensor.format, w, *(weigh(tensor, i) or ()))


def packed_bytes(tensor: PackedTensor, element: str) -> int:
    """Return the packed bytes of all matrices of a tensor, computed without reading weights."""
    if tensor.format is None:
        return 4 * tensor.n
    if tensor.format == "raw":
        return tensor.n * tensor.k * (4 if element == "fp32" else 2)
    return tensor.num_matrices * native.mat_bytes(tensor.format, tensor.n, tensor.k)


class WeightClass(NamedTuple):
    """Totals of one class of weights: number of checkpoint weights, packed bytes, formats."""

    num_weights: int
    num_bytes: int
    formats: tuple[str, ...]


def weight_classes(
    config: ModelConfig, formats: Formats, tensors: Iterable[PackedTensor]
) -> dict[str, WeightClass]:
    """Sum up packed tensors by class of weights.

    Raises:
        ValueError: if a class that `formats` says is quantised is absent or has another format.
    """
    element = element_format(formats)
    totals: dict[str, WeightClass] = {}
    for t in tensors:
        name = t.weight_class(config)
        before = totals.get(name, WeightClass(0, 0, ()))
        fmt = {None: "fp32", "raw": element}.get(t.format, t.format)
        totals[name] = WeightClass(
            before.num_weights + t.num_weights(config),
            before.num_bytes + packed_bytes(t, element),
            tuple(dict.fromkeys([*before.formats, fmt])),
        )
    for name, fmt in _wanted_formats(config, formats).items():
        found = totals.get(name, WeightClass(0, 0, ()))
        if found.formats == (fmt,) and found.num_weights:
            continue
        came_out = (
            f"came out as {', '.join(found.formats)}" if found.num_weights else "matched no tensor"
        )
        raise ValueError(
            f"{name} should be stored as {fmt}, but {came_out}; this model was quantised only in "
            "part"
        )
    return totals


def _wanted_formats(config: ModelConfig, formats: Formats) -> dict[str, str]:
    weights = str(formats.weights)
    wanted = {"attention": weights, "head": formats.head or weights}
    if config.is_mla:
        wanted["kv_b"] = _fine(weights)
    if len(config.moe_layers) < config.num_hidden_layers:
        wanted["dense ffn"] = weights
    if config.is_moe:
        wanted["experts"] = weights
        if config.n_shared_experts:
            wanted["shared experts"] = weights
    return wanted
