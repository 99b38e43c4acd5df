"""Pages: who owns them, whose content they keep, who loses it first."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamoe.engine.pages import PagePool, content_hash


def names(*tokens) -> list[bytes]:
    """Contents of successive pages, one per token."""
    out = []
    for t in tokens:
        out.append(content_hash(out[-1] if out else b"", [t]))
    return out


def full(pool: PagePool, contents: list[bytes]) -> list[int]:
    """Pages taken, filled and published under these contents."""
    pages = [pool.take() for _ in contents]
    for page, content in zip(pages, contents):
        pool.publish(page, content)
    return pages


def test_every_page_is_given_once():
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
    pool, (a, b) = PagePool(2, 1), names(7, 8)
    page = pool.take()
    assert pool.share(a) is None
    pool.publish(page, a)
    assert pool.share(b) is None and pool.share(a) == page
    assert pool.owned == 1


def test_a_shared_page_is_free_when_its_last_owner_leaves():
    pool, (a,) = PagePool(1, 1), names(7)
    (page,) = full(pool, [a])
    assert pool.share(a) == page and pool.share(a) == page  # three owners
    for _ in range(2):
        pool.give_back([page])
        assert (pool.available, pool.owned) == (0, 1) and pool.take() is None
    pool.give_back([page])
    assert (pool.available, pool.owned) == (1, 0)
    assert pool.take() == page and pool.share(a) is None  # the new owner's content is another


def test_kept_content_is_found_again_until_it_is_needed():
    pool, (a, b) = PagePool(2, 1), names(7, 8)
    pages = full(pool, [a, b])
    pool.give_back(pages)
    assert pool.available == 2 and pool.owned == 0
    assert pool.share(a) == pages[0] and pool.share(b) == pages[1] and pool.available == 0


def test_free_pages_go_before_kept_ones():
    pool, (a,) = PagePool(3, 1), names(7)
    kept = full(pool, [a])
    pool.give_back(kept)
    assert kept[0] not in (pool.take(), pool.take())
    assert pool.share(a) == kept[0]


def test_the_least_recently_used_text_goes_first():
    pool = PagePool(3, 1)
    texts = [names(t) for t in (1, 2, 3)]
    pages = [full(pool, t) for t in texts]
    for p in pages:
        pool.give_back(p)
    pool.give_back([pool.share(texts[0][0])])  # used again: now the newest
    assert [pool.take() for _ in range(3)] == [pages[1][0], pages[2][0], pages[0][0]]


def test_of_one_text_the_end_goes_first():
    """A beginning without its continuation can be shared; a continuation without its beginning is
    never looked for.
    """
    pool, text = PagePool(3, 1), names(1, 2, 3)
    pages = full(pool, text)
    pool.give_back(pages)
    assert pool.take() == pages[2]
    assert (
        pool.share(text[0]) == pages[0]
        and pool.share(text[1]) == pages[1]
        and pool.share(text[2]) is None
    )


def test_two_pages_of_one_content():
    """Computed at the same time by two sequences: the first is the shared one, the second is plain
    again when it is given back.
    """
    pool, (a,) = PagePool(2, 1), names(7)
    one, two = full(pool, [a]) + full(pool, [a])
    assert pool.share(a) == one
    pool.give_back([two])
    assert pool.take() == two and pool.take() is None
    pool.give_back([one])
    pool.give_back([one])
    assert pool.share(a) == one


def test_content_is_the_tokens_and_all_before_them():
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
    assert content_hash(b"", [1, 256]) != content_hash(
        b"", [257, 0]
    )  # no carrying over between tokens


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 6),
    st.lists(
        st.tuples(st.sampled_from(["take", "share", "publish", "give"]), st.integers(0, 7)),
        max_size=60,
    ),
)
def test_against_a_model_of_the_pool(n, operations):
    """A dict of owners, a list of kept pages and a set of free ones say the same at every step."""
    pool, owners, kept, content = (
        PagePool(n, 1),
        {},
        [],
        {},
    )  # page -> count; least recent first; page -> published content
    held: list[int] = []
    for what, k in operations:
        if what == "take":
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
        elif what == "share":
            wanted = names(k)[0]
            expected = next((p for p, c in content.items() if c == wanted), None)
            assert pool.share(wanted) == expected
            if expected is not None:
                if expected in kept:
                    kept.remove(expected)
                owners[expected] = owners.get(expected, 0) + 1
                held.append(expected)
        elif what == "publish" and held:
            page, new = held[k % len(held)], names(k)[0]
            pool.publish(page, new)
            if new not in content.values() and page not in content:
                content[page] = new
        elif what == "give" and held:
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


def test_giving_back_what_is_not_owned_is_an_error():
    pool = PagePool(2, 1)
    page = pool.take()
    pool.give_back([page])
    with pytest.raises(KeyError):
        pool.give_back([page])


def test_forgotten_pages_are_found_no_more_and_come_back_free():
    pool = PagePool(4, 2)
    pages, names = [pool.take() for _ in range(3)], [content_hash(b"", [i, i]) for i in range(3)]
    for page, name in zip(pages[:2], names):
        pool.publish(page, name)
    assert pool.share(names[0]) == pages[0]  # somebody else's too: it stays theirs
    pool.forget(pages)
    assert [pool.share(n) for n in names] == [None] * 3 and pool.owned == 3
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
    pool.publish(again, names[0])  # the content made anew
    assert pool.share(names[0]) == again
