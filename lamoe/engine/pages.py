"""Which page of the cache belongs to whom: free pages, shared pages, and full pages that are kept for their content until space is needed.

A full page is known by the hash of all tokens up to its end, so equal beginnings of texts share pages. A page with no owner keeps its content
until it is the least recently used one and somebody needs it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict


class PagePool:
    """Pages 0 .. n-1 of `page_size` rows. A page is free, owned (by one sequence or several), or kept (full, nobody's, reusable)."""

    def __init__(self, pages: int, page_size: int):
        self.page_size, self.total = page_size, pages
        self._free = list(range(pages - 1, -1, -1))
        self._owners: dict[int, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._page_of: dict[bytes, int] = {}
        self._content_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that `take` can give now."""
        return len(self._free) + len(self._kept)

    @property
    def owned(self) -> int:
        return len(self._owners)

    def take(self) -> int | None:
        """A page to write to, or None when every page has an owner."""
        if self._free:
            page = self._free.pop()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            del self._page_of[self._content_of.pop(page)]
        else:
            return None
        self._owners[page] = 1
        return page

    def share(self, content: bytes) -> int | None:
        """The full page of this content with one more owner, or None when there is none."""
        page = self._page_of.get(content)
        if page is not None:
            self._kept.pop(page, None)
            self._owners[page] = self._owners.get(page, 0) + 1
        return page

    def publish(self, page: int, content: bytes) -> None:
        """Say what a page holds, now that it is full. The first page of a content is the one that is shared."""
        if content not in self._page_of and page not in self._content_of:
            self._page_of[content], self._content_of[page] = page, content

    def forget(self, pages: list[int]) -> None:
        """Nobody shall find these pages (owned ones) by their content any more."""
        for page in pages:
            content = self._content_of.pop(page, None)
            if content is not None:
                del self._page_of[content]

    def give_back(self, pages: list[int]) -> None:
        """End one ownership of each page. Later pages are given up first when space is needed: beginnings are what texts share."""
        for page in reversed(pages):
            self._owners[page] -= 1
            if self._owners[page] == 0:
                del self._owners[page]
                if page in self._content_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)


def content_hash(before: bytes, tokens: list[int]) -> bytes:
    """Of a page: the hash of the page before it and its own tokens. Cryptographic, because a collision would show one user's text to another."""
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()
