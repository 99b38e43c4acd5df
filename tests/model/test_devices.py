"""Tests of the model on another device: results equal those of the host.

LAMOE_TEST_DEVICE names the device (default: cpu). If it is an accelerator, the tests compare it
with the host. The last tests need no accelerator. They use torch's meta device, whose tensors have
shapes but no data. `NoMixedDevices` refuses every operation that mixes them with host tensors.
"""

import pytest
import torch

import lamoe
from devices import DENSE, DEVICE, NoMixedDevices
from lamoe import kernels
from lamoe.model import rope
from lamoe.model.cache import KVCache
from lamoe.model.routing import Balance, Training
from lamoe.model.transformer import Transformer
from oracles import tiny

CONFIGS = {
    "mla": tiny.HARD,
    "gqa": tiny.config("llama", num_key_value_heads=2),
    "moe without mla": tiny.config("deepseek"),
}


@pytest.fixture(params=CONFIGS)
def pair(request):
    """Return the same float32 model on the host and on DEVICE."""
    host = tiny.model(CONFIGS[request.param], dtype=torch.float32)
    return host, tiny.model(CONFIGS[request.param], dtype=torch.float32).to(DEVICE)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.device.type == DEVICE.type
    assert torch.allclose(found.cpu(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("form", ["expand", "absorb"])
def test_logits(pair, form, impl):
    host, model = pair
    ids = tiny.ids(host.config, 2, 33)
    with torch.no_grad():
        assert_same(model(ids.to(DEVICE), form=form), host(ids, form=form))


def test_loss_and_gradients(pair, impl):
    host, model = pair
    ids = tiny.ids(host.config, 2, 33)
    segments = (torch.arange(33) >= 17).long().expand(2, -1)
    for m, device in ((host, "cpu"), (model, DEVICE)):
        hook = Training(Balance(devices=m.config.n_group)) if m.config.is_moe else None
        batch = (x.to(device) for x in (ids, ids.roll(-1, 1), segments))
        loss = m.loss(*batch, hook)
        (loss if hook is None else loss + hook.loss()).backward()
        assert loss.device.type == torch.device(device).type
    for p, q in zip(model.parameters(), host.parameters()):
        assert_same(p.grad, q.grad)


def test_decoding_from_a_cache(pair, impl):
    host, model = pair
    ids = tiny.ids(host.config, 2, 12)
    cache = KVCache(host.config, 2, 12, device=DEVICE)
    with torch.no_grad():
        parts = [model(part.to(DEVICE), cache) for part in ids.split([8, 1, 1, 2], 1)]
        assert_same(torch.cat(parts, 1), host(ids))
    assert cache.positions(0).device.type == DEVICE.type


def test_token_dropping(pair):
    host, model = pair
    if not host.config.is_moe:
        pytest.skip("needs a MoE model")
    ids = tiny.ids(host.config, 2, 33)
    dropped = []
    for m, device in ((host, "cpu"), (model, DEVICE)):
        protected = torch.tensor([True, False], device=device)
        hook = Training(Balance(devices=4, capacity_factor=0.8), protected)
        m.hidden(ids.to(device), routing_hook=hook)
        dropped.append([int(record.dropped) for record in hook.records])
    assert dropped[0] == dropped[1] and all(dropped[0])


def test_load_and_generate(tmp_path):
    config = tiny.config(max_position_embeddings=64)
    lamoe.save(tiny.model(config, dtype=torch.float32), tmp_path)
    greedy = lamoe.SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    outputs = []
    for device in ("cpu", DEVICE):
        model = lamoe.load(tmp_path, device=device)
        assert all(p.device.type == torch.device(device).type for p in model.parameters())
        outputs.append([piece.token_id for piece in lamoe.generate(model, [1, 2, 3], greedy)])
    assert outputs[0] == outputs[1] and len(outputs[0]) == 12


def test_a_seed_means_the_same_weights_on_every_device():
    with DEVICE:
        model = Transformer(tiny.HARD)
    for p, q in zip(
        model.init_weights(3).parameters(), Transformer(tiny.HARD).init_weights(3).parameters()
    ):
        assert torch.equal(p.cpu(), q)


# ---- without an accelerator ----
def forward_on_meta(config, form: str) -> torch.Tensor:
    """Run forward passes with and without a cache on the meta device, and return the logits."""
    with torch.device("meta"):
        model = Transformer(config)
        ids = torch.zeros(2, 7, dtype=torch.int64)
    with NoMixedDevices(), torch.no_grad():
        assert model(ids, segments=torch.zeros_like(ids)).device.type == "meta"
        cache = KVCache(config, 2, 8, device="meta")
        for part in ids.split([4, 1, 2], 1):
            assert model(part, cache, form=form).device.type == "meta"
        return model(ids, form=form)


@pytest.mark.parametrize("form", ["expand", "absorb"])
@pytest.mark.parametrize("name", DENSE)
def test_no_host_tensor_takes_part(name, form, impl):
    logits = forward_on_meta(DENSE[name], form)
    assert logits.shape == (2, 7, 64) and logits.device.type == "meta"


@pytest.mark.parametrize("impl", ["ref", "fused"])
def test_no_host_tensor_takes_part_in_training(impl, monkeypatch):
    """A training pass uses no host tensor.

    It ends at the hidden states, because the loss needs a value.
    """
    monkeypatch.setattr(kernels, "_DEFAULT", impl)
    with torch.device("meta"):
        model = Transformer(DENSE["mla"])
        ids = torch.zeros(2, 7, dtype=torch.int64)
    with NoMixedDevices():
        model.hidden(ids).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n != "head.weight")


def test_no_mixed_devices_detects_a_host_table(monkeypatch):
    """NoMixedDevices detects rotary frequencies that stay on the host."""
    tiny.mutate(monkeypatch, rope.freqs, (".to(positions.device, non_blocking=True)", ""))
    with pytest.raises(RuntimeError, match="cpu.*meta"):
        forward_on_meta(DENSE["mla"], "expand")


def test_no_mixed_devices_detects_a_host_mask(monkeypatch):
    """NoMixedDevices detects an attention mask that stays on the host."""
    monkeypatch.setattr(kernels, "_DEFAULT", "ref")
    tiny.mutate(monkeypatch, kernels.ref.visible, ("device=device", "device='cpu'"))
    with pytest.raises(RuntimeError, match="cpu.*meta"):
        forward_on_meta(DENSE["gqa"], "expand")
