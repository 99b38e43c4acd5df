"""Tests of reports: every figure against its definition, and the Markdown and PNG files."""

import gzip
import json
import lzma
import math
import shutil

import numpy as np
import pytest
import torch

import lamoe
from lamoe import backends
from lamoe.engine.text_loss import text_loss
from lamoe.measure import plots, report, tables
from lamoe.model.config import ModelConfig
from lamoe.text.tokenizer import Tokenizer
from lamoe.train import checkpoint
from lamoe.train.data import open_corpus
from tiny_run import BODY, metrics, raw_recipe, train, trained, write_texts  # noqa: F401 (trained is a fixture)

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def spoken(trained):
    folder = checkpoint.latest(trained) / "model"
    return backends.load(folder, backend="torch"), Tokenizer.load(folder)


@pytest.fixture(scope="module")
def result(trained, spoken):
    return report.evaluate_run(*spoken, trained)


def test_held_out_figures(trained, spoken, result):
    """Held-out figures of the model and of the compressors refer to the same held-out text."""
    texts = trained.parent / "texts"
    names = [
        json.loads(line)["name"]
        for line in (trained / "data" / "heldout.jsonl").read_text().splitlines()
    ]
    raw = "".join((texts / n).read_text() for n in names).encode()
    (h,) = result["heldout"]
    assert h["source"] == str(texts)
    assert h["bytes"] == len(raw) == open_corpus(trained / "data").heldout_bytes()
    assert h["gzip"] == 8 * len(gzip.compress(raw, 9)) / len(raw)
    assert h["xz"] == 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)
    assert h["uniform"] == pytest.approx(math.log2(300) * h["tokens"] / len(raw))
    last = metrics(trained)[-1]
    assert h["model"] == pytest.approx(last["heldout_bits_per_byte"], rel=1e-5)
    assert h["perplexity"] == pytest.approx(last["heldout_perplexity"], rel=1e-5)
    assert h["model"] < h["uniform"]


def test_sizes_speed_and_training_figures(trained, spoken, result):
    model = spoken[0].model
    assert result["parameters"] == sum(p.numel() for p in model.parameters()) > result["activated"]
    width, layers = 16 + 8, 2
    cache = dict(result["cache"])
    assert (cache.pop("attention"), cache.pop("this model")) == ("MLA", 2 * width * layers)
    assert cache["MHA"] == 2 * 2 * 2 * 8 * layers
    assert cache["MQA"] == 2 * 2 * 8 * layers
    assert cache["expanded K, V"] == 2 * 2 * (16 + 8) * layers
    assert result["moe_layers"] == [1] and np.sum(result["expert_load"], 1) == pytest.approx([1.0])
    g, t = result["generation"], result["training"]
    assert 1 < g["tokens_per_s"] < 1e6
    assert g["dtype"] == "float32"
    assert g["threads"] == torch.get_num_threads()
    assert (t["steps"], t["tokens"], t["dtype"]) == (40, 40 * 4 * 32, "float32")
    assert t["router"].keys() >= {"drop_rate", "router_entropy"}
    steps = [m for m in metrics(trained) if "loss" in m]
    assert t["curve"] == [[m["step"], m["loss"], m["lr"]] for m in steps]
    assert t["epochs"] == steps[-1]["epoch"]
    assert [s for s, _ in t["heldout_curve"]] == [20, 40]
    assert t["heldout_curve"][1][1] == pytest.approx(
        math.log(result["heldout"][0]["perplexity"]), rel=1e-5
    )
    assert json.loads(json.dumps(result)) == result


def test_the_markdown_shows_the_measured_figures(result):
    text = tables.report(result, "a name")
    h = result["heldout"][0]
    assert text.startswith("# a name\n")
    assert (
        f"| **{h['model']:.3f}** | {h['xz']:.3f} | {h['gzip']:.3f} | {h['uniform']:.3f} |" in text
    )
    assert "| **96** | 128 (75%) |" in text and "this model (MLA)" in text
    load = result["expert_load"][0]
    assert f"| 1 | {8 * min(load):.2f} | {8 * max(load):.2f} |" in text
    assert "Training: 40 steps, 5,120 tokens" in text and "drop rate" in text and "nan" not in text


def test_png(result, tmp_path):
    plots.report(result, "a name", tmp_path / "r.png")
    data = (tmp_path / "r.png").read_bytes()
    assert data[:8] == PNG and int.from_bytes(data[16:20]) > 1000 and len(data) > 20_000


@pytest.mark.parametrize("heads, name", [(2, "MHA"), (1, "MQA")])
def test_a_dense_model_on_any_text(spoken, tmp_path, heads, name):
    """A model without experts and training metrics gets a report without those sections."""
    _, tok = spoken
    config = ModelConfig(model_type="llama", **BODY, num_key_value_heads=heads)
    model = backends.load(lamoe.Transformer(config).init_weights(), backend="torch")
    (tmp_path / "a.txt").write_text("the cat sat\n" * 30)
    (tmp_path / "empty.txt").write_text("")
    r = report.evaluate_texts(model, tok, [str(tmp_path)], 16)
    assert r["cache"]["attention"] == name
    assert r["expert_load"] == []
    assert "training" not in r
    assert r["context"] == 16
    text = tables.report(r, "x")
    assert "Expert load" not in text and "Training" not in text
    plots.report(r, "x", tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes()[:8] == PNG


def test_texts_are_measured_exactly(spoken, tmp_path):
    """Every token after BOS is a target exactly once, also in documents longer than a row."""
    model, tok = spoken
    (tmp_path / "a.txt").write_text("the cat sat on the mat.\n")
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"text": "the dog ran on the hill " * 40})
        + "\n"
        + json.dumps({"text": "x"})
        + "\n"
    )
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    a, b = report.evaluate_texts(model, tok, sources)["heldout"]
    ids = torch.tensor([tok.encode("the cat sat on the mat.\n", bos=True)])
    with torch.no_grad():
        nll = -model.model(ids[:, :-1]).log_softmax(-1)[0].gather(-1, ids[0, 1:, None]).sum().item()
    assert a["bytes"] == 24
    assert a["tokens"] == ids.shape[1] - 1
    assert a["model"] == pytest.approx(nll / math.log(2) / 24, rel=1e-5)
    assert b["tokens"] == len(tok.encode("the dog ran on the hill " * 40)) + len(tok.encode("x"))
    assert b["bytes"] == 24 * 40 + 1
    short = report.evaluate_texts(model, tok, sources[1:], 8)["heldout"][0]
    # shorter rows have the same targets with less context
    assert short["tokens"] == b["tokens"] and short["model"] != b["model"]


def test_bad_requests(spoken, tmp_path):
    model, tok = spoken
    (tmp_path / "a.txt").write_text("text\n")
    for length in (0, -3, 65):
        with pytest.raises(
            ValueError, match=f"the context is {length} tokens; it must be from 1 to the model's 64"
        ):
            report.evaluate_texts(model, tok, [str(tmp_path / "a.txt")], length)
    with pytest.raises(ValueError, match="does not exist"):
        report.evaluate_texts(model, tok, [str(tmp_path / "none.txt")])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "e.txt").write_text("")
    with pytest.raises(ValueError):
        report.evaluate_texts(model, tok, [str(tmp_path / "empty")])


def test_skipped_and_repeated_steps_are_not_in_the_training_figures(tmp_path):
    def line(step: int, **values) -> dict:
        common = dict(loss=2.0, lr=0.1, tokens=step * 10, epoch=0.5, tokens_per_s=5.0, mfu=0.5)
        return {"step": step, **common, **values}

    lines = [line(1), line(2, loss=9.0), line(3, loss=None, skipped="loss nan")]
    lines += [{"step": 3, "restart_from": 1, "reason": "loss nan"}, line(2), line(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    result = report._training(tmp_path, {"run": {"dtype": "float32"}})
    assert result["curve"] == [[1, 2.0, 0.1], [2, 2.0, 0.1], [3, 2.0, 0.1]]
    assert result["tokens"] == 30


def test_a_model_with_a_smaller_vocabulary_is_refused(trained, spoken, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    config = ModelConfig(model_type="llama", **{**BODY, "vocab_size": 100})
    small = backends.load(lamoe.Transformer(config).init_weights(), backend="torch")
    with pytest.raises(ValueError, match="was packed with 300 tokens, the model has 100"):
        report.evaluate_run(small, spoken[1], tmp_path / "run")


def test_a_context_of_a_few_tokens(spoken):
    """Speed is measured even if the context is too short for a warm-up."""
    for context in (3, 5, 12):
        model = lamoe.Transformer(
            ModelConfig(model_type="llama", **{**BODY, "max_position_embeddings": context})
        ).init_weights()
        assert report._speed(model, spoken[1], context)["tokens_per_s"] > 0


def test_several_sources_and_layers(tmp_path):
    """Expert loads of several sources are averaged, weighted by tokens. Layers keep their index."""
    a, b = write_texts(tmp_path / "a"), write_texts(tmp_path / "b", 20, seed=1)
    train(
        raw_recipe(
            a,
            tmp_path / "run",
            data=dict(sources=[str(a), str(b)]),
            model=dict(num_hidden_layers=4, first_k_dense_replace=2),
            run=dict(steps=2),
        )
    )
    folder = checkpoint.latest(tmp_path / "run") / "model"
    r = report.evaluate_run(
        backends.load(folder, backend="torch"), Tokenizer.load(folder), tmp_path / "run"
    )
    assert [h["source"] for h in r["heldout"]] == [str(a), str(b)] and r["moe_layers"] == [2, 3]
    from lamoe.train.data import heldout_rows

    corpus = open_corpus(tmp_path / "run" / "data")
    parts = [
        text_loss(backends.load(folder, backend="torch"), heldout_rows(corpus, 32, s))
        for s in (str(a), str(b))
    ]
    want = sum(p.load * p.targets for p in parts) / sum(p.targets for p in parts)
    assert np.allclose(r["expert_load"], want) and parts[0].targets != parts[1].targets
    text = tables.report(r, "x")
    assert "\n| 2 | " in text and "\n| 3 | " in text
