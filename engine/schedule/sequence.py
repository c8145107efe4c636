"""One request on its way through the engine: the state that scheduler, runner and sampler share."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from tandem.engine.request import EngineRequest, Pooling, Preemption, PromptReport, RequestKey
from tandem.engine.schedule.ranges import EMPTY, TokenRanges
from tandem.kvstore.identity import BlockHash

if TYPE_CHECKING:
    from tandem.common.fairness import Account
    from tandem.engine.masks.guide import Guide


class Phase(enum.Enum):
    """Where a sequence is on its way through the engine."""

    LOOKUP = "lookup"
    """The first mask of its constraint is on its way, or the KV store asked what it has of the prompt; not in the queue
    yet, without blocks."""
    WAITING = "waiting"
    """In the queue, without blocks."""
    IMPORTING = "importing"
    """Blocks reserved, waiting for KV from elsewhere; takes no part in steps."""
    LOADING = "loading"
    """Blocks reserved, filled from the KV store; takes no part in steps."""
    RUNNING = "running"
    """Computed in steps."""
    HOLDING = "holding"
    """Computed here; its blocks are kept until the hand-over is confirmed."""
    FINISHED = "finished"


class Sequence:
    """`num_computed` chases `len(tokens)`: the KV of all tokens below it is in the pool. That of some tokens behind may
    be, too (`ahead`): they are not computed when their turn comes.

    A sequence with one token left beyond its prompt decodes; one with more, or with prompt tokens left, prefills.
    After a preemption the output so far is computed again like a prompt, and no token is emitted twice because only a
    step that reaches the last token samples. A request whose output another worker began starts in that state.
    """

    __slots__ = (
        "account",
        "ahead",
        "arrival",
        "chain",
        "chunk_ends",
        "deadline",
        "displaced",
        "first_scheduled",
        "gated",
        "guide",
        "inexact_from",
        "key",
        "last_token",
        "max_total",
        "num_computed",
        "num_prompt",
        "output_cost",
        "phase",
        "pinned",
        "preempted",
        "priority",
        "published",
        "report",
        "request",
        "root",
        "seed",
        "stop_ids",
        "stored",
        "submitted",
        "tokens",
        "wants_import",
    )

    def __init__(
        self,
        request: EngineRequest,
        *,
        root: bytes,
        chain: list[BlockHash],
        seed: int,
        stop_ids: frozenset[int],
        max_model_len: int,
        submitted: float,
    ) -> None:
        self.request = request
        self.key: RequestKey = request.key
        self.priority = request.priority
        self.deadline = request.deadline
        self.tokens = list(request.token_ids)
        self.last_token = self.tokens[-1]
        self.num_prompt = len(request.prompt_token_ids)
        self.max_total = min(self.num_prompt + request.sampling.max_tokens, max_model_len)
        """Tokens at which it ends with `length`."""
        self.num_computed = 0
        self.ahead = EMPTY
        """Tokens behind `num_computed` whose KV is in the pool: they came from elsewhere. Never the last known one."""
        self.preempted: Preemption | None = None
        """Why it was the last time."""
        self.displaced = 0
        """Times that it was for the sake of an earlier band."""
        self.inexact_from: int | None = None
        """The first token whose KV has not the bits that computing gives: it went through a near codec, or depends on
        rows that did. All that follow it count as inexact. None: all is exact."""
        self.root = root
        """The tenant's namespace: the parent of the chain."""
        self.chain = chain
        """Hashes of the leading full blocks of `tokens`; grows as the output fills more."""
        self.published = 0
        """Leading blocks that are in the prefix cache."""
        self.seed = seed
        self.stop_ids = stop_ids
        self.guide: Guide | None = None
        """What holds the output of a request to its constraint."""
        if request.pooling is not Pooling.NONE:
            self.max_total = self.num_prompt
        self.phase = Phase.WAITING
        self.arrival = -1
        """Set by the scheduler: the order of arrival."""
        self.account: Account | None = None
        """The tenant's, set when it is queued."""
        self.output_cost = 0.0
        """Service per output token, per weight."""
        self.wants_import = request.kv_import is not None
        """Until the import has succeeded, failed or been preempted."""
        self.stored = EMPTY
        """Tokens that the KV store fills once there are blocks; the last known token is not among them."""
        self.pinned = False
        """Somebody else reads its blocks: it is not preempted."""
        self.gated = False
        """RUNNING, though its last layers are still being filled from the KV store."""
        self.chunk_ends: list[int] = []
        """Where the prompt's chunks ended the first time, so that a recompute runs the same kernels on the same
        shapes."""
        self.submitted = submitted
        self.first_scheduled: float | None = None
        self.report: PromptReport | None = PromptReport()
        """Until it has gone out with the first output."""

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def exact_tokens(self) -> int:
        """Leading tokens whose KV is in the pool and exact: what may be known under an exact key."""
        return self.num_computed if self.inexact_from is None else min(self.inexact_from, self.num_computed)

    @property
    def there(self) -> TokenRanges:
        """Tokens whose KV is in the pool."""
        computed = TokenRanges.up_to(self.num_computed)
        return computed.union(self.ahead) if self.ahead else computed

    @there.setter
    def there(self, tokens: TokenRanges) -> None:
        self.num_computed = tokens.first_gap()
        self.ahead = tokens.within(self.num_computed, tokens.end)

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        missing = len(self.tokens) - self.num_computed
        return missing - self.ahead.count if self.ahead else missing

    @property
    def to_compute(self) -> int:
        """Tokens that will be computed here before the next one can be sampled, as far as known. What the KV store was
        not asked for was on the device then; whether it still is turns out when there are blocks."""
        if self.phase in (Phase.LOOKUP, Phase.WAITING):
            return len(self.tokens) - max(self.num_computed, self.stored.end)
        return len(self.tokens) - self.there.union(self.stored).count

    @property
    def order(self) -> tuple[int, int]:
        """Lower goes first; the highest is preempted first."""
        return self.priority, self.arrival

    @property
    def prefills(self) -> bool:
        """Whether its next step computes a chunk; else it decodes."""
        return self.num_computed < self.num_prompt or len(self.tokens) - self.num_computed > 1

    @property
    def owns_its_blocks(self) -> bool:
        """Whether nobody else reads or writes them: no exporter, no loader."""
        return not self.pinned and not self.gated

    @property
    def usable_chain(self) -> list[BlockHash]:
        """What of its chain may come from the cache."""
        return [] if self.computes_all else self.chain

    @property
    def waits_for_mask(self) -> bool:
        """It takes no part in steps: what may follow is not known, and not expected to be when a step ends; or the end
        of its output has been chosen, and only whether it is complete is to be said."""
        guide = self.guide
        if guide is None or guide.ready:
            return False
        return not guide.prompt or self.remaining > 1 or len(self.tokens) >= self.max_total

    @property
    def has_dear_masks(self) -> bool:
        return self.guide is not None and self.guide.work.is_dear

    @property
    def scores_prompt(self) -> bool:
        """Whether prompt log-probabilities are wanted and have not been sent yet."""
        return self.report is not None and self.request.sampling.prompt_logprobs is not None

    @property
    def computes_all(self) -> bool:
        """Whether it needs what only computing every prompt token gives, whatever is cached."""
        return self.scores_prompt or self.request.pooling is Pooling.MEAN

    def computed_to(self, end: int) -> None:
        """All tokens below `end` that had no KV are computed now."""
        self.num_computed = end
        if self.ahead:
            self.there = self.there

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.last_token = token

    def restart(self) -> None:
        """Its blocks are gone: everything is computed again."""
        self.phase = Phase.WAITING
        self.there = EMPTY
        self.inexact_from = None
        self.published = 0
        self.stored = EMPTY
        if self.report is not None:
            self.report.near_tokens = 0
