"""Render chat templates (jinja2) in a sandbox, with protection against forged control tokens.

Templates come with model folders and messages come from users. Neither is trusted.

Templates run in jinja2's immutable sandbox, without private attributes, changes to arguments, or a
loader. Only known filters and string methods are allowed. Every loop iteration, call and string
operation uses up a budget, and there is a time limit. This stops runaway templates and memory
bombs, but may not stop a determined attacker.

Messages may hold the text of a control token, such as an end-of-turn token. `render` inserts a mark
into each such text, which is a noncharacter that occurs nowhere else. Every control token without a
mark in the result therefore comes from the template. The caller removes the marks after it has
converted the control tokens to ids. Messages without such text reach the template unchanged.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

# DeepSeek-V2's format. There is no blank after the last "Assistant:": with one, replies get worse.
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
# The budget of one rendering, in characters, loop iterations and calls. The characters of the
# messages add WORK_PER_CHAR each.
BASE_WORK = 20_000_000
WORK_PER_CHAR = 50
_NONCHARACTERS = [chr(c) for c in range(0xFDD0, 0xFDF0)]

_FILTERS = frozenset(
    """abs bool capitalize count d default dictsort e escape first float int items join last length
    list lower map max min reject rejectattr replace reverse round safe select selectattr sort
    string sum title tojson trim unique upper""".split()
)
_STR_METHODS = frozenset(
    """capitalize count endswith find index isalnum isalpha isascii isdecimal isdigit islower
    isnumeric isspace istitle isupper join lower lstrip removeprefix removesuffix replace rfind
    rindex rsplit rstrip split splitlines startswith strip swapcase title upper partition
    rpartition""".split()
)


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    control_tokens: Sequence[str] = (),
    **variables: Any,
) -> tuple[str, str]:
    """Render a conversation.

    Args:
        source: the template.
        messages: objects with role and content, as in OpenAI's API.
        tools: descriptions of functions, for templates that use them.
        control_tokens: texts that only the template may write.
        variables: passed to the template, e.g. bos_token.

    Returns:
        text: the conversation, with marks inside control tokens that came from the messages.
        mark: the character that was used.

    Raises:
        ValueError: if the template does not support these messages, does not parse, raises an
            error, does something that the sandbox forbids, or exceeds its budget.
    """
    if len(source) > MAX_TEMPLATE_CHARS:
        raise ValueError(
            f"the chat template has {len(source)} characters; "
            f"more than {MAX_TEMPLATE_CHARS} is refused"
        )
    _check_messages(messages, tools, source)
    mark = free_mark([source, *control_tokens, *variables.values(), messages, tools])
    shield = _Shield(control_tokens, mark)
    shielded = [{k: v if k == "role" else shield(v) for k, v in m.items()} for m in messages]
    env = _ChatSandbox(BASE_WORK + WORK_PER_CHAR * _num_chars([messages, tools]))
    try:
        template = env.compile_metered(source)
        text = template.render(messages=shielded, tools=shield(tools), **variables)
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
    except Exception as e:  # a template is a program and may raise anything
        raise ValueError(f"the chat template failed: {type(e).__name__}: {e}") from None
    return text, mark


# ---- messages ------------------------------------------------------------------------------------
def _check_messages(messages: Any, tools: Any, source: str) -> None:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            "messages must be a list with at least one {'role': ..., 'content': ...}, "
            f"found {_short(messages)}"
        )
    knows_tools = re.search(r"\btools?\b", source) is not None
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
        if (role == "tool" or calls) and not knows_tools:
            raise ValueError(
                f"message {n} is about a tool call, but this model's chat template does not know "
                "tools"
            )
        if not isinstance(content, str) and not (content is None and role == "assistant" and calls):
            raise ValueError(
                f"message {n} (role {role}): content must be a str, found {_short(content)}"
            )


def _check_tools(tools: Any, source: str) -> None:
    """Check `tools`, and that the template reads them.

    A template may write earlier tool calls without reading `tools` (DeepSeek-V3's does). The model
    would then never see the tools.
    """
    try:
        names = _ChatSandbox(0).parse(source).find_all(nodes.Name)
    except (jinja2.TemplateSyntaxError, RecursionError):
        return  # `render` reports this error
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
            "tools must be a list of objects {'type': 'function', 'function': {'name': ...}}, "
            f"found {_short(tools)}"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in a nested value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for k, v in value.items():
            yield from _strings(k)
            yield from _strings(v)
    elif isinstance(value, Sequence):
        for v in value:
            yield from _strings(v)


def _num_chars(value: Any) -> int:
    return sum(len(s) + 1 for s in _strings(value))


def free_mark(values: Sequence[Any]) -> str:
    """Return the first noncharacter that occurs in none of the strings in nested values."""
    free = dict.fromkeys(_NONCHARACTERS)
    for text in _strings(values):
        for char in [c for c in free if c in text]:
            del free[char]
    if not free:
        raise ValueError(
            "the conversation uses all 32 noncharacters U+FDD0 to U+FDEF; remove at least one, "
            "they carry no text"
        )
    return next(iter(free))


@functools.lru_cache(maxsize=16)
def _beginnings_of(tokens: frozenset[str]) -> re.Pattern[str]:
    def after(rests: list[str]) -> str:
        """Return a pattern with the shape of a trie, so that many tokens match as fast as one."""
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


def beginnings_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Compile a pattern that matches wherever one of the tokens begins.

    Matches have no width, so overlapping tokens are all found. Group 1 is the longest token there.

    Returns:
        None if there are no tokens.

    Raises:
        ValueError: if a token is longer than MAX_CONTROL_CHARS.
    """
    tokens = frozenset(tokens)
    if (longest := max(map(len, tokens), default=0)) > MAX_CONTROL_CHARS:
        raise ValueError(
            f"a control token has {longest} characters; more than {MAX_CONTROL_CHARS} is refused"
        )
    return _beginnings_of(tokens) if tokens else None


class _Shield:
    """Inserts the mark into every control token in the strings of a nested value.

    A string that begins or ends with part of a control token gets a mark there too, because the
    template may write the rest of the token next to it.
    """

    def __init__(self, control_tokens: Sequence[str], mark: str):
        tokens = set(control_tokens)
        self._mark, self._whole = mark, beginnings_of(tokens)
        self._heads = {t[:k] for t in tokens for k in range(1, len(t))}
        self._tails = {t[k:] for t in tokens for k in range(1, len(t))}
        self._longest = max(map(len, tokens), default=0)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._insert_marks(value)
        if isinstance(value, Mapping):
            return {self(k): self(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self(v) for v in value]
        if value is None or isinstance(value, (bool, int, float)):
            return value
        raise ValueError(f"messages and tools hold JSON values, found {_short(value)}")

    def _insert_marks(self, text: str) -> str:
        if self._whole is None:
            return text
        cuts = [0, *(m.start() + 1 for m in self._whole.finditer(text)), len(text)]
        text = self._mark.join(text[a:b] for a, b in itertools.pairwise(cuts))
        core = text.strip()  # the template may strip the string
        start = text.find(core)
        end, sizes = start + len(core), range(1, min(self._longest, len(core) + 1))
        if any(core[-k:] in self._heads for k in sizes):
            text = text[:end] + self._mark + text[end:]
        if any(core[:k] in self._tails for k in sizes):
            text = text[:start] + self._mark + text[start:]
        return text


# ---- the sandbox ---------------------------------------------------------------------------------
class _ChatSandbox(ImmutableSandboxedEnvironment):
    """A jinja2 environment with a budget. Make a new one for every rendering.

    Args:
        work: the budget, see BASE_WORK.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, work: int):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            finalize=self._output,
        )
        self._work, self._deadline = work, time.monotonic() + MAX_SECONDS
        self._template_chars = 0  # number of literal characters in the template
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
        """Compile a template in which loops and the operator `~` use up the budget.

        jinja2 has no hook for either. So the iterable of every loop goes through the filter `_each`
        and every operand of `~` through the filter `_part`.
        """
        tree = self.parse(source)
        self._template_chars = _literal_chars(tree)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(
                loop.iter, "_each", [nodes.Const(_literal_chars(loop))], [], None, None
            )
        for concat in tree.find_all(nodes.Concat):
            concat.nodes = [nodes.Filter(n, "_part", [], [], None, None) for n in concat.nodes]
        tree.set_environment(self)
        return self.from_string(tree)

    def _pay(self, work: int) -> None:
        """Take `work` from the budget.

        Raises:
            SecurityError: if the budget is used up or the time limit has passed.
        """
        self._work -= work
        if self._work < 0:
            raise SecurityError("more work or text than a conversation of this size needs")
        if time.monotonic() > self._deadline:
            raise SecurityError(f"more than {MAX_SECONDS:g} seconds")

    def _pay_for(self, value: Any) -> None:
        """Charge the budget for converting a value to text. Repeated parts count each time."""
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

    def _each(self, iterable: Any, literal_chars: int) -> Iterator[Any]:
        for item in iterable:
            self._pay(10 + literal_chars)
            yield item

    def _metered(self, filter_):
        # wraps also copies the attribute that tells jinja2 what to pass as the first argument
        @functools.wraps(filter_)
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

    def wrap_str_format(self, value):
        # jinja2 would offer str.format without asking is_safe_attribute
        return None

    def is_safe_attribute(self, obj, attr, value):
        return super().is_safe_attribute(obj, attr, value) and (
            not isinstance(obj, str) or attr in _STR_METHODS
        )

    def call(self, context, function, /, *args, **kwargs):
        """Charge the budget for a call in the template, then make the call."""
        self._pay(50 + (self._template_chars if isinstance(function, Macro) else 0))
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str):
            self._pay_for([owner, *args, *kwargs.values()])
            if name == "replace":
                self._pay_for_replace(owner, *args)
            if name == "join":
                return _join(args[0], owner)
        return super().call(context, function, *args, **kwargs)


class _Generation(Extension):
    """Support {% generation %} ... {% endgeneration %}, which marks the assistant's text.

    The mark is for loss masks in fine-tuning. Here the block is replaced by its body.
    """

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _literal_chars(node: nodes.Node) -> int:
    """Count the literal characters in a part of a template: one pass writes at most that many."""
    return sum(len(d.data) for d in node.find_all(nodes.TemplateData))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_) -> str:
    """Dump JSON without the escapes of <, > and & that jinja2's own filter adds for HTML."""
    if isinstance(value, Undefined):
        raise ValueError("tojson of something that is not defined")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=min(int(indent), 8) if indent else None
    )


def _join(values: Any, separator: str = "") -> str:
    return str(separator).join([str(v) for v in values])


def _strftime_now(pattern: str) -> str:
    # Some C libraries pad to any width, so %1000000000d would need a gigabyte.
    if len(pattern) > 100 or re.search(r"%[^A-Za-z%]*\d", pattern):
        raise ValueError(
            f"strftime_now takes a short date format without widths, found {pattern[:100]!r}"
        )
    return datetime.now().strftime(pattern)


def _raise_exception(message: Any = "") -> None:
    raise jinja2.TemplateError(str(message))
