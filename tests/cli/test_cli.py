"""Tests of every verb of the command line, with its options and error messages."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

import lamoe
from lamoe import cli
from lamoe.backends.paged_cache import PagedCache
from lamoe.checkpoints import shards
from lamoe.cli import models
from lamoe.cli.parser import build_parser
from lamoe.model.config import PRESETS
from lamoe.serve import settings
from lamoe.train import checkpoint, loop
from tiny_run import metrics, raw_recipe, trained, write_texts, write_toml  # noqa: F401 (trained is a fixture)


@pytest.fixture
def quick():
    with mock.patch.object(loop, "measure_peak", return_value=1e10):
        yield


def run(*argv) -> int:
    return cli.main([str(a) for a in argv])


def refused(capsys, *argv) -> str:
    """Run a command that must fail with exit code 2, and return its one line on stderr."""
    capsys.readouterr()
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"lamoe {argv[0]}: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in out + err
    return err


# ---- train ----
@pytest.mark.parametrize("order", ["after", "before", "mixed"])
def test_train_with_overrides(tmp_path, quick, capsys, order):
    raw = raw_recipe(write_texts(tmp_path / "in"), tmp_path / "no")
    file, words = (
        str(write_toml(tmp_path / "r.toml", raw)),
        ["--optim.lr", "3e-4", f"--run.out={tmp_path / 'yes'}", "--run.steps", "2"],
    )
    argv = {
        "after": [file, *words, "--quiet"],
        "before": [*words, "--quiet", file],
        "mixed": [*words[:2], file, *words[2:3], "--quiet", *words[3:]],
    }
    assert run("train", *argv[order]) == 0
    assert [m["lr"] for m in metrics(tmp_path / "yes") if "lr" in m] == [
        pytest.approx(1.5e-4),
        pytest.approx(3e-4),
    ]
    assert not (tmp_path / "no").exists() and capsys.readouterr() == ("", "")
    assert "add --resume" in refused(capsys, "train", *argv[order])
    assert run("train", *argv[order], "--resume") == 0


def test_train_refuses(tmp_path, capsys):
    file = write_toml(tmp_path / "r.toml", raw_recipe(tmp_path / "nothing", tmp_path / "run"))
    assert "run.threads is -1" in refused(capsys, "train", file, "--threads", -1)
    assert "did you mean 'r.toml'" in refused(capsys, "train", tmp_path / "rr.toml")
    assert "did you mean 'lr'?" in refused(capsys, "train", file, "--optim.lrr", "1")
    assert "optim.lr is -1" in refused(capsys, "train", file, "--optim.lr", "-1")
    assert "optim.lr is -0.001" in refused(capsys, "train", file, "--optim.lr", "-1e-3")
    assert "--optim.lr needs a value" in refused(capsys, "train", file, "--optim.lr")
    assert "nothing to resume" in refused(capsys, "train", file, "--resume")
    assert "does not exist" in refused(capsys, "train", file, "--quiet")
    for words in (["--lr", "3"], ["another.toml"], ["--quie"]):  # argparse refuses these
        with pytest.raises(SystemExit) as e:
            run("train", file, *words)
        assert e.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


# ---- generate ----
def test_generate(trained, capsys, monkeypatch):
    assert (
        run(
            "generate",
            "--model",
            trained,
            "--prompt",
            "the ",
            "--max-tokens",
            12,
            "--temperature",
            0,
        )
        == 0
    )
    first = capsys.readouterr().out
    assert first.startswith("the ") and len(first) > 8 and first.endswith("\n")
    for argv in (["--prompt", "-"], []):  # the prompt is standard input, unchanged
        monkeypatch.setattr(sys, "stdin", io.StringIO("the "))
        assert (
            run("generate", "--model", trained, *argv, "--max-tokens", 12, "--temperature", 0) == 0
        )
        assert capsys.readouterr().out == first
    folder = checkpoint.latest(trained)
    # `generate` accepts a checkpoint folder and a model folder.
    for name in (folder, folder / "model"):
        assert (
            run(
                "generate",
                "--model",
                name,
                "--prompt",
                "the ",
                "--max-tokens",
                12,
                "--temperature",
                0,
            )
            == 0
        )
        assert capsys.readouterr().out == first
    stop = first[6:9]
    assert (
        run(
            "generate",
            "--model",
            trained,
            "--prompt",
            "the ",
            "--max-tokens",
            12,
            "--temperature",
            0,
            "--stop",
            "@@",
            "--stop",
            stop,
        )
        == 0
    )
    assert capsys.readouterr().out == "the " + first[4 : 4 + first[4:].index(stop)] + "\n"


def test_generate_passes_options_to_the_engine(trained, capsys):
    def out(*argv):
        assert (
            run("generate", "--model", trained, "--prompt", "the ", "--max-tokens", 15, *argv) == 0
        )
        return capsys.readouterr().out

    greedy = out("--temperature", 0)
    assert out("--top-k", 1) == out("--top-p", 1e-6) == out("--min-p", 1) == greedy
    assert (
        out("--seed", 1, "--temperature", 3)
        == out("--seed", 1, "--temperature", 3)
        != out("--seed", 2, "--temperature", 3)
    )
    assert out("--temperature", 0, "--dtype", "bfloat16").startswith("the ")
    with mock.patch("torch.set_num_threads") as threads:
        out("--threads", 1)
    threads.assert_called_once_with(1)


def test_generate_sizes_the_cache(trained, capsys):
    """The default context fits prompt and output, and the cache holds four of them.

    Options change the context and limit the memory.
    """
    made = []

    def out(*argv):
        with mock.patch(
            "lamoe.backends.base.PagedCache",
            side_effect=lambda *a: made.append(PagedCache(*a)) or made[-1],
        ):
            assert (
                run(
                    "generate",
                    "--model",
                    trained,
                    "--prompt",
                    "the ",
                    "--max-tokens",
                    20,
                    "--temperature",
                    0,
                    *argv,
                )
                == 0
            )
        return capsys.readouterr().out

    whole = out("--cache", "fp32")
    # By default the cache holds four full contexts.
    assert (
        out("--cache", "fp32", "--max-model-len", 64) == whole
        and 16 < made[0].pages * 16 // 4 < made[1].pages * 16 // 4 == 64
    )
    assert out("--cache", "6bit", "--kv-cache-memory", "50kB").startswith("the ")
    assert 40_000 < made[2].nbytes <= 50_000
    assert made[2].format == "6bit"
    # With a context of 8 tokens, the output ends early (finish_reason "length").
    assert whole.startswith(out("--cache", "fp32", "--max-model-len", 8).rstrip("\n"))
    assert (
        "it must fit in max_model_len 2; shorten it, or raise max_model_len (the model takes 64)"
        in refused(
            capsys, "generate", "--model", trained, "--prompt", "the cat", "--max-model-len", 2
        )
    )
    assert "max_model_len is 65; it must be" in refused(
        capsys, "generate", "--model", trained, "--prompt", "x", "--max-model-len", 65
    )
    assert "holds 0 tokens" in refused(
        capsys, "generate", "--model", trained, "--prompt", "x", "--kv-cache-memory", "10"
    )
    assert "unknown cache format '6bits', did you mean '6bit'?" in refused(
        capsys, "generate", "--model", trained, "--prompt", "x", "--cache", "6bits"
    )


def test_generate_refuses(trained, tmp_path, capsys):
    assert "does not look like a hub id" in refused(
        capsys, "generate", "--model", tmp_path / "none", "--prompt", "x"
    )
    assert "top_p is 2.0" in refused(
        capsys, "generate", "--model", trained, "--prompt", "x", "--top-p", 2
    )
    assert "temperature is nan" in refused(
        capsys, "generate", "--model", trained, "--prompt", "x", "--temperature", "nan"
    )
    assert "max_tokens is 0" in refused(
        capsys, "generate", "--model", trained, "--prompt", "x", "--max-tokens", 0
    )
    assert "stop string is empty" in refused(
        capsys, "generate", "--model", trained, "--prompt", "x", "--stop", ""
    )
    assert "it must fit in max_model_len 64; shorten it" in refused(
        capsys, "generate", "--model", trained, "--prompt", "zq " * 100
    )
    (tmp_path / "run").mkdir()
    shutil.copy(trained / "recipe.json", tmp_path / "run")
    assert "is a training run without a checkpoint yet" in refused(
        capsys, "generate", "--model", tmp_path / "run", "--prompt", "x"
    )
    shutil.copytree(
        checkpoint.latest(trained) / "model",
        tmp_path / "bare",
        ignore=shutil.ignore_patterns("token*"),
    )
    assert "no tokenizer at" in refused(
        capsys, "generate", "--model", tmp_path / "bare", "--prompt", "x"
    )


def test_the_device_is_passed_on(trained, tmp_path, capsys):
    argv = ["generate", "--model", trained, "--prompt", "the ", "--max-tokens", 4]
    assert run(*argv, "--device", "cpu") == 0
    assert "unknown device 'gpu'; known: auto, cpu, cuda, mps" in refused(
        capsys, *argv, "--device", "gpu"
    )
    assert "unknown device 'gpu'" in refused(capsys, "chat", trained, "--device", "gpu")
    (tmp_path / "text.txt").write_text("the cat sat on the mat.\n")
    evaluate = ["evaluate", trained, "--data", tmp_path / "text.txt"]
    assert run(*evaluate, "--device", "cpu") == 0
    assert "unknown device 'gpu'" in refused(capsys, *evaluate, "--device", "gpu")


@pytest.mark.parametrize("verb", ["generate", "chat", "serve", "evaluate", "quantize", "bench"])
def test_shared_options_have_the_same_help_in_every_verb(verb):
    def help_of(verb):
        actions = build_parser()._subparsers._group_actions[0].choices[verb]._actions
        words = {o: a.help for a in actions for o in a.option_strings}
        strip = re.compile(r" *([;(] ?default: .*| \[LAMOE_\w+\])$")
        return {o: strip.sub("", strip.sub("", w)) for o, w in words.items() if w}

    shared = ("--weights", "--head", "--cache", "--kv-cache-memory", "--threads", "--device")
    mine, serve = help_of(verb), help_of("serve")
    assert {o: mine[o] for o in shared if o in mine} == {o: serve[o] for o in shared if o in mine}
    assert {"--weights", "--head", "--threads"} <= set(mine)


def test_a_refused_prompt_is_not_echoed(trained, capsys):
    assert run("generate", "--model", trained, "--prompt", "zq " * 100) == 2
    assert capsys.readouterr().out == ""


# ---- evaluate ----
def test_evaluate_a_run(trained, tmp_path, capsys):
    out = tmp_path / "new" / "report"
    assert run("evaluate", trained, "--out", out) == 0
    said = capsys.readouterr().out
    assert "bits per byte" in said and "wrote " in said
    assert (out / "report.md").read_text() in said
    assert (out / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((out / "report.json").read_text())["training"]["steps"] == 40


def test_evaluate_reads_the_weights_once(trained, tmp_path):
    """`lamoe evaluate` reads the weights once. A second copy would double the memory it needs."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat.\n" * 4)
    with mock.patch.object(shards, "stream", wraps=shards.stream) as reads:
        assert run("evaluate", trained, "--data", tmp_path / "text.txt", "--seq-len", 16) == 0
    assert reads.call_count == 1


def test_evaluate_writes_into_the_run_and_works_without_matplotlib(
    trained, tmp_path, capsys, monkeypatch
):
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("evaluate", tmp_path / "run") == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.md").exists()
    assert not (tmp_path / "run" / "report.png").exists()


def test_evaluate_a_model_on_a_file(trained, tmp_path, capsys):
    shutil.copytree(checkpoint.latest(trained) / "model", tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat on the mat.\n" * 4)
    before = sorted(p.name for p in (tmp_path / "model").iterdir())
    assert (
        run("evaluate", tmp_path / "model", "--data", tmp_path / "text.txt", "--seq-len", 16) == 0
    )
    said = capsys.readouterr().out
    assert "| 96 |" in said and "Context 16 tokens" in said and "wrote" not in said
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == before
    assert "is not a run folder" in refused(capsys, "evaluate", tmp_path / "model")
    assert "does not exist" in refused(
        capsys, "evaluate", tmp_path / "model", "--data", tmp_path / "none.txt"
    )
    assert "context is 65 tokens" in refused(
        capsys, "evaluate", tmp_path / "model", "--data", tmp_path / "text.txt", "--seq-len", 65
    )
    assert "--seq-len needs --data" in refused(capsys, "evaluate", trained, "--seq-len", 16)


def test_evaluate_needles(trained, tmp_path, capsys, monkeypatch):
    shutil.copytree(checkpoint.latest(trained) / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": 256})
    )
    (tmp_path / "hay.txt").write_text("The cat sat on the mat. The dog ran up the hill! " * 20)
    out = tmp_path / "out"
    argv = [
        "evaluate",
        tmp_path / "model",
        "--needle",
        "100,256",
        "--needle-depths",
        3,
        "--needle-draws",
        2,
        "--data",
        tmp_path / "hay.txt",
    ]
    assert run(*argv, "--out", out) == 0
    said = capsys.readouterr()
    assert (out / "needle.md").read_text() in said.out
    assert "| depth | 100 tokens | 256 tokens |" in said.out
    assert "256 tokens: " in said.err
    assert (out / "needle.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not (out / "report.md").exists()
    result = json.loads((out / "needle.json").read_text())
    assert np.shape(result["found"]) == (3, 2) and result["depths"] == [0, 0.5, 1]
    # `evaluate` writes nothing into a model folder.
    assert run(*argv) == 0 and "wrote" not in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(*argv, "--out", tmp_path / "other") == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "other" / "needle.png").exists()
    with mock.patch(
        "lamoe.measure.report.read_documents",
        return_value=[mock.Mock(text="One sentence. Another one.")],
    ) as read:
        assert run(*argv[:3], "100", "--needle-draws", 1) == 0
    read.assert_called_once_with(["austen"])
    assert "haystack of 257 tokens" in refused(
        capsys, *argv[:3], "257", "--data", tmp_path / "hay.txt"
    )
    assert "too short for the needle" in refused(
        capsys, *argv[:3], "16", "--data", tmp_path / "hay.txt"
    )
    assert "--seq-len has no effect on the needle test" in refused(capsys, *argv, "--seq-len", 16)
    assert "the number of depths is 1" in refused(capsys, *argv[:3], "100", "--needle-depths", 1)
    with pytest.raises(SystemExit):
        run("evaluate", trained, "--needle", "many")
    assert "not a list of lengths" in capsys.readouterr().err


# ---- info ----
@pytest.mark.parametrize("name", PRESETS)
def test_info_of_presets(name, capsys):
    assert run("info", name) == 0
    table = capsys.readouterr().out
    assert run("info", name, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert name in table and f"{lamoe.accounting.parameters(PRESETS[name]).total:,}" in table
    assert str(lamoe.accounting.parameters(PRESETS[name]).total) in json.dumps(facts)


def test_info_of_folders_and_files(trained, capsys):
    folder = checkpoint.latest(trained)
    total = sum(p.numel() for p in lamoe.load(folder / "model").parameters())
    for name in (trained, folder, folder / "model", folder / "model" / "config.json"):
        assert (
            run(
                "info",
                name,
                "--memory",
                "16GB",
                "--context",
                32,
                "--weight-bits",
                4.5,
                "--cache-bits",
                16,
            )
            == 0
        )
        assert f"{total:,}" in capsys.readouterr().out


def test_info_refuses(tmp_path, capsys):
    assert "neither a preset, did you mean 'deepseek-v2-lite'" in refused(
        capsys, "info", "deepseekv2-lite"
    )
    assert "config.json" in refused(capsys, "info", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in refused(capsys, "info", tmp_path)
    refused(capsys, "info", "tiny", "--context", -1)
    refused(capsys, "info", "tiny", "--weight-bits", "nan")
    refused(capsys, "info", "tiny", "--memory=-16GB")


@pytest.mark.parametrize(
    "text, value",
    [
        ("16GB", 16 * 10**9),
        ("512 MiB", 512 << 20),
        ("1e9", 10**9),
        ("2.5k", 2500),
        ("7", 7),
        ("1TB", 10**12),
        ("1gib", 1 << 30),
    ],
)
def test_amounts_of_memory(text, value):
    assert settings.parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "16XB", "nan", "inf", "1e999", "12 GB 3", "0x10"])
def test_wrong_amounts_of_memory(text, capsys):
    with pytest.raises(SystemExit) as e:
        run("info", "tiny", f"--memory={text}")
    assert e.value.code == 2
    assert "is not an amount of memory; write it like 16GB" in capsys.readouterr().err


# ---- convert ----
def test_convert(trained, tmp_path, capsys):
    assert (
        run("convert", trained, tmp_path / "new", "--dtype", "bfloat16", "--max-shard-size", "50kB")
        == 0
    )
    assert f"wrote {tmp_path / 'new'}" in capsys.readouterr().out
    model = lamoe.load(tmp_path / "new")
    assert str(model.embed.weight.dtype) == "torch.bfloat16"
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    old = checkpoint.latest(trained) / "model"
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == (
        old / "tokenizer.json"
    ).read_bytes()
    assert all(
        (p.bfloat16() == q).all() for p, q in zip(lamoe.load(old).parameters(), model.parameters())
    )
    assert "not empty" in refused(capsys, "convert", trained, tmp_path / "new")
    assert run("convert", trained, tmp_path / "new", "--overwrite") == 0
    assert "max_shard_bytes is 0" in refused(
        capsys, "convert", trained, tmp_path / "other", "--max-shard-size", 0
    )
    assert not (tmp_path / "other").exists()


# ---- the program ----
def test_verbs_are_listed_and_required(capsys):
    for argv in ([], ["--help"], ["trian"]):
        with pytest.raises(SystemExit) as e:
            run(*argv)
        out, err = capsys.readouterr()
        assert e.value.code == (0 if argv == ["--help"] else 2)
        if argv == ["--help"]:
            assert all(verb in out for verb in ("train", "generate", "evaluate", "info", "convert"))
    with pytest.raises(SystemExit):
        run("info", "tiny", "--surprise")
    assert "unrecognized arguments: --surprise" in capsys.readouterr().err


def test_errors_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(models, "read_config", mock.Mock(side_effect=RuntimeError("first\nsecond")))
    assert refused(capsys, "info", "tiny") == "lamoe info: first second\n"
    monkeypatch.setenv("LAMOE_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        run("info", "tiny")
    monkeypatch.setattr(models, "read_config", mock.Mock(side_effect=KeyboardInterrupt))
    assert run("info", "tiny") == 130


def test_as_a_program():
    """Without torch, `lamoe` prints its version, sets its exit code and accepts a closed pipe."""
    lamoe_cli = [sys.executable, "-m", "lamoe"]
    done = subprocess.run([*lamoe_cli, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"lamoe {lamoe.__version__}\n", "")
    done = subprocess.run([*lamoe_cli, "info", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("lamoe info: 'nonsense' is neither")
    assert done.stderr.count("\n") == 1
    for flags in (["--json"], []):
        child = subprocess.Popen(
            [*lamoe_cli, "info", "deepseek-v2", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # With buffered output, only the last flush notices the closed pipe.
            env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
        )
        child.stdout.close()
        assert child.stderr.read() == "" and child.wait() == 1
    code = (
        "import sys, lamoe.cli; lamoe.cli.main(['info', 'tiny']); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_the_public_names_of_the_package():
    assert set(lamoe.__all__) >= {
        "load",
        "save",
        "generate",
        "SamplingParams",
        "ModelConfig",
        "Tokenizer",
        "Transformer",
        "accounting",
    }
    assert all(getattr(lamoe, name) is not None for name in lamoe.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lamoe.nothing
