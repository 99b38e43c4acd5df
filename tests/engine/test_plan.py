"""Tests of the memory plan: formulas match what is allocated, and refusals say what would fit."""

import importlib
import os
import re
from pathlib import Path
from unittest import mock

import pytest

from lamoe import cli
from lamoe.backends import cache_codec
from lamoe.backends.base import Formats
from lamoe.backends.cpu import native
from lamoe.backends.cpu.backend import CpuBackend
from lamoe.backends.memory import available_memory
from lamoe.backends.paged_cache import PagedCache
from lamoe.engine.llm import LLM
from lamoe.engine.plan import fit
from lamoe.engine.sampler import SamplingParams
from lamoe.model import accounting
from lamoe.model.accounting import human_bytes
from lamoe.model.config import ModelConfig
from lamoe.train import checkpoint
from oracles import tiny
from tiny_run import trained  # noqa: F401 (trained is a fixture)

# The package exports a function `load`, which hides the module of this name.
backends_load = importlib.import_module("lamoe.backends.load")
STATE_LIMIT = 128 << 20  # kStateLimit of csrc/model/cost.h
LITE = ModelConfig.preset("deepseek-v2-lite")
LITE_16 = 2 * accounting.parameters(LITE).total


def states(max_num_seqs=3, batch_tokens=64):
    """Return a function from max_model_len to state bytes of V2-Lite, as `fit` takes it."""
    return lambda length: CpuBackend.state_bytes(LITE, length, max_num_seqs, batch_tokens)


def lite(format="bf16", cache_memory=None, length=None, available=None, seqs=1):
    return fit(LITE, LITE_16, format, cache_memory, length, seqs, 16, available)


@pytest.mark.parametrize("format", cache_codec.FORMATS)
def test_the_plan_matches_what_is_allocated(format):
    c = tiny.HARD.replace(max_position_embeddings=200)
    m = tiny.model(c).float()
    engine = LLM(
        m,
        backend="torch",
        cache=format,
        page_size=4,
        cache_memory=1 << 20,
        max_model_len=150,
        max_num_seqs=7,
    )
    p = engine.plan()
    assert (
        p.cache == engine.cache.rows.untyped_storage().nbytes() <= 1 << 20
        and (1 << 20) - p.cache < 4 * p.bytes_per_token
    )
    assert (
        p.bytes_per_token == c.num_hidden_layers * cache_codec.row_bytes(format, c.cache_row)
        and p.tokens == engine.pool.total * 4
    )
    assert (
        p.weights == 4 * accounting.parameters(c).total and p.sequences == engine.pool.total // 38
    )
    assert p.expanded_bytes_per_token == 2 * accounting.expanded_elements(c)


def test_plan_of_v2_lite_in_numbers():
    p = lite(length=32768, cache_memory=4 * 10**9)
    assert (p.bytes_per_token, p.expanded_bytes_per_token) == (31104, 276480)
    assert p.tokens == 4 * 10**9 // (31104 * 16) * 16 and p.sequences == 3
    text = p.describe()
    assert (
        "weights 31.41 GB" in text
        and "31,104 bytes a token; as expanded keys and values 276,480 (8.9 x), the same memory "
        "would hold 14,466 tokens"
        in text
    )
    assert text.endswith(
        "fits    128,592 tokens: 3 sequences of 32,768 at once (max_num_seqs lets 1 run)"
    )
    assert (
        lite(length=32768, cache_memory=4 * 10**9, seqs=64)
        .describe()
        .endswith("3 sequences of 32,768 at once")
    )
    assert lite("6bit").bytes_per_token == 27 * 404
    plain = fit(ModelConfig.preset("deepseek-67b"), 1, "bf16", None, None, 1, 16)
    assert (
        "expanded" not in plain.describe()
        and plain.bytes_per_token == plain.expanded_bytes_per_token
    )


# Bytes of one attention state: maximum, sum and latent of 16 lanes in float32.
LITE_STATE = 4 * (16 + 16 + 16 * 512)


# n tokens of a sequence with S cached rows use the absorbed form if n < 2^17 S / (2^17 + 768 S).
@pytest.mark.parametrize(
    "length, seqs, step, tokens, chunks",
    [
        (100, 3, 3, 3, 1),
        (1000, 3, 3, 3, 8),
        (4096, 3, 3, 3, 8),
        (4097, 3, 3, 3, 9),
        (20_000, 10, 64, 64, 40),
        (128, 1, 512, 73, 1),
        (4096, 1, 512, 163, 8),
    ],
)
def test_memory_of_attention_states_of_v2_lite(length, seqs, step, tokens, chunks):
    """The memory for attention states of V2-Lite equals values computed by hand.

    One token has 16 heads, which fill one block of lanes. A block has one state per chunk of rows.
    """
    size = tokens * chunks * LITE_STATE
    assert CpuBackend.state_bytes(LITE, length, seqs, step) == size * 5 // 4 + 4096


def test_memory_of_attention_states_is_bounded():
    assert (
        CpuBackend.state_bytes(LITE, 163_840, 64, 512)
        == CpuBackend.state_bytes(LITE, 32_768, 64, 512)
        == STATE_LIMIT * 5 // 4 + 4096
    )
    big = ModelConfig.preset("deepseek-v2")
    assert (
        CpuBackend.state_bytes(big, 163_840, 64, 512)
        == STATE_LIMIT * 5 // 4 + 4096
        > CpuBackend.state_bytes(big, 20_000, 1, 1)
        == 8 * 40 * LITE_STATE * 5 // 4 + 4096
    )
    # One token has 64 blocks of lanes, with one state for each of 320 chunks.
    wide = big.replace(num_attention_heads=1024)
    assert CpuBackend.state_bytes(wide, 163_840, 1, 1) == 64 * 320 * LITE_STATE * 5 // 4 + 4096
    # 64 query heads share 8 KV heads, so more than 48 / 8 new tokens use the expanded form.
    dense = ModelConfig.preset("deepseek-67b")
    assert (
        CpuBackend.state_bytes(dense, 4096, 2, 512)
        == 8 * (12 * 8 + 2 * 15) // 16 // 8 * 8 * 8 * 4 * (32 + 16 * 128) * 5 // 4 + 4096
    )


def test_the_plan_counts_attention_states():
    """The plan counts attention states in its memory check, in its advice and in `describe`."""
    partial, page = CpuBackend.state_bytes(LITE, 1600, 3, 64), 16 * 31104
    plan = fit(LITE, LITE_16, "bf16", None, 1600, 3, 16, LITE_16 + 100 * page + partial, states())
    assert (
        plan.pages == 100
        and plan.states == partial
        and plan.describe().startswith(
            f"weights 31.41 GB; {human_bytes(partial)} at most for attention\ncache   49.77 MB"
        )
    )
    assert "attention" not in lite(length=1600).describe()
    with pytest.raises(
        ValueError,
        match=f"with {human_bytes(partial)} for attention, are more than .*lower max_model_len "
        "to 1584,",
    ):
        fit(LITE, LITE_16, "bf16", None, 1600, 3, 16, LITE_16 + 100 * page + partial - 1, states())
    # A shorter context has fewer chunks, so its attention states are smaller too.
    with pytest.raises(ValueError, match="max_model_len to 720,"):
        fit(
            LITE,
            LITE_16,
            "bf16",
            None,
            1600,
            3,
            16,
            LITE_16 + 45 * page + CpuBackend.state_bytes(LITE, 720, 3, 64),
            states(),
        )
    with pytest.raises(
        ValueError, match=re.escape(f"lower cache_memory to at most {human_bytes(101 * page)}")
    ):
        fit(
            LITE, LITE_16, "bf16", 200 * page, 1600, 3, 16, LITE_16 + 101 * page + partial, states()
        )


@pytest.mark.skipif(not native.available(), reason="needs the compiled kernels")
@pytest.mark.parametrize(
    "c", [tiny.HARD, tiny.config("llama", num_key_value_heads=2, head_dim=10)], ids=["mla", "gqa"]
)
def test_planned_attention_states_equal_the_allocated_ones(c):
    """The planned attention states equal what the kernels allocate.

    Seven sequences with a shared prompt decode up to the end of their context. With 32 heads a
    token fills its blocks of 16 lanes, and the plan is exact to the byte. With 4 heads it is an
    upper bound.
    """
    for heads in (32, 4):
        m = tiny.model(
            c.replace(num_attention_heads=heads, max_position_embeddings=200, num_hidden_layers=2)
        ).float()
        engine = LLM(m, cache="fp32", page_size=4, max_num_seqs=7, max_num_batched_tokens=7)
        engine.generate(
            [tiny.ids(c, 189, seed=1).tolist()] * 7,
            SamplingParams(temperature=0.0, max_tokens=11, ignore_eos=True),
        )
        p, taken = engine.plan(), engine.backend.native.state_bytes
        assert taken == p.states if heads == 32 else p.states // 3 < taken <= p.states, (
            heads,
            taken,
            p.states,
        )
    assert LLM(m, backend="torch").plan().states == 0


def test_the_default_size_of_the_cache():
    """The default cache holds four contexts, with limits.

    It has at most 1 GiB but at least one context, and at most the free memory.
    """
    page = 16 * 31104
    assert (
        lite(length=1600).pages == 400
        and lite(length=100_000).pages == 6250
        and lite(length=20_000).pages == (1 << 30) // page
    )
    assert lite(length=1600, available=LITE_16 + 250 * page).pages == 250


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(length=163841),
            "max_model_len is 163841; it must be from 2 to the model's max_position_embeddings "
            "163840",
        ),
        (
            dict(cache_memory=10**9),
            "a cache of 1.000 GB in bf16 holds 32144 tokens, less than max_model_len 163840, "
            "which needs 5.096 GB; .*max_model_len 32144",
        ),
        (
            dict(available=LITE_16 + 10**9),
            "31.41 GB of weights and a cache of 5.096 GB (163,840 tokens in bf16, 31,104 bytes a "
            "token) are more than the 32.41 GB of memory "
            "that are available; lower max_model_len to 32144, or take a smaller cache format "
            "(4bit: 8,505 bytes a token)",
        ),
        (
            dict(available=LITE_16 + 10**9, length=20000, cache_memory=2 * 10**9),
            "lower cache_memory to at most 1.000 GB",
        ),
        (
            dict(available=16 * 10**9),
            "are more than the 16.00 GB of memory that are available; free some memory, or take "
            "a smaller model",
        ),
    ],
)
def test_refusals_offer_a_value_that_fits(options, message):
    """A refusal offers the largest max_model_len that fits: 16 tokens more are refused again."""
    with pytest.raises(ValueError) as e:
        lite(**options)
    pattern = message if ".*" in message else re.escape(message)
    assert re.search(pattern, str(e.value)), str(e.value)
    if offer := re.search(r"max_model_len (?:to )?(\d+)[,$]?", str(e.value).split(";")[-1]):
        assert lite(**{**options, "length": int(offer[1])}).max_model_len == int(offer[1])
        with pytest.raises(ValueError):
            lite(**{**options, "length": int(offer[1]) + 16})


def test_plans_are_refused_before_the_weights_are_read(trained):
    folder = checkpoint.latest(trained) / "model"
    with (
        mock.patch.object(backends_load, "available_memory", return_value=10_000),
        mock.patch("lamoe.checkpoints.hf.load") as load,
    ):
        with pytest.raises(ValueError, match="more than the 10.00 kB of memory that are available"):
            LLM(folder)
    load.assert_not_called()
    plain = LLM(folder, backend="torch")
    weights = plain.plan().weights
    with mock.patch.object(
        backends_load, "available_memory", return_value=weights + 64 * plain.plan().bytes_per_token
    ):
        p = LLM(folder, backend="torch").plan()
    assert p.sequences == 1 and p.weights == sum(
        t.numel() * t.element_size() for t in plain.backend.model.parameters()
    )
    assert LLM(folder, dtype="bfloat16", backend="torch").plan().weights == weights // 2
    c = plain.config
    total = accounting.parameters(c).total
    prepare = backends_load.prepare
    assert prepare(folder, dtype="bfloat16").weight_bytes == 2 * total
    assert prepare(folder, dtype="bfloat16").config == c
    if native.available():
        assert prepare(folder, Formats("int4")).weight_bytes == int(4.5 / 8 * total)
        head = c.vocab_size * c.hidden_size / 2
        assert prepare(folder, Formats("int4", "int8")).weight_bytes == int(4.5 / 8 * total + head)
    # For packed weights, the plan counts their actual bytes.
    for weights in ("bf16", "int8", "int4") if native.available() else ():
        engine = LLM(folder, weights=weights)
        assert engine.plan().weights == engine.backend.weight_bytes()


def test_available_memory(tmp_path):
    assert available_memory(root=tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 2000 kB\nMemAvailable: 1000 kB\n")
    assert available_memory(root=tmp_path) == 1024000
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    for limit, used, want in (
        ("max", "5", 1024000),
        ("500000", "100000", 400000),
        ("5000000", "100000", 1024000),
        ("100", "200", 0),
    ):
        (group / "memory.max").write_text(limit + "\n")
        (group / "memory.current").write_text(used + "\n")
        assert available_memory(root=tmp_path) == want
    (group / "memory.max").write_text("500000\n")
    (group / "memory.current").write_text("400000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 70000\nactive_file 5\n")
    assert available_memory(root=tmp_path) == 170000  # cached files can be dropped
    (group / "memory.stat").write_text("inactive_file\n")
    assert available_memory(root=tmp_path) == 100000
    (tmp_path / "proc" / "meminfo").write_text("MemAvailable:\n")
    assert available_memory(root=tmp_path) == 100000
    assert available_memory() is None or available_memory() > 1 << 20


def test_flags_of_chat(trained, capsys):
    with mock.patch("lamoe.cli.chat.run", return_value=0) as run:
        assert (
            cli.main(
                [
                    "chat",
                    str(trained),
                    "--max-model-len",
                    "48",
                    "--kv-cache-memory",
                    "100kB",
                    "--max-num-seqs",
                    "3",
                    "--cache",
                    "int8",
                ]
            )
            == 0
        )
    p = run.call_args.args[0].plan()
    assert (p.max_model_len, p.max_num_seqs, p.format) == (
        48,
        3,
        "int8",
    ) and 0 <= 100_000 - p.cache < 16 * p.bytes_per_token
    for flags, message in (
        (["--max-model-len", "65"], "max_position_embeddings 64"),
        (["--kv-cache-memory", "1kB"], "a cache of 1.000 kB in bf16 holds 0 tokens"),
        (
            ["--kv-cache-memory", "900TB"],
            "of memory that are available; lower cache_memory to at most",
        ),
    ):
        capsys.readouterr()
        assert cli.main(["chat", str(trained), *flags]) == 2
        assert message in capsys.readouterr().err


def test_cache_memory_is_committed_when_it_is_written():
    """Memory is committed when it is written: an empty cache of 2 GB uses almost none."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    c, before = tiny.HARD, resident()
    token = c.num_hidden_layers * cache_codec.row_bytes("bf16", c.cache_row)
    cache = PagedCache(c, (2 << 30) // (16 * token), 16, "bf16")
    assert cache.nbytes > 2e9 and resident() - before < 50e6
    cache.rows[:, : (100 << 20) // token] = 1
    assert 90e6 < resident() - before < 150e6
