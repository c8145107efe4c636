"""The executor: computes the steps that the scheduler plans, and all that an engine has on its device.

Nothing above it sees a tensor of a step, the model's forward or the sampler. `local.py` is the one there is, in this
process; one that computes on several devices has the same methods.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tandem.common.errors import TandemError
from tandem.engine.request import TokenLogprobs
from tandem.engine.schedule.plan import StepPlan
from tandem.engine.schedule.sequence import Sequence


class NextToken(NamedTuple):
    """What was chosen to follow the last token of `sequence`."""

    sequence: Sequence
    token: int
    logprobs: TokenLogprobs | None
    prompt_logprobs: list[TokenLogprobs] | None
    """Those of all prompt tokens but the first, where they are wanted and this is the first token."""
    dead_end: TandemError | None
    """Why no token can follow; `token` means nothing then."""


@dataclass(slots=True)
class StepResult:
    """What became of a plan. Sequences of the plan that are nowhere in here take part in a later one."""

    computed: StepPlan
    """What of the plan has its KV in the pool, in all layers."""
    tokens: list[NextToken] = field(default_factory=list)
    embeddings: list[tuple[Sequence, bytes]] = field(default_factory=list)
    """Embeddings of requests for one whose prompts are computed: float32, little-endian [hidden_size]."""
    failed: list[tuple[Sequence, TandemError]] = field(default_factory=list)
    """Requests that end, each for a reason of its own; nothing of theirs is in `computed`."""
    seconds: float = 0.0

    def add(self, other: StepResult) -> None:
        """Takes in the result of another part of the same plan."""
        self.computed.decodes += other.computed.decodes
        self.computed.chunks += other.computed.chunks
        self.tokens += other.tokens
        self.embeddings += other.embeddings
        self.failed += other.failed


class StepWatch(Protocol):
    """What an engine does while its executor computes a step. Called on the engine thread; nothing here raises."""

    before_attention: Callable[[int], None] | None
    """Called before a layer reads KV: returns once what the step reads of that layer is there."""
    void: Collection[Sequence]
    """Those for which it was not there in time: what is computed for them means nothing. Grows during the step."""

    def layer_done(self, layer: int) -> None:
        """The step's KV of `layer` is in the pool."""

    def gives_up(self) -> bool:
        """Whether the step should stop between two layers, with nothing of it taken note of."""

    def not_sampled(self, sequences: list[Sequence], step_s: float) -> list[Sequence]:
        """Those of `sequences` for which no token can be chosen yet, although the step has taken `step_s` seconds:
        they are computed again. May wait for a moment."""

    def is_final(self, sequence: Sequence) -> bool:
        """Whether rows of `sequence` may have been read by others, so that they cannot be computed again."""

    def goes_on(self) -> bool:
        """False: the engine stops, nobody needs the rest."""


class Executor(Protocol):
    """One per engine. Engine thread only. `admit` and `execute` raise `DeviceLost` where nothing can be computed any
    more."""

    shortages: int
    """Steps, or parts of them, that found too little memory on the device."""

    @property
    def free_rows(self) -> int:
        """Sequences that can still be admitted."""

    def thread(self) -> AbstractContextManager[object]:
        """Sets up the thread that calls the other methods, for as long as it is entered."""

    def admit(self, sequence: Sequence) -> None:
        """`sequence` has its blocks and may be in plans from now on. Raises what is wrong with it."""

    def release(self, sequence: Sequence) -> None:
        """Forgets `sequence`, if it was admitted: it ends, or begins anew with another `admit`."""

    def holds(self, sequence: Sequence) -> bool:
        """Whether `sequence` is admitted."""

    def execute(self, plan: StepPlan, watch: StepWatch) -> StepResult | None:
        """Computes `plan` and chooses the tokens that follow. None: `watch` gave it up.

        A plan that raises is computed again in parts, and whoever makes it raise is in `failed`.
        """
