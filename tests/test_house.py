"""Tests of rules for the whole package, checked on its syntax trees.

Imports go down the list of packages, files stay short, every module is used, and nothing runs
foreign code.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lamoe"
# Levels of packages. A package may import its own modules and those of packages with a smaller
# level.
LEVEL = {
    "os_errors": 0,  # a module
    "atomic": 0,  # a module
    "spinning": 0,  # a module
    "kernels": 0,
    "text": 0,
    "model": 1,
    "checkpoints": 2,
    "backends": 3,
    "engine": 4,
    "train": 5,
    "measure": 6,
    "serve": 6,
    "cli": 7,
    "__main__": 8,
}
ENTRY_POINTS = {
    "lamoe",
    "lamoe.cli",
    "lamoe.__main__",
    "lamoe.cli.__main__",
    "lamoe.engine.generate",
    "lamoe.engine.grammar_worker",  # the program of a child process
}
MAX_LINES, MAX_TEST_LINES = 560, 820  # lines per file


def modules() -> dict[str, Path]:
    """Return {dotted name: file} of the whole package."""
    out = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


MODULES = modules()


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imports(name: str) -> set[str]:
    """Return the modules of lamoe that a module imports, anywhere in it.

    `from lamoe.a import b` counts as lamoe.a.b if that is a module.
    """
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{name} line {node.lineno}: write the import from the top, `from lamoe...`"
            )
            whole = {f"{node.module}.{a.name}" for a in node.names}
            found |= {w if w in MODULES else node.module for w in whole}
    return {f for f in found if f.split(".")[0] == "lamoe"}


def room(name: str) -> str:
    return name.split(".")[1]


def uphill(name: str, imported: set[str]) -> list[str]:
    """Return imports that go up the list, or through the package's own __init__."""
    if name == "lamoe":
        return []
    return [i for i in sorted(imported) if i != "lamoe" and LEVEL[room(i)] > LEVEL[room(name)]]


def test_every_package_has_a_level():
    assert {room(n) for n in MODULES if n != "lamoe"} <= set(LEVEL)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    assert uphill(name, imports(name)) == []


def test_the_check_sees_an_import_that_goes_up():
    assert uphill("lamoe.model.rope", {"lamoe.engine.llm", "lamoe.model.config"}) == [
        "lamoe.engine.llm"
    ]
    assert "lamoe.kernels" in imports(
        "lamoe.model.transformer"
    ) and "lamoe.model.config" in imports("lamoe.model.rope")  # `imports` does find imports


def test_no_import_circles():
    """Imports have no cycles, except that an __init__ exports modules of its own package."""
    edges = {
        n: {i for i in imports(n) if i in MODULES and not n.startswith(i + ".")} for n in MODULES
    }
    done: set[str] = set()

    def visit(n: str, path: tuple):
        assert n not in path, " -> ".join((*path, n))
        for i in edges[n] - done:
            visit(i, (*path, n))
        done.add(n)

    for n in MODULES:
        visit(n, ())


def test_every_module_is_used():
    """Every module is imported by another one or is an entry point.

    A package counts as used if one of its modules is.
    """
    used = set().union(*(imports(n) - {n} for n in MODULES))
    used |= {n.rsplit(".", 1)[0] for n in used}
    assert sorted(set(MODULES) - used - ENTRY_POINTS) == []


def test_accounting_config_and_the_package_itself_need_no_torch():
    """Config, accounting and the package itself do not import torch, which may be missing."""
    assert "torch" not in ast.unparse(
        ast.Module(
            [
                n
                for n in tree("lamoe.model.accounting").body
                if isinstance(n, (ast.Import, ast.ImportFrom))
            ],
            [],
        )
    )
    code = (
        "import sys, lamoe; lamoe.accounting.report(lamoe.ModelConfig.preset('tiny')); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "path",
    sorted(
        [
            *PACKAGE.rglob("*.py"),
            *(ROOT / "tests").rglob("*.py"),
            *(ROOT / "tools").rglob("*.py"),
            *(ROOT / "benchmarks").rglob("*.py"),
        ]
    ),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_files_stay_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    limit = MAX_TEST_LINES if "tests" in path.parts else MAX_LINES
    assert len(lines) <= limit, f"{len(lines)} lines"
    trailing = [i + 1 for i, line in enumerate(lines) if line != line.rstrip()]
    assert not trailing, f"spaces at the end of lines {trailing}"


MODEL_CLASSES = {"Transformer", "TorchBackend", "CpuBackend"}


def model_class_checks(node: ast.AST) -> list[str]:
    """Return the model classes that a node compares with isinstance."""
    if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"):
        return []
    return [n.id for n in ast.walk(node.args[1]) if getattr(n, "id", "") in MODEL_CLASSES]


@pytest.mark.parametrize("name", [n for n in MODULES if not n.startswith("lamoe.backends")])
def test_only_backends_check_model_classes(name):
    """Only backends check the class of a model. Other code uses the interface base.Backend."""
    assert [c for node in ast.walk(tree(name)) for c in model_class_checks(node)] == []


def test_the_check_sees_a_model_class():
    code = ast.parse("isinstance(model, (int, CpuBackend))")
    assert [c for node in ast.walk(code) for c in model_class_checks(node)] == ["CpuBackend"]


def test_transformer_py_stays_short():
    assert len(MODULES["lamoe.model.transformer"].read_text().splitlines()) < 300


FORBIDDEN = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")


def runs_foreign_code(node: ast.AST) -> str | None:
    """Name what could execute code from a foreign file. Return None for a harmless node."""
    names = (
        [a.name for a in node.names] + [getattr(node, "module", None) or ""]
        if isinstance(node, (ast.Import, ast.ImportFrom))
        else []
    )
    for n in names:
        if n.split(".")[0] in FORBIDDEN:
            return n
    if isinstance(node, ast.Attribute) and ast.unparse(node) in (
        "torch.load",
        "torch.jit.load",
        "torch.save",
        "torch.hub.load",
        "np.lib.format.read_array",
    ):
        return ast.unparse(node)
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in (
            "eval",
            "exec",
            "__import__",
            "compile",
        ):
            return node.func.id
        for k in node.keywords:
            if k.arg in ("allow_pickle", "trust_remote_code", "shell") and not (
                isinstance(k.value, ast.Constant) and k.value.value is False
            ):
                return k.arg
    return None


@pytest.mark.parametrize("name", MODULES)
def test_nothing_runs_foreign_code(name):
    found = [
        f"line {node.lineno}: {bad}"
        for node in ast.walk(tree(name))
        if (bad := runs_foreign_code(node))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "x = torch.load(p)",
        "eval(s)",
        "np.load(p, allow_pickle=True)",
        "f(trust_remote_code=True)",
        "exec(s)",
    ],
)
def test_the_check_sees_foreign_code(code):
    assert any(runs_foreign_code(node) for node in ast.walk(ast.parse(code)))
    assert not any(
        runs_foreign_code(node)
        for node in ast.walk(
            ast.parse("np.load(p, allow_pickle=False); model.eval(); re.compile(s)")
        )
    )


# Documented by the definitions in ref.py, the help of the verbs, and OpenAI's API.
DOCUMENTED_ELSEWHERE = {
    "lamoe.kernels.fused",
    "lamoe.cli",
    "lamoe.serve.wire",
    "lamoe.serve.responses",
}


def undocumented(name: str) -> list[str]:
    """Return the public names without a docstring.

    Modules, public classes and public module-level functions need one. Methods do not, and nor do
    functions of at most four statements.
    """
    missing = [] if ast.get_docstring(tree(name)) else ["the module"]
    for node in tree(name).body:
        if (
            isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
        ):
            if isinstance(node, ast.ClassDef) or len(node.body) > 4:
                missing.append(node.name)
    return missing


@pytest.mark.parametrize("name", sorted(set(MODULES) - DOCUMENTED_ELSEWHERE))
def test_the_api_is_documented(name):
    assert undocumented(name) == []


def test_no_catch_all_modules_or_abstract_classes():
    names = {p.name for p in PACKAGE.rglob("*.py")}
    assert not names & {"utils.py", "helpers.py", "common.py", "misc.py", "registry.py"}
    for name in MODULES:
        bases = [
            ast.unparse(b)
            for node in ast.walk(tree(name))
            if isinstance(node, ast.ClassDef)
            for b in node.bases
        ]
        if name != "lamoe.backends.base":  # Backend is the only abstract class
            assert not {"ABC", "abc.ABC"} & set(bases), f"{name} has an abstract base class"
