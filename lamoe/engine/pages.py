"""Ownership of cache pages: free pages, shared pages, and kept pages for prefix reuse.

A full page is identified by a hash of all tokens up to its end, so sequences with the same prefix
share pages. When the last owner of a full page returns it, the page keeps its content until it is
the least recently used one and a new page is needed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict


class PagePool:
    """Pages 0 to n - 1, each with the cache rows of `page_size` tokens.

    A page is free, owned (by one or more sequences), or kept (full, without owner, reusable).
    """

    def __init__(self, pages: int, page_size: int):
        self.page_size, self.total = page_size, pages
        self._free = list(range(pages - 1, -1, -1))
        self._owners: dict[int, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._page_of: dict[bytes, int] = {}
        self._content_of: dict[int, bytes] = {}
        # Content hashes that sequences of every cache salt may share: the pages of saved prefixes.
        self.public: set[bytes] = set()

    @property
    def available(self) -> int:
        """Number of pages that `take` can return now."""
        return len(self._free) + len(self._kept)

    @property
    def owned(self) -> int:
        """Number of pages that at least one sequence owns."""
        return len(self._owners)

    def take(self) -> int | None:
        """Return a page to write to, or None if every page has an owner.

        If no page is free, the least recently used kept page is evicted.
        """
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
        """Add an owner to the full page with this content hash and return the page.

        Returns None if no page has this content.
        """
        page = self._page_of.get(content)
        if page is not None:
            self._kept.pop(page, None)
            self._owners[page] = self._owners.get(page, 0) + 1
        return page

    def publish(self, page: int, content: bytes) -> None:
        """Make a full page available to `share` under its content hash.

        If two pages have the same content, the first one published is shared.
        """
        if content not in self._page_of and page not in self._content_of:
            self._page_of[content], self._content_of[page] = page, content

    def forget(self, pages: list[int]) -> None:
        """Exclude owned pages from `share`, for example because their rows are invalid."""
        for page in pages:
            content = self._content_of.pop(page, None)
            if content is not None:
                del self._page_of[content]

    def give_back(self, pages: list[int]) -> None:
        """Remove one owner from each page of a sequence.

        The later pages of a text are evicted before its first ones, because prompts share prefixes.
        """
        for page in reversed(pages):
            self._owners[page] -= 1
            if self._owners[page] == 0:
                del self._owners[page]
                if page in self._content_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)


def first_hash(cache_salt: str) -> bytes:
    """Return the hash that a chain of pages begins with.

    Sequences with different salts have different chains, so they share no pages.
    """
    if not cache_salt:
        return b""
    return hashlib.sha256(cache_salt.encode("utf-8", "surrogatepass")).digest()


def content_hash(before: bytes, tokens: list[int]) -> bytes:
    """Return the hash of a page: SHA-256 of the previous page's hash and the page's own tokens.

    The hash is cryptographic, because a collision would give one user's cache rows to another user.

    Args:
        before: hash of the previous page, or `first_hash` for the first page.
        tokens: token ids of the page.
    """
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()
