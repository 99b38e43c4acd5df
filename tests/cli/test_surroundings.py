"""Tests of the command line with unusual encodings, streams and folders, and misspelt words."""

import io
import os
import re
import subprocess
import sys
from unittest import mock

import pytest
from huggingface_hub import errors
from test_cli import refused, run

from lamoe import cli
from lamoe.cli import measure
from lamoe.cli.arguments import in_words_of_options
from lamoe.measure import report
from lamoe.os_errors import check_output, explain
from tiny_run import trained  # noqa: F401 (a fixture)

LATIN = "caf\udce9"  # how Python passes the bytes of "caf\u00e9" in Latin-1 as an argument


class Stream(io.TextIOWrapper):
    """A standard stream over bytes."""

    def __init__(self, content: bytes = b"", **options):
        super().__init__(io.BytesIO(content), **({"encoding": "utf-8"} | options))


def error_of(argv) -> SystemExit:
    with pytest.raises(SystemExit) as e:
        cli.main([str(a) for a in argv])
    assert e.value.code == 2
    return e.value


# ---- encodings ----
def test_a_prompt_that_is_not_utf8_is_named_in_the_words_of_the_command_line(
    trained, capsys, monkeypatch
):
    words = "the prompt is not UTF-8 (byte E9 at 3); convert it, for example with iconv"
    few = ("--max-tokens", 2)
    assert words in refused(capsys, "generate", trained, "--prompt", LATIN, *few)
    monkeypatch.setattr(sys, "stdin", Stream(b"caf\xe9"))
    assert words in refused(capsys, "generate", trained, *few)
    monkeypatch.setattr(sys, "stdin", Stream("abc".encode("utf-16")))
    assert "iconv -f UTF-16" in refused(capsys, "generate", trained, *few)
    said = refused(capsys, "generate", trained, "--prompt", "x", "--stop", LATIN)
    assert "--stop is not UTF-8 (byte E9 at 3)" in said
    assert "--system is not UTF-8" in refused(capsys, "chat", trained, "--system", LATIN)
    said = refused(capsys, "generate", trained, "--prompt", "\ud800")
    assert "half a surrogate pair at character 0" in said


def test_utf8_is_read_whatever_the_locale_is(trained, capsys, monkeypatch):
    options = ("--max-tokens", 2, "--temperature", 0)
    assert run("generate", trained, "--prompt", "caf\u00e9", *options) == 0
    expected = capsys.readouterr().out
    spelt = "caf\udcc3\udca9"  # the bytes of UTF-8, read in the C locale
    assert run("generate", trained, "--prompt", spelt, *options) == 0
    assert capsys.readouterr().out == expected
    for content in ("caf\u00e9".encode(), b"\xef\xbb\xbf" + "caf\u00e9".encode()):
        monkeypatch.setattr(sys, "stdin", Stream(content, encoding="utf-8"))
        assert run("generate", trained, *options) == 0
        assert capsys.readouterr().out == expected


def test_a_chat_goes_on_after_a_line_that_is_not_utf8(trained, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Stream(b"caf\xe9\nhi\n"))
    assert run("chat", trained, "--max-tokens", 2) == 1
    out, err = capsys.readouterr()
    assert "the message is not UTF-8 (byte E9 at 3)" in err and out.count("\n") == 1


def test_output_falls_back_to_replacement(trained, monkeypatch):
    monkeypatch.setattr(sys, "stdout", out := Stream(encoding="ascii"))
    assert run("generate", trained, "--prompt", "caf\u00e9", "--max-tokens", 1) == 0
    assert out.buffer.getvalue().startswith(b"caf?")


# ---- streams and folders ----
def test_generate_needs_no_folder_for_temporary_files(trained):
    """Some calls make torch import its compiler, which takes seconds and looks for a folder."""
    code = (
        "import sys, tempfile\n"
        "tempfile._get_default_tempdir = lambda: sys.exit('asked for a temporary folder')\n"
        "from lamoe import cli\n"
        "code = cli.main(sys.argv[1:])\n"
        "sys.exit(code or ('torch._dynamo' in sys.modules))"
    )
    argv = ["generate", str(trained), "--prompt", "x", "--max-tokens", "1"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_folder_for_temporary_files_is_named():
    error = FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/var/tmp']")
    assert "set TMPDIR to a writable folder (in a container: --tmpfs /tmp)" in explain(error)


def test_closed_streams(trained, monkeypatch, capsys):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert run("info", trained) == 0
    assert all(getattr(sys, name) is not None for name in ("stdin", "stdout", "stderr"))


def test_a_full_disk_below_standard_output(trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", out := open("/dev/full", "w"))
    assert "standard output cannot be written: No space left" in refused(capsys, "info", trained)
    out.close()  # the rest was discarded


def test_a_deleted_current_folder(tmp_path, monkeypatch, capsys):
    def gone():
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "getcwd", gone)
    assert "the current folder was deleted; cd to one" in refused(capsys, "info", "tiny")


# ---- misspelt words ----
@pytest.mark.parametrize(
    "argv, hint",
    [
        (["generat"], "did you mean 'generate'?"),
        (["generate", "x", "--max-token", "3"], "--max-token is unknown, did you mean '--max-tok"),
        (["generate", "x", "--top_k=3"], "--top_k is unknown, did you mean '--top-k'?"),
        (["quantize", "--weight", "int4"], "--weight is unknown, did you mean '--weights'?"),
        (["evaluate", "x", "--weights", "int5"], "did you mean 'int8'?"),
        (["generate", "x", "--prompt", "--hello"], "write --prompt=VALUE for a value that begins"),
        (["generate", "x", "--max-tokens", "1.5"], "'1.5' is not a whole number; write it like"),
        (["train", "r.toml", "--steps", "3"], "--steps is unknown, did you mean --run.steps?"),
        (["train", "r.toml", "--lr=3"], "--lr is unknown, did you mean --optim.lr?"),
        (["train", "r.toml", "--resum"], "--resum is unknown, did you mean '--resume'?"),
    ],
)
def test_misspelt_words(argv, hint, capsys):
    error_of(argv)
    assert hint in capsys.readouterr().err


def test_help_of_train_lists_the_keys_of_a_recipe(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    for words in ("[run] out=runs/model", "sources=stdlib,austen", "ramp_from=0", "eps=1e-08"):
        assert words in out


def test_generate_names_its_model_once(trained, capsys):
    assert "no model is named" in refused(capsys, "generate", "--prompt", "x")
    assert "two models are named" in refused(capsys, "generate", "a", "--model", "b")


def test_generate_says_that_the_context_is_full(trained, capsys):
    argv = ("generate", trained, "--prompt", "the ", "--temperature", 0, "--max-tokens")
    assert run(*argv, "1e3") == 0
    err = capsys.readouterr().err
    assert err.startswith("lamoe generate: the context of 64 tokens is full after ")
    assert err.endswith(" of --max-tokens 1000\n") and err.count("\n") == 1
    assert run(*argv, 3) == 0
    assert capsys.readouterr().err == ""


# ---- errors of the operating system ----
@pytest.mark.parametrize(
    "error, words",
    [
        (FileNotFoundError(2, os.strerror(2), "a.txt"), "a.txt does not exist; check the name"),
        (NotADirectoryError(20, os.strerror(20), "f/x"), "f/x lies under a file, not under a"),
        (OSError(28, os.strerror(28), "a"), "a could not be written, the disk is full; free some"),
        (OSError(28, os.strerror(28)), os.strerror(28)),
        (OSError(28, "the checkpoint could not be saved", "x.bin"), "could not be saved: x.bin"),
        (OSError("own words"), "own words"),
        (OSError(36, os.strerror(36), "x" * 5000), "(5000 characters) has a name that is too long"),
        (OSError(5, os.strerror(5), b"bytes"), "bytes could not be read or written"),
        (OSError(95, os.strerror(95), "a"), "a could not be used: "),
    ],
)
def test_errors_of_the_system_in_words(error, words):
    assert words in explain(error) and "Errno" not in explain(error)


def test_outputs_are_checked_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")

    def words(path, kind="folder") -> str:
        with pytest.raises(ValueError) as e:
            check_output("--out", path, kind)
        return str(e.value)

    assert words("") == words("  ") == "--out is empty; name a folder"
    assert words("a\0b").startswith("--out 'a\\x00b' holds a zero byte")
    assert words("file") == "--out file is a file, not a folder; choose another --out"
    assert "--out file/x/y lies under file, which is a file" in words("file/x/y")
    assert "dangling is a link to nowhere, which does not exist" in words("dangling")
    assert "dangling is a link to nowhere" in words("dangling/x")
    assert "leads back to itself" in words("loop/x")
    assert "has a name that is too long" in words("x" * 5000)
    assert words(".", "file") == "--out . is a folder; name a file"
    assert "the folder no does not exist; make it first" in words("no/x", "file")
    assert check_output("--out", "new/deep") == tmp_path.__class__("new/deep")
    assert check_output("--out", "file", "file").name == "file"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output("--out", "~/new") == tmp_path / "new"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "--out new cannot be written: . may not be written by this user" in words("new")


@pytest.mark.parametrize("argv", [["quantize"], ["convert"]])
def test_targets_are_checked_before_the_work(argv, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    for target, words in (
        ("", "TARGET is empty; name a folder"),
        ("file", "TARGET file is a file, not a folder"),
        ("file/x", "lies under file, which is a file"),
        ("dangling", "is a link to nowhere, which does not exist"),
    ):
        assert words in refused(capsys, *argv, trained, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file"]
    assert (tmp_path / "dangling").is_symlink() and (tmp_path / "file").read_text() == "mine"


def test_the_report_folder_is_checked_before_the_measuring(trained, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    with mock.patch.object(measure, "_evaluate", side_effect=AssertionError("measured")):
        said = refused(capsys, "evaluate", trained, "--out", tmp_path / "file" / "x")
    assert "lies under" in said and "choose another --out" in said


def test_evaluate_shows_progress(trained, monkeypatch, capsys):
    monkeypatch.setattr(report, "_PROGRESS_S", 0.0)
    assert run("evaluate", trained, "--data", trained.parent / "texts", "--seq-len", 16) == 0
    err = capsys.readouterr().err
    assert "measuring the loss on" in err and "measuring the speed of generation" in err
    counts = [int(n) for n in re.findall(r": (\d+) tokens\n", err.replace(",", ""))]
    assert counts == sorted(counts) and counts[0] == 16 and len(counts) > 3


def test_messages_of_the_python_interface_name_the_options(trained, tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    assert "pass --overwrite to replace" in refused(capsys, "convert", trained, tmp_path)
    assert in_words_of_options("or use device='cpu'") == "or use --device cpu"
    assert in_words_of_options("use backend='torch'") == "use LAMOE_BACKEND=torch"


def test_a_missing_model_is_named_without_the_words_of_the_hub(tmp_path, monkeypatch, capsys):
    """The hub is not asked: it is replaced by its errors."""
    monkeypatch.chdir(tmp_path)
    for error, words in (
        (errors.LocalEntryNotFoundError("no snapshot"), "the hub cannot be reached and its cache"),
        (PermissionError(13, os.strerror(13), "/cache"), "/cache may not be used by this user"),
    ):
        with mock.patch("huggingface_hub.snapshot_download", side_effect=error):
            said = refused(capsys, "generate", "runs/tiny", "--prompt", "x")
        assert f"there is no folder 'runs/tiny' (from {tmp_path})" in said and words in said
    error = errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
    with mock.patch("huggingface_hub.snapshot_download", side_effect=error):
        said = refused(capsys, "info", "a/b")
    assert "the hub has no model of this name that may be read; check the name" in said


def test_a_warning_is_one_line(tmp_path, capsys, trained):
    (tmp_path / "x.txt").write_text('{"text": "a"}\n' * 20)
    assert run("evaluate", trained, "--data", tmp_path / "x.txt", "--seq-len", 16) == 0
    err = capsys.readouterr().err
    assert err.startswith("lamoe: warning: source ") and "begin with a JSON object" in err
    assert "UserWarning" not in err
