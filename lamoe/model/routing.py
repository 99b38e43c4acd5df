"""Who computes a token: gate scores, greedy and device-limited top-k, the three balance losses, device-level token dropping.

Pure functions over tensors; moe.py calls them. Letters: B sequences, T tokens, E experts, K experts per token, N = B T.
Sources: paper eq. 20-22 (gate), 2.2.2 (device-limited routing), eq. 23-31 (losses), 2.2.4 (dropping).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from lamoe.model.config import ModelConfig


@dataclass(frozen=True)
class Route:
    """scores [N, E] float32 softmax over all experts; expert [N, K] int64; weight [N, K] float32 (with routed_scaling_factor)."""

    scores: torch.Tensor
    expert: torch.Tensor
    weight: torch.Tensor


def route(x: torch.Tensor, gate: torch.Tensor, config: ModelConfig) -> Route:
    """Choose experts for x [N, D] with gate [E, D]. Logits and softmax in float32 (float64 for float64 models) whatever the
    model's dtype: in bfloat16 near ties flip. Weights are not renormalised unless `norm_topk_prob`."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    scores = F.linear(x.to(work), gate.to(work)).softmax(-1)
    weight, expert = choose(scores, config)
    if config.norm_topk_prob:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return Route(scores, expert, weight * config.routed_scaling_factor)


def choose(scores: torch.Tensor, config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k (weight, expert), both [N, K], of scores [N, E]. `group_limited_greedy`: a group's score is the *maximum* of its
    experts (V3 differs), the best `topk_group` groups stay, experts of the others are set to -inf (0 could still win a place
    when softmax underflows)."""
    allowed = scores
    if config.topk_method == "group_limited_greedy":
        best = scores.unflatten(-1, (config.n_group, -1)).amax(-1)  # [N, groups]
        kept = best.topk(config.topk_group, dim=-1).indices
        closed = torch.ones_like(best, dtype=torch.bool).scatter(-1, kept, False)
        closed = closed.repeat_interleave(scores.shape[-1] // config.n_group, dim=-1)
        allowed = scores.masked_fill(closed, float("-inf"))
    expert = allowed.topk(config.num_experts_per_tok, dim=-1).indices
    return scores.gather(-1, expert), expert


@dataclass(frozen=True)
class Balance:
    """The training-time part of routing, from the recipe. Devices are virtual: contiguous blocks of E / devices experts."""

    expert: float = (
        0.003  # alpha_1: the paper's 236B recipe. (Released configs say 0.001, which was Lite's.)
    )
    device: float = 0.05  # alpha_2
    communication: float = 0.02  # alpha_3
    devices: int = 1  # D
    capacity_factor: float = (
        0.0  # a device's budget in units of the average load; 0: nothing is dropped. Paper: 1.0
    )
    keep_share: float = 0.1  # share of sequences whose tokens are never dropped

    def check(self, config: ModelConfig) -> None:
        for name in ("expert", "device", "communication", "capacity_factor", "keep_share"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"balance.{name} is {getattr(self, name)}; it must not be negative"
                )
        if self.keep_share > 1:
            raise ValueError(
                f"balance.keep_share is {self.keep_share}; it is a share of the sequences, at most 1"
            )
        if config.is_moe and (self.devices < 1 or config.n_routed_experts % self.devices):
            raise ValueError(
                f"balance.devices is {self.devices}; it must divide n_routed_experts {config.n_routed_experts}"
            )
        if config.topk_method == "group_limited_greedy" and self.devices not in (1, config.n_group):
            raise ValueError(
                f"balance.devices is {self.devices}, but the router limits tokens over n_group {config.n_group} groups; use that number, or 1"
            )


def reach(config: ModelConfig, devices: int) -> int:
    """M, the most devices that one token can be sent to: `topk_group` under device-limited routing, else min(K, devices)."""
    limited = config.topk_method == "group_limited_greedy" and devices == config.n_group
    return config.topk_group if limited else min(config.num_experts_per_tok, devices)


@dataclass
class LayerRecord:
    """What one MoE layer did in one training step. All detached but the three losses."""

    losses: (
        torch.Tensor
    )  # [3] unweighted: expert, device, communication; 1 when routing is even (see balance_losses)
    load: torch.Tensor  # [E] int64 chosen assignments, before dropping
    dropped: torch.Tensor  # [] int64 assignments dropped
    entropy: torch.Tensor  # [] mean entropy of a token's scores, nats


class RoutingHook(Protocol):
    """An observer of the router that a caller passes through the model: every MoE layer calls it once.

    Implement it as a plain class. FSDP2 copies dataclasses and lists among forward's arguments, so
    whatever such a hook records would be lost.
    """

    def after_routing(self, route: Route, sequences: int, config: ModelConfig) -> Route:
        """Return the route that the layer uses, given the router's choice for `sequences` rows of equal length."""
        ...


class Chosen:
    """Routing hook that records the chosen experts and changes nothing.

    Attributes:
        layers: one tensor [N, K] int64 per MoE layer, in order.
    """

    def __init__(self) -> None:
        self.layers: list[torch.Tensor] = []

    def after_routing(self, route: Route, sequences: int, config: ModelConfig) -> Route:
        """Append the chosen experts and return `route` as it is."""
        self.layers.append(route.expert)
        return route


class Training:
    """Routing hook of the trainer: records balance losses and load, and drops assignments over budget.

    Use a new one for every forward pass.

    Args:
        balance: coefficients of the losses, number of virtual devices, dropping budget.
        protected: [B] bool, sequences of which nothing is dropped. None protects none.

    Attributes:
        records: one LayerRecord per MoE layer, in order.
    """

    def __init__(self, balance: Balance, protected: torch.Tensor | None = None) -> None:
        self.balance, self.protected = balance, protected
        self.records: list[LayerRecord] = []

    def after_routing(self, route: Route, sequences: int, config: ModelConfig) -> Route:
        """Append one layer's record and return the route without the dropped assignments.

        A dropped assignment gets expert id E (no expert) and weight 0, so the token keeps its
        residual and the shared experts. Losses and load are counted before dropping.
        """
        e, balance = config.n_routed_experts, self.balance
        losses = balance_losses(
            route.scores.unflatten(0, (sequences, -1)),
            route.expert.unflatten(0, (sequences, -1)),
            config,
            balance.devices,
        )
        expert, weight = route.expert, route.weight
        dropped = torch.zeros((), dtype=torch.int64, device=expert.device)
        if balance.capacity_factor:
            protected = self.protected
            if protected is not None:
                protected = protected.repeat_interleave(expert.shape[0] // sequences)
            affinity = route.scores.gather(1, expert)
            keep = keep_mask(
                affinity, expert, e, balance.devices, balance.capacity_factor, protected
            )
            dropped = (~keep).sum()
            expert, weight = expert.masked_fill(~keep, e), weight * keep
        with torch.no_grad():
            entropy = torch.special.entr(route.scores).sum(-1).mean()
        load = route.expert.flatten().bincount(minlength=e)
        self.records.append(LayerRecord(losses, load, dropped, entropy))
        return Route(route.scores, expert, weight)

    def loss(self) -> torch.Tensor:
        """Return alpha_1 L_ExpBal + alpha_2 L_DevBal + alpha_3 L_CommBal, summed over the recorded layers."""
        if not self.records:
            return torch.zeros(())
        losses = torch.stack([record.losses for record in self.records]).sum(0)
        b = self.balance
        alphas = torch.tensor([b.expert, b.device, b.communication], device=losses.device)
        return (losses * alphas).sum()


def balance_losses(
    scores: torch.Tensor, expert: torch.Tensor, config: ModelConfig, devices: int
) -> torch.Tensor:
    """The three sums of eq. 23-31 without their alphas, [3]: expert, device, communication.

    scores [B, T, E], expert [B, T, K]: computed for each sequence on its own and averaged over B, so that the value does not
    depend on how sequences are batched. Counts carry no gradient; it flows through the mean scores P. Even routing gives exactly 1 for experts and
    devices; for communication too when every token reaches all of its M devices, and less when it reaches fewer.
    """
    b, t, e = scores.shape
    k = expert.shape[-1]
    flat = expert.reshape(b, -1)
    f = scores.new_zeros(b, e).scatter_add_(1, flat, scores.new_ones(flat.shape)) * (
        e / (k * t)
    )  # f_i
    p = scores.mean(1)  # P_i
    f_device = f.unflatten(1, (devices, -1)).mean(-1)  # f'_i
    p_device = p.unflatten(1, (devices, -1)).sum(-1)  # P'_i = P''_i
    sent = scores.new_zeros(b, t, devices).scatter_(2, expert // (e // devices), 1.0)
    f_comm = sent.sum(1) * (devices / (reach(config, devices) * t))  # f''_i
    sums = [(f * p).sum(1), (f_device * p_device).sum(1), (f_comm * p_device).sum(1)]
    return torch.stack([s.mean() for s in sums])


def keep_mask(
    affinity: torch.Tensor,
    expert: torch.Tensor,
    n_experts: int,
    devices: int,
    capacity_factor: float,
    protected: torch.Tensor | None = None,
) -> torch.Tensor:
    """Device-level token dropping: which assignments stay, [N, K] bool.

    A device's budget is capacity_factor * N K / devices assignments of this batch, rounded up. On a device over its budget the
    (token, expert) pairs of lowest affinity go first (ties: the later token goes). Assignments of `protected` [N] bool tokens
    always stay and use the budget up first. Affinity [N, K] is the gate's score of the pair.
    """
    n, k = expert.shape
    budget = -int(-(capacity_factor * n * k) // devices)
    device = (expert // (n_experts // devices)).flatten()
    rank_by = affinity.detach().flatten().to(torch.float64)
    if protected is not None:
        rank_by = rank_by + 2.0 * protected.repeat_interleave(
            k
        )  # scores are at most 1, so protected ones come first
    order = rank_by.argsort(descending=True, stable=True)
    order = order[device[order].argsort(stable=True)]  # by device, best first
    counts = device.bincount(minlength=devices)
    place = torch.arange(n * k, device=expert.device) - (counts.cumsum(0) - counts)[device[order]]
    keep = torch.empty(n * k, dtype=torch.bool, device=expert.device)
    keep[order] = place < budget
    if protected is not None:
        keep |= protected.repeat_interleave(k)
    return keep.view(n, k)
