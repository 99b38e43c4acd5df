"""Structured output: what a random model writes under a grammar is what the grammar says, in every
way the engine can run; grammars beyond the limits.
"""

import asyncio
import gc
import json
import math
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import jsonschema
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamoe.engine import grammar as module
from lamoe.engine.async_llm import AsyncLLM
from lamoe.engine.generate import generate
from lamoe.engine.grammar import Grammar
from lamoe.engine.llm import LLM
from lamoe.engine.sampler import SamplingParams
from lamoe.text import tokenizer
from lamoe.text.tokenizer import BOS, EOS, Tokenizer
from oracles import tiny
from tiny_engine import FAMILIES, idle, reforward
from tiny_engine import tokens as ids_of

ROWS = 400  # of the model; the vocabulary has fewer, as DeepSeek-V2's does
TEXT = [
    '{"name": "abc", "n": [1, 22, 333], "ok": true, "no": null}',
    "abab baba ab ba abba the cat ü 中文 the cat",
] * 3


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    made = tokenizer.train(TEXT, 330)
    assert 261 < made.vocab_size < ROWS
    return made


@pytest.fixture(scope="module")
def llm(tok) -> LLM:
    return engine(tok)


def engine(tok: Tokenizer, **options) -> LLM:
    c = FAMILIES["mla"].replace(max_position_embeddings=512, vocab_size=ROWS)
    return LLM(
        tiny.model(c, dtype=torch.float32),
        tok,
        **{"cache": "fp32", "page_size": 4, "max_num_seqs": 16, **options},
    )


def walk(
    grammar: Grammar, tok: Tokenizer, seed: int, most: int = 300, keep: str = ""
) -> tuple[str, bool]:
    """(text, whether it came to an end) of a model that knows nothing.

    White space is unlikely, or a third of JSON would be that.
    """
    matcher, generator, out = grammar.start(tok), torch.Generator().manual_seed(seed), []
    blank = [i for i in range(tok.vocab_size) if not tok.decode([i]).strip()]
    while len(out) < most and not matcher.complete:
        logits = torch.randn(ROWS, generator=generator)
        logits[blank] -= 4
        out.append(int(torch.multinomial(matcher.mask(logits).softmax(0), 1, generator=generator)))
        matcher.accept(out[-1])
        if out[-1] in tok.stop_ids:
            return tok.decode(out), True
    return tok.decode(out), matcher.complete


# ---- whatever is written fits ----
NAMES = st.sampled_from(["a", "b", "name", "ü", 'q"\\', "中"])
SCALARS = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.tuples(st.integers(-1000, 1000), st.integers(0, 5000)).map(
        lambda t: {"type": "integer", "minimum": t[0], "maximum": t[0] + t[1]}
    ),
    st.sampled_from([1, 2, 3, 7, 10, 12, 25]).map(
        lambda m: {"type": "integer", "multipleOf": m, "minimum": 0, "maximum": 10_000}
    ),
    st.tuples(st.integers(-99, 99), st.integers(1, 50)).map(
        lambda t: {"type": "number", "exclusiveMinimum": t[0], "maximum": t[0] + t[1]}
    ),
    st.tuples(st.integers(0, 4), st.integers(0, 4)).map(
        lambda t: {"type": "string", "minLength": t[0], "maxLength": t[0] + t[1]}
    ),
    st.sampled_from(
        [{"type": "string", "format": f} for f in ("date", "ipv4", "uuid")]
        + [{"type": "string", "pattern": "^[a-c]{2,4}-\\d$"}]
    ),
    st.lists(
        st.one_of(NAMES, st.integers(-5, 5), st.none(), st.booleans()), min_size=1, max_size=4
    ).map(lambda v: {"enum": v}),
    NAMES.map(lambda v: {"const": {v: [v]}}),
)


def objects(inner):
    def made(t):
        properties, required, loose = t
        return {
            "type": "object",
            "properties": properties,
            "required": sorted(set(properties) & set(required)),
            "additionalProperties": loose,
        }

    return st.tuples(
        st.dictionaries(NAMES, inner, max_size=3), st.lists(NAMES), st.just(False)
    ).map(made)


SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        objects(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda v: {"anyOf": v}),
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
            lambda t: {"type": "array", "items": t[0], "minItems": t[1], "maxItems": t[1] + t[2]}
        ),
        st.lists(inner, min_size=1, max_size=3).map(
            lambda v: {"type": "array", "prefixItems": v, "items": False, "minItems": len(v)}
        ),
    ),
    max_leaves=6,
)


def check(schema: dict, text: str) -> None:
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(
        json.loads(text)
    )


@given(schema=SCHEMAS, seed=st.integers(0, 1000))
@settings(max_examples=150)
def test_any_schema(tok, schema, seed):
    jsonschema.Draft202012Validator.check_schema(schema)
    text, ended = walk(Grammar.json_schema(schema), tok, seed, 1500)
    if ended:
        check(schema, text)
    else:
        assert len(text) > 500  # a number of endless digits; anything else here ends long before


@given(schema=objects(SCALARS), seed=st.integers(0, 1000))
@settings(max_examples=12)
def test_any_schema_through_the_engine(llm, tok, schema, seed):
    params = SamplingParams(
        seed=seed,
        n=4,
        max_tokens=400,
        grammar=Grammar.json_schema(schema),
        logit_bias=dict.fromkeys(tok.encode(" \n\r\t"), -6),
    )
    outs = llm.generate(["the cat"], params)
    for o in outs:
        assert o.finish_reason in ("stop", "length") and o.error is None
        if o.finish_reason == "stop":
            check(schema, o.text)
    assert sum(o.finish_reason == "stop" for o in outs) >= 2 and idle(llm)


PIECES = st.sampled_from(
    [
        "a",
        "[a-c]",
        "(ab|ba)",
        ".",
        r"\d",
        "ü",
        "中",
        r"\.",
        "(x(y|z)?)",
        "[^a-z]",
        r"\w",
        r"[\s\d]",
        r"\D",
        "/",
        '"',
    ]
)
REGEXES = st.lists(
    st.tuples(PIECES, st.sampled_from(["", "?", "{2}", "{0,3}", "+", "*"])).map("".join),
    min_size=1,
    max_size=6,
).map("".join)


@given(
    pattern=st.one_of(REGEXES, st.tuples(REGEXES, REGEXES).map("|".join)), seed=st.integers(0, 1000)
)
@settings(max_examples=150)
def test_any_regex(tok, pattern, seed):
    text, ended = walk(Grammar.regex(pattern), tok, seed)
    if ended:
        assert re.fullmatch(pattern, text, re.ASCII), (pattern, text)
    else:
        assert re.search(r"[+*]", pattern)


def test_json_object_and_lark(tok):
    texts = [walk(Grammar.json_object(), tok, seed, 2000) for seed in range(12)]
    assert sum(ended for _, ended in texts) >= 6
    assert all(isinstance(json.loads(text), dict) for text, ended in texts if ended)
    sums = Grammar.lark('start: n ("+" n)*\nn: /[1-9][0-9]{0,3}/ | "(" start ")"')
    for text in (text for text, ended in (walk(sums, tok, s) for s in range(20)) if ended):
        assert re.fullmatch(r"[0-9+()]+", text) and sum(
            map(int, re.findall(r"\d+", text))
        ) == eval_sum(text)
    control = Grammar.lark('start: <｜fim▁begin｜> "a" <｜fim▁end｜>').start(tok)
    for name in ("<｜fim▁begin｜>", None, "<｜fim▁end｜>"):
        fits = [i for i, v in enumerate(control.mask(torch.zeros(ROWS)).tolist()) if v == 0]
        assert fits == ([tok.inner.token_to_id(name)] if name else tok.encode("a"))
        control.accept(fits[0])
    assert control.complete


def eval_sum(text: str) -> int:
    """The value of digits, + and parentheses, read by a stack: wrong parentheses raise."""
    stack = [0]
    for part in re.findall(r"\d+|[()]", text):
        if part == "(":
            stack.append(0)
        elif part == ")":
            inner = stack.pop()
            stack[-1] += inner
        else:
            stack[-1] += int(part)
    (value,) = stack
    return value


# ---- against an oracle ----
WORDS = ["the cat", "the c", "abba", "abbaab", "ab", "ü中", "ü中文!", "zzz"]


def finite(tok: Tokenizer, words: list[str], prompt: int, more=lambda logits, ids: logits):
    """`adjust` for reforward: by trying every token against a list of all the words, EOS where a
    word is whole.
    """
    spelled = [w.encode() for w in words]

    def adjust(logits, ids):
        logits, so_far = more(logits, ids), b"".join(tok._bytes(i) for i in ids[prompt:])
        for i in range(len(logits)):
            new = (
                so_far + tok._bytes(i) if i < tok.vocab_size and i not in tok._control_ids else None
            )
            fits = (
                so_far in spelled
                if i == tok.eos_id
                else bool(new) and new != so_far and any(w.startswith(new) for w in spelled)
            )
            if not fits:
                logits[i] = -math.inf
        return logits

    return adjust


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(repetition_penalty=2.0, frequency_penalty=1.0),
        dict(logit_bias={0: 100, 50: 3.0, 300: 80, ROWS - 1: 100}),
        dict(min_tokens=4),
    ],
    ids=str,
)
def test_the_same_tokens_as_trying_all_of_them(llm, tok, options):
    """Greedy, batched with requests without a grammar, and in the plain loop of generate.py."""
    pattern = "|".join(map(re.escape, WORDS))
    for text in ("the", "ab ba", "ü"):
        prompt = tok.encode(text, bos=True)
        params = SamplingParams(
            temperature=0.0, max_tokens=12, grammar=Grammar.regex(pattern), **options
        )
        more = lambda logits, ids: params.adjust(logits, ids, len(prompt), tok.stop_ids).clone()
        words, expected = {w.encode() for w in WORDS}, []
        for n in range(1, 13):  # until EOS, or a word that none continues
            expected, _ = reforward(llm.model, prompt, n, finite(tok, WORDS, len(prompt), more))
            spelled = b"".join(tok._bytes(i) for i in expected if i != tok.eos_id)
            if expected[-1] == tok.eos_id or (
                spelled in words and not any(w != spelled and w.startswith(spelled) for w in words)
            ):
                break
        free = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
        got, other = llm.generate([prompt, [5, 6, 7]], [params, free])
        assert got.token_ids == expected and got.finish_reason == "stop" and got.text in WORDS
        assert [p.token_id for p in generate(llm.model, prompt, params, tok)] == expected
        assert other.token_ids == llm.generate([[5, 6, 7]], free)[0].token_ids
    assert idle(llm)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["abc", "the cat", "ü"]},
        "n": {
            "type": "array",
            "maxItems": 4,
            "items": {"type": "integer", "minimum": 0, "maximum": 333},
        },
        "ok": {"type": "boolean"},
    },
    "required": ["name", "n", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def asked(tok) -> tuple[list, list[SamplingParams]]:
    """Prompts and parameters, three in four with a grammar, seeded and greedy."""
    texts = [tok.encode(t, bos=True) for t in ("the cat", "abab baba ab", "ü", "abab " * 9)]
    common = dict(max_tokens=60, logit_bias=dict.fromkeys(tok.encode(" \n\r\t"), -5))
    return texts, [
        SamplingParams(seed=3, grammar=Grammar.json_schema(SCHEMA), **common),
        SamplingParams(seed=4, **common),
        SamplingParams(
            temperature=0.0,
            grammar=Grammar.regex("(abab ){8,10}the cat"),
            presence_penalty=0.5,
            **common,
        ),
        SamplingParams(seed=5, top_p=0.9, top_k=20, grammar=Grammar.json_schema(SCHEMA), **common),
    ]


def test_alone_batched_preempted_or_drafted(tok, asked):
    """The same tokens: a matcher goes on with what was sampled and with nothing else."""
    texts, params = asked
    alone = [engine(tok, speculate=0).generate([t], p)[0] for t, p in zip(texts, params)]
    check(SCHEMA, alone[0].text)
    check(SCHEMA, alone[3].text)
    assert re.fullmatch("(abab ){8,10}the cat", alone[2].text) and [
        o.finish_reason for o in alone
    ] == ["stop", "length", "stop", "stop"]
    assert ids_of(engine(tok, max_num_batched_tokens=16).generate(texts, params)) == ids_of(alone)
    small = engine(
        tok,
        max_model_len=128,
        cache_memory=engine(tok, max_model_len=128).cache.nbytes // 4,
        speculate=0,
    )
    preempted = []
    release = small.scheduler._release
    small.scheduler._release = lambda seq: (preempted.append(seq.preemptions), release(seq))
    assert (
        ids_of(small.generate(texts * 2, params * 2)) == ids_of(alone) * 2
        and max(preempted) > 0
        and idle(small)
    )
    drafted = engine(tok, speculate=16)
    assert ids_of(drafted.generate(texts, params)) == ids_of(alone) and drafted.accepted > 0


def test_samples_of_one_request_stand_apart(llm, tok, asked):
    texts, params = asked
    many = llm.generate([texts[0]], SamplingParams(**{**vars(params[0]), "n": 6}))
    each = [
        llm.generate([texts[0]], SamplingParams(**{**vars(params[0]), "seed": 3 + i}))[0]
        for i in range(6)
    ]
    assert ids_of(many) == ids_of(each) and len({o.text for o in many}) > 3
    for o in many:
        check(SCHEMA, o.text)


# ---- ends ----
def ends(llm: LLM, pattern: str, **options):
    (o,) = llm.generate(
        ["ab"],
        SamplingParams(
            temperature=0.0, grammar=Grammar.regex(pattern), **{"max_tokens": 20, **options}
        ),
    )
    return o.text, o.finish_reason, len(o.token_ids), o.token_ids[-1] == llm.tokenizer.eos_id


def test_ends(llm, tok):
    eos = {tok.eos_id: 100}
    assert ends(llm, "a{3}") == ("aaa", "stop", 3, False)  # complete: no EOS is waited for
    assert ends(llm, "b*", logit_bias=eos) == ("", "stop", 1, True)
    assert ends(llm, "b*", logit_bias=eos, min_tokens=5)[1:] == ("stop", 6, True)
    assert ends(llm, "b*", logit_bias=eos, ignore_eos=True)[1:] == ("length", 20, False)
    assert ends(llm, "b{3}", min_tokens=20) == (
        "bbb",
        "stop",
        3,
        False,
    )  # a complete text ends before min_tokens
    assert ends(llm, "zzzzzzz", max_tokens=3) == ("zzz", "length", 3, False)
    assert ends(llm, "zzzyzzz", stop=("y",)) == ("zzz", "stop", 4, False)
    assert ends(llm, "", min_tokens=3)[:2] == ("", "stop")  # nothing but EOS fits
    assert ends(llm, "(ab|)", ignore_eos=True, logit_bias=dict.fromkeys(tok.encode("ab"), -100))[
        :2
    ] == ("ab", "stop")
    assert idle(llm)


def test_several_stop_tokens_and_none(tok):
    for stop_ids, eos in (({2, 3}, EOS), ((), None)):
        other = Tokenizer(tok.inner, bos=BOS, eos=eos, stop_ids=stop_ids)
        matcher = Grammar.regex("ab*").start(other)
        matcher.accept(tok.encode("a")[0])
        fits = {i for i, v in enumerate(matcher.mask(torch.zeros(ROWS)).tolist()) if v == 0}
        assert {i for i in fits if i < 5} == set(other.stop_ids) and tok.encode("b")[0] in fits
        assert not {
            i
            for i in matcher.mask(torch.zeros(ROWS), ignore_eos=True)
            .isfinite()
            .nonzero()
            .flatten()
            .tolist()
            if i < 5
        }
    assert not other.stop_ids
    llm = engine(other)
    assert (
        ends(llm, "a{3}|c{4}")[:2] in (("aaa", "stop"), ("cccc", "stop"))
        and ends(llm, "b*")[1] == "length"
    )


def test_rows_beyond_the_vocabulary_and_control_tokens_never_come(llm, tok):
    never = [i for i in range(ROWS) if i >= tok.vocab_size or i in tok._control_ids]
    params = SamplingParams(
        seed=1,
        max_tokens=80,
        ignore_eos=True,
        grammar=Grammar.regex("(?s:.*)"),
        logit_bias=dict.fromkeys(never, 100),
    )
    (o,) = llm.generate(["the cat"], params)
    assert len(o.token_ids) == 80 and not set(never) & set(o.token_ids)
    wild = llm.generate(["the cat"], SamplingParams(**{**vars(params), "grammar": None}))[0]
    assert set(wild.token_ids) <= set(never)  # without the grammar they do


def test_a_vocabulary_that_is_not_byte_level():
    vocab = {
        t: i
        for i, t in enumerate(
            ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "▁a", "b"]
        )
    }
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"
        )
    )
    inner.add_special_tokens(["<s>", "</s>"])
    inner.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    tok = Tokenizer(inner, bos="<s>", eos="</s>")
    for seed in range(10):
        text, ended = walk(Grammar.regex("b a{2,5}(ü|c)"), tok, seed)
        assert ended and re.fullmatch("b a{2,5}(ü|c)", text)


def test_logprobs_are_the_models_own(llm):
    (o,) = llm.generate(
        ["the"],
        SamplingParams(temperature=0.0, max_tokens=4, logprobs=2, grammar=Grammar.regex("zzzz")),
    )
    with torch.no_grad():
        logp = llm.model(torch.tensor([llm.tokenizer.encode("the", bos=True)]))[0, -1].log_softmax(
            -1
        )
    assert abs(o.logprobs[0][o.token_ids[0]] - float(logp[o.token_ids[0]])) < 1e-4 and set(
        logp.topk(2).indices.tolist()
    ) <= set(o.logprobs[0])


# ---- harm ----
def test_one_that_runs_into_a_limit_fails_alone(llm):
    """Nested repeats exhaust the lexer while the text grows.

    The Grammar can be used again: its next request begins with fresh states.
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


def test_compiling_is_the_callers_and_never_the_engine_threads(tok, monkeypatch):
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
    assert len(where) >= 4 and not any("engine" in name for name in where)


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
    """Every case in a thread with the usual stack, as the engine's has: refused, or eighty tokens
    of it within bounds. Prints what it came to.
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
    """In a process of its own, because the library's answer to a long chain is to end the process;
    with limits on memory and processor time.
    """
    code = (
        "import resource, sys, threading; resource.setrlimit(resource.RLIMIT_CPU, (60, 60)); "
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30));"
        "sys.path[:0] = ['tests', 'tests/engine']; import test_grammar; t = "
        "threading.Thread(target=test_grammar.hostile); t.start(); t.join()"
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
    fine = {name for name, what in found.items() if what.endswith(" tokens")}
    assert {
        "a chain of references",
        "ten to the ninth",
        "optional in any subset",
        "large enum",
        "long constant",
        "repeat of repeats",
        "a chain of rules",
    } <= fine
    for name, say in {
        "reference to itself": "no text fits",
        "references in a circle": "no text fits",
        "rules in a circle": "no text fits",
        "deep": "deeper than 64",
        "wide": "at most 500",
        "huge enum": "at most 65536",
        "remainders": "1234567",
        "remainders together": "971",
        "remainders in Lark": "1234567",
        "pattern": "100000",
        "repeat": "100000",
        "repeat of rules": "100000",
        "too long an array": "",
    }.items():
        assert say in found[name], (name, found[name])


@pytest.mark.parametrize(
    "make, say",
    [
        (lambda: Grammar.json_schema([]), "must be an object, found list"),
        (lambda: Grammar.json_schema({1: {}}), "not a str: 1"),
        (lambda: Grammar.json_schema({"enum": [math.nan]}), "not JSON"),
        (lambda: Grammar.json_schema({"enum": [object()]}), "not JSON"),
        (lambda: Grammar.json_schema({"const": 10**400}), "number out of range"),
        (lambda: Grammar.json_schema({"type": "strin"}), "strin"),
        (lambda: Grammar.json_schema({"not": {}}), "not"),
        (lambda: Grammar.json_schema({"format": "colour", "type": "string"}), "colour"),
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
def test_refusals(make, say):
    with pytest.raises(ValueError) as e:
        make()
    assert say in str(e.value) and len(str(e.value)) < 500


def test_what_only_a_vocabulary_can_tell(tok):
    for make in (
        lambda: Grammar.lark("start: <[99999]>"),
        lambda: Grammar.lark("start: <|nosuchtoken|>"),
        lambda: Grammar.regex("[^\\x00-\\U0010FFFF]"),
    ):
        with pytest.raises(ValueError, match="cannot be followed"):
            make().prepare(tok)


def test_compiling_has_a_time_limit(tok, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(module, "MAX_SECONDS", 0.05)
    with pytest.raises(ValueError, match="more than 0.05 seconds to compile"):
        module._compiling("regular expression", gate.wait)
    gate.set()
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


def test_a_vocabulary_is_read_once_and_let_go(monkeypatch):
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
