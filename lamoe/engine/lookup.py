"""Drafts for free: what followed the last time the sequence's latest tokens stood in it (prompt lookup, n-gram drafts).

The model checks a whole draft in one pass. Each position is sampled from the model's own distribution with the request's own generator, and a
draft token counts only where that sample is the same token, so outputs are those of plain decoding: greedy or sampled, token for token.

A draft must earn its pass: drafts that are mostly wrong rest, and so do drafts whose pass took longer than the plain steps it saved (many tokens at once
pass through many experts; what that costs depends on model and machine, so it is measured).
"""

from __future__ import annotations

from dataclasses import dataclass, field

NGRAM = 3  # tokens that must match
LONGEST = 12
REST, LONGEST_REST = (
    24,
    192,
)  # tokens of plain decoding after drafts have failed altogether; twice as many each time in a row


@dataclass
class Lookup:
    """Of one sequence: where each n-gram was last followed by something, how long drafts are now (0: resting until `resume`)."""

    where: dict[tuple[int, ...], int] = field(default_factory=dict)
    indexed: int = 0  # n-grams that end before this position are in `where`
    length: int = 4
    rest: int = REST
    resume: int = 0
    drafted: int = 0
    accepted: int = 0

    def propose(self, tokens: list[int], room: int) -> list[int]:
        """At most `room` tokens that may come next, or none."""
        for end in range(
            max(self.indexed, NGRAM), len(tokens)
        ):  # the n-gram at the very end is the question, not an answer
            self.where[tuple(tokens[end - NGRAM : end])] = end
        self.indexed = len(tokens)
        if not self.length and len(tokens) >= self.resume:
            self.length = 2
        at = self.where.get(tuple(tokens[-NGRAM:])) if self.length else None
        if at is None:
            return []
        period = len(tokens) - at  # a text that repeats itself is taken to go on repeating itself
        return [tokens[at + i % period] for i in range(min(self.length, room))]

    def learn(self, drafted: int, accepted: int, position: int, cost: float = 1.0) -> None:
        """Longer drafts while they are right and worth it, shorter ones when they are not, none for a while when even short ones fail. cost: of a
        pass over this many drafted tokens, in plain steps; it gave 1 + accepted tokens."""
        self.drafted += drafted
        self.accepted += accepted
        if 1 + accepted < cost or 2 * accepted < drafted:
            self.length //= 2
            if not self.length:
                self.resume, self.rest = position + self.rest, min(2 * self.rest, LONGEST_REST)
        elif accepted == drafted:
            self.length, self.rest = min(2 * self.length, LONGEST), REST


@dataclass
class Pace:
    """Seconds of a pass over one sequence by its number of tokens, smoothed."""

    seconds: dict[int, float] = field(default_factory=dict)

    def saw(self, tokens: int, seconds: float) -> None:
        self.seconds[tokens] = 0.75 * self.seconds.get(tokens, seconds) + 0.25 * seconds

    def cost(self, tokens: int) -> float:
        """Of a pass over so many tokens, in plain steps; 1 while either is unknown."""
        return (
            self.seconds[tokens] / self.seconds[1]
            if 1 in self.seconds and tokens in self.seconds
            else 1.0
        )
