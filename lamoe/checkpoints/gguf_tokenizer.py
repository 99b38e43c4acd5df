"""The vocabulary inside a GGUF file -> tokenizer.json and its neighbours. The files name how text is split before the merges (`tokenizer.ggml.pre`)
without saying it, so each name that is read here has its splitting below; another name is refused: close is not equal, and wrong ids look like a weak model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # tokenizer.ggml.token_type

# ---- how text is split -----------------------------------------------------------------------------------------------------
# The letters of DeepSeek-LLM's splitting: Unicode's L& as of that tokenizer.
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
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(*patterns: str, digits: bool = False) -> list:
    return [
        *(pre_tokenizers.Split(Regex(p), "isolated") for p in patterns),
        *([pre_tokenizers.Digits(individual_digits=True)] if digits else []),
    ]


_DIGITS_GPT2 = [
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
]
SPLITS = {
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
_BEGINS_WITH_BOS = ("llama-bpe",)  # where the file does not say


# ---- the files -------------------------------------------------------------------------------------------------------------
def write(facts: Mapping[str, Any], folder: Path, source: str) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json of the vocabulary in a file's `facts`. ValueError, naming `source`, when there is none,
    when it is of a kind that is not known here, or when it contradicts itself."""
    own = {
        k.removeprefix("tokenizer.ggml."): v
        for k, v in facts.items()
        if k.startswith("tokenizer.ggml.")
    }
    kind, tokens, types = own.get("model"), own.get("tokens"), own.get("token_type")
    instead = "name a folder that has the model's own tokenizer.json (--tokenizer)"
    if not tokens or not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError(f"{source} has no vocabulary with a type for each token; {instead}")
    last = max(
        (i for i, (t, k) in enumerate(zip(tokens, types)) if k != _UNUSED and t != f"[PAD{i}]"),
        default=-1,
    )  # the rest fills up the model's rows
    tokens, types = tokens[: last + 1], types[: last + 1]
    vocab = {t: i for i, t in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"{source} has {len(tokens) - len(vocab)} tokens twice; {instead}")
    try:
        if kind == "gpt2":
            inner = _byte_level(own, vocab, source, instead)
        elif kind == "llama":
            inner = _sentencepiece(own, vocab, types)
        else:
            raise ValueError(
                f"a vocabulary of kind {kind!r} is not known; known: gpt2, llama; {instead}"
            )
        named = {
            name: tokens[own[key]]
            for name, key in (
                ("bos", "bos_token_id"),
                ("eos", "eos_token_id"),
                ("pad", "padding_token_id"),
            )
            if key in own
        }
    except (KeyError, IndexError, TypeError) as e:
        raise ValueError(
            f"{source}: its vocabulary is not complete ({type(e).__name__}: {e}); {instead}"
        ) from None
    except ValueError as e:
        raise ValueError(f"{source}: {e}") from None
    special = {own.get(f"{n}_token_id") for n in ("bos", "eos", "padding", "eot", "eom")}
    for i, (token, k) in enumerate(zip(tokens, types)):
        if k in (_CONTROL, _USER, _UNKNOWN) and token != f"[PAD{i}]":
            inner.add_tokens(
                [AddedToken(token, special=k != _USER or i in special, normalized=False)]
            )
    begins = (
        bool(own.get("add_bos_token", kind == "llama" or own.get("pre") in _BEGINS_WITH_BOS))
        and "bos" in named
    )
    if begins:  # for programs that let tokenizer.json add it
        inner.post_processor = processors.TemplateProcessing(
            single=[named["bos"], "$A"],
            pair=[named["bos"], "$A", named["bos"], "$B:1"],
            special_tokens=[(named["bos"], own["bos_token_id"])],
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": begins,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": token for name, token in named.items()},
    }
    if isinstance(template := facts.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    inner.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    stops = [own[f"{n}_token_id"] for n in ("eos", "eot", "eom") if f"{n}_token_id" in own]
    ids = {
        f"{n}_token_id": own[k]
        for n, k in (("bos", "bos_token_id"), ("pad", "padding_token_id"))
        if k in own
    } | ({"eos_token_id": list(dict.fromkeys(stops))} if stops else {})
    if ids:
        (folder / "generation_config.json").write_text(
            json.dumps(ids, indent=2) + "\n", encoding="utf-8"
        )


def _byte_level(
    own: Mapping[str, Any], vocab: dict[str, int], source: str, instead: str
) -> tokenizers.Tokenizer:
    pre = own.get("pre")
    if pre not in SPLITS:
        raise ValueError(
            f"it splits text as {pre!r}, which is not known here; known: {', '.join(SPLITS)}; {instead}"
        )
    merges = [(m[:at], m[at + 1 :]) for m in own["merges"] for at in [m.index(" ", 1)]]
    try:
        inner = tokenizers.Tokenizer(
            models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
        )
    except Exception as e:  # the library's own class: a merge of tokens that are not there
        raise ValueError(f"its merges do not belong to its vocabulary: {e}; {instead}") from None
    steps = SPLITS[pre]
    whole = isinstance(steps[-1], pre_tokenizers.ByteLevel)
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        steps
        if whole
        else [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if pre == "qwen2":
        inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentencepiece(
    own: Mapping[str, Any], vocab: dict[str, int], types: list[int]
) -> tokenizers.Tokenizer:
    """Scored pieces: two neighbours join when their join is a piece, the best score first. As merges: every way to cut a piece in two pieces, by score."""
    scores, merges = own["scores"], []
    for piece, i in vocab.items():
        if types[i] in (_NORMAL, _USER):
            cuts = [
                (piece[:at], piece[at:])
                for at in range(1, len(piece))
                if piece[:at] in vocab and piece[at:] in vocab
            ]
            merges += [(-scores[i], vocab[a], vocab[b], a, b) for a, b in cuts]
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
    blank = own.get("add_space_prefix", True)
    inner.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("\u2581")] if blank else []), normalizers.Replace(" ", "\u2581")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if blank else []),
        ]
    )
    return inner
