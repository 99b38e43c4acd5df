"""Tests of an output head whose format differs from the other linears: bytes, results, metadata."""

import json
import re
from pathlib import Path

import pytest
import torch

import lamoe
from lamoe import backends, cli
from lamoe.backends.base import Formats
from lamoe.backends.cpu import calibrate, native, packed, packed_file
from lamoe.backends.cpu.backend import CpuBackend
from lamoe.checkpoints import hf
from lamoe.engine.llm import LLM
from lamoe.engine.sampler import SamplingParams
from lamoe.measure.random_weights import random_model
from lamoe.measure.timing import Bench
from lamoe.model.config import ModelConfig
from oracles import tiny
from tiny_packed import FAMILIES, contents, pack, source
from tiny_run import trained, write_texts  # noqa: F401 (trained is a fixture)

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled kernels are not there")
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
PAIRS = pytest.mark.parametrize(
    "weights, head",
    [("int4", "int8"), ("int4", "bf16"), ("int8", "fp32"), ("bf16", "int4"), ("fp32", "int8")],
)


def states_of(backend, ids, chunk, head=False):
    return [r.output for r in backend.run_sequence(ids, chunk, head=head)]


def head_of(model: Path) -> torch.Tensor:
    plain = lamoe.load(model)
    return plain.embed.weight if plain.config.tie_word_embeddings else plain.head.weight


def tokens(llm: LLM, family: str) -> list[list[int]]:
    return [
        o.token_ids
        for o in llm.generate(
            [tiny.ids(FAMILIES[family], n, seed=n).tolist() for n in (1, 5, 33)], GREEDY
        )
    ]


def change_config(folder: Path, **changes) -> None:
    """Replace entries of quantization_config in the config.json of a folder."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


# ---- stored bytes and results ----
@PAIRS
@pytest.mark.parametrize("family", ["mla q_lora", "gqa tied", "odd widths"])
def test_only_the_head_is_stored_in_its_format(tmp_path, family, weights, head):
    model = source(tmp_path / "model", family)
    pack(model, tmp_path / "plain", weights)
    pack(model, tmp_path / "out", weights, head=head)
    run, plain = packed_file.load(tmp_path / "out"), packed_file.load(tmp_path / "plain")
    w = head_of(model)
    assert (run.weights, run.head, plain.head) == (weights, head, weights)
    assert run.packed.keys() == plain.packed.keys()
    data, scale = native.pack(head, w)
    assert (
        torch.equal(run.packed["head"][0], data)
        and run.packed["head"][1] == [scale]
        and not torch.equal(data, plain.packed["head"][0])
    )
    assert all(
        torch.equal(run.packed[key][0], data)
        for key, (data, _) in plain.packed.items()
        if key != "head"
    )
    saved = native.mat_bytes(weights, *w.shape) - native.mat_bytes(head, *w.shape)
    assert run.weight_bytes() == plain.weight_bytes() - saved
    assert packed_file.bits_per_weight(tmp_path / "out") == pytest.approx(
        8 * run.weight_bytes() / lamoe.accounting.parameters(run.config).total
    )
    want = tokens(LLM(tmp_path / "out"), family)
    assert len({tuple(t) for t in want}) == 3
    # The weights are quantised while loading.
    for in_memory in (
        LLM(model, weights=weights, head=head),
        LLM(lamoe.load(model), weights=weights, head=head),
    ):
        assert tokens(in_memory, family) == want
        assert in_memory.plan().weights == run.weight_bytes()


@pytest.mark.parametrize("family", ["mla q_lora", "gqa tied", "odd widths"])
@pytest.mark.parametrize("head", ["int8", "int4", "bf16"])
def test_logits_keep_the_error_bound_of_the_head(tmp_path, family, head):
    """The error of the logits stays within the bound of the head's format (see native.py).

    Everything but the head is float32, so all of the error comes from the head. The most likely
    token is the same wherever it leads by more than the bound.
    """
    model = source(tmp_path / "model", family)
    w, ids, k = head_of(model), tiny.ids(FAMILIES[family], 60, seed=3), FAMILIES[family].hidden_size
    stored = native.unpack(head, *native.pack(head, w)[:1], *w.shape, native.pack(head, w)[1])
    cpu = CpuBackend.from_transformer(lamoe.load(model), Formats("fp32", head))
    got = torch.cat(states_of(cpu, ids.tolist(), 32, head=True))
    plain = backends.load(lamoe.load(model), backend="torch")
    states = torch.cat(states_of(plain, ids.tolist(), 60))
    want = states @ stored.T
    padded = torch.nn.functional.pad(states, (0, -k % 64)).unflatten(-1, (-1, 64))
    input_error = (
        (padded.abs().amax(-1, keepdim=True) / 254).expand_as(padded).flatten(1)[:, :k]
        if head != "bf16"
        else states.abs() / 256
    )
    # The second term allows for float32 sums in a different order.
    bound = (input_error + 1e-4 * states.abs()) @ stored.abs().T
    assert ((got - want).abs() <= bound).all()
    best = want.topk(2).values
    sure = best[:, 0] - best[:, 1] > 2 * bound.amax(-1)
    assert sure.sum() >= 5 and torch.equal(got.argmax(-1)[sure], want.argmax(-1)[sure])
    # The bound is tight enough to detect 4-bit rounding of the weights.
    assert head != "int4" or not ((got - states @ w.T).abs() <= bound).all()


def test_bytes_of_the_head_class():
    c = ModelConfig.preset("deepseek-v2-lite")
    for weights, head, bits in (("int4", "int8", 8.5), ("int4", "bf16", 16), ("int8", "int4", 4.5)):
        done = list(packed.packed_tensors(c, Formats(weights, head)))
        found = packed.weight_classes(c, Formats(weights, head), done)
        assert (
            found["head"].formats == (head,)
            and 8 * found["head"].num_bytes
            == bits * found["head"].num_weights
            == bits * 102400 * 2048
        )
        assert found["experts"].formats == found["attention"].formats == (weights,)
        with pytest.raises(
            ValueError, match=f"head should be stored as {weights}, but came out as {head}"
        ):
            packed.weight_classes(c, Formats(weights), done)
    assert [p.format for p in packed.packed_tensors(c, Formats("int4"))] == [
        p.format for p in packed.packed_tensors(c, Formats("int4", "int4"))
    ]


def test_bench_on_random_weights():
    c = FAMILIES["mla"]
    one, other = random_model(c, Formats("int4"), 1), random_model(c, Formats("int4", "int8"), 1)
    assert (one.head, other.head) == ("int4", "int8") and one.tensor_bytes() | {
        "head": native.mat_bytes("int8", c.vocab_size, c.hidden_size)
    } == other.tensor_bytes()
    runs = [Bench(m, "bf16", 40) for m in (one, other)]
    line = runs[0].line("", 1, 16)
    assert (
        runs[1].bytes(line, torch.empty(0)) - runs[0].bytes(line, torch.empty(0))
        == other.tensor_bytes()["head"] - one.tensor_bytes()["head"]
    )
    assert runs[1].run(line, experts=True).shape == (len(c.moe_layers), 1, c.num_experts_per_tok)


# ---- head format in the config of a folder ----
def test_an_interrupted_folder_continues_with_its_own_head_format_only(tmp_path):
    model = source(tmp_path / "model", "mla")
    for started, others in (("int8", (None, "int4", "bf16")), (None, ("int8",))):
        target = tmp_path / f"out {started}"
        next(packed_file.write(model, target, Formats("int4", started)))
        before = contents(target)
        for other in others:
            with pytest.raises(
                ValueError,
                match=f"no unfinished copy of this packed model.*head was {started or 'int4'}, is "
                f"{other or 'int4'}",
            ):
                pack(model, target, head=other)
            assert contents(target) == before
        pack(model, target, head=started or "int4")  # "int4" is the default
        pack(model, tmp_path / f"straight {started}", head=started)
        assert contents(target) == contents(tmp_path / f"straight {started}")
        # A finished folder is refused too.
        with pytest.raises(ValueError, match="head was"):
            pack(model, target, head=others[-1])


def test_a_folder_whose_config_has_no_head_format(tmp_path):
    model = source(tmp_path / "model", "mla")
    pack(model, tmp_path / "whole")
    want = tokens(LLM(tmp_path / "whole"), "mla")
    next(packed_file.write(model, tmp_path / "started", Formats("int4")))
    for folder in (tmp_path / "whole", tmp_path / "started"):
        config = json.loads((folder / "config.json").read_text())
        assert config["quantization_config"].pop("head") == "int4"
        (folder / "config.json").write_text(json.dumps(config))
    assert (
        tokens(LLM(tmp_path / "whole"), "mla") == want
        and packed_file.load(tmp_path / "whole").head == "int4"
    )
    with pytest.raises(ValueError, match="head was int4, is int8"):
        pack(model, tmp_path / "started", head="int8")
    pack(model, tmp_path / "started")
    assert tokens(LLM(tmp_path / "started"), "mla") == want


def test_invalid_head_formats_are_refused(tmp_path):
    model = source(tmp_path / "model", "mla")
    for call in (
        lambda: pack(model, tmp_path / "new", head="int3"),
        lambda: LLM(model, weights="int4", head="int3"),
        lambda: LLM(lamoe.load(model), head="int3"),
        lambda: random_model(FAMILIES["mla"], Formats("int4", "int3"), 1),
    ):
        with pytest.raises(
            ValueError,
            match="unknown format 'int3' of the output head; known: fp32, bf16, int8, int4",
        ):
            call()
    assert not (tmp_path / "new").exists()
    pack(model, tmp_path / "out", head="int8")
    with pytest.raises(
        ValueError, match="head is int4, but the model is packed with its output head as int8"
    ):
        LLM(tmp_path / "out", head="int4")
    assert LLM(tmp_path / "out", head="int8").backend.head == "int8"
    with pytest.raises(ValueError, match="which backend='torch' excludes"):
        LLM(model, head="int8", backend="torch")
    for head, why in (
        ("int3", "says head 'int3'"),
        (["int8"], r"says head \['int8'\]"),
        ("int4", "'head' missing, extra or of another size"),
    ):
        change_config(tmp_path / "out", head=head)
        with pytest.raises(ValueError, match=why):
            packed_file.load(tmp_path / "out")


# ---- calibration and commands ----
@pytest.mark.parametrize("family", ["mla", "gqa tied"])
def test_calibration_leaves_an_8_bit_head_alone(tmp_path, family):
    model, c, walked = source(tmp_path / "model", family), FAMILIES[family], []

    def calibrated(target: str, weights: str, head: str | None) -> dict[str, bytes]:
        walked.clear()
        pack(
            model,
            tmp_path / target,
            weights,
            head=head,
            **calibrate.options(model, hf.read_config(model), tiny.ids(c, 4, 40), walked.append),
        )
        return {
            key: data.numpy().tobytes()
            for key, (data, _) in packed_file.load(tmp_path / target).packed.items()
        }

    all_int4 = calibrated("all", "int4", None)
    assert walked == list(range(c.num_hidden_layers + 1))
    int8_head = calibrated("int8 head", "int4", "int8")
    # Calibration did not compute moments for the head.
    assert walked == list(range(c.num_hidden_layers))
    assert {k for k in all_int4 if all_int4[k] != int8_head[k]} == {"head"}
    assert int8_head["head"] == native.pack("int8", head_of(model))[0].numpy().tobytes()
    head_only = calibrated("head only", "int8", "int4")
    assert (
        head_only["head"]
        == all_int4["head"]
        != native.pack("int4", head_of(model))[0].numpy().tobytes()
    )


def test_commands_on_a_folder_with_its_own_head_format(trained, tmp_path, capsys):
    texts = write_texts(tmp_path / "texts", files=6, seed=3)
    run = lambda *argv: cli.main([str(a) for a in argv])
    for target, words in (
        ("plain", ()),
        ("calibrated", ("--calibrate", texts, "--calibrate-tokens", 512)),
    ):
        assert (
            run(
                "quantize",
                trained,
                tmp_path / target,
                "--weights",
                "int4",
                "--head",
                "int8",
                *words,
            )
            == 0
        )
        table = capsys.readouterr().out
        assert re.search(r"\nhead +[\d,]+ +[\d,]+ +\d+\.\d\d  int8\n", table) and re.search(
            r"\nexperts +[\d,]+ +[\d,]+ +\d+\.\d\d  int4\n", table
        )
        assert packed_file.load(tmp_path / target).head == "int8"
    assert run("quantize", trained, tmp_path / "plain", "--weights", "int4") == 2
    assert "head was int8, is int4" in capsys.readouterr().err
    assert (
        run(
            "quantize",
            trained,
            tmp_path / "eight",
            "--weights",
            "int8",
            "--head",
            "int8",
            "--calibrate",
            texts,
        )
        == 2
    )
    assert "--calibrate concerns int4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("quantize", trained, tmp_path / "new", "--head", "int3")
    assert "invalid choice: 'int3'" in capsys.readouterr().err and not (tmp_path / "new").exists()
    losses = []
    for words in (
        (trained, "--weights", "int4", "--head", "int8"),
        (tmp_path / "plain",),
        (trained, "--weights", "int4"),
    ):
        assert (
            run("evaluate", *words, "--data", texts, "--seq-len", 32, "--out", tmp_path / "report")
            == 0
        )
        losses.append(json.loads((tmp_path / "report" / "report.json").read_text())["heldout"])
    assert losses[0] == losses[1] != losses[2]
    capsys.readouterr()
    outputs = []
    for words in ((trained, "--weights", "int4", "--head", "int8"), (tmp_path / "plain",)):
        assert (
            run(
                "generate",
                "--model",
                *words,
                "--prompt",
                "the ",
                "--max-tokens",
                12,
                "--temperature",
                0,
            )
            == 0
        )
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and outputs[0].startswith("the ") and len(outputs[0]) > 8
    assert run("generate", "--model", tmp_path / "plain", "--head", "int4", "--prompt", "the ") == 2
    assert "head" in capsys.readouterr().err
