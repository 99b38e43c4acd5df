"""The work of the child process that renders chat templates.

It needs only jinja2 and the standard library. Templates run in jinja2's immutable sandbox, with
the settings, filters and functions of transformers. The sandbox bounds neither time nor memory:
child_worker and child_process do.

A request has the template as `source`. With `variables` the answer has the rendered `text`;
without, the `names` that the template reads. An answer may have an `error` instead.
"""

from __future__ import annotations

import codecs
import importlib
import json
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

MEMORY_BYTES = 512 << 20
# Longest result of a template, in characters.
MAX_TEXT = 16 << 20
_MAX_ERROR = 1000
_LATE_MODULES = ("html", "jinja2.constants", "jinja2.debug", "linecache", "pprint", "textwrap")
_LATE_ENCODINGS = "ascii cp1252 latin-1 unicode-escape utf-16 utf-32 utf-8-sig".split()


class _Generation(Extension):
    """Support {% generation %} ... {% endgeneration %}, which marks the assistant's text.

    The mark is for loss masks in fine-tuning. Here the block is replaced by its body, in a scope of
    its own.
    """

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller) -> str:
        return caller()


class _Dict:
    """What templates may do with the class `dict`."""

    def __call__(self, *args, **kwargs) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args) -> dict:
        """Return dict.fromkeys(*args)."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """jinja2's namespace without private names, which could reach into the interpreter."""

    def __init__(*args, **kwargs):
        self, attributes = args[0], dict(*args[1:], **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the private name {name[:100]!r}")


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Dump JSON without the escapes of <, > and & that jinja2's own filter adds for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any = "") -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def environment() -> ImmutableSandboxedEnvironment:
    """Return an environment that renders like transformers."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    env.filters["tojson"] = _tojson
    env.globals.update(
        dict=_Dict(),
        namespace=_Namespace,
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
    )
    return env


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return environment().from_string(source)


def _names(source: str) -> list[str]:
    tree = environment().parse(source)
    return sorted({n.name for n in tree.find_all(nodes.Name) if n.ctx == "load"})


def _render(source: str, variables: dict[str, Any]) -> str:
    pieces, length = [], 0
    for piece in _compiled(source).generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_TEXT:
            raise SecurityError(f"more than {MAX_TEXT} characters of text")
    return "".join(pieces)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    try:
        if "variables" not in request:
            return {"names": _names(request["source"])}
        return {"text": _render(request["source"], request["variables"])}
    except jinja2.TemplateSyntaxError as e:
        error = f"the chat template does not parse: {e.message} (line {e.lineno})"
    except SecurityError as e:
        error = f"the chat template asks for something the sandbox forbids: {e}"
    except jinja2.TemplateError as e:
        error = f"the chat template failed: {e}"
    except RecursionError:
        error = "the chat template failed: it nests or calls itself too deeply"
    except MemoryError:
        # What the template has allocated is freed only after this block.
        error = f"the chat template failed: it needs more than {MEMORY_BYTES >> 20} MiB of memory"
        return {"error": error, "ends": True}
    except Exception as e:  # a template is a program and may raise anything
        error = f"the chat template failed: {type(e).__name__}: {e}"
    return {"error": error if len(error) <= _MAX_ERROR else error[: _MAX_ERROR - 3] + "..."}


def prepare() -> None:
    """Import what jinja2 and Python import lazily, because this process can open no files later."""
    for module in _LATE_MODULES:
        importlib.import_module(module)
    for encoding in _LATE_ENCODINGS:
        codecs.lookup(encoding)
    datetime.now().strftime("%c")
    with suppress(jinja2.TemplateError):
        _compiled("{{ raise_exception('') }}").render()
