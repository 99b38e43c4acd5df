"""Tests of chat templates: what transformers renders, limits on time and memory, tool history."""

import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lamoe.text import chat_template, child_process
from lamoe.text.chat_template import PROCESS
from lamoe.text.child_process import ChildLimit

HELLO = [{"role": "user", "content": "hi"}]
TALK = [
    {"role": "system", "content": 'Be <brief>.\nYes & "no".'},
    {"role": "user", "content": "  Grüße, one two three four five six\nseven  ", "name": "Bo"},
    {"role": "assistant", "content": "日本 http://example.org/a"},
    {"role": "user", "content": ""},
]
VARIABLES = dict(bos_token="<s>", eos_token="</s>", add_generation_prompt=True)


def rendered(source: str, messages=TALK, **options) -> str:
    text, mark = chat_template.render(source, messages, **{**VARIABLES, **options})
    return text.replace(mark, "")


def by_transformers(source: str, messages=TALK, **options) -> str:
    [text], _ = render_jinja_template(
        [messages], chat_template=source, **{"tools": None, **VARIABLES, **options}
    )
    return text


def attempt(render, source: str) -> str | None:
    """Return the text, or None for an error."""
    try:
        return render(source)
    except Exception:
        return None


# ---- equal to transformers -----------------------------------------------------------------------
EXPRESSIONS = r"""
m.content | indent(4)
m.content | indent(width=2, first=true)
m.content | indent(2, blank=true)
m.content | indent('--')
'%s: %s' % (m.role, 'x')
'%-8s|%05.1f|%x' % (m.role, 1.5, 255)
'{:>9}|{a!r}'.format(m.role, a=1)
'%s-%s' | format(m.role, 2)
m | tojson
m | tojson(indent=2)
m | tojson(separators=(',', ':'), sort_keys=true)
m.content | tojson(ensure_ascii=true)
{'b': 1, 'a': [1.5, none, true]} | tojson(4)
messages | map(attribute='role') | join(', ')
messages | join(', ', attribute='role')
messages | join(attribute='role', d='/')
messages | map(attribute='name', default='?') | list
messages | map('length') | sum
messages | selectattr('name', 'defined') | list | length
messages | rejectattr('role', 'equalto', 'user') | map(attribute='content') | first
messages | groupby('role') | map('first') | list
messages | groupby(attribute='name', default='none') | length
messages | sort(attribute='role', reverse=true) | map(attribute='role') | list
messages | unique(attribute='role') | list | length
messages | batch(3, 'fill') | list | length
messages | slice(3) | map('length') | list
m.content | wordcount
m.role | center(20)
m.role | center(width=20) | length
m.content | truncate(9)
m.content | truncate(length=12, killwords=true, end='…', leeway=0)
m.content | striptags
m.content | wordwrap(width=7, break_long_words=false)
m.content | wordwrap(7, wrapstring='/')
m.content | replace('e', 'E', count=1)
m.content | replace('e', 'E')
m.content | trim
m.content | trim(chars=' \n')
m.content | urlize(nofollow=true)
m.content | escape
m.content | forceescape
m.content | upper | lower | title | capitalize
m.name | default('nobody')
m.content | default('empty', boolean=true)
m.nothing | d
{'b': 1, 'a': 2} | dictsort
{'b': 1, 'a': 2} | dictsort(by='value', reverse=true)
{'b': 1, 'a': 2} | items | list
m | xmlattr
m | pprint
m | attr('role')
m.content | urlencode
'12' | int(base=8)
'1e3' | float
'x' | int(default=7)
3.14159 | round(2)
3.15 | round(precision=1, method='floor')
123456789 | filesizeformat(binary=true)
[3, 1, 2] | max ~ [3, 1, 2] | min ~ [[1, 2], [3]] | sum(start=[])
[1, 2, 3, 4] | select('odd') | list
[1, 2, 3] | reverse | list
['a', 'A'] | unique(case_sensitive=true) | list
2 ** 10 ~ '/' ~ 7 // 2 ~ '/' ~ 7 % 3 ~ '/' ~ 'ab' * 3
[1] * 3 + [2]
messages[::-1] | map(attribute='role') | list
m.content[2:5] ~ m['role'][-1]
'a' in m.content and m.role is string and m is mapping and loop.first is true
m.content.split('\n')[0].strip().ljust(20, '.').rjust(30) ~ 'a'.zfill(4)
m.content.encode('utf-8') | length
m.role.startswith(('u', 's')) and not m.role.endswith('x')
dict(a=1, **{'b': 2})
dict.fromkeys(['a', 'b'], 0)
range(5, 0, -2) | list
loop.index ~ loop.index0 ~ loop.revindex ~ loop.length ~ loop.cycle('a', 'b') ~ loop.depth
(loop.previtem or m).role ~ '|' ~ (loop.nextitem or m).role
loop.changed(m.role)
strftime_now('%Y-%m')
documents is none and tools is none
documents is defined
namespace(a=1).a
cycler('a', 'b').next()
lipsum(n=0)
undefined_name
m.missing is defined
(m.missing or 'else') ~ (none if loop.last else 1)
1 if m.role == 'user'
not not m.content
"a" "b"
1_000 + 0x10
[1, 2] == [1, 2] and (1, 2) != [1, 2]
'<' ~ m.content ~ '>'
m.content | safe
m.items() | list | length
m.get('name', 'x')
m.keys() | list
'é' | urlencode
""".strip().splitlines()
BLOCKS = [
    "{% for m in messages if m.role != 'system' %}\n  {{- m.role }}\n{% else %}none{% endfor %}",
    "  {% if true %}\n  a\n  {% endif %}\n\nb  {# a comment #}\n",
    "{%- for m in messages -%}\n {{ m.role }} \n{%+ if loop.last %} end{% endif %}{%- endfor -%} ",
    "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
    "{% if loop.index == 4 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{% macro f(a, b='x') %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{{ caller is defined }}"
    "{% endmacro %}{{ f(1) }}{{ f(1, b=2) }}{{ f(1, 2, 3, e=4) }}",
    "{% macro f() %}<{{ caller('a') }}>{% endmacro %}{% call(x) f() %}{{ x }}!{% endcall %}",
    "{% set x %}a{{ messages | length }}b{% endset %}{{ x | upper }}",
    "{% filter upper | indent(2, first=true) %}a\nb{% endfilter %}",
    "{% set ns = namespace(n=0, s='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.s = ns.s ~ m.role %}{% endfor %}{{ ns.n }}{{ ns.s }}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{{ loop.index }}{% endgeneration %}"
    "{% endfor %}",
    "{% set x = 1 %}{% for i in range(3) %}{% set x = x + 1 %}{% endfor %}{{ x }}",
    "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}",
    "{% for k, v in messages[1].items() %}{{ k }}={{ v | trim }};{% endfor %}",
    "{% for a in [[1, [2]], [3]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}",
    "{% set a, b = (1, 2) %}{{ a }}{{ b }}{% set d = {'x': 1} %}{{ d.x }}{{ d['x'] }}",
    "{% raw %}{{ not rendered }}{% endraw %}{{ '{{' }}\r\n{{ 'a\\nb\\u00e9' }}",
    "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}"
    "{{ messages | length }}{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}",
    "{{ joiner('|')() }}{% set j = joiner() %}{{ j() }}{{ j() }}",
    "line\n# not a comment\n## nor this\n",
    "\n\ntext at the end\n",
]


def test_every_construct_renders_as_in_transformers():
    """Filters, operators, methods and blocks are those of transformers, keywords included.

    One template would stop at its first error, so each construct is compared by itself.
    """
    loop = "{%% for m in messages %%}{{ %s }};{%% endfor %%}"
    different = {}
    for source in (*(loop % e for e in EXPRESSIONS), *BLOCKS):
        ours, theirs = attempt(rendered, source), attempt(by_transformers, source)
        if ours != theirs or ours is None:
            different[source] = (ours, theirs)
    assert different == {}


def test_templates_of_the_case_folder():
    source = "{{ messages[0].content | indent(4) }}{{ '%s: %s' % (messages[0].role, 'x') }}"
    assert rendered(source, [{"role": "user", "content": "a\nb"}]) == "a\n    buser: x"


# ---- limits --------------------------------------------------------------------------------------
DOUBLED = (
    "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(99) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
)
GROWING = "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = STEP %}{% endfor %}"


@pytest.mark.parametrize(
    "template, says",
    [
        ("{{ ''.__class__.__mro__ }}", "sandbox forbids"),
        ("{{ messages.append(1) }}", "sandbox forbids"),
        ("{{ dict.__class__.x }}", "sandbox forbids"),
        ("{{ dict.mro() }}", "has no attribute 'mro'"),
        ("{{ messages[0].pop('role') }}", "sandbox forbids"),
        ("{{ namespace.__init__.__globals__ }}", "sandbox forbids"),
        ("{{ (messages | attr('__class__')).x }}", "sandbox forbids"),
        ("{{ namespace(_x=1) }}", "private name '_x'"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "private name '_x'"),
        ("{{ raise_exception('roles must alternate') }}", "failed: roles must alternate"),
        ("{{ nope.x }}", "'nope' is undefined"),
        ("{% if %}", "does not parse"),
        ("{{ 1 | nope }}", "does not parse: No filter named 'nope'"),
        ("{% include 'x' %}", "no loader"),
        ("{{" + "(" * 9999, "too deeply"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "Range too big"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(0) }}", "too deeply"),
        ("x" * 300_000, "262144 is refused"),
        ("{{ raise_exception('x' * 10000) }}", "xxx..."),
        ("{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "characters of text"),
        ("{{ tools | tojson }}{{ undefined_name | tojson }}", "not JSON serializable"),
        # memory, in one call into C or in small steps
        ("{{ (1).to_bytes(3000000000) }}", "MiB of memory"),
        ("{% set n = 3000000000 %}{{ 'a'.ljust(n) }}", "MiB of memory"),
        ("{% set n = 3000000000 %}{{ 'a' * n }}", "MiB of memory"),
        (GROWING.replace("STEP", "ns.s ~ ns.s"), "MiB of memory"),
        (GROWING.replace("STEP", "ns.s | list + ns.s | list"), "MiB of memory"),
    ],
)
def test_hostile_templates(template, says):
    with pytest.raises(ValueError, match=re.escape(says)) as e:
        rendered(template, HELLO)
    assert len(str(e.value)) < 1100
    assert rendered("{{ messages[0].content }}", HELLO) == "hi"


@pytest.mark.parametrize(
    "template",
    [
        DOUBLED + "{{ ns.a == ns.b }}",  # inside one comparison, where no Python code runs
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**8 }}",  # while it compiles
    ],
)
def test_the_time_limit_stops_a_template(monkeypatch, template):
    rendered("", HELLO)
    before = PROCESS._child
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.3)
    with pytest.raises(ChildLimit, match="more than 0.3 seconds"):
        rendered(template, HELLO)
    assert PROCESS._child is None and before.returncode == -9  # no zombie is left
    monkeypatch.undo()
    assert rendered("{{ messages[0].content }}", HELLO) == "hi"


def test_the_process_has_limits_and_nothing_of_ours(monkeypatch):
    """The child limits itself, inherits no secret, and ends when its parent is gone."""
    monkeypatch.setenv("API_TOKEN", "secret")
    PROCESS.close()
    rendered("", HELLO)
    proc = Path(f"/proc/{PROCESS._child.pid}")
    if not proc.exists():
        pytest.skip("no /proc on this system")
    limits = re.findall(r"Max (.*?) {2,}(\S+)", (proc / "limits").read_text())
    found = {name: value for name, value in limits if value != "unlimited"}
    assert (
        found["address space"] == str(512 << 20)
        and found["open files"] == "3"
        and found["file size"] == found["core file size"] == "0"
        and 1 <= int(found["cpu time"]) < 60
    )
    assert b"secret" not in (proc / "environ").read_bytes()
    assert sorted(p.name for p in (proc / "fd").iterdir()) == ["0", "1", "2"]
    assert os.getsid(PROCESS._child.pid) == PROCESS._child.pid  # Ctrl-C does not reach it
    child = PROCESS._child
    child.stdin.close()
    assert child.wait(20) == 0


def test_a_dead_process_is_replaced():
    rendered("", HELLO)
    first = PROCESS._child
    first.kill()
    first.wait()
    assert rendered("{{ messages[0].content }}", HELLO) == "hi" and PROCESS._child is not first


def test_a_process_that_dies_while_it_renders(monkeypatch):
    rendered("", HELLO)
    killer = threading.Timer(0.2, PROCESS._child.kill)
    killer.start()
    with pytest.raises(ChildLimit, match="ended its process"):
        rendered("{% for i in range(99999) %}{% for j in range(999) %}{% endfor %}{% endfor %}")
    killer.join()


def test_many_threads_render_at_once():
    texts = [f"text {i} " * 50 for i in range(40)]
    found = [None] * len(texts)

    def work(i: int) -> None:
        found[i] = rendered("{{ messages[0].content }}", [{"role": "user", "content": texts[i]}])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(texts))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == texts


def test_a_system_that_cannot_start_a_process(monkeypatch):
    PROCESS.close()
    with monkeypatch.context() as m:
        m.setattr(child_process.sys, "executable", "/nowhere/python")
        with pytest.raises(ValueError, match="could not start one .*/nowhere/python"):
            rendered("", HELLO)
        m.setattr(child_process.sys, "executable", "/bin/false")
        with pytest.raises(ValueError, match="could not start one .*ended its process"):
            rendered("", HELLO)
    assert rendered("{{ messages[0].content }}", HELLO) == "hi"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_starts_its_own():
    code = (
        "import os; from lamoe.text import chat_template as c\n"
        "from lamoe.text.chat_template import PROCESS\n"
        "def say(x): return c.render('{{ messages[0].content }}',"
        " [{'role': 'user', 'content': x}])[0]\n"
        "assert say('a') == 'a'\n"
        "pid = os.fork()\n"
        "for i in range(30): assert say(f'{pid} {i}') == f'{pid} {i}'\n"
        "if pid: assert os.waitpid(pid, 0)[1] == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_values_that_are_not_json():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    for value, says in (
        ({1: "a"}, "hold JSON values"),
        (object(), "hold JSON values"),
        (deep, "nested too deeply"),
    ):
        with pytest.raises(ValueError, match=says):
            rendered("", [{"role": "user", "content": "hi", "extra": value}])


# ---- the form of tool calls ----------------------------------------------------------------------
def history(arguments='{"a": 1}', **call) -> list[dict]:
    function = {"name": "f", "arguments": arguments}
    return [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": function} | call],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]


CALLS = (
    "{#tools#}{% for m in messages %}{% for c in m.tool_calls or [] %}CALL{% endfor %}{% endfor %}"
)
# {name: (how the template writes the call c, what is right)}
WRITERS = {
    "llama": (
        '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}',
        '{"name": "f", "parameters": {"a": 1}}',
    ),
    "whole function": ("{{ c.function | tojson }}", '{"name": "f", "arguments": {"a": 1}}'),
    "whole call": (
        "{{ c | tojson }}",
        '{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}',
    ),
    "text, added": (
        "{{ c.function.name + '|' + c.function.arguments }}",
        'f|{"a": 1}',
    ),
    "text, written": ("{{ c.function.name }}|{{ c.function.arguments }}", 'f|{"a": 1}'),
    "either": (
        "{{ c.function.name }}{% if c.function.arguments is string %}{{ c.function.arguments }}"
        "{% else %}{{ c.function.arguments | tojson }}{% endif %}",
        'f{"a": 1}',
    ),
    "pairs": (
        "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}"
        "{% endfor %}",
        "f<a>1",
    ),
    "pairs by filter": (
        "{{ c.function.name }}{% for k, v in c.function.arguments | items %}<{{ k }}>{{ v }}"
        "{% endfor %}",
        "f<a>1",
    ),
    "keys": (
        "{{ c.function.name }}{% for k in c.function.arguments %}<{{ k }}>"
        "{{ c.function.arguments[k] }}{% endfor %}",
        "f<a>1",
    ),
    "no wrapper": (
        '{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}',
        '{"name": "f", "arguments": {"a": 1}}',
    ),
    "no wrapper, text": ("{{ c.name + c.arguments }}", 'f{"a": 1}'),
    "wrapper or not": (
        "{% if c.function %}{% set c = c.function %}{% endif %}{{ c.name }}"
        "{{ c.arguments | tojson }}",
        'f{"a": 1}',
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_tool_calls_get_the_form_that_the_template_wants(name):
    writer, right = WRITERS[name]
    source = CALLS.replace("CALL", writer)
    assert rendered(source, history()) == right
    # as transformers users write them: an object, and with or without the wrapper
    call = {"name": "f", "arguments": {"a": 1}}
    assert rendered(source, history(function=call)) == right
    flat = history()
    flat[1]["tool_calls"] = [{"id": "c1", "type": "function", **call}]
    assert rendered(source, flat) == right


@pytest.mark.parametrize("arguments", ["", " \n", None, "null", "{}", {}, "missing"])
@pytest.mark.parametrize("name", ["llama", "whole function", "text, added", "pairs"])
def test_empty_arguments_are_an_empty_object(name, arguments):
    writer, right = WRITERS[name]
    messages = history(arguments)
    if arguments == "missing":
        del messages[1]["tool_calls"][0]["function"]["arguments"]
    want = right.replace('{"a": 1}', "null" if arguments == "null" and "text" in name else "{}")
    assert rendered(CALLS.replace("CALL", writer), messages) == want.replace("<a>1", "")


def test_the_mark_is_not_in_parsed_arguments():
    pairs = "{% for k, v in c.function.arguments.items() %}{{ k ~ v }}{% endfor %}"
    source = CALLS.replace("CALL", pairs)
    text, mark = chat_template.render(source, history(r'{"a": "\ufdd0"}'), control_tokens=["<s>"])
    assert text == "a\ufdd0" and mark not in text


def test_a_null_content_becomes_empty_where_the_template_would_write_none():
    for write in ("{{ m.content }}", "{{ '' + m.content }}"):
        source = CALLS.replace("{% endfor %}{% endfor %}", "{% endfor %}" + write + "{% endfor %}")
        source = source.replace("CALL", "{{ c.function.arguments | tojson }}")
        assert rendered(source, history()) == 'hi{"a": 1}42'
    source = CALLS.replace("CALL", "{{ m.content is none }}{{ c.function.arguments | tojson }}")
    assert rendered(source, history()) == 'True{"a": 1}'


@pytest.mark.parametrize(
    "messages, says",
    [
        (history("{"), "message 1: the arguments of a tool call are not JSON"),
        (history('{"a": NaN}'), "NaN is not JSON"),
        (history(function={"arguments": "{}"}), "a tool call must be"),
        (history(function="f"), "a tool call must be"),
        (history("[" * 100_000), "nested too deeply"),
        (history("1" * 5000), "not JSON"),
    ],
)
def test_tool_calls_that_are_refused(messages, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        rendered(CALLS.replace("CALL", WRITERS["llama"][0]), messages)


def test_a_template_that_fails_in_every_form_reports_its_error():
    source = (
        "{#tools#}{% if messages[1].tool_calls %}{{ raise_exception('one at a time') }}{% endif %}"
    )
    with pytest.raises(ValueError, match="one at a time"):
        rendered(source, history())


# ---- fuzz ----------------------------------------------------------------------------------------
def mutated(source: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 4)):
        a, b = sorted(rng.randrange(len(source) + 1) for _ in range(2))
        source = (
            rng.choice(
                [
                    source[:a] + source[min(b, a + 8) :],
                    source[:a] + source[a : a + 20] * rng.randint(2, 30) + source[a:],
                    source[:a] + rng.choice(FRAGMENTS) + source[a:],
                    source[:a] + source[b:] + source[a:b],
                ]
            )
            or "x"
        )
    return source


FRAGMENTS = [
    *"{{ }} {% %} {# #} - + ' \" ( ) [ ] | ~ . , : = ** % \\ \0 \ud800".split(" "),
    "{% for i in range(9999) %}",
    "{% endfor %}",
    "{{ messages * 99 }}",
    "| tojson",
    "| list * 9999",
    "{% macro f() %}",
    "{{ 9 ** 9 ** 9 }}",
    "{% raw %}",
    "{% set messages = [messages, messages] %}",
]


def test_mutated_templates_end_with_a_text_or_a_value_error(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.5)
    rng = random.Random(13)
    sources = [chat_template.V2_TEMPLATE, *BLOCKS]
    sources += [CALLS.replace("CALL", w) for w, _ in WRITERS.values()]
    results = []
    for source in itertools.islice(itertools.cycle(sources), 200):
        try:
            results.append(rendered(mutated(source, rng), TALK))
        except ValueError as e:
            results.append(e)
    errors = sum(isinstance(r, ValueError) for r in results)
    assert 20 < errors < 180
    monkeypatch.undo()
    assert json.loads(rendered("{{ messages | tojson }}")) == TALK
