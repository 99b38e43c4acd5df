"""Tests that C++ and Python agree on the cost rule of attention and the memory of its states."""

import ast
import random
import re
from pathlib import Path

import pytest

import lamoe
from lamoe.backends.cpu import native
from lamoe.model.attention import cheaper_form
from oracles import tiny

lib = native.lib
pytestmark = pytest.mark.skipif(lib is None, reason="needs the compiled kernels")

MLA = tiny.config(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
GQA = tiny.config("llama", num_attention_heads=8, num_key_value_heads=2)


def settings(c) -> dict:
    """Return the sizes that attention depends on, as `_native.Model` takes them."""
    sizes = dict(
        layers=1,
        vocab=c.vocab_size,
        hidden=c.hidden_size,
        heads=c.num_attention_heads,
        kv_heads=c.n_kv_heads,
        head_dim=c.qk_head_dim,
        rope=c.rope_dim,
    )
    if c.is_mla:
        sizes |= dict(latent=c.kv_lora_rank, nope=c.qk_nope_head_dim, value=c.v_head_dim)
    return sizes


def test_cheaper_form_equals_that_of_the_torch_ops():
    generator = random.Random(1)
    for _ in range(500):
        tokens = generator.choice([2, 3, 60, 170, 171, generator.randint(2, 4096)])
        rows = tokens + generator.choice([0, 1, generator.randint(0, 100_000)])
        assert lib.cheaper_form(settings(MLA), tokens, rows) == cheaper_form(MLA, tokens, rows)


def test_a_single_token_is_always_absorbed():
    assert cheaper_form(MLA, 1, 1) == "expand"  # this function counts multiply-adds only
    for c in (MLA, GQA):
        assert {lib.cheaper_form(settings(c), 1, rows) for rows in (1, 2, 100_000)} == {"absorb"}


def test_gqa_expands_above_48_queries_of_a_kv_head():
    assert [lib.cheaper_form(settings(GQA), t, 100) for t in (12, 13)] == ["absorb", "expand"]


def test_state_bound_is_that_of_one_block_of_lanes():
    # A sequence of up to 128 rows has one chunk. Its 8 lanes fill half of a block of 16 lanes.
    c = tiny.config("llama", num_attention_heads=8, num_key_value_heads=1)
    block = 4 * (32 + 16 * c.qk_head_dim)
    assert lib.max_state_bytes(settings(c), 128, 1, 1) == block + block // 4 + 4096


def test_state_bound_grows_with_every_argument_up_to_the_limit():
    for c in (MLA, GQA):
        s = settings(c)
        sizes = [lib.max_state_bytes(s, n, n, n) for n in (1, 2, 64, 1024, 4096, 1 << 20)]
        assert sizes == sorted(sizes)
        limit = 128 << 20
        assert sizes[-1] <= limit + limit // 4 + 4096


@pytest.mark.parametrize("numbers", [(0, 1), (2, 1)])
def test_impossible_lengths_are_refused(numbers):
    with pytest.raises(ValueError, match="tokens"):
        lib.cheaper_form(settings(MLA), *numbers)


def test_stub_names_every_binding():
    """_native.pyi names every binding. `cmake --build DIR --target stub` regenerates the file."""
    stub = ast.parse((Path(lamoe.__file__).parent / "_native.pyi").read_text())
    found = {n.name: n for n in stub.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    public = {name for name in dir(lib) if not name.startswith("_")}
    assert set(found) == public
    for name, node in found.items():
        binding = getattr(lib, name)
        if isinstance(node, ast.FunctionDef):
            signature = binding.__doc__.splitlines()[0]
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
            assert names == re.findall(r"(\w+): ", signature)
            assert (ast.get_docstring(node) or "") in binding.__doc__
    for name in ("Model", "UnitEncoder"):
        methods = {n.name for n in found[name].body if isinstance(n, ast.FunctionDef)}
        members = {n for n in vars(getattr(lib, name)) if not n.startswith("__")}
        assert methods == members | {"__init__"}
