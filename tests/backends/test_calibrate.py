"""Tests of `lamoe quantize --calibrate`: moments of inputs, error feedback, the text sample."""

import re
import weakref

import numpy as np
import pytest
import torch

import lamoe
from lamoe.backends.base import Formats
from lamoe.backends.cpu import calibrate, native, packed, packed_file
from lamoe.checkpoints import hf
from oracles import tiny
from tiny_packed import FAMILIES, pack, source
from tiny_run import trained  # noqa: F401 (a fixture)

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled kernels are not there")


@pytest.mark.parametrize("family", ["mla q_lora", "mla", "moe v1 mha", "gqa tied"])
def test_moments_match_those_of_the_whole_model(tmp_path, family):
    """The layer-by-layer walk finds the same second moments as hooks on the whole model."""
    c, model = FAMILIES[family], source(tmp_path / "model", family)
    plain, ids, want = lamoe.load(model), tiny.ids(FAMILIES[family], 6, 20), {}
    names = {
        f"layers.{i}.{n}": m
        for i, block in enumerate(plain.layers)
        for n, m in block.named_modules()
        if isinstance(m, torch.nn.Linear) and n != "attn.wkv_b"
    }
    for name, module in names.items():
        key = f"layers.{name.split('.')[1]}.{name.split('.')[-1]}"
        module.register_forward_pre_hook(
            lambda m, a, key=key: want.update(
                {key: a[0].flatten(0, -2).T @ a[0].flatten(0, -2) / a[0][..., 0].numel()}
            )
        )
    with torch.no_grad():
        h = plain.hidden(ids)
    want["head"] = h.flatten(0, 1).T @ h.flatten(0, 1) / h[..., 0].numel()
    got = {}
    for part in calibrate.moments(c, packed_file.reader(model, c), ids, torch.float32):
        got |= part
    for key, value in want.items():
        assert torch.allclose(got[key](0), value, rtol=1e-4, atol=1e-6), key
    quantised = {p.key for p in packed.packed_tensors(c, Formats("int4")) if p.format == "int4"}
    assert quantised == set(got)
    for p in packed.packed_tensors(c, Formats("int4")):
        if p.format == "int4":
            assert got[p.key](p.num_matrices - 1).shape == (p.k, p.k)


def test_the_mean_of_the_layer_is_mixed_into_the_moments_of_experts():
    """The moments of an expert are mixed with the mean moments of its layer.

    With many tokens the expert's own moments dominate. Without tokens only the mean remains.
    """
    module = type("E", (), {"w13": torch.ones(3, 4, 2), "w2": torch.ones(3, 2, 2)})
    x = torch.cat([torch.full((10000, 2), 2.0), torch.full((20000, 2), 1.0)])
    expert = torch.tensor([[0]] * 10000 + [[1]] * 20000)
    weight = torch.tensor([[1.0]] * 10000 + [[0.5]] * 20000)
    experts = calibrate._Experts(module)
    for part in (slice(0, 12000), slice(12000, None)):
        experts.add(module, (x[part], expert[part], weight[part]))
    for i, want in enumerate((4, 0.25, (4 + 2 * 0.25) / 3)):
        assert experts.inputs(i).flatten().tolist() == pytest.approx([want] * 4, rel=0.05)
    swiglu = 4 / (1 + np.exp(-4)) * 4  # gate and up are both 2 + 2 = 4
    assert experts.activations(0).flatten().tolist() == pytest.approx([swiglu**2] * 4, rel=0.05)


def test_the_rows_of_all_experts_never_exist_at_once(monkeypatch):
    """The input rows of all experts never exist at once.

    For a layer of DeepSeek-V2, all of them together would take 4 GB.
    """
    module = type("E", (), {"w13": torch.ones(8, 4, 2), "w2": torch.ones(8, 2, 2)})
    experts, returned, alive = calibrate._Experts(module), [], []
    experts.add(module, (torch.ones(80, 2), torch.arange(80)[:, None] % 8, torch.ones(80, 1)))
    real = experts._expert_rows

    def watched(e, activated=False):
        rows = real(e, activated)
        returned.append(weakref.ref(rows))
        alive.append(sum(r() is not None for r in returned))
        return rows

    monkeypatch.setattr(experts, "_expert_rows", watched)
    experts.activations(0)
    assert len(returned) == 9 and max(alive) <= 3


def correlated(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Return n rows of k correlated inputs of different sizes."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, k, generator=g)
        @ torch.randn(k, k, generator=g)
        * torch.exp(torch.randn(k, generator=g))
    )


@pytest.mark.parametrize("k", [27, 64, 128, 200])
@pytest.mark.parametrize(
    "isa", re.split(r"\W+", native.lib.features()) if native.available() else []
)
def test_later_inputs_compensate_for_the_errors_of_earlier_ones(k, isa):
    """With feedback, the output error for correlated inputs is far below that of plain rounding.

    The packed size does not change. The codes equal those of a recursion in plain torch.
    """
    g = torch.Generator().manual_seed(1)
    w, x = torch.randn(40, k, generator=g), correlated(4 * k, k)
    importance, feedback = calibrate.solve(x.T @ x / len(x))
    assert torch.equal(feedback.tril(-1), torch.zeros(k, k)) and torch.allclose(
        feedback.diagonal(), torch.ones(k)
    )
    plain, plain_scale = native.pack("int4", w, isa=isa)
    data, scale = native.pack("int4", w, importance, feedback, isa=isa)
    assert len(data) == len(plain) and scale == plain_scale
    rounded = [native.unpack("int4", d, 40, k, s) for d, s in ((plain, plain_scale), (data, scale))]
    before, after = (float((x @ (r - w).T).square().mean()) for r in rounded)
    assert after < 0.6 * before
    # Recursion in plain torch: the value of each column at the time when it was rounded.
    adjusted = w.clone()
    for i in range(k):
        error = adjusted[:, i] - rounded[1][:, i]
        adjusted[:, i + 1 :] -= error[:, None] * feedback[i, i + 1 :]
    near, far = ((m - rounded[1]).square().mean() / w.square().mean() for m in (adjusted, w))
    # The codes are close to the adjusted values, and farther from the original ones.
    assert near < 0.02 and far > near


def test_feedback_of_uncorrelated_inputs_changes_nothing():
    w = torch.randn(33, 70, generator=torch.Generator().manual_seed(2))
    importance, feedback = calibrate.solve(torch.eye(70))
    assert torch.allclose(feedback, torch.eye(70), atol=1e-6)
    # Equal importance and no feedback give the codes of plain rounding.
    assert torch.equal(
        native.pack("int4", w, importance / importance[0], torch.eye(70))[0],
        native.pack("int4", w)[0],
    )
    importance, feedback = calibrate.solve(torch.zeros(70, 70))  # inputs that are always zero
    assert importance.isfinite().all() and torch.equal(feedback, torch.eye(70))


def test_importance_reduces_the_output_error():
    """Weighting squared errors by importance reduces the output error for unequal inputs."""
    g = torch.Generator().manual_seed(0)
    w, spread = torch.randn(64, 128, generator=g), torch.exp(1.5 * torch.randn(128, generator=g))
    x = torch.randn(500, 128, generator=g) * spread
    errors = []
    for importance in (None, x.square().mean(0)):
        data, scale = native.pack("int4", w, importance)
        errors.append(
            float((x @ (native.unpack("int4", data, 64, 128, scale) - w).T).square().mean())
        )
    assert errors[1] < 0.9 * errors[0]


def test_rows_of_a_text(trained):
    folder = hf.resolve(trained)
    tok, c = lamoe.Tokenizer.load(folder), hf.read_config(folder)
    rows = calibrate.rows_of(tok, ["the cat sat on the mat. " * 200, "the dog ran. " * 300], c, 256)
    assert rows.shape[1] == c.max_position_embeddings and rows.shape[0] == 256 // rows.shape[1]
    with pytest.raises(ValueError, match="tokens; give at least 16"):
        calibrate.rows_of(tok, [""], c, 256)


@pytest.mark.parametrize(
    "sizes", [[3_000_000], [100] * 30_000, [50, 2_000_000, 0, 7, 900_000, 20_000]]
)
def test_only_a_sample_of_a_long_text_is_tokenised(sizes):
    """Only a sample of a long text is tokenised.

    A default run uses 32,768 tokens, but tokenising a gigabyte of text would take minutes.
    """
    tokenised = []
    tokenizer = type(
        "T",
        (),
        {
            "add_bos": False,
            "encode": lambda self, text, bos: tokenised.append(text) or list(range(len(text) // 4)),
        },
    )()
    texts = [
        "".join(chr(65 + (i + at // 100_000) % 60) for at in range(n)) for i, n in enumerate(sizes)
    ]
    rows = calibrate.rows_of(tokenizer, texts, FAMILIES["mla"], 4096)
    assert rows.numel() == 4096
    assert (
        0.5 * calibrate.CHARS * 4096
        < sum(map(len, tokenised))
        < 1.5 * calibrate.CHARS * 4096 + calibrate.PIECE
    )
    # The sample comes from all parts of the text.
    assert len(set("".join(tokenised))) > 0.2 * len(set("".join(texts)))
    assert calibrate._sample(texts[:1], 10**9) == texts[:1]


def test_moments_that_are_not_finite_are_refused(tmp_path):
    m = tiny.model(FAMILIES["mla"], dtype=torch.float32)
    with torch.no_grad():
        m.layers[1].attn_norm.weight.mul_(3e38)
    lamoe.save(m, tmp_path / "model")
    options = calibrate.options(
        tmp_path / "model", FAMILIES["mla"], tiny.ids(FAMILIES["mla"], 2, 20)
    )
    with pytest.raises(
        ValueError, match="gives a matrix inputs that are not finite.*without --calibrate"
    ):
        pack(tmp_path / "model", tmp_path / "out", **options)
