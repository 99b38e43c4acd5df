"""Tests of `lamoe bench`: bytes per pass, options, and the comparison with llama.cpp.

Scripts replace llama.cpp's tools. They print output that was recorded from build b11434.
"""

import json
import sys

import pytest
import torch

from lamoe import cli
from lamoe.backends.base import Batch, Formats
from lamoe.backends.cpu import native, packed
from lamoe.measure import llama_cpp, tables, timing
from lamoe.measure.random_weights import random_model
from oracles import tiny

pytestmark = pytest.mark.skipif(native.lib is None, reason="needs the compiled kernels")
MLA = tiny.config("deepseek_v2", max_position_embeddings=256)

# ---- recorded output of llama.cpp ----
DEPTH = """\
{"build_commit": "unknown", "build_number": 0, "cpu_info": "AMD EPYC", "gpu_info": "", "backends": "CPU", "model_filename": "tiny-q8.gguf", "model_type": "deepseek2 ?B Q8_0", \
"model_size": 115808256, "model_n_params": 108652032, "n_batch": 2048, "n_ubatch": 512, "n_threads": 2, "cpu_mask": "0x0", "cpu_strict": false, "poll": 50, "type_k": "f16", \
"type_v": "f16", "flash_attn": 1, "tensor_split": "0.00", "embeddings": false, "n_prompt": 64, "n_gen": 0, "n_depth": 100, "test_time": "2026-11-25T00:13:01Z", \
"avg_ns": 387693237, "stddev_ns": 35325576, "avg_ts": 165.952133, "stddev_ts": 14.374771, "samples_ns": [ 369081312, 428433149, 365565251 ],"samples_ts": [ 173.404, 149.382, 175.071 ]}
{"build_commit": "unknown", "build_number": 0, "cpu_info": "AMD EPYC", "gpu_info": "", "backends": "CPU", "model_filename": "tiny-q8.gguf", "model_type": "deepseek2 ?B Q8_0", \
"n_threads": 2, "flash_attn": 1, "n_prompt": 0, "n_gen": 16, "n_depth": 100, "test_time": "2026-11-25T00:13:06Z", "avg_ns": 507436947, "stddev_ns": 220245212, \
"avg_ts": 35.565690, "stddev_ts": 14.320373, "samples_ns": [ 320193503, 750098507, 452018831 ],"samples_ts": [ 49.9698, 21.3305, 35.3968 ]}
"""  # noqa: E501
SAID = """\
0.00.012.669 W load: special_eos_id is not in special_eog_ids - the tokenizer config may be incorrect
llama-bench: benchmark 1/2: depth run 1/3
llama-bench: benchmark 2/2: generation run 3/3
"""  # noqa: E501
MANY = """
llama_batched_bench: n_kv_max = 4096, n_batch = 2048, n_ubatch = 512, flash_attn = 1
{"n_kv_max": 4096, "n_batch": 2048, "n_ubatch": 512, "flash_attn": 1, "is_pp_shared": 0, "n_gpu_layers": -1, "n_threads": 2, "n_threads_batch": 2, "pp": 16, "tg": 16, "pl": 4, \
"n_kv": 128, "t_pp": 0.149669, "speed_pp": 427.610229, "t_tg": 0.535068, "speed_tg": 119.610970, "t": 0.684737, "speed": 186.933090}
{"n_kv_max": 4096, "n_batch": 2048, "n_ubatch": 512, "flash_attn": 1, "is_pp_shared": 0, "n_gpu_layers": -1, "n_threads": 2, "n_threads_batch": 2, "pp": 16, "tg": 16, "pl": 16, \
"n_kv": 512, "t_pp": 0.737211, "speed_pp": 347.254730, "t_tg": 1.501245, "speed_tg": 170.525131, "t": 2.238456, "speed": 228.729080}
"""  # noqa: E501


def test_output_of_both_tools_is_parsed():
    assert llama_cpp.parse(DEPTH) == {
        (64, 100, 1): [173.404, 149.382, 175.071],
        (1, 100, 1): [49.9698, 21.3305, 35.3968],
    }
    assert llama_cpp.parse(MANY) == {(1, 16, 4): [119.610970], (1, 16, 16): [170.525131]}
    assert llama_cpp.parse("") == {}


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Return `write(name, stdout, stderr, code)`, which puts a script of that name on PATH.

    `write.calls()` lists the commands that were run. `write.model` is a GGUF file.
    """
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "calls").touch()

    def write(name: str, out: str, err: str = "", code: int = 0) -> None:
        file = tmp_path / name
        file.write_text(
            f"#!{sys.executable}\nimport sys\nopen({str(tmp_path / 'calls')!r}, 'a').write(' "
            f"'.join([{name!r}, *sys.argv[1:]]) + '\\n')\n"
            f"sys.stdout.write({out!r})\nsys.stderr.write({err!r})\nsys.exit({code})\n"
        )
        file.chmod(0o755)

    write.model, write.calls = (
        str(tmp_path / "m.gguf"),
        lambda: (tmp_path / "calls").read_text().splitlines(),
    )
    return write


def test_missing_tools_and_files_are_refused_before_measuring(tools):
    with pytest.raises(ValueError, match="llama-bench is not on PATH"):
        llama_cpp.Peer(tools.model, 1)
    tools("llama-bench", DEPTH)
    with pytest.raises(ValueError, match="llama-batched-bench is not on PATH"):
        llama_cpp.Peer(tools.model, 1)
    tools("llama-batched-bench", MANY)
    with pytest.raises(ValueError, match="not a file; give the GGUF file"):
        llama_cpp.Peer(tools.model + "x", 1)


def test_runs_are_interleaved_with_the_peer(tools):
    tools("llama-bench", DEPTH, SAID)
    tools("llama-batched-bench", MANY)
    run, said, reads = (
        timing.Bench(random_model(MLA, Formats("int8"), 1), "bf16", 200),
        [],
        iter(range(1, 100)),
    )
    lines = run.lines([(64, 100)], [100], [4])
    llama_cpp.measure_interleaved(
        run, llama_cpp.Peer(tools.model, 3), lines, 1, lambda: next(reads) * 1e9, said.append
    )
    model = f"-m {tools.model} -t 3"
    assert tools.calls() == [
        # one run measures prefill and decode after the same filled cache
        f"llama-bench {model} -fa 1 -r 2 -d 100 -p 64 -n 32 -o jsonl --progress",
        f"llama-batched-bench {model} -fa on -npp 16 -ntg 16 -npl 4,4 -c 160 --output-format jsonl",
    ]
    assert [s for s in said if "1/3" not in s and "3/3" not in s and " x" not in s] == [
        "lamoe: decode at 100",
        "lamoe: prefill 64 at 100",
        "llama.cpp: decode at 100, prefill 64 at 100 (it fills 100 tokens first)",
        "lamoe: decode at 100",
        "lamoe: prefill 64 at 100",
        "lamoe: 4 sequences",
        "llama.cpp: 4 sequences",
        "lamoe: 4 sequences",
    ]
    assert "llama.cpp: benchmark 1/2: depth run 1/3" in said and not any("eos" in s for s in said)
    decode, prefill, four = lines
    assert [len(x.seconds) for x in lines] == [6, 2, 4]
    assert decode.peer == [49.9698, 21.3305, 35.3968]
    assert four.peer == [119.61097]
    assert decode.ratio == decode.rate / 35.3968
    assert prefill.ratio == prefill.rate / 173.404
    assert decode.read == [1e9, 2e9, 3e9, 4e9]
    assert four.read == [5e9, 6e9, 7e9, 8e9]
    assert "| 35.4 |" in tables.peer_speeds(lines)
    assert tables.peer_speeds(lines).endswith("5.0, 6.0, 7.0, 8.0 |")


def test_the_error_quotes_a_tool_that_fails(tools):
    tools("llama-batched-bench", "")
    line = timing.Line("decode at 0", 1, 0, 1, 1.0)
    tools(
        "llama-bench",
        "",
        "error: unknown model architecture: 'mamba9'\nmain: failed to load model\n",
        1,
    )
    with pytest.raises(
        ValueError,
        match=r"(?s)code 1 and said: .*unknown model architecture: 'mamba9' main: failed",
    ):
        llama_cpp.Peer(tools.model, 1).measure([line], print)
    tools("llama-bench", MANY)
    with pytest.raises(ValueError, match="no figure for decode at 0"):
        llama_cpp.Peer(tools.model, 1).measure([line], print)


# ---- measurements of lamoe ----
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
def test_bytes_of_a_pass_depend_on_the_form_of_attention(weights):
    run = timing.Bench(random_model(MLA, Formats(weights), 1), "bf16", 100)
    elem, parts = packed.element_format(Formats(weights)), {}
    for p in packed.packed_tensors(MLA, Formats(weights)):
        parts[p.name] = parts.get(p.name, 0) + packed.packed_bytes(p, elem)
    assert sum(parts.values()) == sum(run.model.tensor_bytes().values())
    embed, routed, copies, uk, uv = (
        parts.pop("embed"),
        parts.pop("e13") + parts.pop("e2"),
        parts.pop("uk_rows") + parts.pop("uv_elem", 0),
        parts.pop("uk"),
        parts.pop("uv"),
    )
    rest, row, experts = (
        sum(parts.values()),
        run.cache.nbytes / (run.cache.pages * run.cache.page_size),
        len(MLA.moe_layers) * MLA.n_routed_experts,
    )
    for line in (
        run.line("", 1, 40),
        run.line("", 1, 16, 3),
        run.line("", 90, 0),
        run.line("", 60, 30),
    ):
        chosen = run.run(line, experts=True)
        assert chosen.shape == (len(MLA.moe_layers), line.tokens, MLA.num_experts_per_tok)
        read = len({(layer, int(e)) for layer, each in enumerate(chosen) for e in each.flatten()})
        if line.new == 1:  # absorbed
            attention = uk + uv
        else:  # expanded; without quantisation both forms read the same W^UV
            attention = copies + (0 if weights in ("int8", "int4") else uv)
        want = (
            rest
            + attention
            + embed * min(line.tokens / MLA.vocab_size, 1)
            + routed * read / experts
            + line.sequences * line.depth * row
        )
        assert run.bytes(line, chosen) == pytest.approx(want)
    assert run.line("", 1, 16, 3).flops == 3 * run.line("", 1, 16).flops


def test_a_dense_model_is_measured_too():
    run = timing.Bench(
        random_model(tiny.config("llama", max_position_embeddings=256), Formats("bf16"), 1),
        "fp32",
        200,
    )
    lines = run.lines([(20, 0), (20, 40)], [0, 50], [2])
    timing.measure(run, lines, 1)
    assert [len(x.seconds) for x in lines] == [3, 3, 1, 1, 2] and all(x.rate > 0 for x in lines)
    weights = sum(run.model.tensor_bytes().values()) - run.model.tensor_bytes()["embed"]
    assert lines[0].bytes == pytest.approx(
        weights + run.model.tensor_bytes()["embed"] / run.config.vocab_size
    )
    assert lines[1].bytes > lines[0].bytes


def test_the_command_line(tmp_path, capsys, tools):
    tools("llama-bench", DEPTH, SAID)
    tools("llama-batched-bench", MANY)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MLA.to_dict()))
    argv = [
        "bench",
        str(config),
        "--threads",
        "1",
        "--rounds",
        "1",
        "--depth",
        "100,9999",
        "--prefill",
        "64@100,200@100",
        "--batch",
        "4",
        "--peer",
        "llama.cpp",
        "--peer-model",
        tools.model,
    ]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])["lines"]
    assert list(result) == ["decode at 100", "prefill 64 at 100", "4 sequences"]
    assert "| 4 sequences |" in out
    assert result["decode at 100"]["peer_tokens_per_s"] == 35.3968
    assert len(result["4 sequences"]["read_gb_per_s"]) == 4
    assert "left out, beyond the 256 positions of the model: --depth 9999, --prefill 200@100" in err
    assert "lamoe: decode at 100" in err
    for bad in ("512@x", "1", "a", "8@-1"):
        with pytest.raises(SystemExit):
            cli.main(["bench", "tiny", "--prefill", bad])
        assert "write it like 512,2048,512@4096" in capsys.readouterr().err


def test_random_weights_spread_tokens_over_all_experts():
    """Random weights spread tokens over all experts, as a trained model does.

    Weights with a nonzero mean would send all tokens to the same few experts. Then a batch would
    read too few bytes.
    """
    config = MLA.replace(
        hidden_size=1024,
        num_hidden_layers=8,
        n_routed_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=256,
        first_k_dense_replace=1,
        vocab_size=512,
        n_group=1,
        topk_group=1,
    )
    model = random_model(config, Formats("int4"), 1)
    run = timing.Bench(model, "bf16", 16 * 32)
    pages = torch.arange(16, dtype=torch.int32)
    seqs = torch.tensor([[1, 1, i] for i in range(16)], dtype=torch.int32)
    batch = Batch(list(range(16)), torch.zeros(16, dtype=torch.int64), seqs, pages, [0])
    _, chosen = model.forward(batch, run.cache, experts=True)
    touched = [len(layer.unique()) for layer in chosen]
    assert min(touched) > 0.85 * 32 * (1 - (1 - 4 / 32) ** 16), touched
