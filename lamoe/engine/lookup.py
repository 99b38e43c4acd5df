"""Draft tokens by n-gram lookup in the sequence's own text (prompt lookup decoding).

If the latest tokens have occurred before, the draft is the text that followed them. The model
checks a whole draft in one forward pass. Each position is sampled from the model's own distribution
with the request's own generator, and a draft token is accepted only if the sample equals it. So
outputs are those of plain decoding, token for token, greedy or sampled.

Drafts pause while they cost more than they save. This happens if most of their tokens are rejected,
or if the pass takes longer than the plain decode steps that it saves. The duration of a pass over
several tokens depends on the model and the machine (its tokens are routed to many experts), so
`Pace` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

NGRAM = 3  # number of latest tokens that must match earlier text
LONGEST = 12  # number of tokens of the longest draft
# Tokens to decode without drafts after even the shortest drafts have failed. The pause doubles each
# time that drafts fail again, up to LONGEST_REST.
REST, LONGEST_REST = 24, 192


@dataclass
class Lookup:
    """The n-gram index of one sequence and the current length of its drafts.

    where: {n-gram: the position after its latest occurrence}.
    indexed: all n-grams that end before this position are in `where`.
    length: number of tokens of the next draft. At 0, drafts pause until the sequence has `resume`
        tokens.
    rest: length of the next pause, in tokens.
    drafted, accepted: total numbers of draft tokens, and of accepted ones.
    """

    where: dict[tuple[int, ...], int] = field(default_factory=dict)
    indexed: int = 0
    length: int = 4
    rest: int = REST
    resume: int = 0
    drafted: int = 0
    accepted: int = 0

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        """Return a draft of at most `limit` tokens that may follow `tokens`. It may be empty."""
        # Do not index the n-gram at the very end, because it is the one to look up.
        for end in range(max(self.indexed, NGRAM), len(tokens)):
            self.where[tuple(tokens[end - NGRAM : end])] = end
        self.indexed = len(tokens)
        if not self.length and len(tokens) >= self.resume:
            self.length = 2
        at = self.where.get(tuple(tokens[-NGRAM:])) if self.length else None
        if at is None:
            return []
        # If the draft reaches the end of the text, continue with the draft's own tokens.
        period = len(tokens) - at
        return [tokens[at + i % period] for i in range(min(self.length, limit))]

    def learn(self, drafted: int, accepted: int, position: int, cost: float = 1.0) -> None:
        """Adapt the draft length to the result of one draft.

        The length doubles if all tokens were accepted. It halves if fewer than half were accepted,
        or if plain decoding would have been faster. Drafts pause when the length reaches 0.

        Args:
            drafted: number of tokens of the draft.
            accepted: number of accepted tokens. The pass yielded one token more.
            position: number of tokens of the sequence now.
            cost: duration of the pass, in units of plain decode steps.
        """
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
    """Measured duration of a forward pass over one sequence, by its number of tokens.

    seconds: {number of tokens in the pass: smoothed duration}.
    """

    seconds: dict[int, float] = field(default_factory=dict)

    def saw(self, tokens: int, seconds: float) -> None:
        """Record the duration of one pass over `tokens` tokens."""
        self.seconds[tokens] = 0.75 * self.seconds.get(tokens, seconds) + 0.25 * seconds

    def cost(self, tokens: int) -> float:
        """Return the duration of a pass over `tokens` tokens, in units of plain decode steps.

        Returns 1 while either duration is unknown.
        """
        if 1 in self.seconds and tokens in self.seconds:
            return self.seconds[tokens] / self.seconds[1]
        return 1.0
