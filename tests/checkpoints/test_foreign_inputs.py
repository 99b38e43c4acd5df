"""Folders as other programs write them, compared with transformers: logits and token ids.

Each row is an input of public bug reports. "equal": lamoe loads it, and the results are those of
transformers. Any other text is a part of lamoe's refusal. None of them may be silently different.
"""

import json
import logging

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file, save_model
from tokenizers import decoders, models, pre_tokenizers, trainers

from lamoe.backends.cpu import packed_file
from lamoe.checkpoints import hf
from lamoe.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(1, 41)[None]
LLAMA = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
DEEPSEEK = LLAMA | dict(
    num_key_value_heads=4,
    kv_lora_rank=16,
    q_lora_rank=None,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    first_k_dense_replace=1,
    topk_method="greedy",
)
GONE = object()  # the key is removed


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A random Llama as transformers saves it."""
    folder = tmp_path_factory.mktemp("llama")
    save_random(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), folder)
    return folder


def save_random(model, folder):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)


def logits_differ(folder):
    """Return the largest difference between lamoe's and transformers' logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        ours = hf.load(folder, "float32")(IDS)
        ours = ours[0] if isinstance(ours, tuple) else ours
        return (ours - model.eval()(IDS).logits).abs().max().item()


def check(folder, expected):
    if expected == "equal":
        assert logits_differ(folder) < 1e-4
    else:
        with pytest.raises(ValueError, match=expected):
            hf.load(folder)


def _yarn(**more):
    rope = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, rope_theta=1e4)
    return {"rope_parameters": rope | more}


def _rope(**values):
    return {"rope_parameters": values}


CONFIGS = {
    # transformers 4 and 5, and what their versions leave out
    "theta of transformers 4": ({"rope_parameters": GONE, "rope_theta": 5000.0}, "equal"),
    "no theta": ({"rope_parameters": GONE}, "equal"),
    "no tie_word_embeddings": ({"tie_word_embeddings": GONE}, "equal"),
    "no hidden_act": ({"hidden_act": GONE}, "equal"),
    "no max_position_embeddings": ({"max_position_embeddings": GONE}, "equal"),
    "head_dim null": ({"head_dim": None}, "equal"),
    "swish": ({"hidden_act": "swish"}, "equal"),
    "empty rope_scaling": ({"rope_parameters": GONE, "rope_scaling": {}}, "equal"),
    "linear scaling by 1": (_rope(rope_type="linear", factor=1.0, rope_theta=1e4), "equal"),
    "initializer_range 0": ({"initializer_range": 0.0}, "equal"),
    "no_bias": ({"no_bias": True}, "equal"),
    "use_cache off": ({"use_cache": False}, "equal"),
    "notes of trainers": ({"unsloth_version": "2025.1", "axolotl_config": "x.yml"}, "equal"),
    "architecture of another head": ({"architectures": ["LlamaModel"]}, "equal"),
    "YaRN": (_yarn(), "equal"),
    "YaRN, mscale alone": (_yarn(mscale=0.5), "equal"),
    "YaRN, mscale_all_dim alone": (_yarn(mscale_all_dim=0.5), "equal"),
    "YaRN, both": (_yarn(mscale=1.0, mscale_all_dim=0.5), "equal"),
    "YaRN, a factor of null": (_yarn(attention_factor=None), "equal"),
    "YaRN, betas": (_yarn(beta_fast=16, beta_slow=2), "equal"),
    # refused, because lamoe would compute something else
    "YaRN, own amplitude": (_yarn(attention_factor=1.5), "attention_factor"),
    "YaRN, no rounding": (_yarn(truncate=False), "truncate"),
    "linear": (_rope(rope_type="linear", factor=4.0), "linear"),
    "llama3": (_rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0), "llama3"),
    "longrope": (_rope(rope_type="longrope", short_factor=[1] * 4), "longrope"),
    "a factor without a type": ({"rope_parameters": GONE, "rope_scaling": {"factor": 8}}, "type"),
    "half of the head rotates": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "bias of attention": ({"attention_bias": True}, "attention_bias"),
    "bias of the MLP": ({"mlp_bias": True}, "mlp_bias"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act"),
    "sliding window": ({"sliding_window": 8}, "sliding_window"),
    "logits scaled": ({"logit_scale": 0.5}, "logit_scale"),
    "embeddings scaled": ({"embedding_multiplier": 2.0}, "embedding_multiplier"),
    "both directions": ({"is_causal": False}, "is_causal"),
    "norm with 1 + weight": ({"rms_norm_add_unit_offset": True}, "rms_norm_add_unit_offset"),
    "epsilon by another name": ({"norm_eps": 1e-3}, "norm_eps"),
    "tied, but another head is stored": ({"tie_word_embeddings": True}, "lm_head.weight differs"),
    "a layer less": ({"num_hidden_layers": 1}, "do not belong to the config"),
    "a layer more": ({"num_hidden_layers": 3}, "missing"),
    "a larger vocabulary": ({"vocab_size": 80}, "shape"),
    "bitsandbytes": ({"quantization_config": {"load_in_4bit": True}}, "quantised"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(plain, tmp_path, name):
    changes, expected = CONFIGS[name]
    config = json.loads((plain / "config.json").read_text()) | changes
    config = {k: v for k, v in config.items() if v is not GONE}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(plain / "model.safetensors")
    check(tmp_path, expected)


DEEPSEEKS = {
    "queries of low rank": {"q_lora_rank": 12},
    "no shared experts: empty tensors": {"n_shared_experts": 0},
    "no layer has experts": {"first_k_dense_replace": 2},
    "all experts": {"num_experts_per_tok": 4},
    "scaled": {"routed_scaling_factor": 2.5},
    "groups": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    "YaRN with both scales": _yarn(mscale=0.707, mscale_all_dim=0.707),
}


@pytest.mark.parametrize("name", DEEPSEEKS)
def test_deepseek(tmp_path, name):
    config = transformers.DeepseekV2Config(**DEEPSEEK | DEEPSEEKS[name])
    save_random(transformers.DeepseekV2ForCausalLM(config), tmp_path)
    assert logits_differ(tmp_path) < 1e-4


def _more(**tensors):
    return lambda all: [all | {k.replace("__", "."): v for k, v in tensors.items()}]


def _renamed(before, after):
    return lambda all: [{k.replace(before, after): v for k, v in all.items()}]


def _halves(all):
    names = list(all)
    return [{n: all[n] for n in names[:9]}, {n: all[n] for n in names[9:]}]


L0 = "model__layers__0__self_attn__"
# {name: (weights to the list of their shards, change of the index, expected)}
WEIGHTS = {
    "buffers of rotary embeddings": (
        _more(
            **{f"{L0}rotary_emb__{n}": torch.ones(4) for n in ("inv_freq", "cos_cached")},
            model__rotary_emb__inv_freq=torch.ones(4),
        ),
        None,
        "equal",
    ),
    "float16": (lambda all: [{k: v.half() for k, v in all.items()}], None, "equal"),
    "mixed types": (
        lambda all: [{k: v.bfloat16() if "mlp" in k else v.double() for k, v in all.items()}],
        None,
        "equal",
    ),
    "wrong total_size": (_halves, {"metadata": {"total_size": 5}}, "equal"),
    "names with blanks, ./": (_halves, {"prefix": "./"}, "equal"),
    "a bias": (_more(**{f"{L0}q_proj__bias": torch.ones(32)}), None, "do not belong"),
    "a norm of queries": (_more(**{f"{L0}q_norm__weight": torch.ones(8)}), None, "do not belong"),
    "scales of a cache": (_more(**{f"{L0}k_proj__k_scale": torch.ones(1)}), None, "do not belong"),
    "an adapter inside": (_renamed("q_proj.", "q_proj.base_layer."), None, "LoRA adapter"),
    "DDP": (_renamed("model.", "module.model."), None, "wrapped"),
    "a trainer's module": (_renamed("model.", "model.model."), None, "module of a trainer"),
    "a base model": (_renamed("model.", ""), None, "base model without its output head"),
    "float8": (
        lambda all: [{k: v.to(torch.float8_e4m3fn) for k, v in all.items()}],
        None,
        "not plain floats",
    ),
    "transposed": (
        lambda all: [{k: v.T if "gate_proj" in k else v for k, v in all.items()}],
        None,
        "shape",
    ),
    "shards of other folders": (_halves, {"prefix": "../"}, "same folder"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(plain, tmp_path, name):
    split, index, expected = WEIGHTS[name]
    (tmp_path / "config.json").symlink_to(plain / "config.json")
    shards = split(load_file(plain / "model.safetensors"))
    names = ["model.safetensors"] if index is None else ["part 1.safetensors", "é.safetensors"]
    for file, tensors in zip(names, shards, strict=True):
        tensors = {k: v.contiguous() for k, v in tensors.items()}
        save_file(tensors, tmp_path / file, metadata={"format": "pt"})
    if index is not None:
        prefix = index.get("prefix", "")
        where = {n: prefix + file for file, tensors in zip(names, shards) for n in tensors}
        content = {"metadata": {"total_size": 5}, "weight_map": where}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    check(tmp_path, expected)


def test_a_tied_embedding_under_the_name_of_the_head(tmp_path):
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    save_random(model, tmp_path)
    expected = hf.load(tmp_path, "float32").state_dict()
    save_model(model, tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight" not in load_file(tmp_path / "model.safetensors")
    assert logits_differ(tmp_path) < 1e-4
    read = packed_file.reader(tmp_path, hf.read_config(tmp_path))
    assert torch.equal(read("model.embed_tokens.weight"), expected["embed.weight"])


def test_a_link_to_nothing_is_named(plain, tmp_path):
    (tmp_path / "config.json").symlink_to(plain / "config.json")
    (tmp_path / "model.safetensors").symlink_to("../blobs/0123")
    with pytest.raises(ValueError, match="link to ../blobs/0123, which does not exist"):
        hf.load(tmp_path)


# ---- tokenizers ----
TEXTS = ("the cat sat on a mat .", "  hello  world\n\n 日本語 🙂 <|im_end|> don 't", "", "</s><s>a")


def _template(first):
    token = {"SpecialToken": {"id": first, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [token, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": n, "type_id": 0}} for n in "AB"],
        "special_tokens": {first: {"id": first, "ids": [0], "tokens": [first]}},
    }


_BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
_TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
_PADDING = {
    "strategy": {"Fixed": 20},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 2,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
# {name: (changes of tokenizer.json, tokenizer_config.json)}
TOKENIZERS = {
    "a BOS that nothing adds (SmolLM2)": ({}, NAMED),
    "the post-processor adds BOS (Llama 3)": ({"post_processor": _template("<s>")}, NAMED),
    "a post-processor in a sequence": (
        {"post_processor": {"type": "Sequence", "processors": [_BYTES, _template("<s>")]}},
        NAMED,
    ),
    "a post-processor that adds nothing": ({"post_processor": _BYTES}, NAMED),
    "add_eos_token": (
        {"post_processor": _template("<s>")},
        {**NAMED, "add_bos_token": True, "add_eos_token": True},
    ),
    "no tokenizer_config.json": ({"post_processor": _template("<s>")}, None),
    "truncation and padding": (
        {"truncation": _TRUNCATION, "padding": _PADDING, "post_processor": _template("<s>")},
        NAMED,
    ),
    "model_max_length": ({}, {**NAMED, "model_max_length": 2, "truncation_side": "left"}),
    "a pad token that nobody added": ({}, {**NAMED, "pad_token": "[PAD]"}),
    "clean_up_tokenization_spaces": ({}, {**NAMED, "clean_up_tokenization_spaces": True}),
    "add_prefix_space of the config": ({}, {**NAMED, "add_prefix_space": True}),
    "NFKC": ({"normalizer": {"type": "NFKC"}}, NAMED),
    "lower case": ({"normalizer": {"type": "Lowercase"}}, NAMED),
}


@pytest.fixture(scope="module")
def vocabulary():
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["the cat sat on a mat hello world"] * 9, trainer)
    return json.loads(inner.to_str())


def write_tokenizer(folder, content, config):
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if config is not None:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompt(vocabulary, tmp_path, name):
    changes, config = TOKENIZERS[name]
    ours = write_tokenizer(tmp_path, vocabulary | changes, config)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in TEXTS:
        prompt = ours.encode(text, bos=ours.add_bos, allow_special=True)
        # transformers may truncate and pad in this call only if it is asked to
        assert prompt == theirs(text, truncation=False, padding=False)["input_ids"], text
        ids = theirs(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "kind, config, begins",
    [
        ("LlamaTokenizer", {}, True),  # in transformers 4; there is no post-processor
        ("LlamaTokenizerFast", {"add_bos_token": False}, False),
        ("PreTrainedTokenizerFast", {"add_bos_token": True}, True),  # DeepSeek, as in llama.cpp
        ("GPT2Tokenizer", {}, False),
        ("Qwen2Tokenizer", {}, False),
    ],
)
def test_a_bos_without_post_processor(vocabulary, tmp_path, kind, config, begins):
    config = {**NAMED, "tokenizer_class": kind, **config}
    assert write_tokenizer(tmp_path, vocabulary, config).add_bos is begins


def test_dropout_of_a_training_is_off(vocabulary, tmp_path):
    plain = write_tokenizer(tmp_path, vocabulary, NAMED).encode(TEXTS[0])
    model = vocabulary["model"] | {"dropout": 0.9}
    assert write_tokenizer(tmp_path, vocabulary | {"model": model}, NAMED).encode(TEXTS[0]) == plain


def test_a_pad_token_without_an_id_is_logged(vocabulary, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "lamoe"):
        tokenizer = write_tokenizer(tmp_path, vocabulary, {**NAMED, "pad_token": "[PAD]"})
    assert tokenizer.pad_id is None and "'[PAD]' has no id" in caplog.text
