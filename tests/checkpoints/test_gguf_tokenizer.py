"""Tests of the vocabulary of a GGUF file: names of rules, ids that end a reply, flags of tokens."""

import pytest
from tokenizers import pre_tokenizers

from lamoe.checkpoints import gguf_tokenizer
from lamoe.text.tokenizer import Tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CONTROLS = ["<|a|>", "<|b|>", "<|c|>", "<|d|>", "<|im_end|>", "<|endoftext|>"]


def load(folder, **facts):
    """Return the tokenizer of a GGUF file with these facts."""
    metadata = {
        "general.name": facts.pop("name", "a model"),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*CONTROLS, *BYTES, "ab"],
        "tokenizer.ggml.token_type": [3] * 6 + [1] * 257,
        "tokenizer.ggml.merges": ["a b"],
        **{f"tokenizer.ggml.{k}": v for k, v in facts.items()},
    }
    gguf_tokenizer.write(metadata, folder, "m.gguf")
    return Tokenizer.load(folder)


@pytest.mark.parametrize(
    "name, others",
    [
        ("llama-bpe", ["llama3", "llama-v3", "falcon3", "pixtral", "lfm2"]),
        ("gpt-2", ["phi-2", "jina-es", "mellum"]),
        ("qwen2", ["deepseek-r1-qwen", "megrez"]),
    ],
)
def test_other_names_of_a_rule(tmp_path, name, others):
    tok = load(tmp_path, pre=name, bos_token_id=0)
    text = "Hello  1234'll\n\n x"
    for other in others:
        same = load(tmp_path, pre=other, bos_token_id=0)
        assert same.inner.to_str() == tok.inner.to_str() and same.add_bos == tok.add_bos
        assert same.encode(text) == tok.encode(text)


@pytest.mark.parametrize("pre", ["llama4", "LLAMA3", "", None, 3, ["llama3"], "roberta-bpe"])
def test_unknown_rules_are_refused_by_name(tmp_path, pre):
    with pytest.raises(ValueError, match="which is not known here; known: .*llama-v3"):
        load(tmp_path, pre=pre)


def test_all_ids_that_end_a_reply(tmp_path):
    tok = load(tmp_path, eos_token_id=1, eot_token_id=2, eom_token_id=3)
    assert tok.stop_ids == {1, 2, 3, 4} and tok.eos_id == 1  # 4 is <|im_end|>


def test_ids_that_are_no_ids(tmp_path):
    tok = load(
        tmp_path, eos_token_id=1, padding_token_id=0xFFFFFFFF, bos_token_id=-1, eot_token_id=263
    )
    assert (tok.eos_id, tok.pad_id, tok.bos_id) == (1, None, None)
    for value in ([1, 2], 1.5, True):
        with pytest.raises(ValueError, match="m.gguf: eot_token_id is .*no id of its 263 tokens"):
            load(tmp_path, eot_token_id=value)


def test_control_tokens_of_phi3_swallow_the_blanks_behind_them(tmp_path):
    blank = load(tmp_path).encode(" ")[0]
    for name, swallows in (("Phi-3 mini", True), ("phi3", True), ("Llama", False)):
        tok = load(tmp_path, name=name)
        ids = tok.encode("<|a|> <|endoftext|> ", allow_special=True)
        assert ids == ([0, 5, blank] if swallows else [0, blank, 5, blank])


def test_a_vocabulary_that_keeps_blanks_is_refused(tmp_path):
    facts = {"model": "llama", "scores": [0.0] * 263, "escape_whitespaces": False}
    with pytest.raises(ValueError, match="escape_whitespaces is False"):
        load(tmp_path, **facts)
