"""Convert text to ids with control tokens on, off, or on for some of the text.

The `tokenizers` library splits a text at its added tokens. The flags of a token (lstrip, rstrip,
single_word, normalized) and the position of a piece in the whole text change the ids around it. So
this module never cuts a text by itself. It gives the whole text to one of these tokenizers, which
share one model:

- `inner`, as the file describes it. Every control token counts.
- `_plain`, in which all control tokens are marked special, and special tokens are ordinary text.
- `_stamped`, which is `_plain` plus a stamped copy of every control token: the same flags, and a
  character inside that occurs nowhere else in the text. Only the stamped tokens count.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import tokenizers
from tokenizers import AddedToken

from lamoe.text.chat_template import beginnings_of


class Encoder:
    """Converts text to ids. Special tokens that the post-processor adds are never added.

    Args:
        inner: the tokenizer.
        control: {text: id} of the control tokens, which are added tokens of `inner`.
    """

    def __init__(self, inner: tokenizers.Tokenizer, control: Mapping[str, int]):
        inner.encode_special_tokens = False
        added = inner.get_added_tokens_decoder()
        self._inner, self._control = inner, dict(control)
        self._pattern = beginnings_of(control)
        self._tokens = {i: added[i] for i in control.values()}
        plain = [
            _copy(t, t.content, t.special or t.content in control, t.normalized)
            for _, t in sorted(added.items(), key=operator.itemgetter(0))
        ]
        self._plain = _with_tokens(inner, plain)
        self._plain.encode_special_tokens = True
        # A normalizer can turn other texts into a token of which `normalized` is set.
        self._rewrites = inner.normalizer is not None and any(
            t.normalized for t in self._tokens.values()
        )
        # The model itself may have learned to merge the text of a control token into its id. A
        # token of one character cannot be told from that character.
        long_ids = {i for text, i in control.items() if len(text) > 1}
        self._unwanted = long_ids - _unknown_ids(inner)
        self._by_mark: dict[str, tuple[tokenizers.Tokenizer, dict[int, int]]] = {}

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts in which nothing counts as a control token."""
        rows = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        return [self._without_control(e.ids) for e in rows]

    def with_controls(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts in which every control token counts."""
        return [e.ids for e in self._inner.encode_batch_fast(texts, add_special_tokens=False)]

    def marked(self, text: str, mark: str) -> list[int]:
        """Return the ids of a text in which control tokens count if they do not hold the mark.

        Args:
            text: the text, with marks in control tokens that do not count (after those of one
                character). The marks are no part of the result.
            mark: a character that is used for nothing else.
        """
        if mark not in text and not self._rewrites:
            return self.with_controls([text])[0]
        pieces, tokens, start, begin = [], [], 0, 0
        while m := self._pattern.search(text, start) if self._pattern else None:
            end = m.start() + len(m[1])
            if len(m[1]) == 1 and text[end : end + 1] == mark:
                start = end
                continue
            pieces.append(text[begin : m.start()].replace(mark, ""))
            tokens.append(m[1])
            start = begin = end
        pieces.append(text[begin:].replace(mark, ""))
        return self.between(pieces, tokens, mark)

    def between(self, texts: Sequence[str], tokens: Sequence[str], mark: str) -> list[int]:
        """Return the ids of plain texts with a control token between each two of them.

        Args:
            texts: one text more than tokens. They do not hold the mark.
            tokens: the control tokens.
            mark: a character that occurs in none of the texts and tokens.
        """
        tokenizer, names = self._stamped(mark)
        counts = [True] * len(tokens)
        while True:
            parts, stamps, size = [texts[0]], [], len(texts[0])
            for token, counted, text in zip(tokens, counts, texts[1:]):
                stamps.append(size)
                parts += [_stamp(token, mark) if counted else token, text]
                size += len(parts[-2]) + len(text)
            encoding = tokenizer.encode("".join(parts), add_special_tokens=False)
            found = [n for n, i in enumerate(encoding.ids) if i in names]
            if len(found) == sum(counts):
                return self._without_control(encoding.ids, names)
            # single_word or the normalizer keeps a token from counting at its place, as in any
            # other text. It becomes plain text, without the stamp.
            spans = [encoding.offsets[n] for n in found]
            reached = {n for n, at in enumerate(stamps) if any(a <= at < b for a, b in spans)}
            still = [counted and n in reached for n, counted in enumerate(counts)]
            if sum(still) >= sum(counts):
                raise ValueError(
                    "the tokenizer does not find its own control tokens in this text; "
                    "its tokenizer.json has added tokens that overlap"
                )
            counts = still

    def _stamped(self, mark: str) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """Return the tokenizer of the stamped tokens, and {its id: id} of these tokens."""
        if mark not in self._by_mark:
            normalizer, stamped = self._inner.normalizer, []
            for token in self._tokens.values():
                text = _stamp(token.content, mark)
                # A normalizer that drops the mark would make the stamp count for nothing.
                keeps = normalizer is None or mark in normalizer.normalize_str(text)
                stamped.append(
                    _copy(token, text, special=False, normalized=token.normalized and keeps)
                )
            added = self._plain.get_added_tokens_decoder()
            tokenizer = _with_tokens(self._plain, [added[i] for i in sorted(added)])
            tokenizer.add_tokens(stamped)
            tokenizer.encode_special_tokens = True
            ids = (tokenizer.token_to_id(token.content) for token in stamped)
            self._by_mark[mark] = tokenizer, dict(zip(ids, self._tokens))
        return self._by_mark[mark]

    def _without_control(self, ids: list[int], names: Mapping[int, int] | None = None) -> list[int]:
        """Return the ids with each control token that came out of plain text in two parts.

        Args:
            ids: ids of a text in which no control token counts, or only stamped ones.
            names: {id of a stamped token: id of the token}.
        """
        if self._unwanted.isdisjoint(ids) and not names:
            return ids
        names, out = names or {}, []
        for i in ids:
            out += self._spell(i) if i in self._unwanted else [names.get(i, i)]
        return out

    def _spell(self, token_id: int) -> list[int]:
        """Return ids that spell the text of a control token."""
        token = self._inner.id_to_token(token_id)
        parts = [token[:1], token[1:]]
        ids = [t.id for part in parts for t in self._inner.model.tokenize(part)]
        if not self._unwanted.isdisjoint(ids):
            raise ValueError(
                f"this vocabulary cannot spell the control token {token!r} as plain text; "
                "remove it from the text"
            )
        return ids


def _with_tokens(inner: tokenizers.Tokenizer, tokens: list[AddedToken]) -> tokenizers.Tokenizer:
    """Return a tokenizer with the model and the steps of `inner`, and these added tokens."""
    made = tokenizers.Tokenizer(inner.model)  # shares the model, however large
    made.normalizer, made.pre_tokenizer = inner.normalizer, inner.pre_tokenizer
    made.post_processor = inner.post_processor
    made.add_tokens(tokens)
    for token in tokens:
        if made.token_to_id(token.content) != inner.token_to_id(token.content):
            raise ValueError(
                f"the added token {token.content!r} has id {inner.token_to_id(token.content)}; "
                f"it must be {made.token_to_id(token.content)}, as ids of added tokens have no gaps"
            )
    return made


def _copy(token: AddedToken, content: str, special: bool, normalized: bool) -> AddedToken:
    return AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=normalized,
        special=special,
    )


def _stamp(token: str, mark: str) -> str:
    """Return the token with the mark after its first character."""
    return token[:1] + mark + token[1:]


def _unknown_ids(inner: tokenizers.Tokenizer) -> set[int]:
    """Return the ids that the model gives to a character that no vocabulary has."""
    try:
        return {t.id for t in inner.model.tokenize("\ufdd0")}
    except Exception:  # the library raises a plain Exception if there is no unknown token
        return set()
