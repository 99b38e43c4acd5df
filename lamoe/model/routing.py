"""Who computes a token: gate scores, greedy and device-limited top-k, the three balance losses, device-level token dropping.

Pure functions over tensors; moe.py calls them. Letters: B sequences, T tokens, E experts, K experts per token, N = B T.
Sources: paper eq. 20-22 (gate), 2.2.2 (device-limited routing), eq. 23-31 (losses), 2.2.4 (dropping).
"""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass
class Chosen:
    """Handed down in Training's place by who serves: remembers the experts of every token, [N, K] per MoE layer, and changes nothing."""

    layers: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Training:
    """Handed down by the trainer through the model: what to balance, which sequences are protected, and what was seen.

    `protected` [B] bool marks sequences that are never dropped. After a forward pass `records` has one entry per MoE layer.
    """

    balance: Balance
    protected: torch.Tensor | None = None
    records: list[LayerRecord] = field(default_factory=list)

    def loss(self) -> torch.Tensor:
        """alpha_1 L_ExpBal + alpha_2 L_DevBal + alpha_3 L_CommBal, summed over layers (each layer balances itself)."""
        if not self.records:
            return torch.zeros(())
        alphas = torch.tensor(
            [self.balance.expert, self.balance.device, self.balance.communication]
        )
        return (torch.stack([r.losses for r in self.records]).sum(0) * alphas).sum()


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


def train_route(r: Route, batch: int, config: ModelConfig, training: Training) -> Route:
    """Record the layer's balance losses and load, and drop assignments over budget: a dropped one gets expert E (nobody) and
    weight 0, so the token keeps its residual and shared experts. f is counted before dropping."""
    e, b = config.n_routed_experts, training.balance
    losses = balance_losses(
        r.scores.unflatten(0, (batch, -1)), r.expert.unflatten(0, (batch, -1)), config, b.devices
    )
    expert, weight = r.expert, r.weight
    dropped = torch.zeros((), dtype=torch.int64)
    if b.capacity_factor:
        per_seq = expert.shape[0] // batch
        protected = (
            None if training.protected is None else training.protected.repeat_interleave(per_seq)
        )
        keep = keep_mask(
            r.scores.gather(1, expert), expert, e, b.devices, b.capacity_factor, protected
        )
        dropped = (~keep).sum()
        expert, weight = expert.masked_fill(~keep, e), weight * keep
    with torch.no_grad():
        entropy = torch.special.entr(r.scores).sum(-1).mean()
    training.records.append(
        LayerRecord(losses, r.expert.flatten().bincount(minlength=e), dropped, entropy)
    )
    return Route(r.scores, expert, weight)
