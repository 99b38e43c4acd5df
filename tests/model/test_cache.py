"""Tests of the paged cache: its bytes, its slots, and equal results with a contiguous cache."""

import pytest
import torch

from lamoe.backends import cache_codec
from lamoe.backends.paged_cache import Group, PagedCache, Step
from lamoe.model import accounting
from lamoe.model.cache import KVCache
from oracles import tiny

CONFIGS = {
    "mla": tiny.HARD,
    "mha": tiny.config("deepseek"),
    "gqa": tiny.config("llama", num_key_value_heads=2),
}
V2_ROW = tiny.config("deepseek_v2", kv_lora_rank=512, qk_rope_head_dim=64)


def written(format: str) -> str:
    """Return `format`, or skip the test if cache_codec.py does not support it."""
    try:
        cache_codec.row_bytes(format, (512, 64))
    except (KeyError, NotImplementedError):
        pytest.skip(f"cache_codec.py does not write {format} yet")
    return format


def rows_of(c, n: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, width, generator=generator) for width in c.cache_row)


# ---- bytes ----
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("format, size", [("fp32", 4), ("bf16", 2)])
def test_bytes_are_the_closed_form(name, format, size):
    """Allocated bytes equal tokens x layers x elements of a row (rotary part included) x width."""
    c = CONFIGS[name]
    cache = PagedCache(c, 5, 8, format)
    expected = 5 * 8 * accounting.cache_elements(c) * size
    assert cache.nbytes == cache.rows.untyped_storage().nbytes() == expected
    part = {"mla": 16 + 8, "mha": 2 * 32, "gqa": 2 * 16}[name]
    assert expected == 40 * 3 * part * size  # 3 layers


@pytest.mark.parametrize("format", cache_codec.FORMATS)
def test_bytes_of_every_format(format):
    cache = PagedCache(V2_ROW, 4, 16, written(format))
    assert (
        cache.rows.untyped_storage().nbytes()
        == cache.nbytes
        == 4 * 16 * 3 * cache_codec.row_bytes(format, (512, 64))
    )


def test_six_bit_rows_take_six_bits():
    # 576 elements x 6 bits, scales included.
    assert cache_codec.row_bytes(written("6bit"), (512, 64)) <= 432


def test_formats_are_ordered_by_size():
    sizes = [
        cache_codec.row_bytes(written(f), (512, 64))
        for f in ("fp32", "bf16", "int8", "6bit", "4bit")
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5
    assert sizes[:2] == [4 * 576, 2 * 576]


# ---- rows ----
@pytest.mark.parametrize("name", CONFIGS)
def test_written_rows_are_read_back(name):
    """Rows written to scattered slots are read back in any order, and other slots do not change."""
    c = CONFIGS[name]
    cache = PagedCache(c, 3, 4, "fp32")
    cache.rows.fill_(0xFF)
    parts, slots = rows_of(c, 5), torch.tensor([7, 2, 11, 0, 5])
    cache.write(1, slots, parts)
    asked = torch.tensor([[4, 0], [0, 2], [1, 3]])
    for part, out in zip(parts, cache.read(1, slots[asked])):
        assert torch.equal(out, part[asked])
    untouched = [s for s in range(12) if s not in slots.tolist()]
    assert (cache.rows[1][untouched] == 0xFF).all() and (cache.rows[[0, 2]] == 0xFF).all()


@pytest.mark.parametrize("format", cache_codec.FORMATS)
def test_a_stored_row_does_not_depend_on_other_rows(format):
    """The bytes of a row do not depend on other rows. Otherwise batching would change results."""
    c = V2_ROW
    parts, cache = rows_of(c, 33), PagedCache(c, 9, 16, written(format))
    cache.write(0, torch.arange(33), parts)
    for i in (0, 17, 32):
        cache.write(0, torch.tensor([128 + i % 16]), tuple(p[i : i + 1] for p in parts))
        assert torch.equal(cache.rows[0, i], cache.rows[0, 128 + i % 16])
    close = {"fp32": 0, "bf16": 0.005, "int8": 0.02, "6bit": 0.06, "4bit": 0.2}[format]
    for part, out in zip(parts, cache.read(0, torch.arange(33)[None])):
        assert out.shape == (1, *part.shape) and out.dtype == torch.float32
        assert (out[0] - part).norm() <= close * part.norm()


def test_invalid_page_counts_are_refused():
    for pages, size in ((0, 16), (3, 0), (-1, 16)):
        with pytest.raises(ValueError, match=f"asked for {pages} of {size}"):
            PagedCache(tiny.HARD, pages, size)


# ---- model with a paged cache ----
@pytest.mark.parametrize("name", CONFIGS)
def test_paged_decoding_equals_contiguous_decoding(name, impl):
    """Paged decoding equals decoding each sequence alone from a contiguous cache.

    Two prompts are prefilled as two groups, then decoded as one padded group. Their slots are
    scattered, and all other slots hold NaN.
    """
    c, m = CONFIGS[name], tiny.model(CONFIGS[name], dtype=torch.float32)
    cache = PagedCache(c, 8, 4, "fp32")
    cache.rows.fill_(0xFF)  # NaN in every slot
    assert cache.read(0, torch.tensor([[0]]))[0].isnan().all()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    slots, texts = [order[:7], order[7:20]], [tiny.ids(c, 1, 7, seed=4), tiny.ids(c, 1, 13, seed=5)]
    plain = []
    for text in texts:
        alone = KVCache(c, 1, 13)
        plain.append([m(text[:, :-1], alone)[0], m(text[:, -1:], alone)[0]])
    step = Step(
        cache,
        torch.cat([torch.arange(6), torch.arange(12)]),
        torch.cat([slots[0][:6], slots[1][:12]]),
        [
            Group(slice(0, 6), slots[0][None, :6], None),
            Group(slice(6, 18), slots[1][None, :12], None),
        ],
    )
    got = m(torch.cat([t[:, :-1] for t in texts], 1), step)[0]
    torch.testing.assert_close(got, torch.cat([plain[0][0], plain[1][0]]), rtol=1e-4, atol=1e-4)
    padded = torch.stack([torch.cat([slots[0][:1].expand(6), slots[0]]), slots[1]])
    step = Step(
        cache,
        torch.tensor([6, 12]),
        torch.stack([slots[0][-1], slots[1][-1]]),
        [Group(slice(0, 2), padded, torch.tensor([6, 0]))],
    )
    got = m(torch.cat([t[:, -1:] for t in texts], 1), step)[0]
    torch.testing.assert_close(got, torch.cat([plain[0][1], plain[1][1]]), rtol=1e-4, atol=1e-4)


def test_decoding_without_the_padding_mask_is_wrong():
    """Decoding a padded group is wrong without the argument `first`, which masks the padding."""
    c, m = tiny.HARD, tiny.model(tiny.HARD, dtype=torch.float32)
    out = []
    for first in (torch.tensor([2]), None):
        cache, text = PagedCache(c, 2, 8, "fp32"), tiny.ids(c, 1, 6)
        m(
            text,
            Step(
                cache,
                torch.arange(6),
                torch.arange(6),
                [Group(slice(0, 6), torch.arange(6)[None], None)],
            ),
        )
        padded = torch.tensor([[0, 0, *range(7)]])
        out.append(
            m(
                text[:, :1],
                Step(
                    cache, torch.tensor([6]), torch.tensor([6]), [Group(slice(0, 1), padded, first)]
                ),
            )
        )
    assert (out[0] - out[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "groups", [[slice(0, 2)], [slice(0, 2), slice(3, 4)], [slice(2, 4), slice(0, 2)]]
)
def test_groups_cover_the_tokens_in_order(groups):
    cache = PagedCache(tiny.HARD, 1, 4, "fp32")
    with pytest.raises(AssertionError):
        Step(
            cache,
            torch.arange(4),
            torch.arange(4),
            [Group(g, torch.arange(4)[None], None) for g in groups],
        )
