"""Tests that docs/SERVING.md agrees with the code: options, variables, codes, metrics, examples.

`python tests/serve/test_serving_docs.py` writes the table of options.
"""

import argparse
import ast
import configparser
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from lamoe.cli.parser import build_parser
from lamoe.serve import metrics, settings
from lamoe.serve.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "SERVING.md"
TEXT = PAGE.read_text(encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    verbs = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return verbs.choices["serve"]


def options() -> str:
    """Write the table of options from the parser."""
    rows = ["| flag | variable | default | |", "|---|---|---|---|"]
    defaults = {f"--{f.name.replace('_', '-')}": f.default for f in dataclasses.fields(Settings)}
    for a in parser()._actions:
        flag = a.option_strings[-1] if a.option_strings else ""
        variable = re.search(r"\[(LAMOE_\w+)\]$", a.help or "")
        if flag in defaults and variable:
            help = a.help.removesuffix(variable[0]).strip().replace("%%", "%").replace("|", "/")
            help = re.sub(r" \(default: [^)]*\)$", "", help)
            default = "" if defaults[flag] is None else f"`{defaults[flag]}`"
            rows.append(f"| `{flag}` | `{variable[1]}` | {default} | {help} |")
    assert len(rows) == len(defaults) + 2
    return "\n".join(rows)


def between(text: str, name: str) -> str:
    return text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0].strip()


def block(kind: str) -> str:
    return re.search(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)[1]


def test_table_of_options_is_current():
    assert between(TEXT, "options") == options(), "run: python tests/serve/test_serving_docs.py"


def test_every_variable_of_the_table_changes_its_setting():
    sample = {str: "info", int: "70", float: "7.5", settings.parse_bytes: "1MB"}
    for flag, variable in re.findall(
        r"^\| `(--[\w-]+)` \| `(LAMOE_\w+)` \|", between(TEXT, "options"), re.M
    ):
        field = next(
            f for f in dataclasses.fields(Settings) if f.name == flag[2:].replace("-", "_")
        )
        value = {
            "LAMOE_DTYPE": "float32",
            "LAMOE_LOG_LEVEL": "debug",
            "LAMOE_ALLOWED_ORIGINS": "http://localhost:3000",
            "LAMOE_PREFIX_CACHE_SCOPE": "server",
        }.get(variable, sample[field.metadata["kind"]])
        chosen = settings.from_options(argparse.Namespace(), {variable: value})
        assert getattr(chosen, field.name) != field.default, variable
        assert getattr(
            settings.from_options(parser().parse_args([flag, value]), {}), field.name
        ) == getattr(chosen, field.name)


def test_every_flag_in_the_text_exists():
    known = {o for a in parser()._actions for o in a.option_strings}
    own = TEXT.split("## More than one machine")[0]
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", own)) - {"--json"} <= known


def codes_in_the_code() -> set[str]:
    """Find the error codes: the strings in the third argument of every ApiError."""
    found = set()
    for path in (ROOT / "lamoe" / "serve").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") == "ApiError"
                and len(node.args) > 2
            ):
                found |= {
                    n.value
                    for n in ast.walk(node.args[2])
                    if isinstance(n, ast.Constant) and isinstance(n.value, str)
                }
    return found


def test_every_error_code_is_listed():
    section = TEXT.split("## Errors")[1].split("## Limits")[0]
    rows = [line for line in section.splitlines() if re.match(r"\| [45]", line)]
    listed = set(re.findall(r"`([a-z_]+)`", "\n".join(rows)))
    found = codes_in_the_code() | {"loading", "draining", "failed"}
    assert len(found) > 20 and found <= listed and listed - found <= {"generation_failed"}


def test_every_metric_is_listed():
    names = set()
    for family in metrics.Metrics().registry.collect():
        names.add(family.name + ("_total" if family.type == "counter" else ""))
    section = TEXT.split("## What to watch")[1].split("## More than one machine")[0]
    assert set(re.findall(r"`(lamoe_\w+)", section)) == names


def test_systemd_unit_uses_existing_options():
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str
    unit.read_string(block("ini"))
    words = shlex.split(unit["Service"]["ExecStart"])
    assert words[0].endswith("/lamoe") and words[1] == "serve"
    args = parser().parse_args(words[2:])
    given = dict(w.split("=", 1) for w in shlex.split(unit["Service"]["Environment"]))
    chosen = settings.from_options(args, given)
    assert {k for k in given if k.startswith("LAMOE_")} <= {
        f"LAMOE_{f.name.upper()}" for f in dataclasses.fields(Settings)
    }
    assert chosen.api_key_file == "%d/key"
    assert args.name == "/srv/models/chat"
    assert int(unit["Service"]["TimeoutStopSec"]) > chosen.shutdown_timeout


def test_proxy_example_fits_the_default_limits():
    proxy = block("nginx")
    assert proxy.count("{") == proxy.count("}")
    assert f"127.0.0.1:{Settings.port}" in proxy
    assert "proxy_buffering off" in proxy
    assert int(re.search(r"proxy_read_timeout (\d+)s", proxy)[1]) > Settings.request_timeout
    assert int(re.search(r"client_max_body_size (\d+)m", proxy)[1]) << 20 >= Settings.max_body_bytes


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:tests|lamoe|docs)/[\w/.]+)`", TEXT))))
def test_named_files_exist(path):
    assert (ROOT / path).exists()


if __name__ == "__main__":
    before, rest = TEXT.split("<!-- options -->\n")
    after = rest.split("<!-- /options -->")[1]
    table = f"<!-- options -->\n{options()}\n<!-- /options -->"
    PAGE.write_text(f"{before}{table}{after}", encoding="utf-8")
