"""Work on untrusted text takes time linear in its length.

Clients choose these texts, and much of this work holds the interpreter lock. So anything slower
could freeze a server. Each case has texts of growing length that are as bad as we know.
"""

import contextlib
import functools
import json
import time
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Inner

from lamoe.checkpoints.gguf_tokenizer import SPLITS
from lamoe.engine.grammar import Grammar, _sentence
from lamoe.engine.grammar_checks import MAX_CHARS, check_repeats, check_schema
from lamoe.engine.lookup import Lookup
from lamoe.engine.next_token import TextStream
from lamoe.model.config_keys import is_arithmetic, is_bookkeeping
from lamoe.serve import bodies
from lamoe.serve.errors import ApiError
from lamoe.serve.wire import ChatRequest, CompletionRequest
from lamoe.text import chat_template, json_file
from lamoe.text.call_form import CallForm
from lamoe.text.forced_calls import ForcedCalls, ForcedStream, spelling_of
from lamoe.text.text_finder import TextFinder
from lamoe.text.tokenizer import Tokenizer
from lamoe.text.tokenizer_files import make_splits_linear
from lamoe.text.tool_calls import DEEPSEEK, TAGS, Splitter, parse

REGEX, SCHEMA, LARK = (
    MAX_CHARS[kind] for kind in ("regular expression", "JSON schema", "Lark grammar")
)


def seconds(work: Callable, text) -> float:
    """Return the CPU time of all threads for one call. A refusal counts as an answer."""
    start = time.process_time()
    with contextlib.suppress(ValueError, ApiError, RecursionError):
        work(text)
    return time.process_time() - start


def check_linear(work: Callable, make: Callable[[int], object], largest: int) -> None:
    """Check that 8 times the length takes at most about 8 times as long.

    Quadratic work takes 64 times as long. A machine with other work makes single measurements too
    long, so the shortest of several counts, and a suspicious step is measured again. The lengths
    double from small ones, so bad code fails before it takes hours.
    """
    sizes = [largest >> k for k in range(largest.bit_length()) if largest >> k >= 4][::-1]
    for small, large in zip(sizes, sizes[3:]):
        for _ in range(5):
            one = min(seconds(work, make(small)) for _ in range(3))
            eight = min(seconds(work, make(large)) for _ in range(2))
            if eight < 24 * one + 2e-3:
                break
        else:
            raise AssertionError(f"{small}: {one:.6f} s, {large}: {eight:.6f} s")


def repeats(text: str) -> None:
    check_repeats("regular expression", text)


def pattern_properties(text: str) -> None:
    check_schema({"patternProperties": {text: {}}})


# {name: (function, text of about a given length, largest length)}
CASES = {
    "repeats: a brace, then blanks": (repeats, lambda n: "{" + " " * n, LARK),
    "repeats: blanks and digits": (repeats, lambda n: "{" + " 1" * (n // 2), LARK),
    "repeats: braces and blanks": (repeats, lambda n: "{ " * (n // 2), LARK),
    "repeats: digits": (repeats, lambda n: "{" + "1" * n, LARK),
    "repeats: a tilde, then blanks": (repeats, lambda n: "~" + " " * n, LARK),
    "repeats: a range, then blanks": (repeats, lambda n: "~1" + " " * n, LARK),
    "repeats: tildes": (repeats, lambda n: "~1 .. " * (n // 6), LARK),
    "regex: a brace, then blanks": (Grammar.regex, lambda n: "{" + " " * n, REGEX),
    "regex: backslashes": (Grammar.regex, lambda n: "\\" * n, REGEX),
    "Lark: a brace, then blanks": (Grammar.lark, lambda n: "{" + " " * n, LARK),
    "Lark: %json, then blanks": (Grammar.lark, lambda n: "%json" + " " * n, LARK),
    "Lark: temperature, then blanks": (Grammar.lark, lambda n: "temperature" + " " * n, LARK),
    "Lark: temperatures": (Grammar.lark, lambda n: "temperature " * (n // 12), LARK),
    "Lark: schemas in texts": (
        Grammar.lark,
        lambda n: 'start: %json {"":"' + "%json {}" * (n // 8) + '"}',
        LARK,
    ),
    "schema: pattern": (
        lambda text: Grammar.json_schema({"type": "string", "pattern": text}),
        lambda n: "{" + " " * n,
        REGEX,
    ),
    "schema: patternProperties": (pattern_properties, lambda n: "{" + " " * n, REGEX),
    "schema: multiples": (
        check_schema,
        lambda n: {"allOf": [{"multipleOf": 10**25 + 2 * i + 1} for i in range(n // 40)]},
        SCHEMA,
    ),
    "schema: values": (check_schema, lambda n: {"enum": [0] * n}, SCHEMA),
    "an error: digits": (lambda t: _sentence("Lark grammar", t), lambda n: " 1" * n, LARK),
    "an error: a position": (
        lambda t: _sentence("JSON schema", t),
        lambda n: "at " + "1" * n + "(",
        LARK,
    ),
    "JSON in Lark": (
        Grammar.lark,
        lambda n: "start: %json " + json.dumps({"enum": ["{ " * n]}),
        LARK // 3,
    ),
}


# ---- text and tokens -----------------------------------------------------------------------------
TEXT = 1 << 13
CONTROL = ("<s>", "</s>", "<｜User｜>", "<｜Assistant｜>", "<tool_call>", "<<", "aaaaaaaaaaaab")


@functools.cache
def tok(split: str = "deepseek-llm") -> Tokenizer:
    """Return a byte-level tokenizer that splits text as a released model does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "a"), ("aa", "aa"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ")]
    vocab = {t: i for i, t in enumerate([*alphabet, *(a + b for a, b in merges)])}
    inner = Inner(models.BPE(vocab=vocab, merges=merges))
    steps = [*SPLITS[split], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    make_splits_linear(inner)
    inner.add_tokens([AddedToken(t, special=i < 2) for i, t in enumerate(CONTROL)])
    return Tokenizer(inner, bos="<s>", eos="</s>", chat_template=CHAT)


@functools.cache
def fallback_tok() -> Tokenizer:
    """Return a tokenizer without a byte-level decoder, which decodes runs of bytes at once."""
    vocab = {"<unk>": 0, "a": 1} | {f"<0x{b:02X}>": 2 + b for b in range(256)}
    inner = Inner(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(inner)


CHAT = (
    "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
    "{% endfor %}{# tools #}"
)
TEXTS = {
    "blanks, then a digit": lambda n: " " * n + "1",
    "blanks": lambda n: " " * n,
    "line ends": lambda n: "\n" * n + "1",
    "one letter": lambda n: "a" * n,
    "almost a control token": lambda n: "a" * 12 * (n // 12),
    "control tokens": lambda n: "<｜User｜>" * (n // 8),
    "beginnings of control tokens": lambda n: "<｜Us" * (n // 4),
    "overlapping control tokens": lambda n: "<" * n,
    "marks of accents": lambda n: "a" + "\u0301" * n,
}
SPLIT = {
    f"encode, {split}: {name}": (tok(split).encode, make, TEXT)
    for split in ("deepseek-llm", "deepseek-coder", "llama-bpe", "qwen2", "smollm")
    for name, make in TEXTS.items()
    if split == "deepseek-llm" or name == "blanks, then a digit"
}


def message(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def shield(value) -> None:
    chat_template._Shield(CONTROL, "\ufdd0")(value)


def in_chunks(add: Callable, text: str, size: int = 1) -> None:
    for i in range(0, len(text), size):
        add(text[i : i + size])


def call(arguments: str) -> list[dict]:
    calls = [{"id": "c", "function": {"name": "f", "arguments": arguments}}]
    return [{"role": "assistant", "content": None, "tool_calls": calls}]


def stream(tokenizer: Tokenizer, ids: list[int]) -> None:
    text = TextStream(tokenizer, ("a" * 255 + "b", *(f"{'a' * 254}{c}b" for c in "cdefghij")))
    for i in ids:
        text.add(i)
    text.rest()


def draft(ids: list[int]) -> None:
    lookup, tokens = Lookup(), [0, 1, 2]
    for i in ids:
        tokens.append(i)
        lookup.propose(tokens, 12)


FORCED = ForcedCalls(spelling_of("{{ tools }}<tool_call>"), ("f", "g"), several=True)


def forced(text: str) -> None:
    reply = ForcedStream(FORCED)
    in_chunks(reply.add, text)
    reply.end()


def configured(key: str) -> None:
    is_bookkeeping(key)
    is_arithmetic(key)


def body(model) -> Callable[[str], object]:
    return lambda text: bodies.parse(text.encode(), model)


def json_text(text: str) -> None:
    json_file.parse_object(text.encode(), "config.json")


CASES |= SPLIT
CASES |= {
    **{
        f"chat: {name}": (lambda t: tok().apply_chat(message(t)), make, TEXT)
        for name, make in TEXTS.items()
    },
    "chat: many messages": (
        lambda n: tok().apply_chat(message("<｜User｜>") * n),
        lambda n: n,
        256,
    ),
    "chat: fill in": (
        lambda t: tok().encode_fill_in(t, t, ("<s>", "</s>", "<tool_call>")),
        lambda n: "<｜User｜>" * (n // 8),
        TEXT,
    ),
    "chat: arguments": (
        lambda t: tok().apply_chat(call(json.dumps({"a": t}))),
        lambda n: "<s>\ufdd0" * (n // 4),
        TEXT,
    ),
    "chat: arguments that are not JSON": (
        CallForm().convert,
        lambda n: call('{"a":' + "\n" * n),
        TEXT,
    ),
    "chat: nested arguments": (CallForm().convert, lambda n: call("[" * n), TEXT),
    "chat: digits": (CallForm().convert, lambda n: call("1" * n), TEXT),
    "shield: many short texts": (shield, lambda n: ["<｜Us"] * n, TEXT // 4),
    "shield: blanks": (shield, lambda n: " " * n + "<s>" + " " * n, TEXT),
    "mark: noncharacters": (
        lambda t: chat_template.free_mark([t]),
        lambda n: "".join(map(chr, range(0xFDD0, 0xFDEF))) * (n // 32),
        TEXT,
    ),
    "decode": (tok().decode, lambda n: [5] * n, TEXT // 4),
    "stream: half characters": (lambda ids: stream(tok(), ids), lambda n: [180] * n, TEXT // 4),
    "stream: almost stop strings": (
        lambda ids: stream(tok(), ids),
        lambda n: tok().encode("a" * 4 * n),
        TEXT // 4,
    ),
    "stream: a run of bytes": (
        lambda ids: stream(fallback_tok(), ids),
        lambda n: [2 + 0xE4] * n,
        TEXT // 4,
    ),
    "find: almost": (
        lambda t: in_chunks(TextFinder(["a" * 255 + "b"]).add, t, 3),
        lambda n: ("a" * 254 + "c") * (n // 255),
        TEXT // 4,
    ),
    "calls: tags": (lambda t: parse(TAGS, t), lambda n: "<tool_call>" * (n // 11), TEXT),
    "calls: blanks": (lambda t: parse(TAGS, t), lambda n: "<tool_call>" + " " * n, TEXT),
    "calls: nested": (lambda t: parse(TAGS, t), lambda n: '<tool_call>{"a":' * (n // 16), TEXT),
    "calls: nested in texts": (
        lambda t: parse(TAGS, t),
        lambda n: '<tool_call>{"a":"b",' * (n // 20),
        TEXT,
    ),
    "calls: blanks after lists": (
        lambda t: parse(DEEPSEEK, t),
        lambda n: ("<｜tool▁calls▁begin｜>" + " " * 50) * (n // 70),
        TEXT,
    ),
    "calls: names": (
        lambda t: parse(DEEPSEEK, t),
        lambda n: "<｜tool▁call▁begin｜>function<｜tool▁sep｜>" + "f" * n,
        TEXT,
    ),
    "streamed calls: blanks": (
        lambda t: in_chunks(Splitter(TAGS).add, t),
        lambda n: " " * n,
        TEXT // 2,
    ),
    "streamed calls: beginnings": (
        lambda t: in_chunks(Splitter(DEEPSEEK).add, t),
        lambda n: "<｜tool▁calls▁" * (n // 13),
        TEXT // 8,
    ),
    "forced calls": (
        lambda t: FORCED.parse(t),
        lambda n: 'f", "arguments":{}}\n</tool_call>\n<tool_call>\n{"name": "' * (n // 56),
        TEXT,
    ),
    "streamed forced calls": (forced, lambda n: "f" * n, TEXT // 2),
    "drafts": (draft, lambda n: [i % 7 for i in range(n)], 4096),
}

# ---- bodies and files ----------------------------------------------------------------------------
CASES |= {
    "body: blanks": (body(CompletionRequest), lambda n: "{" + " " * n, TEXT),
    "body: nested": (body(CompletionRequest), lambda n: "[" * n, TEXT),
    "body: quotes": (body(CompletionRequest), lambda n: '"' * n, TEXT),
    "body: escapes": (body(CompletionRequest), lambda n: '{"prompt": "' + "\\\\" * n, TEXT),
    "body: digits": (body(CompletionRequest), lambda n: '{"seed": ' + "1" * n + "}", TEXT),
    "body: unknown fields": (
        body(CompletionRequest),
        lambda n: json.dumps({f"a{i}": {} for i in range(n)}),
        2000,
    ),
    "body: messages": (
        body(ChatRequest),
        lambda n: json.dumps({"messages": [{"role": "user", "content": [[]]}] * n}),
        2000,
    ),
    "body: lists": (
        body(CompletionRequest),
        lambda n: json.dumps({"prompt": [[1]] * n}),
        TEXT // 4,
    ),
    "file: blanks": (json_text, lambda n: '{"a": 1,' + " " * n + "x", TEXT),
    "file: nested": (json_text, lambda n: '{"a":' * (n // 5), TEXT),
    "file: names": (
        json_text,
        lambda n: "{" + ",".join(f'"a{i}": 0' for i in range(n // 8)) + "}",
        TEXT,
    ),
    "config: underscores": (configured, lambda n: "_" * n, TEXT),
    "config: words": (configured, lambda n: "max_" * (n // 4), TEXT),
    "config: drops": (configured, lambda n: "drop_p" * (n // 6), TEXT),
}


@pytest.mark.parametrize("name", CASES)
def test_work_is_linear(name):
    check_linear(*CASES[name])
