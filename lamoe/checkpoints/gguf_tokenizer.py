"""Convert the vocabulary of a GGUF file to tokenizer.json and its companion files.

A GGUF file contains only the name of the rule that splits text before merging
(`tokenizer.ggml.pre`). This module defines the rules. An unknown name is refused, because a similar
rule would give slightly wrong ids, and the model would merely seem weak.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from lamoe.text.chat_template import Templates

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # tokenizer.ggml.token_type

# ---- splitting rules -----------------------------------------------------------------------------
# The letters in DeepSeek-LLM's rule: category L& of the Unicode version that it was made with.
_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5"
    "\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4"
    "\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d"
    "\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# %s is replaced by the number of digits that stay together
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(*patterns: str, digits: bool = False) -> list:
    return [
        *(pre_tokenizers.Split(Regex(p), "isolated") for p in patterns),
        *([pre_tokenizers.Digits(individual_digits=True)] if digits else []),
    ]


_DIGITS_GPT2 = [
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
]
# {value of tokenizer.ggml.pre: its pre-tokenizers in the order of application}
SPLITS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "llama-bpe": _split(_WORDS % "{1,3}"),
    "qwen2": _split(_WORDS % ""),
    "deepseek-llm": _split(
        "[\r\n]",
        rf"\s?[{_LETTERS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _CJK,
        digits=True,
    ),
    "deepseek-coder": _split("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, digits=True),
}
# Other names of the same rules, with the same defaults.
_SAME_RULE = {
    **dict.fromkeys("llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2".split(), "llama-bpe"),
    **dict.fromkeys("deepseek-r1-qwen kormo megrez".split(), "qwen2"),
    **dict.fromkeys("phi-2 jina-es jina-de jina-v2-es jina-v2-de a.x-4.0 mellum".split(), "gpt-2"),
}
# Rules of models that use BOS by default, that is, if the file has no add_bos_token.
_BEGINS_WITH_BOS = ("llama-bpe",)
_TOKEN_IDS = tuple(f"{n}_token_id" for n in ("bos", "eos", "padding", "eot", "eom"))
# Texts of control tokens that end a reply in every model that has them. Files of models with two
# such tokens often name only one.
_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<|end_of_text|>")


# ---- the files -----------------------------------------------------------------------------------
def write(metadata: Mapping[str, Any], folder: Path, source: str) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json to `folder`.

    Args:
        metadata: the metadata of a GGUF file, see gguf.File.
        folder: the folder to write to.
        source: the name of the GGUF file, for error messages.

    Raises:
        ValueError: if the file has no vocabulary, or its vocabulary is of an unknown kind or
            inconsistent.
    """
    own = {
        k.removeprefix("tokenizer.ggml."): v
        for k, v in metadata.items()
        if k.startswith("tokenizer.ggml.")
    }
    if isinstance(own.get("pre"), str):
        own["pre"] = _SAME_RULE.get(own["pre"], own["pre"])
    # An id outside the vocabulary means none, as -1 does.
    own = {k: v for k, v in own.items() if not (k.endswith("_token_id") and _is_outside(v, own))}
    tokens, types = _read_vocabulary(own, source)
    inner, named = _build(own, tokens, types, source)
    _add_special_tokens(inner, own, tokens, types, str(metadata.get("general.name", "")))
    begins = "bos" in named and bool(
        own.get("add_bos_token", own["model"] == "llama" or own.get("pre") in _BEGINS_WITH_BOS)
    )
    if begins:  # for programs that let tokenizer.json add BOS
        inner.post_processor = processors.TemplateProcessing(
            single=[named["bos"], "$A"],
            pair=[named["bos"], "$A", named["bos"], "$B:1"],
            special_tokens=[(named["bos"], own["bos_token_id"])],
        )
    inner.save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata, named, begins))
    if ids := _generation_config(own, tokens, types):
        _write_json(folder / "generation_config.json", ids)


_INSTEAD = "name a folder that has the model's own tokenizer.json (--tokenizer)"


def _is_outside(token_id: Any, own: Mapping[str, Any]) -> bool:
    tokens = own.get("tokens")
    if not isinstance(token_id, int) or not isinstance(tokens, list):
        return False
    return not 0 <= token_id < len(tokens)


def _read_vocabulary(own: Mapping[str, Any], source: str) -> tuple[list[str], list[int]]:
    """Return the tokens and their types, without the padding at the end of the list."""
    for key, kind in (
        ("tokens", str),
        ("merges", str),
        ("token_type", int),
        ("scores", (int, float)),
    ):
        values = own.get(key, [])
        if not isinstance(values, list) or not all(isinstance(v, kind) for v in values):
            raise ValueError(
                f"{source}: tokenizer.ggml.{key} is not a list of its type; {_INSTEAD}"
            )
    tokens, types = own.get("tokens"), own.get("token_type")
    if not tokens or not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError(f"{source} has no vocabulary with a type for each token; {_INSTEAD}")
    # Vocabularies are padded to the rows of the embedding.
    used = [
        i for i, (t, kind) in enumerate(zip(tokens, types)) if kind != _UNUSED and t != f"[PAD{i}]"
    ]
    size = max(used, default=-1) + 1
    tokens, types = tokens[:size], types[:size]
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{source} has {len(tokens) - len(set(tokens))} tokens twice; {_INSTEAD}")
    return tokens, types


def _build(
    own: Mapping[str, Any], tokens: list[str], types: list[int], source: str
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Build the tokenizer. Return it together with the texts of its bos, eos and pad tokens."""
    kind, vocab = own.get("model"), {t: i for i, t in enumerate(tokens)}
    try:
        if kind == "gpt2":
            inner = _byte_level(own, vocab)
        elif kind == "llama":
            inner = _sentencepiece(own, vocab, types)
        else:
            raise ValueError(
                f"a vocabulary of kind {kind!r} is not known; known: gpt2, llama; {_INSTEAD}"
            )
        for key in _TOKEN_IDS:
            if key in own and not (type(own[key]) is int and 0 <= own[key] < len(tokens)):
                raise ValueError(
                    f"{key} is {own[key]!r}, which is no id of its {len(tokens)} tokens; {_INSTEAD}"
                )
        keys = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
        named = {name: tokens[own[key]] for name, key in keys.items() if key in own}
    except (KeyError, IndexError, TypeError) as e:
        raise ValueError(
            f"{source}: its vocabulary is not complete ({type(e).__name__}: {e}); {_INSTEAD}"
        ) from None
    except ValueError as e:
        raise ValueError(f"{source}: {e}") from None
    return inner, named


def _add_special_tokens(
    inner: tokenizers.Tokenizer,
    own: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    model_name: str,
) -> None:
    special = {own.get(key) for key in _TOKEN_IDS}
    # A GGUF file has no lstrip or rstrip. Only Phi-3's tokens are known to swallow blanks.
    is_phi3 = re.search("phi-?3", model_name, re.IGNORECASE) is not None
    added = []
    for i, (token, kind) in enumerate(zip(tokens, types)):
        if kind in (_CONTROL, _USER, _UNKNOWN) and token != f"[PAD{i}]":
            added.append(
                AddedToken(
                    token,
                    special=kind != _USER or i in special,
                    rstrip=is_phi3 and token not in ("<unk>", "<s>", "<|endoftext|>"),
                    normalized=False,
                )
            )
    inner.add_tokens(added)


def _tokenizer_config(
    metadata: Mapping[str, Any], named: Mapping[str, str], begins_with_bos: bool
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": begins_with_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": token for name, token in named.items()},
    }
    if templates := _chat_templates(metadata):
        config["chat_template"] = Templates(templates).to_config()
    return config


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates by name: tokenizer.chat_template[.NAME]."""
    key = "tokenizer.chat_template"
    texts = {k: v for k, v in metadata.items() if isinstance(v, str)}
    templates = {"default": texts[key]} if key in texts else {}
    return templates | {
        k.removeprefix(f"{key}."): v for k, v in texts.items() if k.startswith(f"{key}.")
    }


def _generation_config(
    own: Mapping[str, Any], tokens: list[str], types: list[int]
) -> dict[str, Any]:
    """Return the ids of BOS and padding, and of all tokens that end a reply."""
    keys = {"bos": "bos_token_id", "pad": "padding_token_id"}
    ids: dict[str, Any] = {f"{name}_token_id": own[key] for name, key in keys.items() if key in own}
    stops = [own[f"{n}_token_id"] for n in ("eos", "eot", "eom") if f"{n}_token_id" in own]
    stops += [
        i for i, (t, kind) in enumerate(zip(tokens, types)) if t in _ENDS and kind == _CONTROL
    ]
    if stops:
        ids["eos_token_id"] = list(dict.fromkeys(stops))
    return ids


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


# Limit of the work to cut all pieces in two, for pieces of `n` characters the sum of n^2. Real
# vocabularies need 10 million.
_MAX_CUTS = 10**9


# ---- the two kinds of vocabulary -----------------------------------------------------------------
def _byte_level(own: Mapping[str, Any], vocab: dict[str, int]) -> tokenizers.Tokenizer:
    """Build a byte-level BPE tokenizer ("gpt2")."""
    pre = own.get("pre")
    if not isinstance(pre, str) or pre not in SPLITS:
        known = ", ".join([*SPLITS, *_SAME_RULE])
        raise ValueError(
            f"it splits text as {pre!r}, which is not known here; known: {known}; {_INSTEAD}"
        )
    # "left right"; the left part may itself begin with a space
    merges = [(m[:cut], m[cut + 1 :]) for m in own["merges"] for cut in [m.index(" ", 1)]]
    try:
        inner = tokenizers.Tokenizer(
            models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
        )
    except Exception as e:  # tokenizers raises a plain Exception for a merge of unknown tokens
        raise ValueError(f"its merges do not belong to its vocabulary: {e}; {_INSTEAD}") from None
    steps = list(SPLITS[pre])
    if not isinstance(steps[-1], pre_tokenizers.ByteLevel):
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre == "qwen2":
        inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentencepiece(
    own: Mapping[str, Any], vocab: dict[str, int], types: list[int]
) -> tokenizers.Tokenizer:
    """Build a BPE tokenizer from the scored pieces of SentencePiece ("llama").

    SentencePiece joins two neighbouring pieces if the result is a piece too, best score first. The
    equivalent list of merges has every way to cut a piece into two pieces, ordered by score.
    """
    if own.get("escape_whitespaces") is False:
        raise ValueError(f"escape_whitespaces is False, which is not known here; {_INSTEAD}")
    scores, merges = own["scores"], []
    if sum(len(piece) ** 2 for piece in vocab) > _MAX_CUTS:
        raise ValueError(f"its pieces are too long to be words; {_INSTEAD}")
    for piece, token_id in vocab.items():
        if types[token_id] in (_NORMAL, _USER):
            cuts = [
                (piece[:i], piece[i:])
                for i in range(1, len(piece))
                if piece[:i] in vocab and piece[i:] in vocab
            ]
            merges += [(-scores[token_id], vocab[a], vocab[b], a, b) for a, b in cuts]
    unknown = next((t for t, i in vocab.items() if types[i] == _UNKNOWN), None)
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[m[3:] for m in sorted(merges)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    adds_space = own.get("add_space_prefix", True)
    inner.normalizer = normalizers.Sequence(
        [
            *([normalizers.Prepend("\u2581")] if adds_space else []),
            normalizers.Replace(" ", "\u2581"),
        ]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if adds_space else []),
        ]
    )
    return inner
