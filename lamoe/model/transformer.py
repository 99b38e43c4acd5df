"""The model: embedding, blocks of (norm, attention, norm, feed-forward), final norm, head.

READ THIS FIRST, from top to bottom. Then read attention.py and moe.py. No code here handles
devices, distribution, quantisation or files. Other packages apply them to a finished model.

Parameters have the names of the published code (wq_a, wkv_b, ...). checkpoints/hf.py maps the names
in Hugging Face checkpoints to them.

Letters in shapes and einsum strings, the same in every file of model/ and kernels/:

    B  sequences in the batch        D  hidden size            E  routed experts
    T  new (query) tokens            C  KV latent (512)        K  experts per token
    S  attended (key) tokens         R  rotary part (64)       F  width of a feed-forward layer
    H  query heads                   N  part of a query or key head without rotation (128)
    G  key / value heads             V  value head (128)

Sizes in brackets are those of DeepSeek-V2. Routing flattens the batch to B T rows and calls their
number N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lamoe import kernels
from lamoe.model import rope
from lamoe.model.attention import MLA, Attention
from lamoe.model.cache import Cache
from lamoe.model.config import ModelConfig
from lamoe.model.layers import MLP, Embedding, RMSNorm, linear
from lamoe.model.moe import MoE
from lamoe.model.routing import RoutingHook


class Block(nn.Module):
    """One pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn: MLA | Attention = (MLA if config.is_mla else Attention)(config, layer)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn: MoE | MLP
        if config.is_moe_layer(layer):
            self.ffn = MoE(config)
        else:
            self.ffn = MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: torch.Tensor,
        freqs: torch.Tensor,
        cache: Cache | None = None,
        segments: torch.Tensor | None = None,
        routing_hook: RoutingHook | None = None,
        form: str | None = None,
    ) -> torch.Tensor:
        """Map x [B, T, D] to [B, T, D].

        `freqs` is the result of rope.freqs. The other arguments are those of Transformer.hidden.
        """
        attended = self.attn(self.attn_norm(x), freqs, cache, segments, form)
        x, h = self.ffn_norm.after_add(x, attended)
        return x + (self.ffn(h, routing_hook) if isinstance(self.ffn, MoE) else self.ffn(h))


class Transformer(nn.Module):
    """A decoder-only language model of the DeepSeek family. `model(ids)` returns logits."""

    cross_entropy = staticmethod(kernels.cross_entropy)  # the trainer may compile it

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head = linear(config.hidden_size, config.vocab_size)

    @property
    def head_weight(self) -> torch.Tensor:
        """The output head's matrix [vocabulary, D]. In tied models it is the embedding's matrix."""
        return self.embed.weight if self.config.tie_word_embeddings else self.head.weight

    def hidden(
        self,
        ids: torch.Tensor,
        cache: Cache | None = None,
        segments: torch.Tensor | None = None,
        routing_hook: RoutingHook | None = None,
        form: str | None = None,
    ) -> torch.Tensor:
        """Compute the final normed states, which the head reads.

        Args:
            ids: [B, T] int64 or int32 token ids, on the device of the weights.
            cache: holds the rows of earlier tokens, which `ids` continue. The rows of `ids` are
                appended to it.
            segments: [B, T] integers that separate documents packed into one row. A token attends
                only to earlier tokens with the same number. Not allowed together with a cache.
            routing_hook: called by every MoE layer after routing. `routing.Training` records
                balance losses and drops tokens, `routing.Chosen` records the chosen experts.
            form: "expand" or "absorb" forces this form of MLA, for tests and measurements. None
                means the form with fewer multiply-adds.

        Returns:
            [B, T, D] in the dtype of the weights.

        Raises:
            ValueError: if an id is outside the vocabulary, a position is beyond
                max_position_embeddings, segments have another shape or come with a cache, the form
                is unknown, or the cache is full.
        """
        check_ids(ids, self.config)
        if segments is not None and (cache is not None or segments.shape != ids.shape):
            raise ValueError(
                f"segments must have the shape of ids {tuple(ids.shape)} and need cache=None; "
                f"found {tuple(segments.shape)}" + (" and a cache" if cache is not None else "")
            )
        if form not in (None, "expand", "absorb"):
            raise ValueError(f"form is {form!r}; known: expand, absorb")
        tokens = ids.shape[1]
        if cache is None:
            rope.check_length(self.config, tokens)
            positions = torch.arange(tokens, device=ids.device)[None]
        else:
            positions = cache.positions(tokens).to(ids.device)
        x = self.embed(ids)
        mask = None if segments is None else kernels.document_mask(segments)
        freqs = rope.freqs(self.config, positions, x.dtype)  # [1, T, R / 2], for all layers
        for block in self.layers:
            x = block(x, freqs, cache, mask, routing_hook, form)
        if cache is not None:
            cache.advance(tokens)
        return self.norm(x)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Map normed states [..., D] to logits [..., vocabulary] in at least float32."""
        out = F.linear(h, self.head_weight) if self.config.tie_word_embeddings else self.head(h)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def forward(
        self,
        ids: torch.Tensor,
        cache: Cache | None = None,
        segments: torch.Tensor | None = None,
        routing_hook: RoutingHook | None = None,
        form: str | None = None,
    ) -> torch.Tensor:
        """Compute the logits [B, T, vocabulary]. The arguments are those of `hidden`."""
        return self.logits(self.hidden(ids, cache, segments, routing_hook, form))

    def loss(
        self,
        ids: torch.Tensor,
        targets: torch.Tensor,
        segments: torch.Tensor | None = None,
        routing_hook: RoutingHook | None = None,
    ) -> torch.Tensor:
        """Compute the mean cross-entropy in nats, without the balance losses.

        Logits are computed for a limited number of tokens at once, which bounds memory for large
        vocabularies.

        Args:
            ids: [B, T] token ids.
            targets: [B, T] int64, the id that each position should predict. Positions with a
                negative target do not count.
            segments: as in `hidden`.
            routing_hook: as in `hidden`.

        Returns:
            A scalar in at least float32; 0 when no target counts.
        """
        h = self.hidden(ids, None, segments, routing_hook)
        return self.cross_entropy(h.flatten(0, 1), self.head_weight, targets.flatten())

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> Transformer:
        """Initialise the weights in place and return the model.

        All matrices, the routers included, are drawn from a normal distribution with mean 0 and
        standard deviation initializer_range. Norm weights are set to 1. Numbers are drawn on the
        host in float32, in the order of the parameters. A seed therefore gives the same weights on
        every device, up to rounding to the dtype.

        Source: paper 3.1.2 (standard deviation 0.006 for all learnable parameters).
        """
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            if p.dim() == 1:
                p.fill_(1.0)
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * self.config.initializer_range)
        return self


def check_ids(ids: torch.Tensor, config: ModelConfig) -> None:
    """Raise ValueError unless `ids` are integers [B, T] inside the vocabulary.

    The vocabulary is checked only for ids on the host. On another device, the comparison would wait
    for the device in every forward pass. Callers therefore check ids before they move them there.
    """
    if ids.dim() != 2 or ids.numel() == 0 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            "ids must be integers of shape [batch, tokens] with at least one of each, "
            f"found {ids.dtype} {tuple(ids.shape)}"
        )
    if ids.device.type != "cpu":
        return
    low, high = ids.aminmax()
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"token id {int(low if low < 0 else high)} is outside the vocabulary of "
            f"{config.vocab_size} tokens"
        )
