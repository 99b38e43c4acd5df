"""Tests of structured output: limits on grammars, hostile grammars, and errors."""

import asyncio
import gc
import math
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch

from lamoe.engine import grammar as module
from lamoe.engine.async_llm import AsyncLLM
from lamoe.engine.generate import generate
from lamoe.engine.grammar import Grammar
from lamoe.engine.llm import LLM
from lamoe.engine.sampler import SamplingParams
from lamoe.text import tokenizer
from tiny_engine import idle
from tiny_grammar import ROWS, TEXT, engine, llm, tok  # noqa: F401 (llm and tok are fixtures)


def test_a_grammar_that_exceeds_a_limit_fails_alone(llm):
    """A grammar that exceeds a limit during generation fails only its own request.

    Nested repeats exhaust the lexer while the text grows. The Grammar can be used again, because
    its next request starts with fresh lexer states.
    """
    bomb, good = (
        Grammar.regex("((a{0,100}){0,100}){0,100}"),
        SamplingParams(
            temperature=0.0, max_tokens=12, grammar=Grammar.regex("(ab)*"), ignore_eos=True
        ),
    )
    bad = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True, grammar=bomb)
    for _ in range(2):
        first, second, third = llm.generate(["ab", "cat", "ab"], [good, bad, good])
        assert (
            second.finish_reason == "error"
            and "regular expression cannot be followed" in second.error
            and 5 < len(second.token_ids) < 100
        )
        assert (
            first.text == third.text
            and first.finish_reason == "length"
            and first.text.startswith("abab")
            and idle(llm)
        )


def test_grammars_are_never_compiled_in_the_engine_thread(tok, monkeypatch):
    where, compile_ = [], module._compiling
    monkeypatch.setattr(
        module,
        "_compiling",
        lambda kind, work: where.append(threading.current_thread().name) or compile_(kind, work),
    )
    server = AsyncLLM(engine(tok))

    async def main():
        good = SamplingParams(temperature=0.0, max_tokens=30, grammar=Grammar.regex("(ab){5}"))
        never = SamplingParams(grammar=Grammar.json_schema({"$ref": "#"}))
        return await asyncio.gather(
            server.generate("ab", good),
            server.generate("ab", never),
            server.generate("cat", good),
            return_exceptions=True,
        )

    one, bad, two = asyncio.run(asyncio.wait_for(main(), 60))
    server.close(10)
    assert (
        one[0].text == two[0].text == "ab" * 5
        and isinstance(bad, ValueError)
        and "no text fits it" in str(bad)
    )
    assert len(where) >= 2 and not any("engine" in name for name in where)


CASES = {
    "reference to itself": lambda: Grammar.json_schema({"$ref": "#"}),
    "references in a circle": lambda: Grammar.json_schema(
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    ),
    "a circle through allOf": lambda: Grammar.json_schema(
        {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}] * 2}}, "$ref": "#/$defs/a"}
    ),
    "a chain of references": lambda: Grammar.json_schema(
        {
            "$defs": {
                f"{i:x}": {"anyOf": [{"items": {"$ref": f"#/$defs/{i + 1:x}"}}]}
                for i in range(1000)
            }
            | {f"{1000:x}": {}},
            "$ref": "#/$defs/0",
        }
    ),
    "ten to the ninth": lambda: Grammar.json_schema(
        {
            "$defs": {
                f"l{i}": {
                    "type": "array",
                    "items": {"$ref": f"#/$defs/l{i - 1}"},
                    "minItems": 10,
                    "maxItems": 10,
                }
                for i in range(1, 10)
            }
            | {"l0": {"type": "null"}},
            "$ref": "#/$defs/l9",
        }
    ),
    "too long an array": lambda: Grammar.json_schema(
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**18}
    ),
    "allOf of anyOf": lambda: Grammar.json_schema(
        {
            "allOf": [
                {
                    "anyOf": [
                        {"properties": {f"p{i}{j}": {}}, "required": [f"p{i}{j}"]}
                        for j in range(10)
                    ]
                }
                for i in range(10)
            ]
        }
    ),
    "deep": lambda: Grammar.json_schema(nested(100_000)),
    "wide": lambda: Grammar.json_schema({"properties": {f"k{i}": {} for i in range(600)}}),
    "optional in any subset": lambda: Grammar.json_schema(
        {"properties": {f"k{i}": {"type": "string"} for i in range(500)}, "type": "object"}
    ),
    "huge enum": lambda: Grammar.json_schema({"enum": [f"value {i}" for i in range(50_000)]}),
    "large enum": lambda: Grammar.json_schema(
        {"enum": [f"v{i * 7919 % 100003}" for i in range(5000)]}
    ),
    "long constant": lambda: Grammar.json_schema({"const": "x" * 60_000}),
    "remainders": lambda: Grammar.json_schema({"type": "integer", "multipleOf": 1234567}),
    "remainders together": lambda: Grammar.json_schema(
        {"allOf": [{"type": "integer", "multipleOf": m} for m in (997, 991, 983)]}
    ),
    "remainders in Lark": lambda: Grammar.lark(
        'start: %json {"type": "integer", "mult\\u0069pleOf": 1234567}'
    ),
    "pattern": lambda: Grammar.json_schema({"type": "string", "pattern": "(x{0,100000})*"}),
    "patterns that exclude each other": lambda: Grammar.json_schema(
        {"allOf": [{"type": "string", "pattern": f"^(.*a{i}.*)$"} for i in range(12)]}
    ),
    "repeat": lambda: Grammar.regex("a{0,100000}"),
    "repeat of repeats": lambda: Grammar.regex("(ab{10000}c){10000}"),
    "repeats in Lark": lambda: Grammar.lark("start: A\nA: /a{1000}/{1000}"),
    "repeat of rules": lambda: Grammar.lark('start: x~100000\nx: "a"'),
    "optional in a row": lambda: Grammar.regex("a?" * 1900),
    "parentheses": lambda: Grammar.regex("(" * 2000 + ")" * 2000),
    "parentheses in Lark": lambda: Grammar.lark("start: " + "(" * 5000 + '"a"' + ")" * 5000),
    "a chain of rules": lambda: Grammar.lark(
        "start:a0\n" + "".join(f"a{i}:a{i + 1}\n" for i in range(2700)) + 'a2700:"b"'
    ),
    "a chain of terminals": lambda: Grammar.lark(
        "start:A0\n" + "".join(f"A{i}:A{i + 1}\n" for i in range(2500)) + 'A2500:"b"'
    ),
    "doubled sixty times": lambda: Grammar.lark(
        "start: T0\n" + "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(60)) + 'T60: "a"'
    ),
    "rules doubled": lambda: Grammar.lark(
        "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(60)) + 'r60: "a"'
    ),
    "ambiguous": lambda: Grammar.lark('start: x*\nx: x* y\ny: "a"? "b"?'),
    "rules in a circle": lambda: Grammar.lark("start: a\na: b\nb: a"),
    "intersections": lambda: Grammar.lark(
        "start: A\nA: " + " & ".join(f"/(.*a.{{{i}}}b.*)/" for i in range(2, 12))
    ),
}


def nested(depth: int) -> dict:
    schema: dict = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def hostile() -> None:
    """Compile every case and sample up to 80 tokens under it. Print the result or the error.

    Runs in a thread with a normal stack, like that of the engine.
    """
    tok = tokenizer.train(TEXT, 330)
    for name, make in CASES.items():
        try:
            matcher, count, generator = make().start(tok), 0, torch.Generator().manual_seed(0)
            while count < 80 and not matcher.complete:
                token = int(
                    torch.multinomial(
                        matcher.mask(torch.zeros(ROWS), ignore_eos=True).softmax(0),
                        1,
                        generator=generator,
                    )
                )
                count += 1
                matcher.accept(token)
            print(f"{name}: {count} tokens", flush=True)
        except ValueError as e:
            print(f"{name}: {str(e)[:150]!r}", flush=True)


def test_hostile_grammars():
    """Every hostile grammar is refused or works, within limits on memory and CPU time.

    The test runs in its own process, because a long chain of rules can crash the library.
    """
    code = (
        "import resource, sys, threading; resource.setrlimit(resource.RLIMIT_CPU, (60, 60)); "
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30));"
        "sys.path[:0] = ['tests', 'tests/engine']; import test_grammar_limits; "
        "t = threading.Thread(target=test_grammar_limits.hostile); t.start(); t.join()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (
        f"{done.returncode} after {done.stdout[-300:]!r}: {done.stderr[-2000:]}"
    )
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert list(found) == list(CASES), done.stderr
    accepted = {name for name, result in found.items() if result.endswith(" tokens")}
    assert {
        "a chain of references",
        "ten to the ninth",
        "optional in any subset",
        "large enum",
        "long constant",
        "repeat of repeats",
        "a chain of rules",
    } <= accepted
    for name, message in {
        "reference to itself": "no text fits",
        "references in a circle": "no text fits",
        "rules in a circle": "no text fits",
        "deep": "deeper than 64",
        "wide": "at most 500",
        "huge enum": "at most 65536",
        "remainders": "1234567",
        "remainders together": "common multiple",
        "remainders in Lark": "1234567",
        "pattern": "100000",
        "repeat": "100000",
        "repeat of rules": "100000",
        "too long an array": "",
    }.items():
        assert message in found[name], (name, found[name])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Grammar.json_schema([]), "must be an object, found list"),
        (lambda: Grammar.json_schema({1: {}}), "not a str: 1"),
        (lambda: Grammar.json_schema({"enum": [math.nan]}), "not JSON"),
        (lambda: Grammar.json_schema({"enum": [object()]}), "not JSON"),
        (lambda: Grammar.json_schema({"const": 10**400}), "number out of range"),
        (lambda: Grammar.json_schema({"type": "strin"}), "strin"),
        (lambda: Grammar.json_schema({"not": {}}), "not"),
        (lambda: Grammar.json_schema({"format": "iri", "type": "string"}), "iri"),
        (lambda: Grammar.json_schema({"oneOf": [{"pattern": "a"}, {"pattern": "b"}]}), "Use anyOf"),
        (lambda: Grammar.json_schema({"$ref": "http://example.org/x"}), "retriev"),
        (lambda: Grammar.json_schema({"x-guidance": {"lenient": True}}), "x-guidance"),
        (lambda: Grammar.json_schema({"minimum": 5, "maximum": 4, "type": "integer"}), ""),
        (lambda: Grammar.regex(5), "must be a str, found int"),
        (lambda: Grammar.regex("(?=a)"), "look-around"),
        (lambda: Grammar.regex("("), "unclosed group"),
        (lambda: Grammar.regex("a\\"), "escapes nothing"),
        (lambda: Grammar.regex("a\\\\\\"), "escapes nothing"),
        (lambda: Grammar.regex(r"(a)\1"), "backreferences"),
        (lambda: Grammar.regex("a" * 5000), "5000 bytes; at most 4096"),
        (lambda: Grammar.regex("\ud800"), "surrogate"),
        (lambda: Grammar.lark(""), "Lark grammar"),
        (lambda: Grammar.lark("start: b"), 'at 1(8): unknown name: "b"'),
        (lambda: Grammar.lark("start: %json {"), "%json"),
        (lambda: Grammar.lark('%llguidance {"no_forcing": false}\nstart: "a"'), "%llguidance"),
        (lambda: Grammar.lark("start: a\na[temperature=2]: /x/"), "temperature"),
    ],
)
def test_invalid_grammars_are_refused(make, message):
    with pytest.raises(ValueError) as e:
        make()
    assert message in str(e.value) and len(str(e.value)) < 500


def test_grammars_that_only_fail_with_a_vocabulary(tok):
    for make in (
        lambda: Grammar.lark("start: <[99999]>"),
        lambda: Grammar.lark("start: <|nosuchtoken|>"),
        lambda: Grammar.regex("[^\\x00-\\U0010FFFF]"),
    ):
        with pytest.raises(ValueError, match="cannot be followed"):
            make().prepare(tok)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Grammar.lark("start: T\nT: " + " & ".join(f"/(.*{i}.*)+/" for i in range(200))),
        lambda: Grammar.json_schema(
            {"allOf": [{"type": "string", "pattern": f"(.*a{i}.*){{1,50}}"} for i in range(400)]}
        ),
    ],
)
def test_intersections_that_never_end_are_ended(tok, monkeypatch, make):
    with monkeypatch.context() as m:
        m.setattr(module, "MAX_SECONDS", 0.5)
        with pytest.raises(ValueError, match="too much time or memory .*more than 0.5 seconds"):
            make()
    assert not any(t.name == "lamoe-grammar" for t in threading.enumerate())
    Grammar.regex("(ab)*").prepare(tok)


def test_compiling_has_a_time_limit(tok, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(module, "MAX_SECONDS", 0.05)
    with pytest.raises(ValueError, match="more than 0.05 seconds to compile"):
        module._compiling("regular expression", gate.wait)
    # Nothing can end the thread, so only a few may be left behind.
    with pytest.raises(ValueError, match="more than 0.05 seconds to compile"):
        module._compiling("regular expression", gate.wait)
    with pytest.raises(ValueError, match="2 earlier requests still compile"):
        module._compiling("regular expression", lambda: 5)
    gate.set()
    for thread in module._left_behind:
        thread.join()
    monkeypatch.undo()
    assert module._compiling("regular expression", lambda: 5) == 5


def test_without_the_library_or_a_tokenizer(monkeypatch, llm):
    with pytest.raises(ValueError, match="needs a tokenizer"):
        LLM(llm.model).generate([[1]], SamplingParams(grammar=Grammar.regex("a")))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        generate(llm.model, [1], SamplingParams(grammar=Grammar.regex("a")))
    with pytest.raises(ValueError, match="grammar must be Grammar"):
        SamplingParams(grammar="a*")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"llguidance.*lamoe\[serve\]"):
        Grammar.json_object()


def test_a_vocabulary_is_read_once_and_freed_with_its_tokenizer(monkeypatch):
    tok, made, words = tokenizer.train(TEXT, 300), [], module._Words
    monkeypatch.setattr(module, "_Words", lambda t: made.append(t.vocab_size) or words(t))
    for grammar in (Grammar.regex("a"), Grammar.json_object(), Grammar.regex("b")):
        grammar.prepare(tok)
        first = grammar._prepared(tok)
        grammar.prepare(tok)
        assert grammar._prepared(tok) is first
    assert made == [tok.vocab_size]
    gone = weakref.ref(tok)
    del tok
    gc.collect()
    assert gone() is None
