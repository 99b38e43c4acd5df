"""What people type and have: sources of text, recipes and command lines of public bug reports.

Each row is an input with the texts that lamoe reads, or with a part of what it says.
"""

import gzip
import json
import os
import shlex
import subprocess
import sys

import pytest
from test_cli import refused, run

from lamoe.checkpoints import resolve
from lamoe.engine.request import check_prompt
from lamoe.model.config import PRESETS
from lamoe.train.recipe import Recipe
from lamoe.train.sources import read_documents
from tiny_run import trained  # noqa: F401 (a fixture)


def rows(*values) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


A, B = {"text": "a"}, {"text": "b"}
# {name of a file: (content, its texts or a part of the message)}
SOURCES = {
    "crlf.txt": (b"a\r\nb\r\n", ["a\r\nb\r\n"]),  # bytes are kept
    "mac.txt": (b"a\rb\r", ["a\rb\r"]),
    "bom.txt": (b"\xef\xbb\xbfa\n", ["a\n"]),
    "control.txt": (b"a\fb\x1bc", ["a\fb\x1bc"]),
    "no suffix": (b"a", ["a"]),
    "data[1].txt": (b"a", ["a"]),  # a file, not a glob
    "a:b.txt": (b"a", ["a"]),  # not the field b.txt
    "-dash.txt": (b"a", ["a"]),
    "new\nline.txt": (b"a", ["a"]),
    "x.jsonl:text": (b"a", ["a"]),
    "boms.jsonl": (b"\xef\xbb\xbf" + rows(A) + b"\xef\xbb\xbf" + rows(B), ["a", "b"]),  # joined
    "blank.jsonl": (b"\n\r\n" + rows(A) + b"  \n" + rows(B)[:-1], ["a", "b"]),
    "null.jsonl": (rows({"text": None}, B), ["b"]),  # null is absent
    "empty.jsonl": (rows({"text": ""}, {"text": " "}, B), ["b"]),
    "separators.jsonl": (rows({"text": "a\u2028b\x85"}), ["a\u2028b\x85"]),  # no line ends
    "nan.jsonl": (b'{"text": "a", "score": NaN}\n', ["a"]),
    "emoji.jsonl": (b'{"text": "\\ud83d\\ude00"}\n', ["\U0001f600"]),
    "more.jsonl": (rows({"messages": [], "text": "a"}), ["a"]),
    "lines.json": (rows(A, B), ["a", "b"]),
    "one.json": (b'{"text": "a"}', ["a"]),
    "members.txt.gz": (gzip.compress(b"a ") + gzip.compress(b"b"), ["a b"]),
    "half.jsonl": (b'{"text": "a\\ud800"}\n', "half a surrogate pair"),
    "number.jsonl": (rows({"text": 5}), "must be text, found int"),
    "list.jsonl": (rows({"text": ["a"]}), "must be text, found list"),
    "object.jsonl": (rows({"text": {"value": "a"}}), "must be text, found dict"),
    "string.jsonl": (b'"a"\n', "expected an object"),
    "array.jsonl": (b'[{"text": "a"}]\n', "belongs in a .json file"),
    "pretty.jsonl": (json.dumps(A, indent=1).encode(), "name the file .json"),
    "commas.jsonl": (b'{"text": "a"},\n{"text": "b"},\n', "Each line must be one whole value"),
    "joined.jsonl": (b'{"text": "a"}{"text": "b"}\n', "name the file .json"),
    "capital.jsonl": (rows({"Text": "a"}), "did you mean 'Text'"),
    "nested.jsonl": (rows({"meta": {"text": "a"}}), "it has 'meta'"),
    "later.jsonl": (rows(A, {"content": "b"}), "line 2: no field 'text'"),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', "line 1: not UTF-8 .byte E9"),
    "latin.txt": (b"caf\xe9", "iconv -f ISO-8859-1"),
    "utf16.jsonl": (rows(A).decode().encode("utf-16"), "iconv -f UTF-16"),
    "columns.json": (b'{"text": ["a", "b"]}', "must be text, found list"),
    "below.json": (b'{"data": [{"text": "a"}]}', "jq -c '.data"),
    "strings.json": (b'["a", "b"]', "expected an object"),
    "cut.txt.gz": (gzip.compress(b"a" * 9999)[:-9], "damaged"),
    "fake.gz": (b"a", "not compressed with gzip"),
    "x.zst": (b"\x28\xb5\x2f\xfd", "damaged|needs the package"),
    "x.bz2": (b"BZh9", "unpack it first"),
    "weights.pt": (b"PK\3\4", "an archive"),
    "array.npy": (b"\x93NUMPY\1\0", "binary"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_source(tmp_path, monkeypatch, name):
    content, expected = SOURCES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    if isinstance(expected, list):
        assert [d.text for d in read_documents([name])] == expected
    else:
        with pytest.raises(ValueError, match=expected):
            list(read_documents([name]))


@pytest.mark.parametrize(
    "source, says",
    [
        ("*.txt", "matches no file"),
        ("https://example.org/x.txt", "an address.*download it"),
        ("hf://datasets/x", "an address"),
        ("wikitext", "does not exist"),
        ("Austen", "did you mean 'austen'"),
        ("-", "standard input"),
        ("", "a source is a name or path"),
    ],
)
def test_a_source_that_is_no_file(tmp_path, monkeypatch, source, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says):
        list(read_documents([source]))


TOML = '[model]\npreset = "tiny"\n[run]\nsteps = 7\n'


@pytest.mark.parametrize(
    "name, content",
    [
        ("mark.toml", b"\xef\xbb\xbf" + TOML.encode()),  # Windows editors
        ("powershell.toml", TOML.encode("utf-16")),  # > of PowerShell 5
        ("lines.toml", TOML.replace("\n", "\r\n").encode()),
        ("comments.toml", b"# a comment\n" + TOML.replace("7", "7  # seven").encode()),
        ("recipe.json", b'{"model": {"preset": "tiny"}, "run": {"steps": 7}}'),  # of a run
        ("any.yaml", TOML.encode()),
    ],
)
def test_recipe(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    recipe = Recipe.load(tmp_path / name)
    assert recipe.run.steps == 7 and recipe.model == Recipe.from_dict(recipe.to_dict()).model


@pytest.mark.parametrize(
    "text, says",
    [
        (TOML + 'out = "C:\\runs\\x"', r"not valid TOML.*write a path with \\ in single quotes"),
        (TOML + 'steps = "7"', "not valid TOML"),  # a key twice
        (TOML.replace("7", '"7"'), "run.steps must be int, found '7'"),
        (TOML.replace("[run]", "[runs]"), "unknown section .runs.*did you mean 'run'"),
        (TOML.replace("steps", "step"), "unknown key run.step, did you mean 'steps'"),
        ("model:\n  preset: tiny\n", "not valid TOML"),
        ("", "describes no model"),
    ],
)
def test_recipe_refused(tmp_path, text, says):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ValueError, match=says):
        Recipe.load(tmp_path / "r.toml")


def test_a_run_folder_in_place_of_a_recipe(trained):
    with pytest.raises(ValueError, match=r"is a run folder; its recipe is .*recipe.json"):
        Recipe.load(trained)


@pytest.mark.parametrize(
    "words, says",
    [
        ("--json info tiny", "write them behind info"),
        ("generate x --threads -1", "0 means the default"),
        ("generate x --max-tok 3", "did you mean '--max-tokens'"),
        ("generate x --temperature 0,8", "invalid float value: '0,8'"),
        ("generate x --prompt", "expected one argument"),
        ("generat x", "did you mean 'generate'"),
        ("quantize x y --weights int3", "did you mean 'int8'"),
        ("convert x", "required: target"),
        ("convert x y --dtype fp16", "'float16'"),
        ("info tiny --memory 16x", "write it like 16GB or 512MiB"),
        ("train r.toml --out x", "did you mean --run.out"),
        ("train r.toml --lr 3", "did you mean --optim.lr"),
    ],
)
def test_usage(capsys, words, says):
    with pytest.raises(SystemExit) as e:
        run(*shlex.split(words))
    assert e.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("words", ["-V", "--version"])
def test_version(capsys, words):
    with pytest.raises(SystemExit) as e:
        run(words)
    assert e.value.code == 0 and capsys.readouterr().out.startswith("lamoe ")


@pytest.mark.parametrize(
    "words, says",
    [
        ("info TINY", "did you mean 'tiny'"),
        ("info tiny --context -5", "at least 1"),
        ("info tiny --weight-bits nan", "bits is nan"),
        ("generate nope/x/y --prompt a", "check the path"),
        ("generate '' --prompt a", "no model is named"),
        ("generate x --model y --prompt a", "two models are named"),
        ("generate nope --prompt a --temperature -1", "temperature is -1.0"),
        ("generate nope --prompt a --top-k -1", "0 switches it off"),
        ("convert TINY x", "there is no folder"),
        ("quantize . q --calibrate x", "no config.json"),
        ("train .", "no recipe at ."),
        ("evaluate .", "no config.json"),
    ],
)
def test_refusals(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *shlex.split(words))


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("https://huggingface.co/owner/name", "owner/name"),
        ("https://huggingface.co/owner/na.me/tree/main", "owner/na.me"),
        ("hf.co/owner/name", "owner/name"),
        ("hf://owner/name", "owner/name"),
        ("owner/name/", "owner/name"),
        ("owner/name@main", "owner/name"),
    ],
)
def test_other_spellings_of_a_hub_id(tmp_path, monkeypatch, typed, meant):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"write {meant}$"):
        resolve(typed)


def test_a_full_disk_under_the_output_is_named():
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "lamoe", "info", "tiny"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "lamoe info: standard output cannot be written: No space left on device\n"


def test_convert_with_a_folder_without_a_tokenizer(tmp_path, trained, capsys):
    words = ("convert", trained, tmp_path / "out", "--tokenizer", tmp_path)
    assert "which holds no tokenizer.json" in refused(capsys, *words)
    assert not os.path.exists(tmp_path / "out")


def test_an_id_beyond_the_embeddings_names_its_token():
    class Added:
        vocab_size = PRESETS["tiny"].vocab_size + 1

        class inner:
            id_to_token = staticmethod(lambda i: "<new>")

    with pytest.raises(ValueError, match="the token '<new>' of id 4096.* for 4096 tokens only"):
        check_prompt([1, 4096], None, Added, PRESETS["tiny"], 64)
