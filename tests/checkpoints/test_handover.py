"""Tests that the folder of a trained run has what vLLM and SGLang need to load it.

Neither is installed here. The tests use transformers' Auto classes, which both use for config and
tokenizer.
"""

import json

import pytest
import torch

import lamoe
from lamoe.text.tokenizer import Tokenizer
from lamoe.train import checkpoint
from tiny_run import trained  # noqa: F401 (a fixture)

transformers = pytest.importorskip("transformers")
TEXTS = [
    "the cat sat on the mat",
    "  two  blanks\tand a tab\n\n",
    "Größe 日本語 🦜 1234",
    "x" * 50,
    " ",
]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the  cat?"},
    {"role": "assistant", "content": "It sat."},
    {"role": "user", "content": "and then"},
]


@pytest.fixture(scope="module")
def folder(trained):
    return checkpoint.latest(trained) / "model"


def test_folder_has_exactly_the_files_that_loaders_need(folder):
    assert {p.name for p in folder.iterdir()} == {
        "checksums.json",  # lamoe's own
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config, tok = (
        json.loads((folder / f"{n}.json").read_text()) for n in ("config", "tokenizer_config")
    )
    assert (
        config["architectures"] == ["DeepseekV2ForCausalLM"]
        and config["model_type"] == "deepseek_v2"
        and config["torch_dtype"] == "float32"
    )
    assert "auto_map" not in config and "auto_map" not in tok  # --trust-remote-code is not needed
    assert (
        tok["tokenizer_class"] == "PreTrainedTokenizerFast"
        and "add_generation_prompt" in tok["chat_template"]
    )


def test_config_and_generation_config(folder):
    config, generation, ours = (
        transformers.AutoConfig.from_pretrained(folder),
        transformers.GenerationConfig.from_pretrained(folder),
        lamoe.load(folder).config,
    )
    assert type(config).__name__ == "DeepseekV2Config"
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "first_k_dense_replace",
        "moe_intermediate_size",
        "max_position_embeddings",
        "eos_token_id",
        "bos_token_id",
    ):
        assert getattr(config, name) == getattr(ours, name), name
    eos = generation.eos_token_id
    assert set(eos if isinstance(eos, list) else [eos]) == Tokenizer.load(folder).stop_ids


def test_the_tokenizer_and_the_chat_template(folder):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
        assert theirs.decode(ours.encode(text), clean_up_tokenization_spaces=False) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    ids = theirs.apply_chat_template(TALK, add_generation_prompt=True)
    assert list(ids if isinstance(ids, list) else ids["input_ids"]) == ours.apply_chat(TALK)


def test_transformers_gives_the_same_logits_and_tokens(folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours, tok = lamoe.load(folder), Tokenizer.load(folder)
    ids = torch.tensor([tok.encode("the cat sat on the hill of", bos=True)])
    with torch.inference_mode():
        want = theirs(ids).logits
        assert torch.allclose(ours(ids), want, atol=1e-4) and want.std() > 0.1
    out = theirs.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
    [mine] = lamoe.LLM(folder, cache="fp32").generate(
        [ids[0].tolist()], lamoe.SamplingParams(temperature=0.0, max_tokens=16)
    )
    assert mine.token_ids == out
