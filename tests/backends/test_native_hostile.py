"""Tests of the extension with invalid arguments, incomplete models and concurrent callers.

The tests run in the test process, so a crash ends the whole test run and cannot go unnoticed.
"""

import threading

import numpy as np
import pytest
import torch

from lamoe.backends.base import Formats
from lamoe.backends.cpu import native, packed
from lamoe.backends.cpu.backend import CpuBackend, codec_numbers
from lamoe.backends.paged_cache import PagedCache
from native_run import Run
from oracles import tiny

pytestmark = pytest.mark.skipif(not native.available(), reason="needs the compiled kernels")
lib = native.lib
HUGE = [-1, 0, 2**31 - 1, 2**31, 2**33, 2**62]
CODEC = codec_numbers("6bit", (16, 8))


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


# ---- ops ----
@pytest.mark.parametrize("n", HUGE)
def test_impossible_sizes_are_refused(n):
    data = np.zeros(1088, np.uint8)
    for call in (
        lambda: lib.mat_bytes(2, n, 64),
        lambda: lib.mat_bytes(2, 16, n),
        lambda: lib.unpack(2, data, n, 64, 1.0),
        lambda: lib.unpack(2, data, 16, n, 1.0),
        lambda: lib.linear(2, data, 1.0, n, floats(1, 64)),
    ):
        with pytest.raises(ValueError, match="a matrix has from 1 to|takes .* bytes"):
            call()


@pytest.mark.parametrize("fmt", [-1, 4, 2**31 - 1])
def test_unknown_formats_are_refused(fmt):
    for call in (
        lambda: lib.mat_bytes(fmt, 1, 1),
        lambda: lib.pack(fmt, floats(1, 1)),
        lambda: lib.linear(fmt, np.zeros(64, np.uint8), 1.0, 1, floats(1, 1)),
    ):
        with pytest.raises(ValueError, match="format .* is not known"):
            call()


def test_buffers_of_the_wrong_size_are_refused():
    data = np.zeros(lib.mat_bytes(3, 17, 65), np.uint8)
    for wrong in (data[:-1], np.zeros(len(data) + 1, np.uint8), data[:0]):
        with pytest.raises(ValueError, match="takes 2304 bytes, found"):
            lib.linear(3, wrong, 1.0, 17, floats(1, 65))
    with pytest.raises(ValueError, match="one number per input"):
        lib.pack(3, floats(2, 5), np.ones(4, np.float32))
    with pytest.raises(ValueError, match="at least one|from 1 to"):
        lib.pack(3, floats(0, 5))


def test_arrays_of_another_type_or_layout_are_refused_and_never_copied():
    data = np.zeros(lib.mat_bytes(0, 1, 4), np.uint8)
    for x in (
        np.zeros((1, 4)),
        np.zeros((1, 4), np.int32),
        floats(4),
        floats(1, 1, 4),
        floats(2, 8)[:, ::2],
        None,
        [[0.0] * 4],
    ):
        with pytest.raises(TypeError):
            lib.linear(0, data, 1.0, 1, x)
    with pytest.raises(TypeError):
        lib.linear(0, data.astype(np.int8), 1.0, 1, floats(1, 4))
    with pytest.raises(TypeError):
        lib.pack(0, np.zeros((2, 2)))


def test_unknown_isa_and_invalid_threads_are_refused():
    with pytest.raises(ValueError, match="isa is 'sse'; this CPU runs: .*scalar"):
        lib.pack(0, floats(1, 1), isa="sse")
    for threads in (-1, 0, 1025, 2**31 - 1):
        with pytest.raises(ValueError, match="threads is"):
            lib.pack(0, floats(1, 1), threads=threads)


@pytest.mark.parametrize(
    "numbers",
    [
        CODEC[:6],
        [*CODEC, 1],
        [3, *CODEC[1:]],
        [-1, *CODEC[1:]],
        [2, 0, *CODEC[2:]],
        [2, 9000, *CODEC[2:]],
        [*CODEC[:3], 3, *CODEC[4:]],
        [*CODEC[:4], 9, *CODEC[5:]],
        [*CODEC[:5], 8, CODEC[6]],
        [*CODEC[:5], 0, CODEC[6]],
        [*CODEC[:5], -16, CODEC[6]],
        [*CODEC[:6], 1],
        [*CODEC[:6], 2**31 - 1],
        [*CODEC[:6], -1],
        [0, *CODEC[1:]],
    ],
)
def test_inconsistent_codec_numbers_are_refused(numbers):
    with pytest.raises(ValueError, match="codec|cache row"):
        lib.encode(numbers, floats(2, 24))
    with pytest.raises(ValueError, match="codec|cache row"):
        lib.decode(numbers, np.zeros((2, CODEC[6]), np.uint8))
    with pytest.raises(ValueError, match="as wide as"):
        lib.encode(CODEC, floats(2, 25))
    with pytest.raises(ValueError, match="the codec's bytes"):
        lib.decode(CODEC, np.zeros((2, CODEC[6] + 1), np.uint8))


# ---- building a model ----
SETTINGS = dict(
    layers=1,
    vocab=8,
    hidden=8,
    heads=2,
    kv_heads=2,
    head_dim=4,
    latent=0,
    rope=4,
    nope=0,
    value=0,
    elem=0,
)
MLA = SETTINGS | dict(latent=6, head_dim=8, nope=4, value=4)
MOE = SETTINGS | dict(experts=4, top_k=2, moe_width=4)


@pytest.mark.parametrize(
    "base, change",
    [
        *(
            (SETTINGS, {k: v})
            for k in ("layers", "vocab", "hidden", "heads", "kv_heads", "head_dim", "rope")
            for v in (0, -1, 2**31 - 1)
        ),
        (SETTINGS, dict(kv_heads=3)),
        (SETTINGS, dict(head_dim=5, rope=5)),
        (SETTINGS, dict(head_dim=6)),
        (SETTINGS, dict(elem=2)),
        (SETTINGS, dict(elem=-1)),
        (SETTINGS, dict(nope=2)),
        (MLA, dict(nope=6)),
        (MLA, dict(latent=7)),
        (MLA, dict(value=5)),
        (MLA, dict(latent=-2)),
        (MLA, dict(q_lora=-1)),
        (MOE, dict(top_k=5)),
        (MOE, dict(top_k=0)),
        (MOE, dict(experts=-1)),
        (MOE, dict(experts=40000)),
        (MOE, dict(groups=3)),
        (MOE, dict(groups=0)),
        (MOE, dict(moe_width=0)),
        (MOE, dict(groups=4, top_groups=1, group_limited=True)),
        (MOE, dict(groups=2, top_groups=3)),
        (MOE, dict(tok_p=2)),
    ],
)
def test_impossible_model_settings_are_refused(base, change):
    lib.Model(base, 1)
    with pytest.raises(ValueError):
        lib.Model(base | change, 1)


def test_settings_of_another_type_and_invalid_threads_are_refused():
    for bad in (dict(SETTINGS, layers="1"), dict(SETTINGS, layers=2**40), dict(SETTINGS, eps=None)):
        with pytest.raises(ValueError, match="is not a number of its kind"):
            lib.Model(bad, 1)
    for threads in (-1, 0, 5000):
        with pytest.raises(ValueError, match="threads is"):
            lib.Model(SETTINGS, threads)


def without_tensor(config, drop: str) -> CpuBackend:
    """Make a model whose weights are all set except `drop`."""
    m = tiny.model(config, dtype=torch.float32)
    tensors = CpuBackend.from_transformer(m).packed
    p = CpuBackend.__new__(CpuBackend)
    real = packed.packed_tensors
    try:
        packed.packed_tensors = lambda c, formats: (
            piece for piece in real(c, formats) if piece.key != drop
        )
        p.__init__(config, Formats("fp32"), tensors)
    finally:
        packed.packed_tensors = real
    return p


KEYS = (
    {
        c: [p.key for p in packed.packed_tensors(c, Formats("fp32")) if p.layer in (-1, 1)]
        for c in (tiny.HARD, tiny.config("llama", num_key_value_heads=2))
    }
    if native.lib
    else {}
)


@pytest.mark.parametrize("config, key", [(c, key) for c, keys in KEYS.items() for key in keys])
def test_a_model_without_one_of_its_weights_does_not_run(config, key):
    p = without_tensor(config, key)
    with pytest.raises(
        ValueError,
        match=key.split(".")[-1] if not key.endswith((".w13", ".gate")) else "w13|w2|gate",
    ):
        Run(p).feed({"a": [1, 2]})


def test_weights_of_other_sizes_are_refused():
    p = CpuBackend.from_transformer(tiny.model(tiny.HARD, dtype=torch.float32))
    fresh = lambda: CpuBackend(p.config, Formats("fp32"), p.packed).native
    n = fresh()
    for name, size in (("attn_norm", 31), ("ffn_norm", 33), ("q_norm", 32), ("kv_norm", 0)):
        with pytest.raises(ValueError, match=f"{name} has .* elements, found"):
            n.vector(0, name, floats(size))
    with pytest.raises(ValueError, match="embed has .* bytes, found 12"):
        n.raw(-1, "embed", np.zeros(12, np.uint8))
    odd = np.zeros(4 * 64 * 32 + 1, np.uint8)
    with pytest.raises(ValueError, match="address"):
        n.raw(-1, "embed", odd[1:])
    for call in (
        lambda: n.vector(0, "wq", floats(32)),
        lambda: n.raw(0, "norm", odd),
        lambda: n.set(0, "norm", 0, 1, 1, np.zeros(64, np.uint8), [1.0]),
    ):
        with pytest.raises(ValueError, match="unknown"):
            call()
    for layer in (-1, 3, 2**31 - 1):
        with pytest.raises(ValueError, match="no layer"):
            n.vector(layer, "attn_norm", floats(32))
    for scales in ([], [1.0, 1.0]):
        with pytest.raises(ValueError, match="take .* bytes"):
            n.set(0, "wo", 0, 32, 40, np.zeros(lib.mat_bytes(0, 32, 40), np.uint8), scales)
    for name, rows, cols, count in (
        ("wo", 16, 40, 1),
        ("wkv_a", 24, 16, 1),
        ("uk", 16, 12, 3),
        ("uv", 10, 18, 4),
        ("w13", 16, 32, 1),
        ("wq_b", 80, 40, 1),
    ):
        n = fresh()
        n.set(
            0,
            name,
            0,
            rows,
            cols,
            np.zeros(count * lib.mat_bytes(0, rows, cols), np.uint8),
            [1.0] * count,
        )
        # The sizes of all weights are checked together, in the first step.
        q = CpuBackend(p.config, Formats("fp32"), p.packed)
        q.native = n
        with pytest.raises(ValueError, match="layer 0: .*the config says"):
            Run(q).feed({"a": [1]})
    for fmt in (1, 2):  # the router must be float32
        n = fresh()
        n.set(1, "gate", fmt, 8, 32, np.zeros(lib.mat_bytes(fmt, 8, 32), np.uint8), [1.0])
        q.native = n
        with pytest.raises(ValueError, match="gate is in format"):
            Run(q).feed({"a": [1]})


def test_weights_cannot_be_replaced_after_a_step():
    p = CpuBackend.from_transformer(tiny.model(tiny.HARD, dtype=torch.float32))
    Run(p).feed({"a": [1]})
    with pytest.raises(ValueError, match="has run"):
        p.native.vector(0, "attn_norm", floats(32))
    with pytest.raises(ValueError, match="has run"):
        p.native.set(0, "wo", 0, 32, 40, np.zeros(lib.mat_bytes(0, 32, 40), np.uint8), [1.0])


def test_the_model_keeps_its_weights_alive():
    p = CpuBackend.from_transformer(tiny.model(tiny.HARD, dtype=torch.float32))
    want = Run(p).feed({"a": [1, 2, 3]})
    p.packed.clear()
    # If the weights were freed by mistake, these allocations would overwrite them.
    overwrite = [torch.full((1 << 16,), float("nan")) for _ in range(64)]
    assert torch.equal(Run(p).feed({"a": [1, 2, 3]}), want)
    del overwrite


# ---- steps ----
@pytest.fixture(scope="module")
def model():
    return CpuBackend.from_transformer(tiny.model(tiny.HARD, dtype=torch.float32), threads=2)


def step(p: CpuBackend, **changes):
    """Run a step of two sequences with some arguments replaced.

    One sequence adds 3 tokens after 2 cached ones, the other adds 1 token after 7.
    """
    cache = PagedCache(p.config, 4, 4, "fp32", p.dtype)
    a = dict(
        ids=np.array([1, 2, 3, 4], np.int32),
        cos_sin=np.ones((4, 8), np.float32),
        seqs=np.array([[3, 5, 0], [1, 8, 2]], np.int32),
        pages=np.array([3, 0, 2, 1], np.int32),
        rows=cache.rows.numpy(),
        page=4,
        format=codec_numbers("fp32", p.config.cache_row),
        out_rows=np.array([2, 3], np.int32),
        logits=True,
        experts=True,
    )
    return p.native.step(**(a | changes))


def i32(*x) -> np.ndarray:
    return np.array(x, np.int32)


@pytest.mark.parametrize(
    "changes",
    [
        dict(ids=i32()),
        dict(ids=i32(1, 2, 3)),
        dict(ids=i32(1, 2, 3, 64)),
        dict(ids=i32(1, -1, 3, 4)),
        dict(ids=i32(1, 2, 3, 2**31 - 1)),
        dict(cos_sin=floats(3, 8)),
        dict(cos_sin=floats(4, 7)),
        dict(out_rows=i32(4)),
        dict(out_rows=i32(-1)),
        dict(page=0),
        dict(page=-4),
        dict(page=5),
        dict(page=2**31 - 1),
        dict(seqs=i32([3, 5, 0])),
        dict(seqs=i32([3, 5, 0], [1, 8, 2], [1, 1, 0])),
        dict(seqs=i32([3, 5, 0], [0, 8, 2])),
        dict(seqs=i32([5, 5, 0], [-1, 8, 2])),
        dict(seqs=i32([3, 2, 0], [1, 8, 2])),
        dict(seqs=i32([3, 5, 0], [1, 8, 3])),
        dict(seqs=i32([3, 5, -1], [1, 8, 2])),
        dict(seqs=i32([3, 5, 2**31 - 1], [1, 8, 2])),
        dict(seqs=i32([3, 2**31 - 1, 0], [1, 8, 2])),
        dict(seqs=i32([3, 17, 0], [1, 8, 2])),
        dict(seqs=i32([2**31 - 1, 2**31 - 1, 0], [1, 8, 2])),
        dict(seqs=i32([3, 5], [1, 8])),
        dict(seqs=np.zeros((0, 3), np.int32)),
        dict(pages=i32(3, 0, 2, 4)),
        dict(pages=i32(3, -1, 2, 1)),
        dict(pages=i32(3, 0, 2, 2**31 - 1)),
        dict(pages=i32()),
        dict(format=codec_numbers("bf16", (16, 8))),
        dict(format=codec_numbers("fp32", (8, 16))),
        dict(format=codec_numbers("fp32", (16, 10))),
        dict(format=[0, 16, 8, 32, 32, 16, 95]),
        dict(format=[]),
        dict(rows=np.zeros((2, 16, 96), np.uint8)),
        dict(rows=np.zeros((3, 15, 96), np.uint8)),
        dict(rows=np.zeros((3, 16, 95), np.uint8)),
        dict(rows=np.zeros((3, 0, 96), np.uint8)),
    ],
)
def test_invalid_steps_are_refused(model, changes):
    step(model)
    with pytest.raises(ValueError):
        step(model, **changes)
    step(model)


@pytest.mark.parametrize(
    "changes",
    [
        dict(ids=np.array([1, 2, 3, 4])),
        dict(ids=i32([1, 2, 3, 4])),
        dict(cos_sin=np.ones((4, 8))),
        dict(seqs=np.array([[3, 5, 0], [1, 8, 2]])),
        dict(pages=np.array([3.0, 0, 2, 1], np.float32)),
        dict(rows=np.zeros((3, 16, 96), np.int8)),
        dict(rows=np.zeros((3, 32, 96), np.uint8)[:, ::2]),
        dict(rows=np.zeros((3, 16 * 96), np.uint8)),
        dict(out_rows=np.array([0])),
        dict(ids=None),
    ],
)
def test_step_refuses_arrays_of_another_type_or_layout(model, changes):
    """A step never copies an array of another type or layout.

    A copy of the cache would receive the new rows instead of the cache itself.
    """
    with pytest.raises(TypeError):
        step(model, **changes)


def test_a_read_only_cache_is_refused(model):
    rows = np.zeros((3, 16, 96), np.uint8)
    rows.setflags(write=False)
    with pytest.raises(TypeError):
        step(model, rows=rows)


def test_a_cache_at_an_odd_address_is_refused(model):
    odd = np.zeros(3 * 16 * 96 + 1, np.uint8)[1:].reshape(3, 16, 96)
    with pytest.raises(ValueError, match="the cache begins at an address"):
        step(model, rows=odd)


def test_unsupported_geometries_are_named():
    wide = tiny.config("llama", num_attention_heads=4, head_dim=2050)
    assert "at most 8,192 elements" in packed.unsupported(wide) and "even" in packed.unsupported(
        tiny.config(v_head_dim=7)
    )
    with pytest.raises(ValueError, match="at most 8,192"):
        list(packed.packed_tensors(wide, Formats("fp32")))


def test_a_step_without_output_rows(model):
    out, chosen = step(model, out_rows=i32())
    assert out.shape == (0, 64) and chosen.shape == (2, 4, 3)
    states, chosen = step(model, logits=False, experts=False)
    assert states.shape == (2, 32) and chosen.shape[0] == 0


def test_concurrent_callers(model):
    """Threads that share a model, each with its own cache, get the results of one thread."""
    texts = {i: tiny.ids(model.config, 40, seed=i).tolist() for i in range(4)}
    want = {i: Run(model).all(ids, [7]) for i, ids in texts.items()}
    got, errors = {}, []

    def work(i):
        try:
            for _ in range(5):
                got[i] = Run(model, seed=i).all(texts[i], [7])
                assert torch.equal(got[i], want[i])
                with pytest.raises(ValueError):
                    step(model, ids=i32(1, 2, 3, 64))
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in texts]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors and len(got) == 4


def test_creating_and_freeing_many_models():
    m = tiny.model(tiny.HARD, dtype=torch.float32)
    for i in range(20):
        p = CpuBackend.from_transformer(m, threads=1 + i % 4)
        if i % 2:
            Run(p).feed({"a": [1, 2]})
