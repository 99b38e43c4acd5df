"""Which experts compute a token: gate, top-k, balance losses, token dropping, and routing hooks.

The functions here are pure. Only the hooks `Chosen` and `Training` record or change anything. A
caller passes one of these hooks to the model as `routing_hook`.

Letters: B sequences of T tokens, N = B T rows, E experts, K experts per token, D hidden size.
Sources: paper eq. 20-22 (gate), 2.2.2 (device-limited routing), eq. 23-31 (balance losses),
2.2.4 (token dropping).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from lamoe import kernels
from lamoe.model.config import ModelConfig


@dataclass(frozen=True)
class Route:
    """The router's choice for N rows.

    scores: [N, E] softmax over all experts, in at least float32.
    expert: [N, K] int64 chosen experts; id E stands for no expert.
    weight: [N, K] factors that multiply the experts' outputs, routed_scaling_factor included.
    """

    scores: torch.Tensor
    expert: torch.Tensor
    weight: torch.Tensor


def route(x: torch.Tensor, gate: torch.Tensor, config: ModelConfig) -> Route:
    """Choose the experts of each row.

    Scores are computed in float32 (float64 in float64 models) whatever the model's dtype, because
    bfloat16 would decide near ties differently. Weights are renormalised only if the config sets
    `norm_topk_prob`.

    Args:
        x: [N, D] input rows of the layer.
        gate: [E, D] router weight.
        config: gives the routing method and its sizes.

    Source: eq. 20-22.
    """
    if compiled := kernels.compiled("route", x, gate):  # the same in one pass, for training
        limited = config.topk_method == "group_limited_greedy"
        groups = (config.n_group, config.topk_group) if limited else (0, 0)
        top_k, scale = config.num_experts_per_tok, config.routed_scaling_factor
        return Route(*compiled(x, gate, top_k, *groups, config.norm_topk_prob, scale))
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    scores = F.linear(x.to(work), gate.to(work)).softmax(-1)
    weight, expert = choose(scores, config)
    if config.norm_topk_prob:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return Route(scores, expert, weight * config.routed_scaling_factor)


def choose(scores: torch.Tensor, config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Select K experts per row of scores [N, E]. Return (scores, ids) of these, both [N, K].

    Under "group_limited_greedy" only the experts of a row's best `topk_group` groups compete. A
    group's score is the maximum of its experts (DeepSeek-V3 sums the best two instead). Experts of
    other groups get the score -inf. With 0 instead, they could still win where the softmax of an
    eligible expert underflows to 0.

    Source: 2.2.2.
    """
    allowed = scores
    if config.topk_method == "group_limited_greedy":
        best = scores.unflatten(-1, (config.n_group, -1)).amax(-1)  # [N, groups]
        kept = best.topk(config.topk_group, dim=-1).indices
        closed = torch.ones_like(best, dtype=torch.bool).scatter(-1, kept, False)
        closed = closed.repeat_interleave(scores.shape[-1] // config.n_group, dim=-1)
        allowed = scores.masked_fill(closed, float("-inf"))
    expert = allowed.topk(config.num_experts_per_tok, dim=-1).indices
    return scores.gather(-1, expert), expert


# ---- training: balance losses and token dropping -------------------------------------------------
@dataclass(frozen=True)
class Balance:
    """The recipe's [balance] section: weights of the balance losses, and token dropping.

    Devices are virtual. Device d holds the d-th contiguous block of E / devices experts. The
    default weights are those of the paper's 236B run (released configs carry Lite's 0.001).

    expert, device, communication: the loss weights alpha_1, alpha_2, alpha_3 of eq. 23-31.
    devices: number of virtual devices, D in the paper.
    capacity_factor: budget of a device in multiples of the average load. 0 switches dropping off.
        The paper uses 1.0.
    keep_share: fraction (0 to 1) of the sequences whose tokens are never dropped.
    """

    expert: float = 0.003
    device: float = 0.05
    communication: float = 0.02
    devices: int = 1
    capacity_factor: float = 0.0
    keep_share: float = 0.1

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError when a value is out of range or does not fit the model."""
        for name in ("expert", "device", "communication", "capacity_factor", "keep_share"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"balance.{name} is {getattr(self, name)}; it must not be negative"
                )
        if self.keep_share > 1:
            raise ValueError(
                f"balance.keep_share is {self.keep_share}; "
                "it is a fraction of the sequences, so it must be at most 1"
            )
        if config.is_moe and (self.devices < 1 or config.n_routed_experts % self.devices):
            raise ValueError(
                f"balance.devices is {self.devices}; "
                f"it must divide n_routed_experts {config.n_routed_experts}"
            )
        if config.topk_method == "group_limited_greedy" and self.devices not in (1, config.n_group):
            raise ValueError(
                f"balance.devices is {self.devices}, but the router limits tokens over "
                f"n_group {config.n_group} groups; use that number, or 1"
            )


def reach(config: ModelConfig, devices: int) -> int:
    """Return the paper's M, the largest number of devices that one token can be sent to.

    M is `topk_group` if the router itself restricts each token to that many of these devices, else
    min(K, devices).
    """
    limited = config.topk_method == "group_limited_greedy" and devices == config.n_group
    return config.topk_group if limited else min(config.num_experts_per_tok, devices)


def balance_losses(
    scores: torch.Tensor, expert: torch.Tensor, config: ModelConfig, devices: int
) -> torch.Tensor:
    """Compute the three balance losses without their weights alpha.

    The losses are computed per sequence and then averaged, so the values do not depend on how
    sequences are batched. Gradients flow through the mean scores P, not through the counts f.

    Args:
        scores: [B, T, E] router scores, after the softmax.
        expert: [B, T, K] ids of the chosen experts, before dropping.
        config: gives K and the routing method.
        devices: number of virtual devices.

    Returns:
        [3], the expert-level, device-level and communication-level loss. Under even routing the
        first two are exactly 1. The third is 1 if every token also reaches M devices, and smaller
        otherwise.

    Source: eq. 23-31.
    """
    b, t, e = scores.shape
    k = expert.shape[-1]
    flat = expert.reshape(b, -1)
    counts = scores.new_zeros(b, e).scatter_add_(1, flat, scores.new_ones(flat.shape))
    f = counts * (e / (k * t))  # f_i
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
    """Decide which assignments (token, expert) stay when every device has a budget.

    A device may take capacity_factor * N K / devices assignments of this batch, rounded up. If a
    device gets more, its assignments with the lowest scores are dropped. Among equal scores, those
    of later tokens are dropped first. Assignments of protected tokens always stay, and they use up
    the budget first.

    Args:
        affinity: [N, K] router score of each assignment.
        expert: [N, K] chosen experts.
        n_experts: E.
        devices: number of virtual devices.
        capacity_factor: see Balance.
        protected: [N] bool, True for tokens that are never dropped. None protects no token.

    Returns:
        [N, K] bool, True for assignments that stay.

    Source: 2.2.4.
    """
    n, k = expert.shape
    budget = -int(-(capacity_factor * n * k) // devices)
    device = (expert // (n_experts // devices)).flatten()
    rank = 2 * device  # by device, protected assignments first, best first
    if protected is not None:
        protected = protected.repeat_interleave(k)
        rank = rank - protected.int()
    order = affinity.detach().flatten().argsort(descending=True, stable=True)
    order = order[rank[order].argsort(stable=True)]
    counts = _counts(device, devices)
    place = torch.arange(n * k, device=expert.device) - (counts.cumsum(0) - counts)[device[order]]
    keep = torch.empty(n * k, dtype=torch.bool, device=expert.device)
    keep[order] = place < budget
    if protected is not None:
        keep |= protected
    return keep.view(n, k)


def _counts(ids: torch.Tensor, size: int) -> torch.Tensor:
    """Count each of the ids 0 to size - 1, int64 [size]. bincount would wait for the device."""
    return ids.new_zeros(size).scatter_add_(0, ids, torch.ones_like(ids))


# ---- routing hooks -------------------------------------------------------------------------------
class RoutingHook(Protocol):
    """What a caller passes to the model to observe or change routing.

    Every MoE layer calls `after_routing` once per forward pass. Implement a hook as a plain class,
    not as a dataclass or list. FSDP2 copies dataclasses and lists among the arguments of forward,
    and the caller would never see what a copy records.
    """

    def after_routing(self, route: Route, sequences: int, config: ModelConfig) -> Route:
        """Return the route that the layer uses.

        Args:
            route: the router's choice for N rows.
            sequences: number of sequences B. The N / B rows of a sequence are adjacent.
            config: the config of the model.
        """
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


@dataclass
class LayerRecord:
    """Routing statistics of one MoE layer in one training step. Only `losses` carries gradients.

    losses: [3] balance losses of balance_losses, not yet multiplied by their weights alpha.
    load: [E] int64 number of assignments per expert, before dropping.
    dropped: int64 scalar, the number of dropped assignments.
    entropy: scalar, the entropy in nats of the router scores, averaged over rows.
    """

    losses: torch.Tensor
    load: torch.Tensor
    dropped: torch.Tensor
    entropy: torch.Tensor


class Training:
    """Routing hook of the trainer: records balance losses and load, drops assignments over budget.

    Use a new instance for every forward pass.

    Args:
        balance: weights of the losses, number of virtual devices, dropping budget.
        protected: [B] bool, True for sequences whose tokens are never dropped. None protects no
            sequence.

    Attributes:
        records: one LayerRecord per MoE layer, in order.
    """

    def __init__(self, balance: Balance, protected: torch.Tensor | None = None) -> None:
        self.balance, self.protected = balance, protected
        self.records: list[LayerRecord] = []

    def after_routing(self, route: Route, sequences: int, config: ModelConfig) -> Route:
        """Append one layer's record and return the route without the dropped assignments.

        A dropped assignment gets expert id E (no expert) and weight 0. The token still passes
        through the residual and the shared experts. Losses and load are counted before dropping.
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
            # torch.special.entr does the same, but it is not vectorised on CPUs.
            log = route.scores.clamp_min(torch.finfo(route.scores.dtype).tiny).log()
            entropy = -(route.scores * log).sum(-1).mean()
        load = _counts(route.expert.flatten(), e)
        self.records.append(LayerRecord(losses, load, dropped, entropy))
        return Route(route.scores, expert, weight)

    def loss(self) -> torch.Tensor:
        """Return the weighted sum of the balance losses over all recorded layers.

        The result is a scalar, and 0 if no layer was recorded.

        Source: alpha_1 L_ExpBal + alpha_2 L_DevBal + alpha_3 L_CommBal of eq. 23-31.
        """
        if not self.records:
            return torch.zeros(())
        losses = torch.stack([record.losses for record in self.records]).sum(0)
        return (losses * _alphas(self.balance, losses.device)).sum()


@functools.cache
def _alphas(balance: Balance, device: torch.device) -> torch.Tensor:
    """Return the weights of the balance losses. Cached: a copy to the device would wait for it."""
    weights = [balance.expert, balance.device, balance.communication]
    return torch.tensor(weights, device=device)
