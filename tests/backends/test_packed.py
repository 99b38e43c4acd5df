"""Tests of packed models: equal tokens from folder and memory, bytes per class, writing, commands.

test_packed_hostile.py tests damaged and hostile files.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import lamoe
from lamoe import cli
from lamoe.backends.base import Formats
from lamoe.backends.cpu import native, packed, packed_file
from lamoe.backends.cpu.backend import CpuBackend
from lamoe.backends.torch_backend import TorchBackend
from lamoe.checkpoints import hf, lock
from lamoe.engine.llm import LLM
from lamoe.engine.sampler import SamplingParams
from lamoe.engine.text_loss import text_loss
from lamoe.model import accounting
from lamoe.model.config import ModelConfig
from oracles import tiny
from tiny_packed import FAMILIES, SMALL, contents, pack, source
from tiny_run import trained, write_texts  # noqa: F401 (trained is a fixture)

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled kernels are not there")
EVERY = pytest.mark.parametrize("family", FAMILIES)
WEIGHTS = pytest.mark.parametrize("weights", native.FORMATS)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def prompts(family: str) -> list[list[int]]:
    return [tiny.ids(FAMILIES[family], n, seed=n).tolist() for n in (1, 5, 33)]


def tokens(llm: LLM, family: str) -> list[list[int]]:
    return [o.token_ids for o in llm.generate(prompts(family), GREEDY)]


# ---- equality with the model in memory ----
@EVERY
@WEIGHTS
def test_a_folder_gives_the_tokens_of_the_model_packed_in_memory(tmp_path, family, weights):
    model = source(tmp_path / "model", family)
    pack(model, tmp_path / "packed", weights)
    want = tokens(LLM(lamoe.load(model), weights=weights), family)
    assert len({tuple(t) for t in want}) == 3
    assert tokens(LLM(tmp_path / "packed"), family) == want
    # The weights are quantised while loading.
    assert tokens(LLM(model, weights=weights), family) == want
    if weights == "fp32":
        assert tokens(LLM(model, backend="torch"), family) == want


@EVERY
def test_logits_are_those_of_the_rounded_weights(tmp_path, family):
    """Logits equal those of torch on the unpacked weights, up to rounded activations."""
    model = source(tmp_path / "model", family)
    pack(model, tmp_path / "packed", "int8")
    plain, run = lamoe.load(model), packed_file.load(tmp_path / "packed")
    places = hf.views(plain.config, dict(plain.named_parameters()))
    with torch.no_grad():
        for name, w in places.items():
            if w.dim() == 2 and "embed" not in name and ".gate." not in name and "kv_b" not in name:
                data, scale = native.pack("int8", w)
                w.copy_(native.unpack("int8", data, *w.shape, scale))
        ids = prompts(family)[-1]
        want = plain.logits(plain.hidden(torch.tensor([ids])))[0]
    got = torch.cat([r.output for r in run.run_sequence(ids, 8)])
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    # 8-bit activations and bf16 attention route a few tokens to other experts. A wrong matrix
    # would give an error of about 1.
    assert error.median() < 0.09


def test_tokens_do_not_depend_on_the_instruction_set(tmp_path):
    jobs = []
    for family, weights in itertools.product(["mla q_lora", "gqa tied"], ["bf16", "int8", "int4"]):
        folder = tmp_path / f"{family} {weights}"
        pack(source(tmp_path / f"{family} {weights} model", family), folder, weights)
        jobs.append([str(folder), prompts(family)])
    # The instruction set is chosen once in a process, so each needs a process of its own.
    code = (
        "import sys, json\n"
        "from lamoe import LLM, SamplingParams\n"
        "params = SamplingParams(temperature=0.0, max_tokens=12)\n"
        "for folder, prompts in json.loads(sys.argv[1]):\n"
        "    llm = LLM(folder, threads=1)\n"
        "    print([o.token_ids for o in llm.generate(prompts, params)])"
    )
    isas = native.lib.features().split(", ")
    assert isas
    outputs = {}
    for isa in isas:
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(jobs)],
            env={**os.environ, "LAMOE_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs[isa] = done.stdout.splitlines()
        assert len(outputs[isa]) == len(jobs)
    for n, (folder, _) in enumerate(jobs):
        assert len({lines[n] for lines in outputs.values()}) == 1, (folder, outputs)


# ---- bytes ----
@EVERY
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_every_class_is_quantised(family, weights):
    """Every class of weights is quantised. None, such as fused experts, silently stays at 16 bits.

    The bytes of all classes add up to the model.
    """
    c = FAMILIES[family]
    found = packed.weight_classes(c, Formats(weights), packed.packed_tensors(c, Formats(weights)))
    p = accounting.parameters(c)
    kv_b = (
        c.num_hidden_layers
        * c.num_attention_heads
        * (c.qk_nope_head_dim + c.v_head_dim)
        * c.kv_lora_rank
        if c.is_mla
        else 0
    )
    assert (
        found["head"].num_weights == p.head_active
        and found.get("experts", (0,))[0] == p.routed_experts
        and found.get("dense ffn", (0,))[0] == p.dense_ffn
    )
    assert (
        found.get("shared experts", (0,))[0] == p.shared_experts
        and found.get("kv_b", (0,))[0] == kv_b
        and found["embedding"].num_weights == p.embedding
    )
    assert sum(x.num_weights for x in found.values()) == p.total + (p.head_active - p.head)
    for kind in ("experts", "shared experts", "dense ffn", "attention", "head", "kv_b"):
        if kind in found:
            assert found[kind].formats == (("int8" if kind == "kv_b" else weights),)


def test_bits_per_weight_of_v2_lite():
    """V2-Lite has exactly the stated bits per weight, because its widths need no padding."""
    c = ModelConfig.preset("deepseek-v2-lite")
    for weights, bits in (("int4", 4.5), ("int8", 8.5)):
        found = packed.weight_classes(
            c, Formats(weights), packed.packed_tensors(c, Formats(weights))
        )
        for kind in ("experts", "shared experts", "dense ffn", "head", "attention"):
            assert 8 * found[kind].num_bytes == bits * found[kind].num_weights, kind
        assert 8 * found["kv_b"].num_bytes == 8.5 * found["kv_b"].num_weights


@pytest.mark.parametrize(
    "kind", ["experts", "shared experts", "dense ffn", "attention", "head", "kv_b"]
)
def test_a_class_without_tensors_or_in_another_format_is_an_error(kind):
    c = FAMILIES["mla q_lora"]
    tensors = list(packed.packed_tensors(c, Formats("int4")))
    with pytest.raises(ValueError, match=f"{kind} should be .* matched no tensor"):
        packed.weight_classes(c, Formats("int4"), [p for p in tensors if p.weight_class(c) != kind])
    changed = [p._replace(format="bf16") if p.weight_class(c) == kind else p for p in tensors]
    with pytest.raises(ValueError, match=f"{kind} should be .* came out as .*bf16"):
        packed.weight_classes(c, Formats("int4"), changed)


@EVERY
@WEIGHTS
def test_files_are_valid_aligned_safetensors(tmp_path, family, weights):
    pack(source(tmp_path / "model", family), tmp_path / "packed", weights)
    c, seen = FAMILIES[family], {}
    for path in sorted((tmp_path / "packed").glob("*.safetensors")):
        start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8:start])
        with safe_open(path, framework="pt") as f:  # the safetensors library can read the file
            for name in f.keys():
                t = f.get_tensor(name)
                seen[name] = t
                if not name.endswith(".scale"):
                    assert (
                        start + header[name]["data_offsets"][0]
                    ) % 64 == 0 and t.dtype == torch.uint8
    for p in packed.packed_tensors(c, Formats(weights)):
        size = packed.packed_bytes(p, packed.element_format(Formats(weights)))
        assert seen[p.key].numel() == size + -size % 64 and seen[f"{p.key}.scale"].shape == (
            p.num_matrices,
        )
    run = packed_file.load(tmp_path / "packed")
    memory = CpuBackend.from_transformer(lamoe.load(tmp_path / "model"), Formats(weights))
    for key, (data, scales) in run.packed.items():
        assert torch.equal(data, memory.packed[key][0]) and scales == memory.packed[key][1]
    assert sum(run.tensor_bytes().values()) * 8 / accounting.parameters(c).total == pytest.approx(
        packed_file.bits_per_weight(tmp_path / "packed")
    )
    assert hf.read_config(tmp_path / "model") == run.config


def test_loaded_weights_are_mapped_pages_of_the_files(tmp_path):
    """Loaded weights are memory-mapped. Pages have no private copies, so processes share them."""
    pack(source(tmp_path / "model", "lite widths"), tmp_path / "packed")
    llm = LLM(tmp_path / "packed")
    tokens(llm, "lite widths")
    maps = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    mapped = [m for m in maps if str(tmp_path / "packed") in m]
    assert len(mapped) == len(list((tmp_path / "packed").glob("*.safetensors")))
    for m in mapped:
        assert "Private_Dirty:         0 kB" in m and "Anonymous:             0 kB" in m
    assert any(int(re.search(r"\nRss: +(\d+)", m)[1]) > 0 for m in mapped)


# ---- writing ----
def test_an_interrupted_writer_continues(tmp_path):
    model = source(tmp_path / "model", "mla q_lora")
    pack(model, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    total = len(list(packed.packed_tensors(FAMILIES["mla q_lora"], Formats("int4"))))
    for stop in range(0, total, 3):
        target = tmp_path / f"cut{stop}"
        writer = packed_file.write(model, target, Formats("int4"))
        for _ in range(stop + 1):
            next(writer)
        writer.close()
        done = {p.name: p.stat().st_mtime_ns for p in target.glob("packed-*")}
        with pytest.raises(ValueError, match="incomplete"):
            packed_file.load(target)
        assert len(pack(model, target)) == total
        assert contents(target) == whole
        # Files that were complete before have not been written again.
        assert all((target / name).stat().st_mtime_ns == at for name, at in done.items())


def test_quantize_continues_after_kill_9(tmp_path):
    c = tiny.config(
        hidden_size=256,
        num_hidden_layers=6,
        intermediate_size=512,
        moe_intermediate_size=128,
        n_routed_experts=24,
        **SMALL,
    )
    lamoe.save(tiny.model(c, dtype=torch.bfloat16), tmp_path / "model")
    words = [
        sys.executable,
        "-m",
        "lamoe",
        "quantize",
        tmp_path / "model",
        tmp_path / "out",
        "--threads",
        "1",
    ]
    victim = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "packed-00002.safetensors").exists():
        assert victim.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    left = sorted(p.name for p in (tmp_path / "out").glob("packed-*"))
    assert 0 < len(left) < 7
    with pytest.raises(ValueError, match="incomplete"):
        LLM(tmp_path / "out")
    table = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert re.search(r"experts +11,796,480 .* int4", table), table
    packed_file.load(tmp_path / "out")
    pack(tmp_path / "model", tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_folder_of_another_source_or_format_is_not_overwritten(tmp_path):
    model, other = source(tmp_path / "model", "mla"), source(tmp_path / "other", "mla", seed=1)
    target = tmp_path / "out"
    next(packed_file.write(model, target, Formats("int4")))
    for again, weights, options, why in (
        (model, "int8", {}, "weights was int4, is int8"),
        (other, "int4", {}, "source was"),
        (model, "int4", {"calibration": "x"}, "calibration was None, is x"),
    ):
        before = contents(target)
        with pytest.raises(ValueError, match=f"no unfinished copy of this packed model.*{why}"):
            pack(again, target, weights, **options)
        assert contents(target) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="thesis.txt"):
        pack(model, tmp_path / "full")
    with pytest.raises(ValueError, match="is a file"):
        pack(model, tmp_path / "full" / "thesis.txt")
    pack(model, tmp_path / "fine")
    with pytest.raises(ValueError, match="is a packed model already"):
        pack(tmp_path / "fine", tmp_path / "twice")
    with pytest.raises(ValueError, match="unknown weight format 'int3'"):
        pack(model, tmp_path / "three", "int3")


def test_a_second_writer_is_refused(tmp_path):
    model = source(tmp_path / "model", "mla")
    first = packed_file.write(model, tmp_path / "out", Formats("int4"))
    next(first)
    with pytest.raises(ValueError, match="another process is writing"):
        pack(model, tmp_path / "out")
    assert (
        len(list(first)) == len(list(packed.packed_tensors(FAMILIES["mla"], Formats("int4")))) - 1
    )
    packed_file.load(tmp_path / "out")


def test_a_complete_file_that_was_damaged_later_is_refused(tmp_path):
    model = source(tmp_path / "model", "mla")
    pack(model, tmp_path / "out")
    whole, file = contents(tmp_path / "out"), tmp_path / "out" / "packed-00002.safetensors"
    for broken in (
        b"",
        file.read_bytes()[:-1],
        (tmp_path / "out" / "packed-00001.safetensors").read_bytes(),
    ):
        file.write_bytes(broken)
        with pytest.raises(
            ValueError, match="packed-00002.*Delete this file; complete files are kept"
        ):
            pack(model, tmp_path / "out")
        file.unlink()
        pack(model, tmp_path / "out")
        assert contents(tmp_path / "out") == whole


def test_a_writer_does_not_damage_a_file_that_another_one_just_finished(tmp_path, monkeypatch):
    """A writer does not damage a file that another writer has just finished.

    The other writer finishes and renames the file after this writer has opened it.
    """
    model, real = source(tmp_path / "model", "mla"), lock.try_lock

    def finish_other_writer_first(f):
        monkeypatch.setattr(lock, "try_lock", real)
        pack(model, tmp_path / "out")
        return real(f)

    monkeypatch.setattr(lock, "try_lock", finish_other_writer_first)
    with pytest.raises(ValueError, match="another process was writing"):
        pack(model, tmp_path / "out")
    packed_file.load(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("packed-*"))) == FAMILIES["mla"].num_hidden_layers + 1


def test_without_compiled_kernels_packing_is_refused_and_sizes_are_known(tmp_path, monkeypatch):
    model = source(tmp_path / "model", "odd widths")
    pack(model, tmp_path / "out")
    sizes = [
        (fmt, n, k)
        for fmt in native.FORMATS
        for n in (1, 15, 16, 17, 100)
        for k in (1, 2, 3, 63, 64, 65, 1408)
    ]
    want = [native.lib.mat_bytes(native.FORMATS[fmt], n, k) for fmt, n, k in sizes]
    bits = packed_file.bits_per_weight(tmp_path / "out")
    monkeypatch.setattr(native, "lib", None)
    monkeypatch.setattr(native, "_why", "no compiler")
    assert [native.mat_bytes(*s) for s in sizes] == want
    assert packed_file.bits_per_weight(tmp_path / "out") == bits  # as `lamoe info` shows
    with pytest.raises(
        ValueError,
        match=r"packing needs the compiled kernels, which could not be imported \(no compiler\)",
    ):
        pack(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="packing needs the compiled kernels"):
        native.pack("int4", torch.zeros(2, 2))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    m = tiny.model(FAMILIES["mla"], dtype=torch.float32)
    with torch.no_grad():
        m.layers[1].ffn.experts.w2[3, 0, 0] = float("nan")
    lamoe.save(m, tmp_path / "model")
    with pytest.raises(ValueError, match="not finite"):
        pack(tmp_path / "model", tmp_path / "out")


# ---- loading ----
def test_a_packed_model_runs_in_its_own_format_only(tmp_path, monkeypatch):
    pack(source(tmp_path / "model", "mla"), tmp_path / "out")
    for options in (dict(weights="int8"), dict(backend="torch")):
        with pytest.raises(ValueError, match="packed as int4"):
            LLM(tmp_path / "out", **options)
    with pytest.raises(ValueError, match="dtype is float32"):
        LLM(tmp_path / "out", dtype="float32")
    with pytest.raises(ValueError, match="unknown weight format"):
        LLM(tmp_path / "model", weights="int3")
    monkeypatch.setenv("LAMOE_IMPL", "ref")
    with pytest.raises(ValueError, match="which do not run because LAMOE_IMPL"):
        LLM(tmp_path / "out")


# ---- commands ----
def run(*argv) -> int:
    return cli.main([str(a) for a in argv])


def test_the_commands_take_a_packed_folder(trained, tmp_path, capsys):
    texts, out = write_texts(tmp_path / "texts", files=6, seed=3), tmp_path / "out"
    assert run("quantize", trained, out, "--weights", "int8") == 0
    table = capsys.readouterr().out
    assert (
        re.search(r"\nexperts +[\d,]+ +[\d,]+ +\d+\.\d\d  int8", table)
        and "norms" in table
        and "router" in table
    )
    assert (
        run("quantize", trained, tmp_path / "four", "--calibrate", texts, "--calibrate-tokens", 512)
        == 0
    )
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    assert config["quantization_config"]["calibration"]
    capsys.readouterr()
    outputs = []
    for words in (["--model", trained, "--weights", "int8"], ["--model", out]):
        assert (
            run("generate", *words, "--prompt", "the ", "--max-tokens", 12, "--temperature", 0) == 0
        )
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and outputs[0].startswith("the ") and len(outputs[0]) > 8
    for name in (out, tmp_path / "four"):
        assert run("evaluate", name, "--data", texts) == 0
        assert "Generation, one sequence:" in capsys.readouterr().out
    assert run("info", out) == 0 and "parameters" in capsys.readouterr().out
    assert run("info", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)
    assert run("quantize", trained, out, "--weights", "int4") == 2
    assert "weights was int8, is int4" in capsys.readouterr().err
    assert (
        run("quantize", trained, tmp_path / "eight", "--weights", "int8", "--calibrate", texts) == 2
    )
    assert "--calibrate concerns int4" in capsys.readouterr().err
    assert run("convert", out, tmp_path / "no") == 2
    assert "the weights are packed by `lamoe quantize`" in capsys.readouterr().err


def test_loss_of_a_packed_model_equals_that_of_the_torch_model(trained):
    """Loss and expert loads of a packed model equal those of the torch model.

    The packed model processes documents in chunks through the paged cache.
    """
    from lamoe.train.data import heldout_rows, open_corpus

    corpus = open_corpus(trained / "data")
    model = lamoe.load(trained, dtype=torch.float32)
    for mask in (True, False):
        rows = lambda: heldout_rows(corpus, 32)
        want = text_loss(TorchBackend(model), rows(), document_mask=mask)
        got = text_loss(CpuBackend.from_transformer(model), rows(), document_mask=mask)
        assert got.targets == want.targets and got.nats == pytest.approx(want.nats, rel=2e-4)
        # The torch model also counts the experts of padding tokens.
        assert np.allclose(got.load, want.load, atol=0.05)
        int4 = CpuBackend.from_transformer(model, Formats("int4"))
        coarse = text_loss(int4, rows(), document_mask=mask)
        assert coarse.nats != got.nats and coarse.nats == pytest.approx(want.nats, rel=0.1)
