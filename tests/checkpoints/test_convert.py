"""Tests of Hugging Face folders: exact round trips, exchange with transformers, strict names.

test_hostile_folders.py tests damaged and hostile files.
"""

import json
import os
import resource
import shutil
import stat
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lamoe import Tokenizer, atomic, checkpoints
from lamoe.checkpoints import hf, shards
from lamoe.model.config import ModelConfig, RopeScaling
from lamoe.model.transformer import Transformer

_SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=256,
    torch_dtype="float32",
    bos_token_id=1,
    eos_token_id=2,
)
_MLA = dict(
    model_type="deepseek_v2",
    kv_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
)
_MOE = dict(
    moe_intermediate_size=20,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
)
_YARN = RopeScaling(factor=8.0, original_max_position_embeddings=32)
CONFIGS = {
    "v2-lite": ModelConfig(**_SIZES, **_MLA, **_MOE),
    "v2": ModelConfig(
        **_SIZES,
        **_MLA,
        **_MOE,
        q_lora_rank=24,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=4.0,
        rope_scaling=_YARN,
    ),
    "v2-tied-no-shared": ModelConfig(
        **_SIZES,
        **_MLA,
        **{**_MOE, "n_shared_experts": 0, "first_k_dense_replace": 0},
        tie_word_embeddings=True,
    ),
    "v2-dense": ModelConfig(**_SIZES, **_MLA),
    "moe-v1": ModelConfig(**_SIZES, **_MOE, model_type="deepseek", moe_layer_freq=2),
    "llama-gqa": ModelConfig(**_SIZES, model_type="llama", num_key_value_heads=2),
    "llama-mqa-tied": ModelConfig(
        **_SIZES, model_type="llama", num_key_value_heads=1, head_dim=12, tie_word_embeddings=True
    ),
}
# 40 tokens, more than the 32 original positions of YaRN.
IDS = torch.arange(2 * 40).reshape(2, 40) * 7 % 64


def tiny(config: ModelConfig, seed=0) -> Transformer:
    """Return a model with random weights of unit scale, norms included.

    With such weights, a swapped or missing tensor changes the logits.
    """
    model = Transformer(config).to(getattr(torch, config.torch_dtype)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.2 if p.dim() > 1 else 1.0))
    return model


def assert_same(a: Transformer, b: Transformer):
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


def assert_close_logits(ours: torch.Tensor, theirs: torch.Tensor):
    error, scale = (ours - theirs).abs().max(), theirs.abs().max()
    assert error <= 1e-5 * scale, f"{error} of {scale}"


@pytest.fixture(params=CONFIGS)
def config(request) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture
def folder(tmp_path) -> Path:
    checkpoints.save(tiny(CONFIGS["v2-lite"]), tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path) -> Path:
    checkpoints.save(tiny(CONFIGS["v2-lite"]), tmp_path / "m", max_shard_bytes=60_000)
    return tmp_path / "m"


# ---- round trips through lamoe ----
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 11_000])
def test_round_trip_is_exact(config, tmp_path, max_shard_bytes):
    model = tiny(config)
    checkpoints.save(model, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    loaded = checkpoints.load(tmp_path / "m")
    assert not loaded.training and loaded.config == config == checkpoints.read_config(
        tmp_path / "m"
    )
    assert_same(model, loaded)
    assert torch.equal(model(IDS), loaded(IDS))
    assert all(p.requires_grad for p in loaded.parameters())
    files = sorted(p.name for p in (tmp_path / "m").iterdir())
    if max_shard_bytes > 10**9:
        assert files == [
            "checksums.json",
            "config.json",
            "generation_config.json",
            "model.safetensors",
        ]
    else:
        n = sum(f.endswith(".safetensors") for f in files)
        assert (
            n > 3
            and f"model-00001-of-{n:05d}.safetensors" in files
            and "model.safetensors.index.json" in files
        )
        assert all(
            sum(t.nbytes for t in load_file(tmp_path / "m" / f).values()) <= 11_000
            for f in files
            if f.endswith(".safetensors")
        )


def test_tensor_table_covers_every_parameter_once(config):
    model = Transformer(config)
    for p in model.parameters():
        p.data.zero_()
    for view in hf.views(config, {n: p.data for n, p in model.named_parameters()}).values():
        view += 1
    assert all((p == 1).all() for p in model.parameters())


def test_released_tensor_counts():
    assert len(hf.table(ModelConfig.preset("deepseek-v2"))) == 29_102
    assert len(hf.table(ModelConfig.preset("deepseek-v2-lite"))) == 5_291


def test_disk_names_and_gate_up_order(folder):
    model, disk = tiny(CONFIGS["v2-lite"]), load_file(folder / "model.safetensors")
    experts = model.layers[1].ffn.experts
    assert torch.equal(disk["model.layers.1.mlp.experts.5.gate_proj.weight"], experts.w13[5, :20])
    assert torch.equal(disk["model.layers.1.mlp.experts.5.up_proj.weight"], experts.w13[5, 20:])
    assert torch.equal(disk["model.layers.1.mlp.experts.5.down_proj.weight"], experts.w2[5])
    assert torch.equal(
        disk["model.layers.2.self_attn.kv_a_proj_with_mqa.weight"],
        model.layers[2].attn.wkv_a.weight,
    )
    assert disk["model.layers.1.mlp.shared_experts.up_proj.weight"].shape == (40, 32)
    with safe_open(folder / "model.safetensors", "pt") as f:
        assert f.metadata()["format"] == "pt"  # transformers requires it


def test_dtype_follows_the_tensors(folder, tmp_path):
    half = checkpoints.load(folder, dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    checkpoints.save(half, tmp_path / "half")
    assert checkpoints.read_config(tmp_path / "half").torch_dtype == "bfloat16"
    assert_same(half, checkpoints.load(tmp_path / "half"))
    assert {
        p.dtype for p in checkpoints.load(tmp_path / "half", dtype=torch.float64).parameters()
    } == {torch.float64}
    with pytest.raises(ValueError, match="dtype is 'int8'; known: float32"):
        checkpoints.load(folder, dtype="int8")


def test_loading_holds_one_tensor_beside_the_model(folder, monkeypatch):
    order, alive = [], []
    real = shards.safe_open

    class Counting:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def __enter__(self):
            self.inner = self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def get_tensor(self, name):
            tensor = self.inner.get_tensor(name)
            order.append(sum(ref() is not None for ref in alive))
            alive.append(weakref.ref(tensor))
            return tensor

    monkeypatch.setattr(shards, "safe_open", Counting)
    checkpoints.load(folder)
    assert len(order) == len(hf.table(CONFIGS["v2-lite"])) and max(order) <= 1


# ---- exchange with transformers ----
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 30_000])
@pytest.mark.parametrize("name", ["v2-lite", "v2", "v2-dense", "llama-gqa", "llama-mqa-tied"])
def test_transformers_loads_what_lamoe_saves(name, tmp_path, max_shard_bytes):
    transformers = pytest.importorskip("transformers")
    model = tiny(CONFIGS[name])
    checkpoints.save(model, tmp_path, max_shard_bytes=max_shard_bytes)
    kind = getattr(
        transformers, json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    )
    theirs, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32 and theirs.generation_config.eos_token_id == 2
    for disk, view in hf.views(model.config, dict(model.named_parameters())).items():
        if ".experts." not in disk:
            assert torch.equal(theirs.state_dict()[disk], view), disk
    fused = theirs.state_dict().get("model.layers.1.mlp.experts.gate_up_proj")
    assert fused is None or torch.equal(fused, model.layers[1].ffn.experts.w13)
    with torch.no_grad():
        assert_close_logits(model(IDS), theirs.eval()(IDS).logits)


def test_transformers_follows_the_saved_dtype(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny(CONFIGS["v2"]).to(torch.bfloat16)
    checkpoints.save(model, tmp_path)
    theirs = transformers.DeepseekV2ForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16 and torch.equal(theirs.lm_head.weight, model.head.weight)


@pytest.mark.parametrize("name", ["v2-lite", "v2", "llama-gqa", "llama-mqa-tied"])
def test_lamoe_loads_what_transformers_saves(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    raw = CONFIGS[name].to_dict()
    kind = getattr(transformers, raw.pop("architectures")[0])
    torch.manual_seed(1)
    theirs = kind(kind.config_class(**raw)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * (0.2 if p.dim() > 1 else 1.0))
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = checkpoints.load(tmp_path)
    with torch.no_grad():
        assert_close_logits(ours(IDS), theirs(IDS).logits)


# ---- safe saving ----
CARRIED = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
]


def test_side_files_are_copied_and_the_rest_is_named(folder, tmp_path, caplog):
    for name in CARRIED:
        (folder / name).write_text(f'{{"from": "{name}"}}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("T")
    for name in ("modeling_evil.py", "README.md", "pytorch_model.bin", ".gitattributes"):
        (folder / name).write_text("raise SystemExit")
    out = tmp_path / "copy"
    for _ in range(2):  # an earlier copy may be overwritten as a whole
        checkpoints.save(checkpoints.load(folder), out, extras_from=folder, overwrite=True)
    assert {p.name for p in out.iterdir()} == {
        "checksums.json",
        "config.json",
        "model.safetensors",
        "additional_chat_templates",
        *CARRIED,
    }
    assert all(json.loads((out / n).read_text()) == {"from": n} for n in CARRIED)
    assert (out / "additional_chat_templates/tool_use.jinja").read_text() == "T"
    assert "not copied: 'README.md', 'modeling_evil.py'" in caplog.text
    assert "bin" not in caplog.text
    (out / "additional_chat_templates/mine.txt").write_text("")
    with pytest.raises(ValueError, match="holds more than a model.*additional_chat_templates"):
        checkpoints.save(checkpoints.load(folder), out, overwrite=True)
    with pytest.raises(ValueError, match="extras_from is .* not a folder"):
        checkpoints.save(
            checkpoints.load(folder), tmp_path / "other", extras_from=tmp_path / "nowhere"
        )


def test_a_sentencepiece_file_alone_is_carried_with_advice(folder, tmp_path, caplog):
    (folder / "tokenizer.model").write_bytes(b"x")
    out = tmp_path / "out"
    checkpoints.save(checkpoints.load(folder), out, extras_from=folder)
    assert (out / "tokenizer.model").read_bytes() == b"x"
    assert "SentencePiece file, which lamoe does not read. To make tokenizer.json" in caplog.text
    with pytest.raises(FileNotFoundError, match="SentencePiece.*AutoTokenizer"):
        Tokenizer.load(out)


def test_generation_config_has_the_special_ids(folder):
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def test_overwriting_must_be_requested_and_replaces_everything(sharded):
    before = {p.name: p.read_bytes() for p in sharded.iterdir()}
    model = tiny(CONFIGS["v2"], seed=5)
    with pytest.raises(ValueError, match="is not empty .*overwrite=True"):
        checkpoints.save(model, sharded)
    assert {p.name: p.read_bytes() for p in sharded.iterdir()} == before
    checkpoints.save(model, sharded, overwrite=True, extras_from=sharded)
    assert_same(model, checkpoints.load(sharded))  # shards and index of the old model are gone
    assert [p.name for p in sharded.parent.iterdir()] == ["m"]


def test_overwriting_refuses_to_delete_other_things(folder):
    (folder / "notes.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds more than a model lamoe saved .*notes.txt"):
        checkpoints.save(tiny(CONFIGS["v2"]), folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "years of work"


def test_a_full_disk_leaves_the_old_model(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The limit on file sizes allows config.json, but not the weights.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(
            OSError, match="m/model.safetensors could not be written.*bytes are needed"
        ):
            checkpoints.save(tiny(CONFIGS["v2"]), folder, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in folder.parent.iterdir()] == ["m"]
    assert_same(tiny(CONFIGS["v2-lite"]), checkpoints.load(folder))


def test_a_failing_swap_puts_the_old_model_back(folder, monkeypatch):
    rename = os.rename

    def refuse_new(a, b):
        if b == folder and ".old.tmp-" not in str(a):
            raise OSError("refused")
        rename(a, b)

    monkeypatch.setattr(os, "rename", refuse_new)
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)  # as on other systems
    with pytest.raises(OSError, match="refused"):
        checkpoints.save(tiny(CONFIGS["v2"]), folder, overwrite=True)
    assert [p.name for p in folder.parent.iterdir()] == ["m"]
    assert_same(tiny(CONFIGS["v2-lite"]), checkpoints.load(folder))


def test_save_through_a_link_keeps_the_link_and_normal_permissions(folder, tmp_path):
    (tmp_path / "latest").symlink_to(folder)
    checkpoints.save(tiny(CONFIGS["v2"]), tmp_path / "latest", overwrite=True)
    assert (tmp_path / "latest").is_symlink() and checkpoints.load(folder).config == CONFIGS["v2"]
    modes = {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


def test_unsavable_models_are_refused_before_anything_is_written(tmp_path):
    mixed = tiny(CONFIGS["v2-lite"])
    mixed.layers[0].attn.wo.half()
    with pytest.raises(ValueError, match="types torch.float16, torch.float32"):
        checkpoints.save(mixed, tmp_path / "m")
    with torch.device("meta"), pytest.raises(ValueError, match="meta device"):
        checkpoints.save(Transformer(CONFIGS["v2-lite"]), tmp_path / "m")
    wrapped = tiny(CONFIGS["v2-lite"])
    wrapped.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="unexpected 'extra.weight', 'extra.bias', absent none"):
        checkpoints.save(wrapped, tmp_path / "m")
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        checkpoints.save(tiny(CONFIGS["v2-lite"]), tmp_path / "m", max_shard_bytes=0)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        checkpoints.save(tiny(CONFIGS["v2-lite"]), tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


# ---- sources ----
def test_sources_without_a_model_are_refused(folder, tmp_path, monkeypatch):
    for bad in (
        "no-such-folder",
        "/no/such/folder",
        "a/b/c",
        "../x",
        "owner/na me",
        tmp_path / "owner" / "name",
    ):
        with pytest.raises(ValueError, match="there is no folder .*check the path"):
            checkpoints.load(bad)
    with pytest.raises(ValueError, match="is a file; give the model folder"):
        checkpoints.load(folder / "model.safetensors")
    with pytest.raises(ValueError, match="no config.json"):
        checkpoints.load(tmp_path)


def test_hub_id_asks_for_weights_and_tokenizer_only(folder, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, **kwargs: asked.append((repo, kwargs)) or str(folder),
    )
    assert_same(checkpoints.load("owner/some.Model-1"), tiny(CONFIGS["v2-lite"]))
    [(repo, patterns)] = asked
    wanted = [
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "additional_chat_templates/tool_use.jinja",
        "LICENSE",
    ]
    others = ["onnx/config.json", "modeling_x.py", "pytorch_model.bin", "assets/x.json", "a/b.json"]
    assert repo == "owner/some.Model-1"
    assert list(filter_repo_objects(wanted + others, **patterns)) == wanted

    def offline(repo, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline and not cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match="there is no folder 'owner/name'.*cache does not hold"):
        checkpoints.load("owner/name")


def test_offline_hub_id_loads_from_the_symlinks_of_the_cache(sharded, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit, repo = "a" * 40, tmp_path / "hub" / "models--owner--name"
    snapshot, blobs = repo / "snapshots" / commit, repo / "blobs"
    for made in (snapshot, blobs, repo / "refs"):
        made.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for i, file in enumerate(sharded.iterdir()):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert checkpoints.resolve("owner/name") == snapshot
    assert_same(checkpoints.load("owner/name"), tiny(CONFIGS["v2-lite"]))
    with pytest.raises(
        ValueError, match="there is no folder 'owner/other'.* and HF_HUB_OFFLINE is set"
    ):
        checkpoints.load("owner/other")


def test_code_in_the_folder_is_never_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    checkpoints.load(folder)
    assert not (tmp_path / "ran").exists()


# ---- tensors that do not belong to the config ----
def edit(folder: Path, change):
    """Apply `change` to the dict of stored tensors and write it back."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_json(path: Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


GATE = "model.layers.1.mlp.gate.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(GATE), f"1 of 83 tensors of the config are missing: '{GATE}'"),
        (
            lambda t: [t.pop(n) for n in list(t) if "experts.3" in n],
            r"6 of 83 tensors .* and 3 more",
        ),
        (
            lambda t: t.pop("lm_head.weight"),
            "missing: 'lm_head.weight'; .*tie_word_embeddings: true",
        ),
        (
            lambda t: t.update({"model.layers.9.self_attn.q_proj.bias": torch.ones(3)}),
            "1 tensors do not belong to the config: 'model.layers.9",
        ),
        (lambda t: t.update({GATE: t[GATE][:7].clone()}), rf"'{GATE}' is \[7, 32\], not \[8, 32\]"),
        (
            lambda t: t.update({GATE: t[GATE].T.contiguous()}),
            rf"'{GATE}' is \[32, 8\], not \[8, 32\]",
        ),
        (
            lambda t: t.update({GATE: t[GATE].to(torch.int8)}),
            rf"'{GATE}' is I8; use an unquantised",
        ),
        (
            lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)}),
            rf"'{GATE}' is F8_E4M3; use an unquantised",
        ),
    ],
)
def test_tensors_that_do_not_match_the_config_are_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(folder)


def test_harmless_extras_are_tolerated_by_name(folder):
    inv = torch.ones(4)
    edit(
        folder,
        lambda t: t.update(
            {
                "model.layers.2.self_attn.rotary_emb.inv_freq": inv,
                "model.rotary_emb.inv_freq": inv + 1,
            }
        ),
    )
    assert_same(checkpoints.load(folder), tiny(CONFIGS["v2-lite"]))
    edit(folder, lambda t: t.update({"model.layers.2.self_attn.rotary_emb.inv_freq2": inv}))
    with pytest.raises(ValueError, match="inv_freq2"):
        checkpoints.load(folder)


def test_a_tied_head_may_be_stored_twice_but_not_differ(tmp_path):
    model = tiny(CONFIGS["llama-mqa-tied"])
    checkpoints.save(model, tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_same(checkpoints.load(tmp_path), model)
    edit(tmp_path, lambda t: t["lm_head.weight"][3, 3].add_(1))
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"num_hidden_layers": 10**9},
            "says 1,000,000,000 layers, but the weights are only 83 tensors",
        ),
        ({"n_routed_experts": 10**9}, "routed experts in all, but the weights are only"),
        ({"hidden_size": 2**31 - 1, "vocab_size": 2**31 - 1}, "cannot be built"),
        ({"hidden_size": 64}, r"is \[64, 32\], not \[64, 64\]"),
    ],
)
def test_a_config_cannot_ask_for_more_than_the_files_hold(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(folder)
