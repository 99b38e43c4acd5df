"""Drafts for free: what followed the last time the sequence's latest tokens stood in it (prompt lookup, n-gram drafts).

The model checks a whole draft in one pass. Each position is sampled from the model's own distribution with the request's own generator, and a
draft token counts only where that sample is the same token, so outputs are those of plain decoding: greedy or sampled, token for token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

NGRAM = 3  # tokens that must match
LONGEST = 12
REST = 24  # tokens of plain decoding after drafts have failed altogether


@dataclass
class Lookup:
    """Of one sequence: where each n-gram was last followed by something, how long drafts are now (0: resting until `resume`)."""

    where: dict[tuple[int, ...], int] = field(default_factory=dict)
    indexed: int = 0  # n-grams that end before this position are in `where`
    length: int = 4
    resume: int = 0
    drafted: int = 0
    accepted: int = 0

    def propose(self, tokens: list[int], room: int) -> list[int]:
        """At most `room` tokens that may come next, or none."""
        for end in range(max(self.indexed, NGRAM), len(tokens)):  # the n-gram at the very end is the question, not an answer
            self.where[tuple(tokens[end - NGRAM : end])] = end
        self.indexed = len(tokens)
        if not self.length and len(tokens) >= self.resume:
            self.length = 2
        at = self.where.get(tuple(tokens[-NGRAM:])) if self.length else None
        return [] if at is None else tokens[at : at + min(self.length, room)]

    def learn(self, drafted: int, accepted: int, position: int) -> None:
        """Longer drafts while they are right, shorter ones when they are not, none for a while when even short ones fail."""
        self.drafted += drafted
        self.accepted += accepted
        if accepted == drafted:
            self.length = min(2 * self.length, LONGEST)
        elif 2 * accepted < drafted:
            self.length //= 2
            self.resume = position + REST
