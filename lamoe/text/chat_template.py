"""Chat templates, rendered in a sandbox: jinja2 in, marked text out. Knows no vocabulary.

A template comes with a model folder, that is from a stranger, and a message comes from another one. Two dangers, two answers:
- the template: jinja2's immutable sandbox (no private attributes, no changes to arguments, no loader), known filters and string
  methods only, and a meter that every loop turn, call and growing string pays into, with a deadline. That stops runaway templates
  and memory bombs; it is a guard on top of the sandbox, not a proof against a determined author of templates.
- the message: `render` breaks the text of every control token inside the messages with a mark (a noncharacter that occurs nowhere
  else), so that in its result an unbroken control token was written by the template. The caller removes the mark from what is
  then plain text. Messages without such text reach the template unchanged.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

# DeepSeek-V2's format: nothing after EOS, and no blank after the last "Assistant:" (with one the model answers badly)
V2_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

MAX_TEMPLATE_CHARS = 256 << 10
MAX_CONTROL_CHARS = 256
MAX_SECONDS = 5.0
BASE_WORK = 20_000_000  # characters handled, loop turns and calls a rendering may spend, beside 50 for each character of the messages
_NONCHARACTERS = [chr(c) for c in range(0xFDD0, 0xFDF0)]

_FILTERS = frozenset(
    """abs bool capitalize count d default dictsort e escape first float int items join last length list lower map max min
    reject rejectattr replace reverse round safe select selectattr sort string sum title tojson trim unique upper""".split()
)
_STR_METHODS = frozenset(
    """capitalize count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace istitle
    isupper join lower lstrip removeprefix removesuffix replace rfind rindex rsplit rstrip split splitlines startswith strip swapcase
    title upper partition rpartition""".split()
)


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    control_tokens: Sequence[str] = (),
    **variables: Any,
) -> tuple[str, str]:
    """Render a conversation; gives (text, mark), see above. ValueError for messages the template cannot take, and for a template
    that does not parse, raises, reaches for what the sandbox forbids, or asks for more work than a chat needs."""
    if len(source) > MAX_TEMPLATE_CHARS:
        raise ValueError(
            f"the chat template has {len(source)} characters; more than {MAX_TEMPLATE_CHARS} is refused"
        )
    _check_messages(messages, tools, source)
    mark = _free_mark([source, *control_tokens, *variables.values()], [messages, tools])
    shield = _Shield(control_tokens, mark)
    turns = [{k: v if k == "role" else shield(v) for k, v in m.items()} for m in messages]
    env = _ChatSandbox(BASE_WORK + 50 * _size([messages, tools]))
    try:
        text = env.compile_metered(source).render(messages=turns, tools=shield(tools), **variables)
    except jinja2.TemplateSyntaxError as e:
        raise ValueError(
            f"the chat template does not parse: {e.message} (line {e.lineno})"
        ) from None
    except SecurityError as e:
        raise ValueError(f"the chat template asks for something the sandbox forbids: {e}") from None
    except jinja2.TemplateError as e:
        raise ValueError(f"the chat template failed: {e}") from None
    except RecursionError:
        raise ValueError("the chat template failed: it nests or calls itself too deeply") from None
    except Exception as e:  # a template is a program: whatever it raises is the template's error
        raise ValueError(f"the chat template failed: {type(e).__name__}: {e}") from None
    return text, mark


# ---- messages ------------------------------------------------------------------------------------------------------------
def _check_messages(messages: Any, tools: Any, source: str):
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            f"messages must be a list with at least one {{'role': ..., 'content': ...}}, found {_short(messages)}"
        )
    does_tools = re.search(r"\btools?\b", source) is not None
    if tools is not None:
        _check_tools(tools, source)
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(k, str) for k in message):
            raise ValueError(
                f"message {n} must be an object with role and content, found {_short(message)}"
            )
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"message {n} has role {role!r}; known: system, user, assistant, tool")
        calls = message.get("tool_calls")
        if (role == "tool" or calls) and not does_tools:
            raise ValueError(
                f"message {n} is about a tool call, but this model's chat template does not know tools"
            )
        if not isinstance(content, str) and not (content is None and role == "assistant" and calls):
            raise ValueError(
                f"message {n} (role {role}): content must be a str, found {_short(content)}"
            )


def _check_tools(tools: Any, source: str):
    """A template that writes old calls need not read `tools` (DeepSeek-V3's does not): then the model would never hear of them."""
    try:
        names = _ChatSandbox(0).parse(source).find_all(nodes.Name)
    except (jinja2.TemplateSyntaxError, RecursionError):
        return  # rendering says what is wrong
    if not any(n.name == "tools" and n.ctx == "load" for n in names):
        raise ValueError(
            "tools were given, but this model's chat template does not know tools; leave them out"
        )
    if (
        isinstance(tools, (str, Mapping))
        or not isinstance(tools, Sequence)
        or not all(isinstance(t, Mapping) for t in tools)
    ):
        raise ValueError(
            f"tools must be a list of objects {{'type': 'function', 'function': {{'name': ...}}}}, found {_short(tools)}"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _strings(value: Any):
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for k, v in value.items():
            yield from _strings(k)
            yield from _strings(v)
    elif isinstance(value, Sequence):
        for v in value:
            yield from _strings(v)


def _size(value: Any) -> int:
    return sum(len(s) + 1 for s in _strings(value))


def _free_mark(fixed: list[str], said: Any) -> str:
    """The first noncharacter that occurs in none of the strings."""
    free = dict.fromkeys(_NONCHARACTERS)
    for text in (*_strings(fixed), *_strings(said)):
        for char in [c for c in free if c in text]:
            del free[char]
    if not free:
        raise ValueError(
            "the conversation uses all 32 noncharacters U+FDD0 to U+FDEF; remove at least one, they carry no text"
        )
    return next(iter(free))


@functools.lru_cache(maxsize=16)
def _beginnings_of(tokens: frozenset[str]) -> re.Pattern:
    def after(
        rests: list[str],
    ) -> str:  # a tree of characters: thousands of tokens cost no more than one
        by_first: dict[str, list[str]] = {}
        for rest in rests:
            by_first.setdefault(rest[:1], []).append(rest[1:])
        ends = by_first.pop("", None) is not None
        branches = "|".join(re.escape(c) + after(more) for c, more in sorted(by_first.items()))
        return (
            f"(?:{branches}){'?' if ends else ''}"
            if len(by_first) > 1 or (ends and branches)
            else branches
        )

    return re.compile(f"(?=({after(sorted(tokens))}))")


def beginnings_of(tokens: Iterable[str]) -> re.Pattern | None:
    """Matches, without width so that overlapping ones are all found, where one of the tokens begins; group 1 is the longest there.
    None when there are no tokens. ValueError for one that is longer than any real control token."""
    tokens = frozenset(tokens)
    if (longest := max(map(len, tokens), default=0)) > MAX_CONTROL_CHARS:
        raise ValueError(
            f"a control token has {longest} characters; more than {MAX_CONTROL_CHARS} is refused"
        )
    return _beginnings_of(tokens) if tokens else None


class _Shield:
    """Breaks control tokens in every string of a nested value: whole ones, and a piece of one at either end, which could become
    whole beside the next message."""

    def __init__(self, control_tokens: Sequence[str], mark: str):
        tokens = {t for t in control_tokens if len(t) > 1}
        self._mark, self._whole = mark, beginnings_of(tokens)
        self._heads = {t[:k] for t in tokens for k in range(1, len(t))}
        self._tails = {t[k:] for t in tokens for k in range(1, len(t))}
        self._longest = max(map(len, tokens), default=0)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._broken(value)
        if isinstance(value, Mapping):
            return {self(k): self(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self(v) for v in value]
        if value is None or isinstance(value, (bool, int, float)):
            return value
        raise ValueError(f"messages and tools hold JSON values, found {_short(value)}")

    def _broken(self, text: str) -> str:
        if self._whole is None:
            return text
        cuts = [0, *(m.start() + 1 for m in self._whole.finditer(text)), len(text)]
        text = self._mark.join(text[a:b] for a, b in itertools.pairwise(cuts))
        core = text.strip()  # a template may trim what it is given
        start = text.find(core)
        end, sizes = start + len(core), range(1, min(self._longest, len(core) + 1))
        if any(core[-k:] in self._heads for k in sizes):
            text = text[:end] + self._mark + text[end:]
        if any(core[:k] in self._tails for k in sizes):
            text = text[:start] + self._mark + text[start:]
        return text


# ---- the sandbox ---------------------------------------------------------------------------------------------------------
class _ChatSandbox(ImmutableSandboxedEnvironment):
    """One environment for one rendering, because the meter is its state. `work` is in characters, turns and calls."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, work: int):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            finalize=self._output,
        )
        self._work, self._deadline, self._literal = work, time.monotonic() + MAX_SECONDS, 0
        known = {name: f for name, f in self.filters.items() if name in _FILTERS} | {
            "tojson": _tojson,
            "join": _join,
        }
        self.filters = {name: self._metered(f) for name, f in known.items()} | {
            "_each": self._each,
            "_part": self._output,
        }
        self.globals = {
            "range": self.globals["range"],
            "dict": dict,
            "namespace": self.globals["namespace"],
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def compile_metered(self, source: str) -> jinja2.Template:
        """Every loop goes through `_each` and every operand of `~` through `_part`: neither can be intercepted otherwise."""
        tree = self.parse(source)
        self._literal = _literal_chars(tree)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(
                loop.iter, "_each", [nodes.Const(_literal_chars(loop))], [], None, None
            )
        for concat in tree.find_all(nodes.Concat):
            concat.nodes = [nodes.Filter(n, "_part", [], [], None, None) for n in concat.nodes]
        return self.from_string(tree.set_environment(self))

    def _pay(self, work: int):
        self._work -= work
        if self._work < 0:
            raise SecurityError("more work or text than a conversation of this size needs")
        if time.monotonic() > self._deadline:
            raise SecurityError(f"more than {MAX_SECONDS:g} seconds")

    def _pay_for(self, value: Any):
        """What turning the value into text would cost; shared parts count as often as they would be written."""
        if isinstance(value, str):
            self._pay(len(value) + 1)
        elif isinstance(value, Mapping):
            self._pay(1)
            for k, v in value.items():
                self._pay_for(k)
                self._pay_for(v)
        elif isinstance(value, (list, tuple, set)):
            self._pay(1)
            for v in value:
                self._pay_for(v)
        else:
            self._pay(len(value) if isinstance(value, range) else 1)

    def _output(self, value: Any) -> Any:
        self._pay_for(value)
        return value

    def _each(self, iterable: Any, literal: int):
        for item in iterable:
            self._pay(10 + literal)
            yield item

    def _metered(self, filter_):
        @functools.wraps(
            filter_
        )  # also copies jinja's note on what the filter wants as its first argument
        def paid(*args, **kwargs):
            for a in (*args, *kwargs.values()):
                if not isinstance(
                    a, (jinja2.Environment, jinja2.runtime.Context, jinja2.nodes.EvalContext)
                ):
                    self._pay_for(a)
            if filter_ is self._plain_replace:
                self._pay_for_replace(*args[1:4])
            return filter_(*args, **kwargs)

        return paid

    _plain_replace = staticmethod(jinja2.filters.FILTERS["replace"])

    def _pay_for_replace(self, text: Any, old: Any = "", new: Any = "", *_):
        self._pay(str(text).count(str(old)) * len(str(new)))

    def call_binop(self, context, operator, left, right):
        numbers = all(isinstance(v, (int, float)) and abs(v) < 1 << 63 for v in (left, right))
        if operator == "**" or (operator in "*%" and not numbers):
            raise SecurityError(f"{operator} on {type(left).__name__} and {type(right).__name__}")
        if not numbers:
            self._pay_for(left)
            self._pay_for(right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(
        self, value
    ):  # str.format is not among our methods; jinja2 would hand it out before asking
        return None

    def is_safe_attribute(self, obj, attr, value):
        return super().is_safe_attribute(obj, attr, value) and (
            not isinstance(obj, str) or attr in _STR_METHODS
        )

    def call(
        self, context, function, /, *args, **kwargs
    ):  # every call a template writes comes through here
        self._pay(50 + (self._literal if isinstance(function, Macro) else 0))
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str):
            self._pay_for([owner, *args, *kwargs.values()])
            if name == "replace":
                self._pay_for_replace(owner, *args)
            if name == "join":
                return _join(args[0], owner)
        return super().call(context, function, *args, **kwargs)


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what an assistant said, for training masks; here it is just its body."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _literal_chars(node: nodes.Node) -> int:
    """The characters of text that lie open in a part of a template: what one turn through it can write at most, beside values."""
    return sum(len(d.data) for d in node.find_all(nodes.TemplateData))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_) -> str:
    """jinja2's own escapes <, > and & for web pages; a model shall read what was meant. (transformers does the same.)"""
    if isinstance(value, Undefined):
        raise ValueError("tojson of something that is not defined")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=min(int(indent), 8) if indent else None
    )


def _join(values: Any, separator: str = "") -> str:
    return str(separator).join([str(v) for v in values])


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100 or re.search(
        r"%[^A-Za-z%]*\d", pattern
    ):  # some C libraries pad to any width: %1000000000d
        raise ValueError(
            f"strftime_now takes a short date format without widths, found {pattern[:100]!r}"
        )
    return datetime.now().strftime(pattern)


def _raise_exception(message: Any = ""):
    raise jinja2.TemplateError(str(message))
