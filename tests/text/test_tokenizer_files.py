"""Tests of the files of a tokenizer: encodings, lists of ids, damaged files."""

import json
import random
import time

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from lamoe.text.tokenizer import BOS, Tokenizer, train
from lamoe.text.tokenizer_files import make_splits_linear

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


@pytest.mark.parametrize(
    "files, stops",
    [
        ({"config.json": {"eos_token_id": [1, 3, 4]}}, {1, 3, 4}),
        ({"config.json": {"eos_token_id": 3}}, {1, 3}),
        ({"config.json": {"eos_token_id": [3]}, "generation_config.json": {}}, {1, 3}),
        (
            {"config.json": {"eos_token_id": 3}, "generation_config.json": {"eos_token_id": [4]}},
            {1, 4},
        ),
        ({"generation_config.json": {"eos_token_id": [1, -1], "pad_token_id": [2]}}, {1}),
        ({"config.json": {"eos_token_id": {"a": 1}}}, {1}),
    ],
)
def test_every_listed_eos_id_ends_a_reply(tok, tmp_path, files, stops):
    tok.save(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).stop_ids == stops


@pytest.mark.parametrize("name", ["bos", "pad"])
def test_several_ids_where_one_is_meant_are_refused(tok, tmp_path, name):
    tok.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(f'{{"{name}_token_id": [1, 2]}}')
    with pytest.raises(ValueError, match=f"{name}_token_id must be one id, found .1, 2."):
        Tokenizer.load(tmp_path)


BLANKS = st.text(" \t\n\r\x0b\x85\u2028\u3000a1", max_size=12)


@given(BLANKS)
def test_the_faster_pattern_splits_equally(text):
    rows = []
    for linear in (False, True):
        for steps in ([SPLIT], [DIGITS, SPLIT, DIGITS]):
            inner = tokenizers.Tokenizer(tokenizers.models.BPE())
            inner.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
            if linear:
                make_splits_linear(inner)
                assert "(?<!" in inner.to_str()
            rows.append(inner.pre_tokenizer.pre_tokenize_str(text))
    assert rows[:2] == rows[2:]


SPLIT = pre_tokenizers.Split(tokenizers.Regex(r"\s+$"), "isolated")
DIGITS = pre_tokenizers.Digits(individual_digits=True)


# ---- damaged files ----
VALUES = [
    None,
    True,
    0,
    -1,
    1 << 40,
    1.5,
    "",
    "x",
    "<｜begin▁of▁sentence｜>",
    [],
    [1],
    {},
    {"a": []},
]


def mutate(value, rng):
    """Return a JSON value with one change somewhere: another value, a missing or a new entry."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value)[:30])
        change = rng.random()
        if change < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if change < 0.25:
            return {**value, f"{key}?": value[key]}
        return {**value, key: mutate(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], mutate(value[at], rng), *value[at + (rng.random() < 0.9) :]]
    return rng.choice(VALUES)


def mutate_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data))
        data[at : at + rng.randint(0, 3)] = bytes(rng.choices(range(256), k=rng.randint(0, 3)))
    return bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_mutated_files_load_or_give_a_value_error(tok, tmp_path, name):
    rng, loaded, seconds = random.Random(name), 0, []
    tok.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    added = json.loads(tok.inner.to_str())["added_tokens"]
    config["added_tokens_decoder"] = {str(t.pop("id")): t for t in added}
    config["extra_special_tokens"] = ["a", {"content": "b", "lstrip": True}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    good = (tmp_path / name).read_bytes()
    for n in range(120):
        value = json.dumps(mutate(json.loads(good), rng)).encode()
        (tmp_path / name).write_bytes(value if n % 3 else mutate_bytes(good, rng))
        begin = time.perf_counter()
        try:
            made = Tokenizer.load(tmp_path)
            messages = [{"role": "user", "content": f"x{BOS}y"}]
            ids = made.encode("a <b> c\n") + made.apply_chat(messages)
            made.decode(ids)
            loaded += 1
        except ValueError as e:
            assert str(tmp_path) in str(e) or "template" in str(e) or "token" in str(e)
        seconds.append(time.perf_counter() - begin)
    assert 5 < loaded < 120 and max(seconds) < 60


@pytest.mark.parametrize("key", ["continuing_subword_prefix", r"continuing_\u0073ubword_prefix"])
def test_merges_without_their_prefix_do_not_end_the_process(tok, tmp_path, key):
    text = tok.inner.to_str().replace('"continuing_subword_prefix":null', f'"{key}":"\N{SNOWMAN}"')
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="lacks the continuing_subword_prefix"):
        Tokenizer.load(tmp_path)
