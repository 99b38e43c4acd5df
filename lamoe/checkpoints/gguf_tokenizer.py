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
    "A-Za-z\u00B5\u00C0-\u00D6\u00D8-\u00F6\u00F8-\u01BA\u01BC-\u01BF\u01C4-\u0293\u0295-\u02AF\u0370-\u0373\u0376\u0377"
    "\u037B-\u037D\u037F\u0386\u0388-\u038A\u038C\u038E-\u03A1\u03A3-\u03F5\u03F7-\u0481\u048A-\u052F\u0531-\u0556\u10A0-\u10C5"
    "\u13A0-\u13F5\u13F8-\u13FD\u1C90-\u1CBA\u1CBD-\u1CBF\u1D00-\u1D2B\u1D6B-\u1D77\u1D79-\u1D9A\u1E00-\u1F15\u1F18-\u1F1D"
    "\u1F20-\u1F45\u1F48-\u1F4D\u1F50-\u1F57\u1F59\u1F5B\u1F5D\u1F5F-\u1F7D\u1F80-\u1FB4\u1FB6-\u1FBC\u1FBE\u1FC2-\u1FC4"
    "\u1FC6-\u1FCC\u1FD0-\u1FD3\u1FD6-\u1FDB\u1FE0-\u1FEC\u1FF2-\u1FF4\u1FF6-\u1FFC\u2102\u2107\u210A-\u2113\u2115\u2119-\u211D"
    "\u2124\u2126\u2128\u212A-\u212D\u212F-\u2134\u2139\u213C-\u213F\u2145-\u2149\u214E\u2183\u2184\u2C00-\u2C7B\u2C7E-\u2CE4"
    "\u2CEB-\u2CEE\u2CF2\u2CF3\uA640-\uA66D\uA680-\uA69B\uA722-\uA76F\uA771-\uA787\uA78B-\uA78E\uAB70-\uABBF\uFB00-\uFB06"
    "\uFB13-\uFB17\uFF21-\uFF3A\uFF41-\uFF5A\U00010400-\U0001044F\U000104B0-\U000104D3\U000104D8-\U000104FB\U00010C80-\U00010CB2"
    "\U00010CC0-\U00010CF2\U000118A0-\U000118DF\U0001E900-\U0001E943"
)
_CJK = "[\u4E00-\u9FA5\u0800-\u4E00\uAC00-\uD7FF]+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(*patterns: str, digits: bool = False) -> list:
    return [*(pre_tokenizers.Split(Regex(p), "isolated") for p in patterns), *([pre_tokenizers.Digits(individual_digits=True)] if digits else [])]


_DIGITS_GPT2 = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
SPLITS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
    "smollm": _DIGITS_GPT2, "starcoder": _DIGITS_GPT2, "refact": _DIGITS_GPT2,
    "llama-bpe": _split(_WORDS % "{1,3}"), "qwen2": _split(_WORDS % ""),
    "deepseek-llm": _split("[\r\n]", rf"\s?[{_LETTERS}]+", "\\s?[!-/:-~\uFF01-\uFF0F\uFF1A-\uFF5E\u2018-\u201F\u3000-\u3002]+", r"\s+$", _CJK, digits=True),
    "deepseek-coder": _split("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, digits=True),
}
_BEGINS_WITH_BOS = ("llama-bpe",)  # where the file does not say


# ---- the files -------------------------------------------------------------------------------------------------------------
def write(facts: Mapping[str, Any], folder: Path, source: str) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json of the vocabulary in a file's `facts`. ValueError, naming `source`, when there is none,
    when it is of a kind that is not known here, or when it contradicts itself."""
    own = {k.removeprefix("tokenizer.ggml."): v for k, v in facts.items() if k.startswith("tokenizer.ggml.")}
    kind, tokens, types = own.get("model"), own.get("tokens"), own.get("token_type")
    instead = "name a folder that has the model's own tokenizer.json (--tokenizer)"
    if not tokens or not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError(f"{source} has no vocabulary with a type for each token; {instead}")
    last = max((i for i, (t, k) in enumerate(zip(tokens, types)) if k != _UNUSED and t != f"[PAD{i}]"), default=-1)  # the rest fills up the model's rows
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
            raise ValueError(f"a vocabulary of kind {kind!r} is not known; known: gpt2, llama; {instead}")
        named = {name: tokens[own[key]] for name, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("pad", "padding_token_id")) if key in own}
    except (KeyError, IndexError, TypeError) as e:
        raise ValueError(f"{source}: its vocabulary is not complete ({type(e).__name__}: {e}); {instead}") from None
    except ValueError as e:
        raise ValueError(f"{source}: {e}") from None
    special = {own.get(f"{n}_token_id") for n in ("bos", "eos", "padding", "eot", "eom")}
    for i, (token, k) in enumerate(zip(tokens, types)):
        if k in (_CONTROL, _USER, _UNKNOWN) and token != f"[PAD{i}]":
            inner.add_tokens([AddedToken(token, special=k != _USER or i in special, normalized=False)])
    begins = bool(own.get("add_bos_token", kind == "llama" or own.get("pre") in _BEGINS_WITH_BOS)) and "bos" in named
    if begins:  # for programs that let tokenizer.json add it
        inner.post_processor = processors.TemplateProcessing(single=[named["bos"], "$A"], pair=[named["bos"], "$A", named["bos"], "$B:1"], special_tokens=[(named["bos"], own["bos_token_id"])])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": begins, "add_eos_token": False, "clean_up_tokenization_spaces": False,
              **{f"{name}_token": token for name, token in named.items()}}
    if isinstance(template := facts.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    inner.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    stops = [own[f"{n}_token_id"] for n in ("eos", "eot", "eom") if f"{n}_token_id" in own]
    ids = {f"{n}_token_id": own[k] for n, k in (("bos", "bos_token_id"), ("pad", "padding_token_id")) if k in own} | ({"eos_token_id": list(dict.fromkeys(stops))} if stops else {})
    if ids:
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")


def _byte_level(own: Mapping[str, Any], vocab: dict[str, int], source: str, instead: str) -> tokenizers.Tokenizer:
    pre = own.get("pre")
    if pre not in SPLITS:
        raise ValueError(f"it splits text as {pre!r}, which is not known here; known: {', '.join(SPLITS)}; {instead}")
    merges = [(m[:at], m[at + 1 :]) for m in own["merges"] for at in [m.index(" ", 1)]]
    try:
        inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    except Exception as e:  # the library's own class: a merge of tokens that are not there
        raise ValueError(f"its merges do not belong to its vocabulary: {e}; {instead}") from None
    steps = SPLITS[pre]
    whole = isinstance(steps[-1], pre_tokenizers.ByteLevel)
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps if whole else [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if pre == "qwen2":
        inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentencepiece(own: Mapping[str, Any], vocab: dict[str, int], types: list[int]) -> tokenizers.Tokenizer:
    """Scored pieces: two neighbours join when their join is a piece, the best score first. As merges: every way to cut a piece in two pieces, by score."""
    scores, merges = own["scores"], []
    for piece, i in vocab.items():
        if types[i] in (_NORMAL, _USER):
            cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece)) if piece[:at] in vocab and piece[at:] in vocab]
            merges += [(-scores[i], vocab[a], vocab[b], a, b) for a, b in cuts]
    unknown = next((t for t, i in vocab.items() if types[i] == _UNKNOWN), None)
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[m[3:] for m in sorted(merges)], unk_token=unknown, fuse_unk=True, byte_fallback=True))
    blank = own.get("add_space_prefix", True)
    inner.normalizer = normalizers.Sequence([*([normalizers.Prepend("\u2581")] if blank else []), normalizers.Replace(" ", "\u2581")])
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] if blank else [])])
    return inner
