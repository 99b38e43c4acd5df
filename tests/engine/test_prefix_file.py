"""Tests of saved prefixes: equal tokens after loading, and refusals of files that do not fit."""

import json
import os
import re
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lamoe.backends import base as base_module
from lamoe.backends import cache_codec
from lamoe.backends.torch_backend import TorchBackend
from lamoe.checkpoints import checksums
from lamoe.engine import prefix_file
from lamoe.engine.llm import LLM
from lamoe.engine.sampler import SamplingParams
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer
from tiny_run import BODY, MLA, MOE

CONFIG = ModelConfig(
    **{**BODY, "max_position_embeddings": 128, "initializer_range": 0.2}, **MLA, **MOE
)
GQA = ModelConfig(
    model_type="llama",
    **{**BODY, "num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.2},
    num_key_value_heads=2,
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
TEXT = [(7 * i * i + 3 * i) % 300 for i in range(61)]


def model(config=CONFIG, seed=1) -> Transformer:
    return Transformer(config).init_weights(seed).eval()


def llm(m=None, **options) -> LLM:
    return LLM(m or model(), **{"cache": "fp32", "page_size": 4, **options})


def saved(path, tokens=TEXT, **options):
    """Save a prefix to `path`. Return (path, number of tokens saved, output without loading it)."""
    one = llm(**options)
    [out] = one.generate([tokens], GREEDY)
    return path, one.save_cache(path, tokens), out


# ---- the round trip ----
@pytest.mark.parametrize("config", [CONFIG, GQA], ids=["mla", "gqa"])
@pytest.mark.parametrize("format", cache_codec.FORMATS)
@pytest.mark.parametrize("written, read", [(4, 4), (4, 16), (16, 4), (1, 3), (7, 1)])
def test_same_tokens_after_loading(tmp_path, config, format, written, read):
    file, n, out = saved(tmp_path / "c", m=model(config), cache=format, page_size=written)
    assert n == 61 // written * written
    two = llm(model(config), cache=format, page_size=read)
    assert two.load_cache(file) == n // read * read and two.pool.owned == 0
    [again] = two.generate([TEXT], GREEDY)
    assert again.token_ids == out.token_ids and again.cached_tokens == min(n, 60) // read * read > 0
    assert out.cached_tokens == 0 and len(set(out.token_ids)) > 3


@pytest.mark.parametrize("format", cache_codec.FORMATS)
def test_saved_rows_are_the_bytes_of_the_cache(tmp_path, format):
    row = cache_codec.row_bytes(format, CONFIG.cache_row)
    one, two = llm(cache=format), llm(cache=format, page_size=5)
    # The first prompt takes page 0, so TEXT begins on a later page.
    one.generate([[9] * 10, TEXT], GREEDY)
    assert one.save_cache(tmp_path / "c", TEXT) == 60
    stored = load_file(tmp_path / "c")  # the safetensors library can read the file
    assert (
        stored["tokens"].tolist() == TEXT[:60]
        and stored["rows"].shape == (2, 60, row)
        and stored["rows"].dtype == torch.uint8
    )
    pages = [one.pool.share(c) for c in prefix_file._page_hashes(TEXT, 4)]
    slots = torch.tensor([p * 4 + i for p in pages for i in range(4)])
    assert torch.equal(stored["rows"], one.cache.rows[:, slots]) and stored["rows"].any(-1).all()
    two.load_cache(tmp_path / "c")
    pages = [two.pool.share(c) for c in prefix_file._page_hashes(TEXT[:60], 5)]
    slots = torch.tensor([p * 5 + i for p in pages for i in range(5)])
    assert torch.equal(stored["rows"], two.cache.rows[:, slots])
    with safe_open(tmp_path / "c", framework="pt") as f:
        meta = f.metadata()
    assert (meta["format"], meta["widths"], meta["dtype"]) == (
        format,
        "16 8",
        "float32",
    ) and re.fullmatch("[0-9a-f]{64}", meta["model"])


def test_the_rows_of_the_file_are_used(tmp_path):
    """The rows of the file are used: if they are zero, the output differs."""
    file, _, out = saved(tmp_path / "c")
    rewrite(file, rows=torch.zeros_like(load_file(file)["rows"]))
    two = llm()
    two.load_cache(file)
    assert two.generate([TEXT], GREEDY)[0].token_ids != out.token_ids


def test_only_cached_rows_are_saved(tmp_path):
    one = llm()
    one.generate([TEXT[:30]], GREEDY)
    assert one.save_cache(tmp_path / "c", TEXT) == 28
    one.generate([TEXT[:20] + [5] * 20], GREEDY)
    assert one.save_cache(tmp_path / "c", TEXT[:20] + [5] * 30) == 40
    for tokens in ([], TEXT[:3], [8] * 50):
        with pytest.raises(
            ValueError,
            match=f"nothing of these {len(tokens)} tokens is in the cache.*full pages of 4 tokens",
        ):
            one.save_cache(tmp_path / "d", tokens)
    assert (
        one.pool.owned == 0
        and not (tmp_path / "d").exists()
        and [p.name for p in tmp_path.iterdir()] == ["c"]
    )


def test_loading_into_a_cache_in_use(tmp_path):
    """A prefix can be loaded into a cache in use.

    Free pages are out of order, part of the text is cached, and another sequence is running.
    """
    file, n, out = saved(tmp_path / "c")
    two = llm(max_model_len=100, cache_memory=40 * 4 * 2 * 24 * 4)
    two.generate([[3] * 33, TEXT[:22], [4] * 17], GREEDY)
    [other] = two.add([6] * 20, SamplingParams(temperature=0.0, max_tokens=30))
    two.step()
    assert two.load_cache(file) == n == 60
    assert two.load_cache(file) == n  # loading the file a second time changes nothing
    [again] = two.generate([TEXT], GREEDY)
    assert (again.token_ids, again.cached_tokens) == (out.token_ids, 60)
    two.cancel(other)
    assert two.pool.owned == 0 and two.pool.available == 40


def test_loaded_pages_are_evicted_like_others(tmp_path):
    file, _, out = saved(tmp_path / "c")
    two = llm(max_model_len=80, cache_memory=20 * 4 * 2 * 24 * 4)
    two.load_cache(file)
    assert two.pool.available == 20
    [long] = two.generate([[2] * 60], SamplingParams(temperature=0.0, max_tokens=20))
    assert (
        long.token_ids
        == llm().generate([[2] * 60], SamplingParams(temperature=0.0, max_tokens=20))[0].token_ids
    )
    [again] = two.generate([TEXT], GREEDY)
    assert again.token_ids == out.token_ids and again.cached_tokens < 60
    two.load_cache(file)  # loads the evicted pages again
    assert two.generate([TEXT], GREEDY)[0].cached_tokens == 60


def test_a_prefix_that_is_too_long_for_the_cache(tmp_path):
    file, *_ = saved(tmp_path / "c")
    with pytest.raises(ValueError, match="holds 60 tokens, more than max_model_len 50"):
        llm(max_model_len=50).load_cache(file)
    two = llm(max_model_len=64, cache_memory=16 * 4 * 2 * 24 * 4)
    [running] = two.add([6] * 7, SamplingParams(temperature=0.0, max_tokens=30))
    two.step()
    with pytest.raises(
        ValueError, match="needs 15 more pages of 4 tokens, and 14 of 16 are not in use"
    ):
        two.load_cache(file)
    two.cancel(running)
    assert two.pool.available == 16 and two.load_cache(file) == 60


def digest(m) -> str:
    return TorchBackend(m).digest()


# ---- model digest and other metadata ----
def test_digest_depends_on_config_and_weights():
    base = model()
    assert (
        digest(base)
        == digest(model())
        == digest(Transformer(CONFIG.replace(torch_dtype="bfloat16")).init_weights(1))
    )
    others = [model(seed=2), model(CONFIG.replace(rope_theta=5000.0)), model().bfloat16()]
    for name in ("embed.weight", "layers.1.attn.wkv_a.weight", "norm.weight"):
        others.append(model())
        with torch.no_grad():
            others[-1].get_parameter(name).flatten()[-1] += 1e-3
    assert len({digest(m) for m in (base, *others)}) == 1 + len(others)


def test_digest_of_large_tensors_samples_all_of_them(monkeypatch):
    """The digest of large tensors depends on sampled blocks of every tensor.

    The test lowers the limits, so that small tensors are sampled too.
    """
    monkeypatch.setattr(base_module, "_HASH_WHOLE_BYTES", 1024)
    monkeypatch.setattr(base_module, "_HASH_SAMPLES", 16)
    monkeypatch.setattr(base_module, "_HASH_SAMPLE_BYTES", 64)
    base, seen = digest(model()), []
    for at in (*range(0, 9600, 97), 9599):
        m = model()
        with torch.no_grad():
            m.embed.weight.flatten()[at] += 1.0
        seen += [at] if digest(m) != base else []
    # The digest samples 16 blocks of 16 numbers from 9,600 numbers.
    assert 2 <= len(seen) < 30 and seen[0] == 0 and seen[-1] == 9599
    for name, p in model().named_parameters():
        m = model()
        with torch.no_grad():
            m.get_parameter(name).mul_(1.01)
        assert digest(m) != base, name


@pytest.mark.parametrize(
    "options, words",
    [
        (
            dict(m=model(seed=2)),
            "has the model digest '[0-9a-f]{64}', but this engine uses '[0-9a-f]{64}'; use "
            "the model it was saved with",
        ),
        (
            dict(cache="bf16"),
            "has the cache format 'fp32', but this engine uses 'bf16'; load the model with "
            "cache='fp32'",
        ),
        (dict(m=model(GQA)), "has the row widths '16 8', but this engine uses '16 16'"),
        (dict(m=model().bfloat16()), "has the dtype 'float32', but this engine uses 'bfloat16'"),
        (dict(m=model(CONFIG.replace(num_hidden_layers=3))), "model digest"),
    ],
)
def test_a_file_of_another_model_or_format_is_refused(tmp_path, options, words):
    file, *_ = saved(tmp_path / "c")
    two = llm(**options)
    with pytest.raises(ValueError, match=words):
        two.load_cache(file)
    assert (
        two.pool.available == two.pool.total and two.generate([TEXT], GREEDY)[0].cached_tokens == 0
    )


# ---- hostile files ----
def rewrite(file, meta=None, **tensors):
    """Replace metadata and tensors of a saved prefix. None removes a tensor.

    The checksums are left out, as another program would do.
    """
    stored = load_file(file)
    with safe_open(file, framework="pt") as f:
        meta = {**f.metadata(), **(meta or {})}
    del meta[checksums.KEY]
    save_file({k: v for k, v in {**stored, **tensors}.items() if v is not None}, file, meta)


def assert_refused(file, words):
    """Check that loading `file` fails with a short message that names it, and takes no pages."""
    two = llm()
    with pytest.raises(ValueError, match=words) as e:
        two.load_cache(file)
    assert (
        str(file) in str(e.value)
        and len(str(e.value)) < 600
        and two.pool.available == two.pool.total
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (
            dict(tokens=torch.tensor(TEXT[:59] + [300])),
            "token ids from 0 to 300; the vocabulary has 300",
        ),
        (dict(tokens=torch.tensor(TEXT[:59] + [-1])), "token ids from -1"),
        (dict(tokens=torch.tensor(TEXT[:60], dtype=torch.int32)), "tokens I32 .*need I64"),
        (dict(tokens=torch.tensor(TEXT[:48])), r"tokens I64 \[48\] and rows U8 \[2, 60, 96\]"),
        (dict(tokens=torch.tensor(TEXT[:60])[None]), r"tokens I64 \[1, 60\]"),
        (
            dict(
                tokens=torch.tensor([], dtype=torch.int64),
                rows=torch.zeros(2, 0, 96, dtype=torch.uint8),
            ),
            "with n at least 1",
        ),
        (dict(tokens=torch.tensor(3)), r"tokens I64 \[\]"),
        (
            dict(rows=torch.zeros(2, 60, 95, dtype=torch.uint8)),
            r"need I64 \[n\] and U8 \[2, n, 96\]",
        ),
        (dict(rows=torch.zeros(3, 60, 96, dtype=torch.uint8)), r"U8 \[3, 60, 96\]"),
        (dict(rows=torch.zeros(2, 60, 96, dtype=torch.int8)), "rows I8"),
        (dict(rows=None), "is not a saved cache"),
        (dict(more=torch.zeros(1)), "is not a saved cache"),
        (dict(meta={"kind": "model"}), "is not a saved cache"),
        (dict(meta={"version": "2"}), "of version '2'; this lamoe reads version 1"),
        (dict(meta={"format": "x" * 10**5}), "cache format 'xxx"),
        (dict(meta={"format": "{0.__class__}"}), "cache format"),
    ],
)
def test_files_with_invalid_content(tmp_path, change, words):
    file, *_ = saved(tmp_path / "c")
    rewrite(file, **change)
    assert_refused(file, words)


def test_damaged_files(tmp_path):
    file, *_ = saved(tmp_path / "c")
    whole = file.read_bytes()
    for cut in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert_refused(file, "truncated")
    file.write_bytes(whole + b"x")
    assert_refused(file, "1 bytes after its last tensor")
    file.write_bytes(b"\xff" * 200)
    assert_refused(file, "claims a header")
    header = {"tokens": {"dtype": "I64", "shape": [2**62], "data_offsets": [0, 2**65]}}
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw)
    assert_refused(file, "data_offsets")
    with pytest.raises(FileNotFoundError):
        llm().load_cache(tmp_path / "none")
    with pytest.raises(OSError):
        llm().load_cache(tmp_path)


def test_a_file_that_is_truncated_while_it_is_read(tmp_path):
    file, *_ = saved(tmp_path / "c")
    check = prefix_file._check

    def check_then_truncate(*args):
        out = check(*args)
        os.truncate(file, file.stat().st_size - 100)
        return out

    with mock.patch.object(prefix_file, "_check", check_then_truncate):
        assert_refused(file, "ends in the middle of its rows")


# ---- writing ----
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    file, *_ = saved(tmp_path / "c")
    before, two = file.read_bytes(), llm()
    two.generate([[5] * 40], GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", mock.Mock(side_effect=OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            two.save_cache(file, [5] * 40)
    assert (
        file.read_bytes() == before
        and [p.name for p in tmp_path.iterdir()] == ["c"]
        and two.pool.owned == 0
    )
    assert two.save_cache(file, [5] * 40) == 40
    assert file.read_bytes() != before and [p.name for p in tmp_path.iterdir()] == ["c"]


def test_other_files_are_not_overwritten(tmp_path):
    one = llm()
    one.generate([TEXT], GREEDY)
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "empty").touch()
    for name in ("model.safetensors", "notes.txt", "empty"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(ValueError, match="exists and is not a saved cache"):
            one.save_cache(tmp_path / name, TEXT)
        assert (tmp_path / name).read_bytes() == before
