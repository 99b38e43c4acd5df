"""A model with its weights packed for the compiled kernels: made from a Transformer or from the tensors of a checkpoint, run one step at a time.

What is quantised: every linear and every expert, in one format; the output head (of tied embeddings: its copy) in another where that is asked for.
Not the embedding (a lookup), the router (float32: near ties must not flip) and the norms. W^UK and W^UV are kept per head, W^UK transposed (it acts
on the query), never below 8 bits; the expanded form reads a 16-bit copy made of the same rounded values, so both forms are one model. File layout
and loading: packed_file.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import NamedTuple

import torch

from lamoe.backends import cache_codec
from lamoe.backends.cpu import native
from lamoe.backends.paged_cache import PagedCache
from lamoe.checkpoints import hf
from lamoe.model import rope
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer

WEIGHTS = tuple(native.FORMATS)
COPY = "kv_b, 16-bit copies"  # for the expanded form
Read = Callable[[str], torch.Tensor]  # the tensor of a Hugging Face name
Weigh = Callable[
    ["Piece", int], tuple[torch.Tensor, torch.Tensor] | None
]  # (importance, feedback) of native.pack for matrix i of a piece


class Piece(NamedTuple):
    """One packed tensor: `count` matrices [n, k] of one format side by side (format None: a float32 vector of n; "raw": plain elements [n, k]).
    build(read, i) gives matrix i as a tensor [n, k]."""

    layer: int
    name: str
    format: str | None
    n: int
    k: int
    count: int
    build: Callable[[Read, int], torch.Tensor]

    @property
    def key(self) -> str:
        return self.name if self.layer < 0 else f"layers.{self.layer}.{self.name}"

    def kind(self, config: ModelConfig) -> str:
        """The class of weights it belongs to."""
        if self.name in ("w13", "w2"):
            return "shared experts" if config.is_moe_layer(self.layer) else "dense ffn"
        known = {
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
        return "norms" if self.format is None else known.get(self.name, "attention")

    def elements(self, config: ModelConfig) -> int:
        """Weights of the checkpoint in it, without filling; 0 for a copy of weights that another piece has."""
        if self.name in ("uk_rows", "uv_elem"):
            return 0
        if self.name in ("w13", "e13"):
            dense = (
                config.intermediate_size
                if not config.is_moe_layer(self.layer)
                else config.n_shared_experts * config.moe_intermediate_size
            )
            return (
                2
                * (config.moe_intermediate_size if self.name == "e13" else dense)
                * self.k
                * self.count
            )
        return self.n * self.k * self.count


def pieces(config: ModelConfig, weights: str, head: str | None = None) -> Iterator[Piece]:
    """All tensors of a packed model in the order of a step. `weights`: fp32 | bf16 | int8 | int4, `head`: the same for the output head, None: as the others.
    ValueError for another format and for a geometry the kernels lack."""
    if why := lacks(config):
        raise ValueError(why)
    elem, head = element(weights), head or weights
    if head not in WEIGHTS:
        raise ValueError(f"unknown format {head!r} of the output head; known: {', '.join(WEIGHTS)}")
    yield Piece(
        -1,
        "embed",
        "raw",
        config.vocab_size,
        config.hidden_size,
        1,
        lambda read, i: read("model.embed_tokens.weight"),
    )
    for layer in range(config.num_hidden_layers):
        yield from _layer(config, layer, weights, elem)
    yield _vector(-1, "norm", config.hidden_size, "model.norm")
    source = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    yield Piece(
        -1, "head", head, config.vocab_size, config.hidden_size, 1, lambda read, i: read(source)
    )


def element(weights: str) -> str:
    """What attention, the embedding and the expanded form compute in: fp32 for fp32 weights, else bf16."""
    if weights not in WEIGHTS:
        raise ValueError(f"unknown weight format {weights!r}; known: {', '.join(WEIGHTS)}")
    return "fp32" if weights == "fp32" else "bf16"


def lacks(c: ModelConfig) -> str | None:
    """Why the kernels cannot run this geometry (the torch ops can), or None when they can. csrc/valid.cpp has the last word."""
    widths = [c.qk_head_dim, c.value_head_dim, c.rope_dim] + (
        [c.kv_lora_rank, c.qk_nope_head_dim] if c.is_mla else []
    )
    if any(w % 2 for w in widths):
        return f"the compiled kernels need even head and latent widths, found {widths}; use impl='torch'"
    if max(c.cache_row) > 8192:
        return f"the compiled kernels take cache rows of two parts of at most 8,192 elements, found {c.cache_row}; use impl='torch'"
    return None


def _vector(layer: int, name: str, n: int, disk: str) -> Piece:
    return Piece(layer, name, None, n, 1, 1, lambda read, i: read(f"{disk}.weight"))


def _layer(c: ModelConfig, layer: int, w: str, elem: str) -> Iterator[Piece]:
    disk, d = f"model.layers.{layer}.", c.hidden_size

    def linear(name: str, n: int, k: int, source: str) -> Piece:
        return Piece(layer, name, w, n, k, 1, lambda read, i: read(f"{disk}{source}.weight"))

    yield _vector(layer, "attn_norm", d, f"{disk}input_layernorm")
    attn = "self_attn."
    if c.is_mla:
        h, n, v, latent = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim, c.kv_lora_rank
        if c.q_lora_rank is None:
            yield linear("wq", h * c.qk_head_dim, d, f"{attn}q_proj")
        else:
            yield linear("wq_a", c.q_lora_rank, d, f"{attn}q_a_proj")
            yield _vector(layer, "q_norm", c.q_lora_rank, f"{disk}{attn}q_a_layernorm")
            yield linear("wq_b", h * c.qk_head_dim, c.q_lora_rank, f"{attn}q_b_proj")
        yield linear("wkv_a", latent + c.qk_rope_head_dim, d, f"{attn}kv_a_proj_with_mqa")
        yield _vector(layer, "kv_norm", latent, f"{disk}{attn}kv_a_layernorm")
        kv_b = f"{disk}{attn}kv_b_proj.weight"
        fine = "int8" if w == "int4" else w
        yield Piece(
            layer,
            "uk",
            fine,
            latent,
            n,
            h,
            lambda read, i: read(kv_b)[i * (n + v) : i * (n + v) + n].t(),
        )
        yield Piece(
            layer,
            "uv",
            fine,
            v,
            latent,
            h,
            lambda read, i: read(kv_b)[i * (n + v) + n : (i + 1) * (n + v)],
        )
        yield Piece(
            layer,
            "uk_rows",
            "raw",
            h * n,
            -(-latent // 64) * 64,
            1,
            lambda read, i: _uk_rows(read(kv_b), c, fine),
        )
        if w in ("int8", "int4"):
            yield Piece(
                layer,
                "uv_elem",
                elem,
                v,
                latent,
                h,
                lambda read, i: _rounded(fine, read(kv_b)[i * (n + v) + n : (i + 1) * (n + v)]),
            )
        yield linear("wo", d, h * v, f"{attn}o_proj")
    else:
        yield linear("wq", c.num_attention_heads * c.qk_head_dim, d, f"{attn}q_proj")
        yield linear("wk", c.n_kv_heads * c.qk_head_dim, d, f"{attn}k_proj")
        yield linear("wv", c.n_kv_heads * c.qk_head_dim, d, f"{attn}v_proj")
        yield linear("wo", d, c.num_attention_heads * c.qk_head_dim, f"{attn}o_proj")
    yield _vector(layer, "ffn_norm", d, f"{disk}post_attention_layernorm")
    mlp = f"{disk}mlp."
    if not c.is_moe_layer(layer):
        yield from _swiglu(layer, "", w, d, c.intermediate_size, 1, lambda i: mlp)
        return
    f = c.moe_intermediate_size
    yield Piece(
        layer, "gate", "fp32", c.n_routed_experts, d, 1, lambda read, i: read(f"{mlp}gate.weight")
    )
    if c.n_shared_experts:
        yield from _swiglu(
            layer, "", w, d, c.n_shared_experts * f, 1, lambda i: f"{mlp}shared_experts."
        )
    yield from _swiglu(layer, "e", w, d, f, c.n_routed_experts, lambda i: f"{mlp}experts.{i}.")


def _swiglu(
    layer: int, prefix: str, w: str, d: int, f: int, count: int, disk: Callable[[int], str]
) -> Iterator[Piece]:
    """gate | up, each filled up to whole tiles of 16 outputs, and down."""
    padded = -(-f // 16) * 16

    def w13(read: Read, i: int) -> torch.Tensor:
        gate, up = read(f"{disk(i)}gate_proj.weight"), read(f"{disk(i)}up_proj.weight")
        return torch.cat([torch.nn.functional.pad(x, (0, 0, 0, padded - f)) for x in (gate, up)])

    yield Piece(layer, "e13" if prefix else "w13", w, 2 * padded, d, count, w13)
    yield Piece(
        layer,
        "e2" if prefix else "w2",
        w,
        d,
        f,
        count,
        lambda read, i: read(f"{disk(i)}down_proj.weight"),
    )


def _rounded(fmt: str, w: torch.Tensor) -> torch.Tensor:
    data, scale = native.pack(fmt, w)
    return native.unpack(fmt, data, *w.shape, scale)


def _uk_rows(kv_b: torch.Tensor, c: ModelConfig, fmt: str) -> torch.Tensor:
    """W^UK of all heads as rows [H N, C filled up to 64], with the values that the packed transposed form has."""
    uk = kv_b.unflatten(0, (c.num_attention_heads, -1))[:, : c.qk_nope_head_dim]
    rows = torch.cat([_rounded(fmt, head.t()).t() for head in uk])
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 64))


def build(
    piece: Piece, read: Read, elem: str, weigh: Weigh = lambda piece, i: None
) -> Iterator[tuple[torch.Tensor, float]]:
    """(uint8 bytes, scale) of each matrix of a piece; of a vector or raw elements one tensor of their bytes."""
    for i in range(piece.count):
        w = piece.build(read, i)
        if piece.format is None:
            yield w.detach().to(torch.float32).contiguous().view(torch.uint8).flatten(), 1.0
        elif piece.format == "raw":
            yield (
                w.detach()
                .to(torch.float32 if elem == "fp32" else torch.bfloat16)
                .contiguous()
                .view(torch.uint8)
                .flatten(),
                1.0,
            )
        else:
            yield native.pack(piece.format, w, *(weigh(piece, i) or ()))


def piece_bytes(piece: Piece, elem: str) -> int:
    """Bytes of the whole piece, from the config alone."""
    if piece.format is None:
        return 4 * piece.n
    if piece.format == "raw":
        return piece.n * piece.k * (4 if elem == "fp32" else 2)
    return piece.count * native.mat_bytes(piece.format, piece.n, piece.k)


class Class(NamedTuple):
    """What a class of weights came to: weights of the checkpoint, packed bytes, formats."""

    elements: int
    bytes: int
    formats: tuple[str, ...]


def classes(
    config: ModelConfig, weights: str, done: Iterable[Piece], head: str | None = None
) -> dict[str, Class]:
    """{class: what it came to} of packed pieces. ValueError when a class that `weights` or `head` (`pieces`) says is quantised is not there or not quantised."""
    elem, out = element(weights), {}
    for p in done:
        c = out.get(kind := p.kind(config), Class(0, 0, ()))
        name = {None: "fp32", "raw": elem}.get(p.format, p.format)
        out[kind] = Class(
            c.elements + p.elements(config),
            c.bytes + piece_bytes(p, elem),
            tuple(dict.fromkeys([*c.formats, name])),
        )
    fine = "int8" if weights == "int4" else weights
    want = {"attention": weights, "head": head or weights} | (
        {"kv_b": fine} if config.is_mla else {}
    )
    if len(config.moe_layers) < config.num_hidden_layers:
        want["dense ffn"] = weights
    if config.is_moe:
        want |= {"experts": weights} | (
            {"shared experts": weights} if config.n_shared_experts else {}
        )
    for kind, fmt in want.items():
        found = out.get(kind, Class(0, 0, ()))
        if found.formats != (fmt,) or not found.elements:
            raise ValueError(
                f"{kind} should be {fmt} and "
                + (
                    f"came out as {', '.join(found.formats)}"
                    if found.elements
                    else "matched no tensor"
                )
                + "; this model was not quantised whole"
            )
    return out


class PackedModel:
    """Runs steps over a PagedCache. `tensors`: {piece.key: (uint8 1-D, scales)}; they stay referenced, not copied. weights, head: formats (`pieces`)."""

    def __init__(
        self,
        config: ModelConfig,
        weights: str,
        tensors: dict[str, tuple[torch.Tensor, list[float]]],
        threads: int = 0,
        head: str | None = None,
    ):
        self.config, self.weights, self.head, self.elem = (
            config,
            weights,
            head or weights,
            element(weights),
        )
        self.tensors, self.dtype = tensors, torch.float32 if self.elem == "fp32" else torch.bfloat16
        self.nbytes = {key: data.numel() for key, (data, _) in tensors.items()}
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
            elem=native.FORMATS[self.elem],
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
        self._table = torch.empty(0, c.rope_dim)
        self.native = native.lib.Model(settings, threads or torch.get_num_threads())
        for piece in pieces(config, weights, head):
            data, scales = tensors[piece.key]
            array = data.numpy()
            if piece.format is None:
                self.native.vector(piece.layer, piece.name, array.view("float32"))
            elif piece.format == "raw":
                self.native.raw(piece.layer, piece.name, array)
            else:
                self.native.set(
                    piece.layer,
                    piece.name,
                    native.FORMATS[piece.format],
                    piece.n,
                    piece.k,
                    array,
                    scales,
                )
                if piece.name == "uv" and weights in ("fp32", "bf16"):
                    self.native.set(
                        piece.layer,
                        "uv_elem",
                        native.FORMATS[piece.format],
                        piece.n,
                        piece.k,
                        array,
                        scales,
                    )

    @classmethod
    def of(
        cls,
        model: Transformer,
        weights: str | None = None,
        threads: int = 0,
        head: str | None = None,
    ) -> PackedModel:
        """Pack a Transformer's weights (None: in the format of its parameters, exactly)."""
        dtype = model.embed.weight.dtype
        if weights is None:
            weights = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype)
            if weights is None:
                raise ValueError(
                    f"the compiled kernels compute in float32 and bfloat16, and the model is {dtype}; use impl='torch'"
                )
        return cls.read(
            model.config,
            weights,
            hf.views(model.config, dict(model.named_parameters())).__getitem__,
            threads,
            head,
        )

    @classmethod
    def read(
        cls,
        config: ModelConfig,
        weights: str,
        read: Read,
        threads: int = 0,
        head: str | None = None,
    ) -> PackedModel:
        """Pack the tensors that `read` gives, one at a time."""
        elem, tensors = element(weights), {}
        for piece in pieces(config, weights, head):
            if piece.format in (
                None,
                "raw",
            ):  # one array; where nothing needs a cast it is the memory that `read` gave
                tensors[piece.key] = next(build(piece, read, elem))[0], [1.0]
                continue
            data, scales, at = native.room(piece_bytes(piece, elem)), [], 0
            for part, scale in build(piece, read, elem):
                data[at : at + len(part)] = part
                scales.append(scale)
                at += len(part)
            tensors[piece.key] = data, scales
        return cls(config, weights, tensors, threads, head)

    def _turns(self, length: int) -> torch.Tensor:
        """[at least length, R]: cos | sin of every position. Made once and again when the text grows beyond it: most of a small step's time in Python."""
        if len(self._table) < length:
            freqs = rope.freqs(
                self.config,
                torch.arange(min(max(2 * length, 1024), self.config.max_position_embeddings)),
            )
            self._table = torch.view_as_real(freqs).transpose(-1, -2).flatten(-2).contiguous()
        return self._table

    def run(
        self,
        ids: list[int],
        positions: torch.Tensor,
        seqs: torch.Tensor,
        pages: torch.Tensor,
        cache: PagedCache,
        rows: list[int],
        *,
        logits: bool = True,
        experts: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step: ids [N] at positions [N]; seqs int32 [sequences, 3]: tokens in the step, rows in the cache after it, where its pages begin in `pages`
        int32. The tokens' rows are appended. -> (float32 [len(rows), vocabulary], or final normed states [len(rows), D] when not `logits`,
        for the tokens `rows`; chosen experts int16 [MoE layers, N, K] when asked for)."""
        cos_sin = self._turns(int(positions.max()) + 1).index_select(0, positions)
        out, chosen = self.native.step(
            torch.tensor(ids, dtype=torch.int32).numpy(),
            cos_sin.numpy(),
            seqs.numpy(),
            pages.numpy(),
            cache.rows.numpy(),
            cache.page_size,
            codec_numbers(cache.format, cache.widths),
            torch.tensor(rows, dtype=torch.int32).numpy(),
            logits,
            experts,
        )
        return torch.from_numpy(out), torch.from_numpy(chosen)


@cache
def codec_numbers(name: str, widths: tuple[int, int]) -> list[int]:
    """How csrc knows a cache format: kind, widths, bits, group, bytes of a row."""
    kind = {"fp32": 0, "bf16": 1}.get(name, 2)
    return [
        kind,
        *widths,
        *cache_codec.part_bits(name, widths),
        cache_codec.group_of(name),
        cache_codec.row_bytes(name, widths),
    ]
