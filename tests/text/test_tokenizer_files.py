"""Tests of the files of a tokenizer: encodings, lists of ids, damaged files."""

import pytest

from lamoe.text.tokenizer import Tokenizer, train

TEXT = "def add(x, y):\n    return x + y  # the sum of 12 and 345\n"


@pytest.fixture(scope="module")
def tok():
    return train([TEXT] * 4, 300)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_with_a_byte_order_mark_are_read(tok, tmp_path, encoding):
    tok.save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 4]}')
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text, encoding=encoding)
    (tmp_path / "chat_template.jinja").write_text("x", encoding="utf-8-sig")
    back = Tokenizer.load(tmp_path)
    assert back.stop_ids == {1, 4} and back.encode(TEXT) == tok.encode(TEXT)
    assert back.render_chat([{"role": "user", "content": "y"}]) == "x"
