"""Tests of TextFinder: it finds what a search in the whole text finds, for any chunks."""

from hypothesis import given
from hypothesis import strategies as st

from lamoe.text.text_finder import TextFinder

TEXT = st.text("ab", min_size=1, max_size=6)


@given(st.lists(TEXT, min_size=1, max_size=4), st.lists(st.text("abc", max_size=5), max_size=12))
def test_the_first_of_the_texts_is_found(texts, chunks):
    finder, before = TextFinder(texts), ""
    for chunk in chunks:
        begin, held = finder.add(chunk)
        whole = before + chunk
        found = [at for t in texts if (at := whole.find(t)) >= 0]
        assert begin == (min(found) - len(before) if found else None)
        if found:
            return
        beginnings = (n for t in texts for n in range(1, len(t)) if whole.endswith(t[:n]))
        assert held == max(beginnings, default=0)
        before = whole
