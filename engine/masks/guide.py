"""What may follow the output of one sequence, as far as its mask process has said."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.common.constraint_limits import DEAR_S, MASK_S
from tandem.common.sampling import Constraint
from tandem.engine.masks.messages import Reply

BUDGET_S = 2.0
"""Processor time that the masks of a tenant's sequences with one constraint may take together, and for each token"""
BUDGET_PER_TOKEN_S = MASK_S
"""so much more."""
PROMPT_S = 0.005
"""A sequence is left out of steps until its mask is there, where that, and those that its process is asked for before
it, can be expected to take longer."""
MAX_STRIKES = 2
"""Times that a process may end while it works for a sequence. Once may be somebody else's doing."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Work:
    """What the masks of one constraint have cost, while a tenant has sequences with it."""

    tokens: int = 0
    masks: int = 0
    spent_s: float = 0.0

    @property
    def is_dear(self) -> bool:
        """It keeps its sequences waiting; they may not keep many slots from others meanwhile."""
        return self.spent_s > DEAR_S * self.masks

    @property
    def problem(self) -> str:
        """Why the constraint is too much work for the tokens that it has covered; empty: it is not."""
        allowed_s = BUDGET_S + BUDGET_PER_TOKEN_S * self.tokens
        if self.spent_s <= allowed_s:
            return ""
        return (
            f"the constraint takes too much work: {self.spent_s:.1f} s for what may follow {self.tokens} tokens, the "
            f"most is {allowed_s:.1f} s; use fewer rules that match the same text, or a smaller n"
        )


@dataclass(slots=True, eq=False)
class Guide:
    """Engine thread only."""

    number: int
    constraint: Constraint
    tenant: str
    tokens: list[int]
    """The output that the process has been told of."""
    work: Work
    """Shared by the tenant's guides of this constraint."""
    bits: bytes | None = None
    """The mask of the next token (see `Reply.bits`). None: it is not there yet."""
    complete: bool = False
    """Nothing but an end can follow."""
    error: str = ""
    """Why the output cannot go on."""
    error_code: str = "invalid_request"
    prompt: bool = False
    """The next mask can be expected to be there when a step ends."""
    last_s: float = 0.0
    """Processor time of its last mask."""
    queued: bool = False
    """Its first mask has come, and the sequence has taken its place in the queue."""
    opened: bool = False
    """There has been a mask."""
    strikes: int = 0

    @property
    def ready(self) -> bool:
        """There is a mask to sample with."""
        return self.bits is not None

    @property
    def awaited(self) -> bool:
        """A mask will come, or a reason why not."""
        return not (self.ready or self.complete or self.error)

    def take(self, reply: Reply) -> None:
        """Takes the reply to what was asked last: the next mask, an end, or an error."""
        self.opened = True
        self.work.masks += 1
        self.work.spent_s += reply.cost_s
        self.last_s = reply.cost_s
        self.complete = reply.complete
        self.bits = reply.bits or None
        self.error = reply.error

    def reopen(self) -> None:
        """Its mask is lost."""
        self.bits, self.prompt = None, False

    def fail(self, error: str, code: str = "invalid_request") -> None:
        self.bits, self.error, self.error_code = None, error, code
