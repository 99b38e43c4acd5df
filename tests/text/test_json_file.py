"""Tests of reading JSON files as people save them, and of the messages for what is not JSON."""

import json
from pathlib import Path

import pytest

from lamoe import checkpoints
from lamoe.model.config import ModelConfig
from lamoe.text import json_file, tokenizer_files

CONFIG = ModelConfig.preset("tiny")


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_every_encoding_that_editors_write_is_read(tmp_path: Path, encoding):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()), encoding=encoding)
    assert checkpoints.read_config(tmp_path) == CONFIG
    assert tokenizer_files.read_json(tmp_path / "config.json")["vocab_size"] == CONFIG.vocab_size


@pytest.mark.parametrize(
    "raw, says",
    [
        (b'{"a": 1,}', "line 1, column 9; remove the comma that no value follows"),
        (b'{"a": [1,\n]}', "remove the comma that no value follows"),
        (b'{"a": 1 // one\n}', "remove the comment"),
        (b"{'a': 1}", "write names and texts in double quotes"),
        (b'{"a": [1', "the file ends too early"),
        (b" \n", "the file is empty"),
        (b"[1]", "must be a JSON object, found list"),
        (b'{"a": 1, "a": 2}', "the name 'a' occurs twice with different values"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "limit"),
        (b'{"a": "\xff"}', "byte 7 is not utf-8 text; the file is binary or damaged"),
        (b'{"a": [' + b"[]," * 2_000_000, "more than 2,000,000 values"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a git-lfs pointer .*git lfs pull"),
    ],
)
def test_what_is_not_json_is_named(tmp_path: Path, raw, says):
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(ValueError, match=rf"x\.json .*{says}"):
        json_file.read_json(tmp_path / "x.json")


def test_a_name_may_occur_twice_with_the_same_value():
    assert json_file.parse_object(b'{"a": [1], "a": [1]}', "x") == {"a": [1]}


def test_large_files_are_not_read(tmp_path: Path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(json_file.MAX_BYTES + 1)
    with pytest.raises(ValueError, match="more than 16,777,216 bytes is refused"):
        json_file.read_json(tmp_path / "x.json")
