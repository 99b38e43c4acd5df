"""Tests of GGUF headers: byte order, versions, counts beyond the file, damaged files."""

import resource
import struct
import time

import gguf
import numpy as np
import pytest
import torch

from lamoe.checkpoints import gguf as ours
from lamoe.checkpoints import gguf_file

SHAPES = {
    "token_embd": (96, 32),
    "output_norm": (32,),
    "output": (96, 32),
    "blk.0.attn_q": (32, 32),
    "blk.0.attn_k": (32, 32),
    "blk.0.attn_v": (32, 32),
    "blk.0.attn_output": (32, 32),
    "blk.0.attn_norm": (32,),
    "blk.0.ffn_norm": (32,),
    "blk.0.ffn_gate": (64, 32),
    "blk.0.ffn_up": (64, 32),
    "blk.0.ffn_down": (32, 64),
}


def write(path, *, kind="F32", order=gguf.GGUFEndian.LITTLE, facts=(), alignment=None):
    """Write a small llama model of equal weights in every call."""
    writer = gguf.GGUFWriter(path, "llama", endianess=order)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    sizes = {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 64,
        "attention.head_count": 2,
    }
    for key, value in sizes.items():
        if f"llama.{key}" not in dict(facts):
            writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    for key, value in facts:
        add = {
            bool: writer.add_bool,
            int: writer.add_int32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](key, value)
    random = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        data = np.ones(shape) if "norm" in name else random.normal(size=shape)
        as_ = gguf.GGMLQuantizationType["F32" if len(shape) == 1 else kind]
        data = gguf.quants.quantize(data.astype(np.float32), as_)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=as_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(*parts: bytes, tensors=0, keys=0, version=3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def described(name: bytes, offset: int, shape=(8,), kind=0) -> bytes:
    return (
        string(name)
        + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        + struct.pack("<IQ", kind, offset)
    )


# ---- byte order ----
@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_a_big_endian_file_gives_the_same_model(tmp_path, kind):
    little = ours.load(ours.read(write(tmp_path / "l.gguf", kind=kind)), "float32")
    file = ours.read(write(tmp_path / "b.gguf", kind=kind, order=gguf.GGUFEndian.BIG))
    big = ours.load(file, "float32")
    assert file.is_big_endian and big.config == little.config
    assert all(torch.equal(a, b) for a, b in zip(big.parameters(), little.parameters()))
    assert (big.norm.weight == 1).all()


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_blocks_of_big_endian_files_are_refused(tmp_path, kind):
    file = ours.read(write(tmp_path / "b.gguf", kind=kind, order=gguf.GGUFEndian.BIG))
    with pytest.raises(ValueError, match=f"big-endian file, and .*{kind}.*gguf-convert-endian"):
        ours.load(file)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16"])
def test_the_parser_agrees_with_the_gguf_package(tmp_path, kind):
    path = write(tmp_path / "m.gguf", kind=kind, facts=[("a.b", [1, 2, 3]), ("c", ["x", "yy"])])
    file, reference = ours.read(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in reference.fields.items() if not k.startswith("GGUF.")}
    assert list(file.metadata) == list(fields) and file.metadata["c"] == ["x", "yy"]
    for key, value in fields.items():
        assert file.metadata[key] == pytest.approx(value), key
    for tensor in reference.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(file.read(tensor.name), expected)


# ---- facts ----
@pytest.mark.parametrize(
    "facts",
    [
        {"llama.tensor_data_layout": "Meta AI original pth", "llama.attention.causal": True},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0},
        {"llama.rope.scale_linear": 1.0, "llama.rope.scaling.original_context_length": 64},
        {"llama.attention.head_count_kv": [2], "llama.feed_forward_length": [64]},
        {"llama.attention.head_count": [2], "llama.attention.layer_norm_epsilon": 1e-6},
        {"llama.rope.dimension_count": 16, "llama.vocab_size": 96, "llama.expert_count": 0},
        {"llama.expert_used_count": 0, "llama.expert_shared_count": 0},
        {"llama.attention.clamp_kqv": 0.0, "llama.attention.max_alibi_bias": 0.0},
        {"llama.attention.sliding_window": 0, "llama.attn_logit_softcapping": 0.0},
        {"llama.logit_scale": 1.0, "llama.residual_scale": 1.0, "llama.embedding_scale": 1.0},
        {"llama.use_parallel_residual": False, "llama.attention.scale": 0.25},
        {"llama.attention.key_length": 16, "llama.attention.value_length": 16},
        {"llama.decoder_start_token_id": 1, "llama.pooling_type": 0, "llama.name": "x"},
        {"general.quantization_version": 2, "general.file_type": 7, "quantize.imatrix.file": "x"},
        {"tokenizer.ggml.padding_token_id": -1, "tokenizer.ggml.eos_token_id": 96},
        {"split.count": 1, "split.no": 0},
        {"split.count": 0},
    ],
    ids=lambda facts: ", ".join(facts)[:60],
)
def test_facts_that_lamoe_assumes_are_accepted(tmp_path, facts):
    plain = ours.load(ours.read(write(tmp_path / "plain.gguf")))
    found = ours.load(ours.read(write(tmp_path / "m.gguf", facts=facts.items())))
    assert found.config == plain.config
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), plain.parameters()))


# ---- broken and hostile headers ----
def test_alignment_is_followed(tmp_path):
    for alignment in (8, 64, 4096):
        file = ours.read(write(tmp_path / "m.gguf", alignment=alignment))
        assert (ours.load(file).norm.weight == 1).all()


ENDLESS = header(
    string(b"general.x") + struct.pack("<IIQ", 9, 0, 2**62) + bytes(11), tensors=0, keys=1
)


@pytest.mark.parametrize(
    "raw, says",
    [
        (ENDLESS, "promises 4,611,686,018,427,387,904 values of 'general.x'"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 8, 2**62), keys=1), "values of 'k'"),
        (header(struct.pack("<Q", 2**63), keys=1) + bytes(20), "needs 9,223,372,036,854,775,808"),
        (header(keys=2**40), "promises 1,099,511,627,776 metadata keys"),
        (header(tensors=2**40), "promises 1,099,511,627,776 tensors"),
        (
            header(string(b"k") + b"\t\0\0\0" + struct.pack("<IQ", 9, 1) * 6, keys=1),
            "nested more than 3",
        ),
        (header(string(b"k") + struct.pack("<II", 99, 0), keys=1), "type 99, which is not known"),
        (header(string(b"k") + struct.pack("<IB", 7, 2), keys=1), "neither true nor false"),
        (header(string(b"\xff") + struct.pack("<II", 4, 0), keys=1), "not UTF-8"),
        (header((string(b"k") + struct.pack("<II", 4, 0)) * 2, keys=2), "'k' occurs twice"),
        (header(described(b"a", 0) * 2, tensors=2) + bytes(99), "tensor 'a' occurs twice"),
        (header(described(b"a", 0, kind=5), tensors=1) + bytes(99), "type 5, which"),
        (header(described(b"a", 0, (1,) * 5), tensors=1) + bytes(99), "has 5 dimensions"),
        (header(described(b"a", 0, (8,), 8), tensors=1) + bytes(99), "8 elements, which Q8_0"),
        (header(described(b"a", 0, (2**40, 2**40)), tensors=1) + bytes(99), "it is truncated"),
        (header(described(b"a", 2**40), tensors=1) + bytes(99), "it is truncated"),
        (header(described(b"a", 8), tensors=1) + bytes(99), "not aligned to 32"),
        (
            header(described(b"a", 0, (16,)), described(b"b", 32), tensors=2) + bytes(199),
            "'a' and 'b' overlap",
        ),
        *(
            (
                header(string(b"general.alignment") + struct.pack("<II", 4, n), keys=1),
                f"general.alignment is {n}; it must be a power of two",
            )
            for n in (0, 1, 33)
        ),
        (header(version=1), "version 1; lamoe reads the versions 2 and 3"),
        (header(version=4), "version 4; lamoe reads"),
        (b"ggjt" + bytes(40), "begins with b'ggjt'"),
        (b"PK\3\4" + bytes(40), "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
        (b"<!doctype html>", "a web page"),
        (b"", "needs 4 bytes, but 0 are left"),
    ],
)
def test_broken_headers_are_refused(tmp_path, raw, says):
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(ValueError) as error:
        ours.read(tmp_path / "m.gguf")
    assert says in str(error.value) and "m.gguf" in str(error.value)


def test_a_header_of_too_many_values_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "MAX_VALUES", 10)
    path = write(tmp_path / "m.gguf", facts=[("k", list(range(11)))])
    with pytest.raises(ValueError, match="more than 10 values"):
        ours.read(path)


def test_mutated_files_load_or_are_refused_in_bounded_time_and_memory(tmp_path):
    """Change bytes, cut, and write extreme numbers into 300 small files."""
    facts = [("tokenizer.ggml.tokens", ["a", "b"]), ("llama.attention.causal", True)]
    good = write(tmp_path / "good.gguf", kind="Q8_0", facts=facts).read_bytes()
    end, path = good.index(b"blk.0.ffn_down") + 80, tmp_path / "bad.gguf"
    random, refused, slowest = np.random.default_rng(5), 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(300):
        bad = bytearray(good)
        for _ in range(random.integers(1, 4)):
            at = int(random.integers(4, end))
            if i % 3 == 0:
                bad[at] = random.integers(256)
            elif i % 3 == 1:
                number = [0, 1, 300, 2**31, 2**32 - 1, 2**62, 2**64 - 1][random.integers(7)]
                bad[at : at + 8] = number.to_bytes(8, "little")
            else:
                bad = bad[:at] + bad[at + int(random.integers(0, 9)) :]
        path.write_bytes(bad[: len(bad) - int(random.integers(0, 2) * 100)])
        start = time.perf_counter()
        try:
            ours.load(ours.read(path))
        except (ValueError, OSError) as e:
            assert "bad.gguf" in str(e)
            refused += 1
        slowest = max(slowest, time.perf_counter() - start)
    assert refused > 150 and slowest < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
