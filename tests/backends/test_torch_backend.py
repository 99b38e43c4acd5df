"""Tests of TorchBackend on LAMOE_TEST_DEVICE (default: cpu), and of the choice of a backend."""

import pytest
import torch

import lamoe
from devices import DENSE, DEVICE, NoMixedDevices
from lamoe import backends
from lamoe.backends.base import Batch, Formats
from lamoe.backends.cpu import native
from lamoe.backends.load import resolve_device
from lamoe.backends.torch_backend import TorchBackend
from lamoe.engine.llm import LLM
from lamoe.engine.sampler import SamplingParams
from lamoe.engine.text_loss import text_loss
from lamoe.model.transformer import Transformer
from oracles import tiny

CONFIGS = {
    "mla": tiny.HARD.replace(max_position_embeddings=256),
    "gqa": tiny.config("llama", num_key_value_heads=2, max_position_embeddings=256),
}
PROMPTS = [[1, 2, 3], list(range(1, 40)), [5] * 17]
KERNELS = pytest.mark.skipif(not native.available(), reason="needs the compiled kernels")


def llm(name: str, **options) -> LLM:
    model = tiny.model(CONFIGS[name], dtype=torch.float32)
    options = {"cache": "fp32", "max_model_len": 96, "page_size": 4, **options}
    return LLM(model, backend="torch", **options)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cache", ["fp32", "6bit"])
def test_the_engine_on_a_device_gives_the_tokens_of_the_host(name, cache):
    params = [
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=0.0, max_tokens=12, repetition_penalty=1.3),
    ]
    host = llm(name, cache=cache, device="cpu").generate(PROMPTS, params)
    engine = llm(name, cache=cache, device=DEVICE)
    found = engine.generate(PROMPTS, params)
    assert engine.cache.rows.device.type == engine.backend.device.type == DEVICE.type
    assert [o.token_ids for o in found] == [o.token_ids for o in host]


def test_a_prefix_file_of_the_host_is_read_on_a_device(tmp_path):
    prompt = list(range(1, 40))
    greedy = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    host, engine = llm("mla", device="cpu"), llm("mla", device=DEVICE)
    expected = host.generate([prompt], greedy)[0].token_ids
    saved = host.save_cache(tmp_path / "prefix", prompt)
    assert engine.load_cache(tmp_path / "prefix") == saved > 0
    output = engine.generate([prompt], greedy)[0]
    assert output.token_ids == expected and output.cached_tokens == saved
    assert engine.save_cache(tmp_path / "again", prompt) == saved


def test_text_loss_on_a_device():
    ids = tiny.ids(CONFIGS["mla"], 4, 33).numpy()
    rows = [(row, (torch.arange(33) > 20).int().numpy()) for row in ids]
    model = tiny.model(CONFIGS["mla"], dtype=torch.float32)
    host = text_loss(TorchBackend(model), rows)
    found = text_loss(backends.load(model, device=DEVICE, backend="torch"), rows)
    assert found.targets == host.targets == 4 * 31
    assert found.nats == pytest.approx(host.nats, rel=1e-5)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("cache", ["fp32", "bf16", "6bit", "4bit"])
def test_no_host_tensor_takes_part_in_a_forward_pass(name, cache):
    """A forward pass on the meta device uses no host tensor.

    The pass has two decoding sequences and one prompt chunk. Meta tensors have shapes but no data.
    """
    with torch.device("meta"):
        backend = TorchBackend(Transformer(DENSE[name]))
    paged = backend.new_cache(8, 4, cache)
    batch = Batch(
        ids=[1, 2, 3, 4, 5],
        positions=torch.tensor([2, 6, 0, 1, 2]),
        sequences=torch.tensor([[1, 3, 0], [1, 7, 1], [3, 3, 3]], dtype=torch.int32),
        pages=torch.tensor([0, 1, 2, 3], dtype=torch.int32),
        output_rows=[0, 1, 4],
    )
    with NoMixedDevices():
        logits, experts = backend.forward(batch, paged)
    assert logits.shape == (3, DENSE[name].vocab_size) and logits.device.type == "meta"
    assert paged.rows.device.type == "meta" and experts is None


# ---- the choice of a backend ----
@KERNELS
def test_the_default_backend_of_a_model():
    model = tiny.model(tiny.HARD, dtype=torch.float32)
    assert backends.load(model).name == "cpu"
    assert backends.load(model, backend="torch").name == "torch"
    assert backends.load(model.double()).name == "torch"  # the kernels do not support float64


def test_lamoe_backend_chooses_the_default(monkeypatch):
    monkeypatch.setenv("LAMOE_BACKEND", "torch")
    assert backends.load(tiny.model(tiny.HARD)).name == "torch"
    monkeypatch.setenv("LAMOE_BACKEND", "gpu")
    with pytest.raises(ValueError, match="backend is 'gpu'; known: torch, cpu"):
        backends.load(tiny.model(tiny.HARD))


@KERNELS
def test_an_argument_overrides_lamoe_backend(monkeypatch):
    monkeypatch.setenv("LAMOE_BACKEND", "torch")
    model = tiny.model(tiny.HARD, dtype=torch.float32)
    assert backends.load(model, backend="cpu").name == "cpu"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(backend="native"), "backend is 'native'; known: torch, cpu"),
        (dict(device="tpu7"), "unknown device 'tpu7'; known: auto, cpu, cuda, mps"),
        (dict(device="meta", backend="cpu"), "run on the CPU, not on meta"),
        (dict(device="meta", weights="int8"), "run on the CPU, not on meta"),
    ],
)
def test_invalid_backends_and_devices_are_refused(options, message):
    options = dict(options)
    formats = Formats(options.pop("weights", None))
    with pytest.raises(ValueError, match=message):
        backends.load(tiny.model(tiny.HARD), formats, **options)


def test_a_loaded_backend_keeps_its_device_and_formats(monkeypatch):
    backend = backends.load(tiny.model(tiny.HARD, dtype=torch.float32), backend="torch")
    # This default applies only to models that are not loaded yet.
    monkeypatch.setenv("LAMOE_BACKEND", "cpu")
    assert backends.load(backend, Formats("fp32"), device="cpu") is backend
    loaded = "was requested, but the model is already loaded on the torch backend in fp32"
    with pytest.raises(ValueError, match=f"weights='int8'.* {loaded}"):
        backends.load(backend, Formats("int8"))
    with pytest.raises(ValueError, match=f"backend='cpu' {loaded}"):
        backends.load(backend, backend="cpu")
    with pytest.raises(ValueError, match="on device 'cpu', but device is 'meta'"):
        backends.load(backend, device="meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_this_machine_lacks_is_refused(tmp_path):
    lamoe.save(tiny.model(tiny.HARD), tmp_path)
    with pytest.raises(ValueError, match="device 'cuda' is not available.*use device='cpu'"):
        LLM(tmp_path, device="cuda")
    assert resolve_device("auto").type in ("cpu", "mps")
