"""Tests of the model against three oracles: the paper as loops, transformers, and frozen goldens.

The last tests show that each oracle fails if a formula of the model is broken (a mutation).
Comparisons start at position 1, because position 0 does not depend on the softmax scale.
"""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from lamoe import checkpoints
from lamoe.model import attention, cache, moe, rope, routing
from lamoe.model import transformer as model
from lamoe.model.cache import KVCache
from lamoe.model.config import ModelConfig, RopeScaling
from oracles import naive, run, tiny

GOLDENS = Path(__file__).parents[1] / "oracles" / "goldens"
FAR = [0, 1, 2, 50, 4095, 4096, 4097, 30000, 39999, 40000, 40001, 100000]
ALL_CASES = {
    **tiny.V2_CASES,
    **{f"llama-{k}": c for k, c in tiny.LLAMA_CASES.items()},
    "moe-v1": tiny.config("deepseek", norm_topk_prob=True),
    "moe-v1-gqa-every-second": tiny.config(
        "deepseek", num_key_value_heads=2, moe_layer_freq=2, n_shared_experts=0
    ),
    "v2-dense": tiny.config("llama").replace(
        model_type="deepseek_v2",
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
    ),
    "v2-renormalised": tiny.HARD.replace(norm_topk_prob=True),
    "v2-two-mscales": tiny.HARD.replace(
        rope_scaling=RopeScaling(8.0, 64, mscale=1.0, mscale_all_dim=0.5)
    ),
}


def by_every_path(m, tokens: torch.Tensor):
    """Yield (name, logits) of one text for every way to compute it.

    The text runs at once in each form of attention, and through a cache in uneven chunks and token
    by token.
    """
    forms = ["expand", "absorb"] if m.config.is_mla else [None]
    with torch.no_grad():
        for form in forms:
            yield f"whole, {form}", m(tokens, form=form)
        for form, sizes in [(form, [3, 1, tokens.shape[1] - 4]) for form in forms] + [
            (None, [1] * tokens.shape[1])
        ]:
            cache = KVCache(m.config, *tokens.shape, m.embed.weight.dtype)
            yield (
                f"cached, {form}, {sizes}",
                torch.cat([m(part, cache, form=form) for part in tokens.split(sizes, 1)], 1),
            )


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str = ""):
    """Compare logits [B, T, ...] by the largest error relative to the largest value. NaN fails.

    Position 0 is not compared.
    """
    ours, theirs = ours[:, 1:].double(), theirs[:, 1:].double()
    assert ours.shape == theirs.shape
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error <= tolerance, f"{what}: relative error {error:.1e} > {tolerance:.0e}"


# ---- oracle: the paper as loops ----
def against_naive(m, tokens: torch.Tensor):
    w = tiny.weights(m)
    theirs = torch.tensor(np.stack([naive.logits(m.config, w, row) for row in tokens.tolist()]))
    for path, ours in by_every_path(m, tokens):
        assert_close(ours, theirs, 1e-12, path)


@pytest.mark.parametrize("name", ALL_CASES)
def test_logits_equal_the_paper_on_every_path(name, impl):
    m = tiny.model(ALL_CASES[name])
    against_naive(m, tiny.ids(m.config, 2, 10))


@pytest.mark.parametrize(
    "name",
    [
        "lora-yarn-limited-1dense",
        "plain-rope-greedy-0dense",
        "moe-v1",
        "llama-gqa-yarn",
        "v2-two-mscales",
    ],
)
def test_far_positions_equal_the_paper(name, impl):
    m = tiny.model(ALL_CASES[name])
    tokens = tiny.ids(m.config, 1, len(FAR))
    theirs = torch.tensor(naive.logits(m.config, tiny.weights(m), tokens[0].tolist(), FAR))[None]
    for form in ["expand", "absorb"] if m.config.is_mla else [None]:
        assert_close(tiny.at_positions(m, tokens, FAR, form).detach(), theirs, 1e-10, str(form))


@pytest.mark.parametrize(
    "name", ["lora-yarn-limited-1dense", "plain-rope-greedy-1dense", "moe-v1", "llama-gqa"]
)
def test_gradients_equal_central_differences_of_the_paper(name, impl):
    """The gradient along a random direction equals the central difference of naive.py's loss."""
    m = tiny.model(ALL_CASES[name])
    tokens = tiny.ids(m.config, 1, 8)
    targets = tokens.roll(-1, 1)
    generator = torch.Generator().manual_seed(9)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in m.parameters()]
    m.loss(tokens, targets).backward()
    slope = sum(float((p.grad * d).sum()) for p, d in zip(m.parameters(), direction))

    def naive_loss(step: float) -> float:
        moved = tiny.model(m.config)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), direction):
                p += step * d
        out = torch.tensor(naive.logits(m.config, tiny.weights(moved), tokens[0].tolist()))
        return float(F.cross_entropy(out, targets[0]))

    h = 1e-6
    assert slope == pytest.approx((naive_loss(h) - naive_loss(-h)) / (2 * h), rel=1e-6)


# ---- transformers ----
@functools.cache
def _transformers():
    transformers = pytest.importorskip(
        "transformers",
        reason="THE ORACLE IS MISSING: parity with transformers was NOT checked; pip install "
        "'lamoe[test]'",
    )
    version = tuple(int(x) for x in transformers.__version__.split(".")[:2])
    if version < (5, 17):
        pytest.skip(
            f"THE ORACLE IS TOO OLD: transformers {transformers.__version__} computes YaRN "
            "wrongly; parity was NOT checked; need >= 5.17"
        )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@functools.lru_cache(maxsize=4)
def theirs_of(c: ModelConfig, dtype: torch.dtype = torch.float32):
    """Return transformers' model with the weights of tiny.model(c).

    Its norms, rotations and softmax are float32 whatever its dtype.
    """
    transformers = _transformers()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(tiny.model(c, dtype=dtype), folder)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        ).eval()


def gradient_of(theirs, disk: str) -> torch.Tensor:
    """Return transformers' gradient of the tensor named `disk`, whose experts may be stacked."""
    parameters = dict(theirs.named_parameters())
    if disk in parameters:
        return parameters[disk].grad
    stem, expert, part, _ = disk.rsplit(".", 3)
    if part == "down_proj":
        return parameters[f"{stem}.down_proj"].grad[int(expert)]
    return (
        parameters[f"{stem}.gate_up_proj"]
        .grad[int(expert)]
        .chunk(2)[("gate_proj", "up_proj").index(part)]
    )


def against_transformers(m, tokens: torch.Tensor):
    theirs = theirs_of(m.config)
    with torch.no_grad():
        expected = theirs(tokens).logits
    for path, ours in by_every_path(m, tokens):
        assert_close(ours, expected, 3e-5, path)


_HF_CASES = {**tiny.V2_CASES, **{f"llama-{k}": c for k, c in tiny.LLAMA_CASES.items()}}


@pytest.mark.parametrize("name", _HF_CASES)
def test_logits_gradients_and_greedy_tokens_equal_those_of_transformers(name):
    c = _HF_CASES[name]
    m, theirs = tiny.model(c, dtype=torch.float32), theirs_of(c)
    tokens = tiny.ids(c, 2, 24)
    against_transformers(m, tokens)

    targets = tokens.roll(-1, 1)
    m.loss(tokens, targets).backward()
    theirs.zero_grad()
    F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten()).backward()
    ours = dict(m.named_parameters())
    for disk, parameter, where in checkpoints.hf.table(c):
        expected, found = gradient_of(theirs, disk), ours[parameter].grad[where]
        # The limit is relative to all experts, because a single expert may have had only one token.
        limit = 2e-4 * float(ours[parameter].grad.abs().max())
        assert float((found - expected).abs().max()) <= limit, f"gradient of {disk}"

    assert torch.equal(greedy(m, tokens[:, :5], 12), greedy_uncached(theirs, tokens[:, :5], 12))


@torch.no_grad()
def greedy(m, tokens: torch.Tensor, steps: int) -> torch.Tensor:
    """Decode greedily from a cache. Returns [B, steps] token ids."""
    cache = KVCache(m.config, tokens.shape[0], tokens.shape[1] + steps, m.embed.weight.dtype)
    out = []
    for _ in range(steps):
        tokens = m(tokens, cache)[:, -1:].argmax(-1)
        out.append(tokens)
    return torch.cat(out, 1)


@torch.no_grad()
def greedy_uncached(theirs, tokens: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        tokens = torch.cat([tokens, theirs(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokens[:, -steps:]


@pytest.mark.parametrize(
    "name", ["lora-yarn-limited-1dense", "plain-rope-greedy-1dense", "llama-gqa"]
)
def test_float64_logits_equal_those_of_transformers(name):
    """float64 logits equal those of transformers, which computes norms and softmax in float32."""
    c = _HF_CASES[name]
    m, theirs = tiny.model(c), theirs_of(c, torch.float64)
    tokens = tiny.ids(c, 2, 24)
    m(tokens).logsumexp(-1).sum().backward()
    out = theirs(tokens).logits
    assert_close(m(tokens).detach(), out.detach(), 5e-6)
    out.logsumexp(-1).sum().backward()
    ours = dict(m.named_parameters())
    for disk, parameter, where in checkpoints.hf.table(c):
        error = (ours[parameter].grad[where] - gradient_of(theirs, disk)).abs().max()
        assert error <= 2e-5 * ours[parameter].grad.abs().max(), f"gradient of {disk}"


# 32 rotary pairs as in the released models, so that the YaRN ramp (pairs 10 to 23) has an effect.
_WIDE = dict(num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
LONG = {
    "mla": tiny.config(
        **_WIDE,
        q_lora_rank=16,
        qk_rope_head_dim=64,
        qk_nope_head_dim=4,
        v_head_dim=4,
        rope_scaling=RopeScaling(),
        first_k_dense_replace=0,
        **tiny.LIMITED,
    ),
    "mla-no-yarn": tiny.config(
        **_WIDE, qk_rope_head_dim=64, qk_nope_head_dim=4, v_head_dim=4, first_k_dense_replace=0
    ),
    "llama": tiny.config("llama", **_WIDE, num_key_value_heads=1, head_dim=64),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("form", ["expand", "absorb"])
def test_logits_at_far_positions_equal_those_of_transformers(name, form):
    c = LONG[name]
    if form == "absorb" and not c.is_mla:
        form = None
    m, theirs = tiny.model(c, dtype=torch.float32), theirs_of(c)
    tokens = tiny.ids(c, 2, len(FAR))
    with torch.no_grad():
        expected = theirs(
            tokens, position_ids=torch.tensor([FAR, FAR]), attention_mask=torch.ones_like(tokens)
        ).logits
        assert_close(tiny.at_positions(m, tokens, FAR, form), expected, 5e-5)


@pytest.mark.parametrize("name", ["mla", "llama"])
def test_logits_over_4200_tokens_equal_those_of_transformers(name):
    """Logits equal those of transformers at every position up to 4200, beyond the original 4096."""
    c = LONG[name]
    m, theirs = tiny.model(c, dtype=torch.float32), theirs_of(c)
    tokens = tiny.ids(c, 1, 4200)
    with torch.no_grad():
        ours, expected = m(tokens), theirs(tokens, use_cache=False).logits
    for position in (1, 2, 4095, 4096, 4097, 4199):
        assert_close(
            ours[:, position - 1 : position + 1],
            expected[:, position - 1 : position + 1],
            5e-5,
            f"position {position}",
        )
    assert_close(ours, expected, 5e-5)


def from_position_40000(m, theirs, form: str | None):
    """Return our and transformers' logits of 4 tokens after 40,000 cached ones.

    Both caches hold the same random rows.
    """
    c, start = m.config, 40000
    cache = KVCache(c, 1, start + 4)
    generator = torch.Generator().manual_seed(5)
    for rows in cache.rows:
        rows[:, :, :start] = torch.randn(*rows.shape[:2], start, rows.shape[3], generator=generator)
    cache.length = start
    heads = 1 if c.is_mla else c.n_kv_heads
    past = _transformers().DynamicCache(config=theirs.config)
    past.update(
        *(rows[0, :, :start].unflatten(-1, (heads, -1)).transpose(1, 2) for rows in cache.rows), 0
    )
    tokens = tiny.ids(c, 1, 4)
    with torch.no_grad():
        ours = m(tokens, cache, form=form)
        assert cache.length == start + 4
        return ours, theirs(tokens, past_key_values=past).logits


@pytest.mark.parametrize(
    "name, form", [("mla", "expand"), ("mla", "absorb"), ("mla-no-yarn", "absorb"), ("llama", None)]
)
def test_logits_from_position_40000_equal_those_of_transformers(name, form):
    m = tiny.model(LONG[name], dtype=torch.float32)
    assert_close(*from_position_40000(m, theirs_of(LONG[name]), form), 5e-5)


def test_far_oracle_fails_for_a_position_off_by_one(monkeypatch):
    tiny.mutate(
        monkeypatch,
        cache.KVCache.positions,
        ("self.length, self.length + tokens", "self.length + 1, self.length + 1 + tokens"),
    )
    m = tiny.model(LONG["mla"], dtype=torch.float32)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(*from_position_40000(m, theirs_of(LONG["mla"]), "absorb"), 5e-5)


# ---- frozen goldens ----
def frozen(name: str, folder: Path):
    """Return the model of the golden `name`, loaded as any checkpoint, and its other tensors."""
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as f:
        tensors, about = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["about"])
    assert tuple(int(x) for x in about["transformers"].split(".")[:2]) >= (5, 17)
    (folder / "config.json").write_text(json.dumps(about["config"]))
    save_file(
        {k.removeprefix("weights."): t for k, t in tensors.items() if k.startswith("weights.")},
        folder / "model.safetensors",
    )
    return checkpoints.load(folder, dtype="float32"), tensors


def against_golden(name: str, folder: Path):
    m, golden = frozen(name, folder)
    for path, ours in by_every_path(m, golden["ids"]):
        assert_close(ours, golden["logits"], 3e-5, path)
    for form in ["expand", "absorb"] if m.config.is_mla else [None]:
        assert_close(
            tiny.at_positions(m, golden["ids"], FAR, form).detach(),
            golden["far"],
            5e-5,
            f"far, {form}",
        )


GOLDEN_NAMES = sorted(p.stem for p in GOLDENS.glob("*.safetensors"))


def test_all_goldens_exist_and_are_small():
    assert GOLDEN_NAMES == ["llama-gqa", "llama-mha-tied", "v2", "v2-lite", "v2-no-yarn"]
    assert sum(p.stat().st_size for p in GOLDENS.iterdir()) < 200_000


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_logits(name, tmp_path, impl):
    against_golden(name, tmp_path)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_greedy_tokens_and_gradients(name, tmp_path, impl):
    m, golden = frozen(name, tmp_path)
    tokens = golden["ids"]
    assert torch.equal(greedy(m, tokens, golden["greedy"].shape[1]), golden["greedy"])
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -1
    m.loss(tokens, targets).backward()
    gradients = {
        e.disk: dict(m.named_parameters())[e.parameter].grad[e.where]
        for e in checkpoints.hf.table(m.config)
    }
    assert {f"gradients.{disk}" for disk in gradients} == {
        k for k in golden if k.startswith("gradients.")
    }
    largest = max(float(g.norm()) for g in gradients.values())
    for disk, g in gradients.items():
        g = g.double().flatten()
        norm, signed = golden[f"gradients.{disk}"]  # tools/make_goldens.py: summary
        assert float(g.norm()) == pytest.approx(float(norm), rel=1e-4, abs=1e-6 * largest), disk
        weights = torch.cos(torch.arange(g.numel(), dtype=torch.float64) * 0.7)
        assert float(g @ weights) == pytest.approx(
            float(signed), rel=1e-3, abs=1e-4 * float(norm) + 1e-6 * largest
        ), disk


def test_golden_run(impl):
    """Ten training losses and the first gradients equal recorded ones, with either set of ops."""
    expected, found = json.loads((GOLDENS / "run.json").read_text()), run.ten_steps()
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["gradient"] == pytest.approx(expected["gradient"], rel=1e-4)
    assert found["losses"][-1] < 0.7 * found["losses"][0]


# ---- mutations that every oracle must detect ----
MUTATIONS = {
    "YaRN softmax factor forgotten": (rope.softmax_scale, ("** 2", "** 0")),
    "YaRN softmax factor not squared": (rope.softmax_scale, ("** 2", "** 1")),
    "YaRN frequencies not stretched": (rope.inv_freq, ("if y is None:", "if True:")),
    "YaRN ramp rounded the other way": (rope.yarn_ramp_limits, ("math.ceil", "math.floor")),
    "rope pairs halves instead of neighbours": (
        ModelConfig.rope_interleaved,
        ('== "deepseek_v2"', '!= "deepseek_v2"'),
    ),
    "rope turns the other way": (rope.freqs, ("angle)", "-angle)")),
    "rope key normed": (
        attention.MLA.forward,
        (
            "k_rope[:, :, None]",
            "(k_rope / k_rope.square().mean(-1, keepdim=True).sqrt())[:, :, None]",
        ),
    ),
    "latent not normed": (attention.MLA.forward, ("self.kv_norm(latent)", "latent")),
    "query latent not normed": (
        attention.MLA.forward,
        ("self.q_norm(self.wq_a(x))", "self.wq_a(x)"),
    ),
    "nope and rope parts of the query swapped": (
        attention.MLA.forward,
        (
            "q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)",
            "q_rope, q_nope = q.split([c.qk_rope_head_dim, c.qk_nope_head_dim], -1)",
        ),
    ),
    "keys and values swapped in expand": (
        attention.MLA.expand,
        (
            "k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)",
            "v, k_nope = kv.split([c.v_head_dim, c.qk_nope_head_dim], -1)",
        ),
    ),
    "absorb scaled by the latent width": (
        attention.MLA.absorb,
        ("self.scale", "(c.kv_lora_rank + c.qk_rope_head_dim) ** -0.5"),
    ),
    "absorb expands values with the key rows": (
        attention.MLA.absorb,
        ("o_latent, w_uv", "o_latent, w.split([c.v_head_dim, c.qk_nope_head_dim], 1)[0]"),
    ),
    "latent cached before its norm": (
        attention.MLA.forward,
        ("latent = self.kv_norm(latent)", "raw, latent = latent, self.kv_norm(latent)"),
        (
            "views = cache.views(self.layer, latent, k_rope)",
            "views = cache.views(self.layer, raw, k_rope); "
            "views[0].rows[0] = torch.cat([views[0].rows[0][:, : -latent.shape[1]], latent], 1)",
        ),
    ),
    "rope key cached before its rotation": (
        attention.MLA.forward,
        ("k_rope = kernels.rope(", "raw, k_rope = k_rope, kernels.rope("),
        (
            "views = cache.views(self.layer, latent, k_rope)",
            "views = cache.views(self.layer, latent, raw.squeeze(2)); "
            "views[0].rows[1] = torch.cat([views[0].rows[1][:, : -k_rope.shape[1]], k_rope], 1)",
        ),
    ),
    "positions start again after the cache": (
        cache.KVCache.positions,
        ("self.length, self.length + tokens", "0, tokens"),
    ),
    "group score is the sum of the best two (V3)": (
        routing.choose,
        (".amax(-1)", ".topk(2).values.sum(-1)"),
    ),
    "groups not limited": (routing.choose, ('== "group_limited_greedy"', '== "never"')),
    "top-k weights renormalised": (routing.route, ("if config.norm_topk_prob", "if True")),
    "routed_scaling_factor forgotten": (routing.route, (" * config.routed_scaling_factor", "")),
    "routed_scaling_factor applied twice": (
        routing.route,
        ("weight * config.routed_scaling_factor", "weight * config.routed_scaling_factor ** 2"),
    ),
    "softmax after the top-k": (
        routing.choose,
        (
            "return scores.gather(-1, expert), expert",
            "return scores.gather(-1, expert).log().softmax(-1), expert",
        ),
    ),
    "shared experts scaled too": (
        moe.MoE.forward,
        ("out + self.shared(flat)", "out + self.config.routed_scaling_factor * self.shared(flat)"),
    ),
    "shared experts forgotten": (moe.MoE.forward, ("self.shared is not None", "False")),
    "gate and up swapped": (
        moe.MLP.forward,
        ("self.w13(x)", "self.w13(x).roll(self.w13.out_features // 2, -1)"),
    ),
    "final norm forgotten": (model.Transformer.hidden, ("return self.norm(x)", "return x")),
    "feed-forward reads the attention's norm": (
        model.Block.forward,
        ("self.ffn_norm.after_add", "self.attn_norm.after_add"),
    ),
    "epsilon ten thousand times too large": (
        attention.RMSNorm.forward,
        ("self.eps", "self.eps * 1e4"),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("oracle", ["naive", "transformers", "golden"])
def test_oracle_fails_for_every_mutation(name, oracle, monkeypatch, tmp_path):
    tiny.mutate(monkeypatch, *MUTATIONS[name])
    with pytest.raises(AssertionError, match="relative error"):
        if oracle == "golden":
            against_golden("v2", tmp_path)
        else:
            m = tiny.model(tiny.HARD, dtype=torch.float64 if oracle == "naive" else torch.float32)
            (against_naive if oracle == "naive" else against_transformers)(
                m, tiny.ids(m.config, 2, 10)
            )


@pytest.mark.parametrize(
    "name", ["YaRN softmax factor forgotten", "rope pairs halves instead of neighbours"]
)
def test_position_0_hides_a_wrong_softmax_scale(name, monkeypatch):
    m = tiny.model(tiny.HARD)
    tokens = tiny.ids(m.config, 1, 2)
    right = m(tokens)
    tiny.mutate(monkeypatch, *MUTATIONS[name])
    wrong = tiny.model(tiny.HARD)(tokens)
    assert torch.allclose(wrong[:, 0], right[:, 0], rtol=0, atol=1e-12)
    assert (wrong[:, 1] - right[:, 1]).abs().max() > 1e-3


def test_first_dense_layers_off_by_one_does_not_load(monkeypatch, tmp_path):
    checkpoints.save(tiny.model(tiny.HARD), tmp_path)
    tiny.mutate(
        monkeypatch, ModelConfig.is_moe_layer, ("layer >= self.first", "layer > self.first")
    )
    with pytest.raises(ValueError, match="layers.1.mlp"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        ("f * p", "f * f"),
        ("(e / (k * t))", "(1 / (k * t))"),
        ("p_device).sum(1), (f_comm", "p_device).sum(1) * 2, (f_comm"),
    ],
)
def test_golden_run_fails_for_mutations(change, monkeypatch):
    tiny.mutate(monkeypatch, routing.balance_losses, change)
    assert run.ten_steps()["losses"] != pytest.approx(
        json.loads((GOLDENS / "run.json").read_text())["losses"], rel=1e-5
    )
