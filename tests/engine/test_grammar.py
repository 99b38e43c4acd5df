"""Tests of structured output: texts of a random model match their grammar under any schedule.

test_grammar_limits.py tests limits and errors.
"""

import json
import math
import re

import jsonschema
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamoe.engine.generate import generate
from lamoe.engine.grammar import Grammar
from lamoe.engine.llm import LLM
from lamoe.engine.sampler import SamplingParams
from lamoe.text.tokenizer import BOS, EOS, Tokenizer
from tiny_engine import idle, reforward
from tiny_engine import tokens as ids_of
from tiny_grammar import ROWS, engine, llm, tok  # noqa: F401 (llm and tok are fixtures)


def walk(grammar: Grammar, tok: Tokenizer, seed: int, limit: int = 300) -> tuple[str, bool]:
    """Sample a text under a grammar from random logits.

    White space gets lower logits, because otherwise a third of JSON text would be white space.

    Returns:
        the text, and whether it is complete (rather than cut after `limit` tokens).
    """
    matcher, generator = grammar.start(tok), torch.Generator().manual_seed(seed)
    out: list[int] = []
    blank = [i for i in range(tok.vocab_size) if not tok.decode([i]).strip()]
    while len(out) < limit and not matcher.complete:
        logits = torch.randn(ROWS, generator=generator)
        logits[blank] -= 4
        out.append(int(torch.multinomial(matcher.mask(logits).softmax(0), 1, generator=generator)))
        matcher.accept(out[-1])
        if out[-1] in tok.stop_ids:
            return tok.decode(out), True
    return tok.decode(out), matcher.complete


# ---- random schemas and patterns ----
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
    """Generate schemas of objects whose properties have `inner` schemas."""

    def schema(t):
        properties, required = t
        return {
            "type": "object",
            "properties": properties,
            "required": sorted(set(properties) & set(required)),
            "additionalProperties": False,
        }

    return st.tuples(st.dictionaries(NAMES, inner, max_size=3), st.lists(NAMES)).map(schema)


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
        assert len(text) > 500  # only a text with an endless number is cut off


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
    """Evaluate digits, + and parentheses with a stack. Unbalanced parentheses raise."""
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


# ---- comparison with an oracle ----
WORDS = ["the cat", "the c", "abba", "abbaab", "ab", "ü中", "ü中文!", "zzz"]


def allow_words(tok: Tokenizer, words: list[str], prompt: int, more=lambda logits, ids: logits):
    """Make an `adjust` function for `reforward` that allows only the given words.

    The function tries every token, and allows EOS after a whole word.

    Args:
        prompt: number of prompt tokens.
        more: changes the logits before the mask is applied.
    """
    allowed = [w.encode() for w in words]

    def adjust(logits, ids):
        logits, so_far = more(logits, ids), b"".join(tok._bytes(i) for i in ids[prompt:])
        for i in range(len(logits)):
            if i == tok.eos_id:
                fits = so_far in allowed
            elif i < tok.vocab_size and i not in tok._control_ids and tok._bytes(i):
                fits = any(w.startswith(so_far + tok._bytes(i)) for w in allowed)
            else:
                fits = False
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
def test_the_same_tokens_as_an_oracle_that_tries_every_token(llm, tok, options):
    """Greedy tokens equal those of an oracle that tries every token.

    They are compared in a mixed batch of the engine and in generate.py.
    """
    pattern = "|".join(map(re.escape, WORDS))
    for text in ("the", "ab ba", "ü"):
        prompt = tok.encode(text, bos=True)
        params = SamplingParams(
            temperature=0.0, max_tokens=12, grammar=Grammar.regex(pattern), **options
        )
        more = lambda logits, ids: params.adjust(logits, ids, len(prompt), tok.stop_ids).clone()
        words, expected = {w.encode() for w in WORDS}, []
        for n in range(1, 13):  # until EOS, or a word that no other word continues
            expected, _ = reforward(
                llm.model, prompt, n, allow_words(tok, WORDS, len(prompt), more)
            )
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
def requests(tok) -> tuple[list, list[SamplingParams]]:
    """Return prompts and sampling parameters, some greedy and some seeded, most with a grammar."""
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


def test_same_output_alone_batched_preempted_or_drafted(tok, requests):
    """The output is the same alone, in a batch, after preemption and with drafts.

    The matcher of a grammar must advance only with sampled tokens, not with drafts or recomputed
    ones.
    """
    texts, params = requests
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


def test_samples_of_one_request_have_separate_matchers(llm, tok, requests):
    texts, params = requests
    many = llm.generate([texts[0]], SamplingParams(**{**vars(params[0]), "n": 6}))
    each = [
        llm.generate([texts[0]], SamplingParams(**{**vars(params[0]), "seed": 3 + i}))[0]
        for i in range(6)
    ]
    assert ids_of(many) == ids_of(each) and len({o.text for o in many}) > 3
    for o in many:
        check(SCHEMA, o.text)


# ---- end of the output ----
def ends(llm: LLM, pattern: str, **options):
    """Generate under a pattern. Return (text, finish reason, tokens, whether the last is EOS)."""
    (o,) = llm.generate(
        ["ab"],
        SamplingParams(
            temperature=0.0, grammar=Grammar.regex(pattern), **{"max_tokens": 20, **options}
        ),
    )
    return o.text, o.finish_reason, len(o.token_ids), o.token_ids[-1] == llm.tokenizer.eos_id


def test_how_outputs_end(llm, tok):
    eos = {tok.eos_id: 100}
    # A text that nothing can continue needs no EOS.
    assert ends(llm, "a{3}") == ("aaa", "stop", 3, False)
    assert ends(llm, "b*", logit_bias=eos) == ("", "stop", 1, True)
    assert ends(llm, "b*", logit_bias=eos, min_tokens=5)[1:] == ("stop", 6, True)
    assert ends(llm, "b*", logit_bias=eos, ignore_eos=True)[1:] == ("length", 20, False)
    # A complete text ends even before min_tokens.
    assert ends(llm, "b{3}", min_tokens=20) == ("bbb", "stop", 3, False)
    assert ends(llm, "zzzzzzz", max_tokens=3) == ("zzz", "length", 3, False)
    assert ends(llm, "zzzyzzz", stop=("y",)) == ("zzz", "stop", 4, False)
    assert ends(llm, "", min_tokens=3)[:2] == ("", "stop")  # the empty pattern allows only EOS
    against_ab = dict.fromkeys(tok.encode("ab"), -100)
    assert ends(llm, "(ab|)", ignore_eos=True, logit_bias=against_ab)[:2] == ("ab", "stop")
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


def test_padded_vocabulary_rows_and_control_tokens_are_never_sampled(llm, tok):
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
    unrestricted = llm.generate(["the cat"], SamplingParams(**{**vars(params), "grammar": None}))[0]
    # Without the grammar the model samples only these tokens.
    assert set(unrestricted.token_ids) <= set(never)


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


def test_logprobs_are_those_before_the_grammar(llm):
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
