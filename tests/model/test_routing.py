"""Tests of routing: top-k, balance losses and token dropping against loops, effect on a gate."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from lamoe.model import routing
from lamoe.model.config import ModelConfig
from lamoe.model.routing import Balance, Training, balance_losses, keep_mask
from oracles import tiny

V2 = ModelConfig.preset("deepseek-v2")
GREEDY = tiny.config()  # 8 experts, 3 of them per token
LIMITED = tiny.config(**tiny.LIMITED)  # 4 groups, 2 of them per token


def random_scores(*shape: int, seed: int = 0, sharpness: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * sharpness).softmax(-1)


# ---- top-k ----
def test_v2_tokens_touch_at_most_three_devices_of_twenty_experts():
    scores = random_scores(500, 160, sharpness=1.0)
    _, expert = routing.choose(scores, V2)
    touched = [len(set(row)) for row in (expert // 20).tolist()]
    assert max(touched) == 3 and min(touched) >= 1
    _, free = routing.choose(scores, V2.replace(topk_method="greedy", n_group=1, topk_group=1))
    # Without the limit, tokens reach more groups.
    assert max(len(set(row)) for row in (free // 20).tolist()) > 3


def test_group_score_is_the_maximum():
    """The score of a group is its maximum: one strong expert beats two medium ones.

    The sum of two experts, as in DeepSeek-V3, would choose the other group.
    """
    scores = torch.tensor([[0.30, 0.01, 0.20, 0.19, 0.14, 0.13, 0.02, 0.01]])
    _, expert = routing.choose(scores, LIMITED.replace(topk_group=1, num_experts_per_tok=2))
    assert expert.tolist() == [[0, 1]]
    _, expert = routing.choose(scores, LIMITED)
    assert expert.tolist() == [[0, 2, 3]]


def underflowing(n: int) -> torch.Tensor:
    """Return scores where all but one or two experts are exactly 0 after a softmax in float32."""
    logits = torch.zeros(n, 8)
    for i in range(n):
        logits[i, i % 8] = 300.0
        logits[i, (3 * i + 1) % 8] = 299.0
    scores = logits.softmax(-1)
    assert (scores == 0).sum() >= 6 * n
    return scores


def touched(expert: torch.Tensor) -> int:
    return max(len(set(row)) for row in (expert // 2).tolist())


def test_groups_stay_excluded_when_scores_underflow():
    assert touched(routing.choose(underflowing(64), LIMITED)[1]) <= 2


def test_masking_with_zero_would_choose_excluded_groups(monkeypatch):
    tiny.mutate(monkeypatch, routing.choose, ('float("-inf")', "0.0"))
    assert touched(routing.choose(underflowing(64), LIMITED)[1]) > 2


def test_weights_are_plain_scores_times_the_factor():
    torch.manual_seed(0)
    x, gate = torch.randn(20, 32), torch.randn(8, 32)
    for c in (
        GREEDY,
        LIMITED,
        V2.replace(n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2),
    ):
        r = routing.route(x, gate, c)
        assert torch.allclose(r.scores, (x @ gate.t()).softmax(-1), atol=1e-6)
        assert torch.equal(r.weight, r.scores.gather(1, r.expert) * c.routed_scaling_factor)
        assert (r.weight.sum(1) < c.routed_scaling_factor).all()  # the weights are not renormalised
        normed = routing.route(x, gate, c.replace(norm_topk_prob=True))
        # lamoe both renormalises and scales. The published code does only one of them.
        assert torch.allclose(normed.weight.sum(1), torch.full((20,), c.routed_scaling_factor))
        assert torch.equal(normed.expert, r.expert)


@pytest.mark.parametrize(
    "dtype, work",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_gate_is_computed_in_at_least_float32(dtype, work):
    torch.manual_seed(0)
    x, gate = torch.randn(50, 32).to(dtype), torch.randn(8, 32).to(dtype)
    r = routing.route(x, gate, GREEDY)
    assert r.scores.dtype == r.weight.dtype == work
    exact = F.linear(x.double(), gate.double()).softmax(-1)
    assert (r.scores - exact).abs().max() < 1e-5  # bfloat16 logits would differ by 1e-2


def test_near_ties_are_decided_in_float32():
    """The gate distinguishes two experts whose logits are equal in bfloat16."""
    gate = torch.zeros(8, 32)
    gate[2, 0], gate[5, 0], gate[5, 1] = 8.0, 8.0, 2**-7
    c = GREEDY.replace(num_experts_per_tok=1)
    x = torch.ones(1, 32)
    assert (x.bfloat16() @ gate.bfloat16().t())[0, 2] == (x.bfloat16() @ gate.bfloat16().t())[0, 5]
    assert routing.route(x.bfloat16(), gate.bfloat16(), c).expert.tolist() == [[5]]


# ---- balance losses ----
def losses_by_loops(scores: list, expert: list, devices: int, most: int) -> list[float]:
    """Compute eq. 23-31 literally for one sequence, from scores [T][E] and experts [T][K]."""
    t, e, k = len(scores), len(scores[0]), len(expert[0])
    per = e // devices
    f = [e / (k * t) * sum(1 for row in expert for j in row if j == i) for i in range(e)]
    p = [sum(row[i] for row in scores) / t for i in range(e)]
    members = [range(d * per, (d + 1) * per) for d in range(devices)]
    f1 = [sum(f[j] for j in m) / per for m in members]
    p1 = [sum(p[j] for j in m) for m in members]
    f2 = [
        devices / (most * t) * sum(1 for row in expert if any(j in m for j in row)) for m in members
    ]
    return [
        sum(a * b for a, b in zip(f, p)),
        sum(a * b for a, b in zip(f1, p1)),
        sum(a * b for a, b in zip(f2, p1)),
    ]


@pytest.mark.parametrize(
    "c, devices, most",
    [(GREEDY, 1, 1), (GREEDY, 2, 2), (GREEDY, 8, 3), (LIMITED, 4, 2), (LIMITED, 1, 1)],
)
def test_losses_equal_the_loops(c, devices, most):
    scores = random_scores(3, 17, 8)
    expert = routing.choose(scores.flatten(0, 1), c)[1].unflatten(0, (3, 17))
    by_loops = [
        losses_by_loops(s, e, devices, most) for s, e in zip(scores.tolist(), expert.tolist())
    ]
    expected = torch.tensor(by_loops, dtype=torch.float64).mean(0)
    assert routing.reach(c, devices) == most
    assert torch.allclose(balance_losses(scores, expert, c, devices), expected, rtol=1e-13, atol=0)


def uniform(c: ModelConfig, t: int, devices: int):
    """Return equal scores and experts with equal loads. Each token reaches `reach` devices."""
    e, k = c.n_routed_experts, c.num_experts_per_tok
    per, most = e // devices, routing.reach(c, devices)
    share = k // most
    rows = [
        [
            ((i + m) % devices) * per + (i // devices * share + j) % per
            for m in range(most)
            for j in range(share)
        ]
        for i in range(t)
    ]
    expert = torch.tensor(rows)[None]
    assert torch.equal(
        expert.flatten().bincount(minlength=e), torch.full((e,), t * k // e)
    ) and all(len(set(r)) == k for r in rows)
    return torch.full((1, t, e), 1 / e, dtype=torch.float64), expert


@pytest.mark.parametrize(
    "c, devices",
    [
        (GREEDY.replace(num_experts_per_tok=4), 1),
        (GREEDY.replace(num_experts_per_tok=2), 2),
        (GREEDY.replace(num_experts_per_tok=4), 8),
        (LIMITED.replace(num_experts_per_tok=2), 4),
        (LIMITED.replace(num_experts_per_tok=4), 4),
    ],
)
def test_uniform_routing_costs_exactly_alpha(c, devices):
    scores, expert = uniform(c, 32, devices)
    losses = balance_losses(scores, expert, c, devices)
    assert losses.tolist() == [1.0, 1.0, 1.0]
    training = Training(Balance(devices=devices))
    training.records += [routing.LayerRecord(losses, None, None, None)] * 2
    # The default coefficients are those of the 236B model. The loss sums over both layers.
    assert training.loss().item() == pytest.approx(2 * (0.003 + 0.05 + 0.02), rel=1e-7)


def test_losses_do_not_depend_on_batching():
    scores = random_scores(6, 11, 8)
    expert = routing.choose(scores.flatten(0, 1), LIMITED)[1].unflatten(0, (6, 11))
    loss = lambda rows: balance_losses(scores[rows], expert[rows], LIMITED, 4)
    whole = loss([0, 1, 2, 3, 4, 5])
    for parts in ([[0], [1], [2], [3], [4], [5]], [[5, 0, 3], [1, 2, 4]], [[0, 1], [2, 3], [4, 5]]):
        assert torch.allclose(
            torch.stack([loss(p) for p in parts]).mean(0), whole, rtol=1e-13, atol=0
        )
    as_one = balance_losses(scores.flatten(0, 1)[None], expert.flatten(0, 1)[None], LIMITED, 4)
    assert (as_one - whole).abs().max() > 1e-3  # the loss balances every sequence separately


def test_gradient_flows_through_the_mean_scores_only():
    """The gradient of the balance losses flows only through the mean scores.

    The gradient of eq. 23 is f_i / (B T). The other two losses have the f' or f'' of the device
    instead.
    """
    b, t, devices = 2, 9, 4
    scores = random_scores(b, t, 8).requires_grad_()
    expert = routing.choose(scores.flatten(0, 1), LIMITED)[1].unflatten(0, (b, t))
    alphas = torch.tensor([0.3, 5.0, 2.0], dtype=torch.float64)
    (balance_losses(scores, expert, LIMITED, devices) * alphas).sum().backward()
    for s in range(b):
        f = [8 / (3 * t) * int((expert[s] == i).sum()) for i in range(8)]
        f1 = [(f[2 * d] + f[2 * d + 1]) / 2 for d in range(4)]
        f2 = [4 / (2 * t) * int((expert[s] // 2 == d).any(1).sum()) for d in range(4)]
        expected = torch.tensor(
            [0.3 * f[i] + 5.0 * f1[i // 2] + 2.0 * f2[i // 2] for i in range(8)],
            dtype=torch.float64,
        ) / (b * t)
        assert torch.allclose(scores.grad[s], expected.expand(t, 8), rtol=1e-12, atol=0)


def test_balance_losses_give_gradients_to_gates_only():
    m = tiny.model(LIMITED)
    training = Training(Balance(devices=4))
    m.hidden(tiny.ids(LIMITED, 2, 16), routing_hook=training)
    assert len(training.records) == 2
    training.loss().backward()
    for block in list(m.layers)[1:]:
        assert block.ffn.gate.weight.grad.abs().max() > 0
    last = m.layers[-1].ffn
    assert last.experts.w13.grad is None or last.experts.w13.grad.abs().max() == 0
    assert m.head.weight.grad is None


@pytest.mark.parametrize(
    "change",
    [
        {"expert": -1.0},
        {"device": -0.1},
        {"capacity_factor": -1.0},
        {"keep_share": 1.5},
        {"devices": 3},
        {"devices": 0},
        {"devices": 2},
    ],
)
def test_impossible_balance_is_refused(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=rf"balance\.{name} is {value}"):
        Balance(**change).check(LIMITED)
    Balance(devices=4).check(LIMITED)
    Balance(devices=2).check(GREEDY)


# ---- token dropping ----
def keep_by_loops(
    affinity, expert, n_experts, devices, capacity_factor, protected
) -> list[list[bool]]:
    n, k = len(expert), len(expert[0])
    budget = math.ceil(capacity_factor * n * k / devices)
    keep = [[True] * k for _ in range(n)]
    for d in range(devices):
        mine = [
            (t, j)
            for t in range(n)
            for j in range(k)
            if expert[t][j] // (n_experts // devices) == d
        ]
        excess = len(mine) - budget
        loose = [p for p in mine if not protected[p[0]]]
        # Drop the lowest affinity first. Of equal affinities, drop the later token first.
        loose.sort(key=lambda p: (affinity[p[0]][p[1]], -p[0], -p[1]))
        for t, j in loose[: max(excess, 0)]:
            keep[t][j] = False
    return keep


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "devices, capacity", [(1, 0.5), (2, 1.0), (4, 1.0), (4, 0.75), (8, 1.25), (4, 0.01)]
)
def test_dropping_equals_the_loops(seed, devices, capacity):
    rng = random.Random(seed)
    n, k, e = rng.choice([1, 3, 17, 40]), 3, 8
    expert = torch.tensor([rng.sample(range(e), k) for _ in range(n)])
    expert[: n // 2] = torch.tensor([0, 1, 2])  # overloads the first devices
    # Few distinct affinities give many ties.
    affinity = torch.tensor(
        [[rng.choice([0.1, 0.2, 0.2, 0.3, rng.random()]) for _ in range(k)] for _ in range(n)]
    )
    protected = torch.tensor([rng.random() < 0.3 for _ in range(n)])
    for guard in (None, protected):
        found = keep_mask(affinity, expert, e, devices, capacity, guard)
        rows = [False] * n if guard is None else guard.tolist()
        assert found.tolist() == keep_by_loops(
            affinity.tolist(), expert.tolist(), e, devices, capacity, rows
        )


def test_budget_is_met_exactly():
    # Device 0 has 12 assignments and device 1 has 4. The average is 8.
    expert = torch.tensor([[0, 1]] * 6 + [[4, 5]] * 2)
    affinity = torch.arange(16.0).view(8, 2) / 16
    keep = keep_mask(affinity, expert, 8, 2, 1.0)
    assert keep[:6].sum() == 8 and keep[6:].all()
    assert not keep[:2].any()  # the four assignments with the lowest affinity are dropped
    assert keep_mask(affinity, expert, 8, 2, 1.5).all()  # each device may take 12
    # A budget of 7.2 is rounded up to 8.
    assert keep_mask(affinity, expert, 8, 2, 0.9)[:6].sum() == 8
    ties = keep_mask(torch.full((8, 2), 0.5), expert, 8, 2, 1.0)
    assert ties[:4].all() and not ties[4:6].any()  # the later token is dropped


def test_protected_tokens_are_kept_and_count_against_the_budget():
    expert, affinity = torch.zeros(10, 1, dtype=torch.long), torch.linspace(1, 0.1, 10)[:, None]
    protected = torch.arange(10) >= 7  # the three tokens with the lowest affinity
    keep = keep_mask(affinity, expert, 2, 2, 1.0, protected)
    assert keep.flatten().tolist() == [True] * 2 + [False] * 5 + [True] * 3
    # Protected assignments stay even over the budget.
    assert keep_mask(affinity, expert, 2, 2, 1.0, torch.ones(10, dtype=torch.bool)).all()


def trained_route(x, gate, c, batch, **changes):
    training = Training(Balance(devices=4, **changes))
    r = routing.route(x, gate, c)
    return r, training.after_routing(r, batch, c), training.records[0]


def test_the_training_hook_drops_after_counting():
    torch.manual_seed(3)
    x, gate = torch.randn(24, 32), torch.randn(8, 32)
    gate[0] += x.mean(0) * 5
    r, after, record = trained_route(x, gate, LIMITED, 2, capacity_factor=1.0)
    dropped = after.expert == 8
    assert 0 < int(dropped.sum()) == int(record.dropped)
    assert torch.equal(dropped, ~keep_mask(r.scores.gather(1, r.expert), r.expert, 8, 4, 1.0))
    assert (after.weight[dropped] == 0).all() and torch.equal(
        after.weight[~dropped], r.weight[~dropped]
    )
    assert torch.equal(after.expert[~dropped], r.expert[~dropped])
    # The load counts dropped tokens too.
    assert torch.equal(record.load, r.expert.flatten().bincount(minlength=8))
    undropped = trained_route(x, gate, LIMITED, 2)
    assert torch.equal(record.losses, undropped[2].losses) and int(undropped[2].dropped) == 0
    assert torch.equal(undropped[1].expert, r.expert)
    entropy = -(r.scores * r.scores.log()).sum(-1).mean()
    assert float(record.entropy) == pytest.approx(float(entropy), rel=1e-5)


def test_protected_sequences_of_a_model_are_never_dropped():
    c = LIMITED
    m = tiny.model(c)
    tokens = tiny.ids(c, 4, 16)
    plain = m.hidden(tokens)
    training = Training(
        Balance(devices=4, capacity_factor=0.5), torch.tensor([False, True, False, True])
    )
    dropped = m.hidden(tokens, routing_hook=training)
    assert all(int(r.dropped) > 0 for r in training.records)
    assert torch.allclose(dropped[[1, 3]], plain[[1, 3]], rtol=0, atol=1e-12)
    for row in (0, 2):
        assert (dropped[row] - plain[row]).abs().max() > 1e-2
    # Only the training hook drops tokens. Train mode alone drops nothing.
    assert torch.equal(m.hidden(tokens), plain)
    assert torch.equal(m.train().hidden(tokens), plain)


def test_loss_oracle_fails_for_mutations(monkeypatch):
    for change in (
        ("(e / (k * t))", "(e / t)"),
        ("unflatten(1, (devices, -1)).mean(-1)", "unflatten(1, (devices, -1)).sum(-1)"),
        ("reach(config, devices) * t", "devices * t"),
        ("s.mean() for", "s.sum() for"),
    ):
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            tiny.mutate(patch, balance_losses, change)
            test_losses_equal_the_loops(LIMITED, 4, 2)


def test_dropping_oracle_fails_for_mutations(monkeypatch):
    for change in (
        ("descending=True, stable=True", "stable=True"),
        ("place < budget", "place <= budget"),
        ("rank_by + 2.0", "rank_by + 0.0"),
        ("-int(-(capacity_factor * n * k) // devices)", "int(capacity_factor * n * k) // devices"),
    ):
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            tiny.mutate(patch, keep_mask, change)
            for seed in range(6):
                for capacity in (0.5, 0.75, 0.8):
                    test_dropping_equals_the_loops(seed, 4, capacity)


# ---- effect of the losses on a gate ----
def imbalance_after_training(weight: float) -> float:
    """Train a gate that prefers two experts for 60 steps. Return max load / mean load."""
    c = GREEDY.replace(num_experts_per_tok=2)
    generator = torch.Generator().manual_seed(0)
    # The inputs share a direction, which makes the bias of the gate effective.
    x = torch.randn(4, 32, 32, generator=generator) + 1.0
    # The task loss also favours the two experts a little.
    cost = torch.tensor([0.0, 0.0] + [0.02] * 6)
    gate = torch.randn(8, 32, generator=generator) * 0.05
    gate[:2] += 0.15
    gate.requires_grad_()
    optimiser = torch.optim.Adam([gate], lr=0.01)
    balance = Balance(expert=weight, device=weight, communication=weight, devices=4)
    for _ in range(60):
        training = Training(balance)
        r = training.after_routing(routing.route(x.flatten(0, 1), gate, c), 4, c)
        task = (r.scores @ cost).mean()
        optimiser.zero_grad()
        (task + training.loss()).backward()
        optimiser.step()
    load = training.records[0].load
    return float(load.max() / load.float().mean())


def test_a_biased_router_recovers_with_the_losses_and_not_without():
    assert imbalance_after_training(0.0) > 3.5
    assert imbalance_after_training(0.1) < 2.0
