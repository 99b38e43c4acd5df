"""Tests of activation recomputation: the same bits as without it, in less memory."""

from unittest import mock

import pytest
import torch

from lamoe.model.config import ModelConfig
from lamoe.model.routing import Balance, Training
from lamoe.model.transformer import Block, Transformer
from lamoe.train import recompute
from tiny_run import BODY, MLA, MOE, metrics, raw_recipe, state, train, write_texts

MODELS = {
    "mla-moe": {**BODY, **MLA, **MOE, "num_hidden_layers": 3},
    "group-limited": {
        **BODY,
        **MLA,
        **MOE,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
    },
    "mha-moe": {**BODY, **MOE, "model_type": "deepseek", "norm_topk_prob": True},
    "gqa-dense-tied": {
        **BODY,
        "model_type": "llama",
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
}


def one_pass(config, dtype, blocks, capacity_factor=1.0):
    """Return (losses, gradients, routing records) of one pass over packed documents."""
    model = Transformer(config).init_weights(3).to(dtype)
    recompute.apply(model, blocks)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (3, 49), generator=generator)
    segments = (torch.arange(48) // 20).expand(3, 48)
    balance = Balance(devices=4 if config.is_moe else 1, capacity_factor=capacity_factor)
    hook = Training(balance, torch.tensor([True, False, False]))
    loss = model.loss(ids[:, :-1], ids[:, 1:], segments, hook)
    total = loss + hook.loss()
    total.backward()
    records = [(r.losses.detach(), r.load, r.dropped, r.entropy) for r in hook.records]
    return (loss.detach(), total.detach()), [p.grad for p in model.parameters()], records


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return len(a) == len(b) and all(map(equal, a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_losses_gradients_and_records_have_the_same_bits(name, dtype):
    config = ModelConfig(**MODELS[name])
    plain = one_pass(config, dtype, 0)
    assert len(plain[2]) == len(config.moe_layers)
    assert not plain[2] or sum(int(r[2]) for r in plain[2]) > 0  # some tokens were dropped
    for blocks in (1, config.num_hidden_layers):
        with mock.patch.object(Block, "forward", autospec=True, side_effect=Block.forward) as run:
            again = one_pass(config, dtype, blocks)
        assert run.call_count == config.num_hidden_layers + blocks
        assert equal(again, plain)


def test_without_dropping():
    config = ModelConfig(**MODELS["mla-moe"])
    plain, again = (one_pass(config, torch.float32, blocks, capacity_factor=0) for blocks in (0, 3))
    assert equal(again, plain)


def test_the_second_run_uses_the_experts_of_the_first():
    """Even if the router would choose others then, because a device's sums are not reproducible."""
    config = ModelConfig(**MODELS["mla-moe"])
    hook = Training(Balance(devices=4))
    twice = recompute._RunTwice(hook)
    scores = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)).softmax(-1)
    weight, expert = scores.topk(2)
    first = twice.after_routing(recompute.Route(scores, expert, weight), 2, config)
    other = recompute.Route(scores, expert.flip(0), weight)
    second = twice.after_routing(other, 2, config)
    assert torch.equal(second.expert, first.expert) and len(hook.records) == 1


def test_passes_without_gradients_run_once():
    config = ModelConfig(**MODELS["mla-moe"])
    model = Transformer(config).init_weights()
    names = [name for name, _ in model.named_parameters()]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        plain = model(ids)
        recompute.apply(model, 3)
        assert torch.equal(model(ids), plain)
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_ends_in_the_same_state(tmp_path, dtype):
    texts = write_texts(tmp_path / "in")
    folders = []
    for wish in (False, True):
        run = dict(steps=3, dtype=dtype, recompute=wish)
        folders.append(train(raw_recipe(texts, tmp_path / str(wish), run=run)))
    a, b = map(state, folders)
    assert a["weights"] == b["weights"]
    assert equal(a["optimizer"]["masters"], b["optimizer"]["masters"])
    assert metrics(tmp_path / "False") == metrics(tmp_path / "True")
