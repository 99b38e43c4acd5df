"""Tests of PagePool: ownership, sharing by content, and the order of eviction."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamoe.engine.pages import PagePool, content_hash


def hashes(*tokens) -> list[bytes]:
    """Return the content hashes of successive pages of one token each."""
    out = []
    for t in tokens:
        out.append(content_hash(out[-1] if out else b"", [t]))
    return out


def full(pool: PagePool, contents: list[bytes]) -> list[int]:
    """Take pages and publish them under these content hashes."""
    pages = [pool.take() for _ in contents]
    for page, content in zip(pages, contents):
        pool.publish(page, content)
    return pages


def test_every_page_is_taken_once():
    pool = PagePool(3, 16)
    pages = [pool.take() for _ in range(3)]
    assert (
        sorted(pages) == [0, 1, 2]
        and pool.take() is None
        and (pool.available, pool.owned) == (0, 3)
    )
    pool.give_back(pages[1:])
    assert (pool.available, pool.owned) == (2, 1)
    assert {pool.take(), pool.take()} == set(pages[1:]) and pool.take() is None


def test_unpublished_content_is_not_found():
    pool, (a, b) = PagePool(2, 1), hashes(7, 8)
    page = pool.take()
    assert pool.share(a) is None
    pool.publish(page, a)
    assert pool.share(b) is None and pool.share(a) == page
    assert pool.owned == 1


def test_a_shared_page_is_available_when_its_last_owner_returns_it():
    pool, (a,) = PagePool(1, 1), hashes(7)
    (page,) = full(pool, [a])
    assert pool.share(a) == page and pool.share(a) == page  # the page now has three owners
    for _ in range(2):
        pool.give_back([page])
        assert (pool.available, pool.owned) == (0, 1) and pool.take() is None
    pool.give_back([page])
    assert (pool.available, pool.owned) == (1, 0)
    # Taking the page has removed its old content.
    assert pool.take() == page and pool.share(a) is None


def test_kept_pages_can_be_shared_again():
    pool, (a, b) = PagePool(2, 1), hashes(7, 8)
    pages = full(pool, [a, b])
    pool.give_back(pages)
    assert pool.available == 2 and pool.owned == 0
    assert pool.share(a) == pages[0] and pool.share(b) == pages[1] and pool.available == 0


def test_free_pages_are_taken_before_kept_ones():
    pool, (a,) = PagePool(3, 1), hashes(7)
    kept = full(pool, [a])
    pool.give_back(kept)
    assert kept[0] not in (pool.take(), pool.take())
    assert pool.share(a) == kept[0]


def test_the_least_recently_used_text_is_evicted_first():
    pool = PagePool(3, 1)
    texts = [hashes(t) for t in (1, 2, 3)]
    pages = [full(pool, t) for t in texts]
    for p in pages:
        pool.give_back(p)
    pool.give_back([pool.share(texts[0][0])])  # this text is now the most recently used one
    assert [pool.take() for _ in range(3)] == [pages[1][0], pages[2][0], pages[0][0]]


def test_the_last_pages_of_a_text_are_evicted_first():
    """The last pages of a text are evicted first, because they need the pages before them."""
    pool, text = PagePool(3, 1), hashes(1, 2, 3)
    pages = full(pool, text)
    pool.give_back(pages)
    assert pool.take() == pages[2]
    assert (
        pool.share(text[0]) == pages[0]
        and pool.share(text[1]) == pages[1]
        and pool.share(text[2]) is None
    )


def test_two_pages_with_the_same_content():
    """If two sequences compute the same page, the first is shared and the second becomes free."""
    pool, (a,) = PagePool(2, 1), hashes(7)
    one, two = full(pool, [a]) + full(pool, [a])
    assert pool.share(a) == one
    pool.give_back([two])
    assert pool.take() == two and pool.take() is None
    pool.give_back([one])
    pool.give_back([one])
    assert pool.share(a) == one


def test_a_content_hash_depends_on_all_tokens_so_far():
    a, b = content_hash(b"", [1, 2]), content_hash(b"", [2, 1])
    assert (
        len(
            {
                a,
                b,
                content_hash(a, [3, 4]),
                content_hash(b, [3, 4]),
                content_hash(b"", [1, 2, 3, 4]),
                content_hash(b"", [3, 4]),
            }
        )
        == 6
    )
    assert content_hash(a, [3, 4]) == content_hash(content_hash(b"", [1, 2]), [3, 4])
    # Tokens have a fixed width in the hashed bytes.
    assert content_hash(b"", [1, 256]) != content_hash(b"", [257, 0])


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 6),
    st.lists(
        st.tuples(st.sampled_from(["take", "share", "publish", "give"]), st.integers(0, 7)),
        max_size=60,
    ),
)
def test_against_a_model_of_the_pool(n, operations):
    """After every operation the pool agrees with a simple model of it."""
    pool = PagePool(n, 1)
    owners: dict[int, int] = {}  # page -> number of owners
    kept: list[int] = []  # pages, least recently used first
    content: dict[int, bytes] = {}  # page -> published hash
    held: list[int] = []  # pages, once per owner that holds them
    for operation, k in operations:
        if operation == "take":
            free = set(range(n)) - set(owners) - set(kept)
            page = pool.take()
            if free:
                assert page in free
            elif kept:
                assert page == kept.pop(0)
                del content[page]
            else:
                assert page is None
            if page is not None:
                owners[page] = 1
                held.append(page)
        elif operation == "share":
            wanted = hashes(k)[0]
            expected = next((p for p, c in content.items() if c == wanted), None)
            assert pool.share(wanted) == expected
            if expected is not None:
                if expected in kept:
                    kept.remove(expected)
                owners[expected] = owners.get(expected, 0) + 1
                held.append(expected)
        elif operation == "publish" and held:
            page, new = held[k % len(held)], hashes(k)[0]
            pool.publish(page, new)
            if new not in content.values() and page not in content:
                content[page] = new
        elif operation == "give" and held:
            page = held.pop(k % len(held))
            pool.give_back([page])
            owners[page] -= 1
            if not owners[page]:
                del owners[page]
                if page in content:
                    kept.append(page)
        assert pool.owned == len(owners) and pool.available == n - len(owners)
    for page in held:
        pool.give_back([page])
    assert pool.owned == 0 and pool.available == n


def test_giving_back_a_page_without_owner_is_an_error():
    pool = PagePool(2, 1)
    page = pool.take()
    pool.give_back([page])
    with pytest.raises(KeyError):
        pool.give_back([page])


def test_forgotten_pages_are_not_shared_and_become_free():
    pool = PagePool(4, 2)
    pages = [pool.take() for _ in range(3)]
    contents = [content_hash(b"", [i, i]) for i in range(3)]
    for page, content in zip(pages[:2], contents):
        pool.publish(page, content)
    # The page has a second owner now, so it is not freed.
    assert pool.share(contents[0]) == pages[0]
    pool.forget(pages)
    assert [pool.share(c) for c in contents] == [None] * 3 and pool.owned == 3
    pool.give_back(pages)
    pool.give_back(pages[:1])
    assert (
        pool.owned == 0
        and pool.available == 4
        and not pool._kept
        and not pool._page_of
        and not pool._content_of
    )
    again = pool.take()
    pool.publish(again, contents[0])  # another page with the same content, computed again
    assert pool.share(contents[0]) == again
