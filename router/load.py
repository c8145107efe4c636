"""What a worker has to do: what this router gave it, counted at once, and what others gave it, as of its last status.

Pure: the clock is passed in. Shared by the live router and by what drives the placement policy in virtual time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.planner.perf_model import PerfModel


@dataclass(slots=True)
class WorkerLoad:
    """Of one start of one worker. Read by `placement.place`, changed by `Work` and `foreign`."""

    model: PerfModel
    slot: int
    """In the prefix index."""
    capacity_tokens: int
    """KV that fits; 0: unknown, never full."""
    max_requests: int
    """In its batch at one time; 0: unknown, never full."""
    name: str = ""
    """The worker's id, for people."""
    store_node: str = ""
    """Its home node in the KV store; empty without a store."""
    requests: int = 0
    """Placed and not over."""
    waiting: int = 0
    """Of those, prompts it has to compute and has not yet."""
    waiting_tokens: int = 0
    """Of those prompts, cached or not."""
    waiting_s: float = 0.0
    """Estimated time to compute them."""
    busy_until: float = 0.0
    """When it will have computed them, by the clock that is passed in."""
    decoding: int = 0
    """Requests that produce tokens."""
    kv_tokens: int = 0
    """Prompt and output so far of all `requests`: what a decode step reads, or will before long."""
    reserved_tokens: int = 0
    """KV that they take up beyond what was cached, with the output that is still to come."""
    foreign_requests: int = 0
    foreign_decoding: int = 0
    foreign_s: float = 0.0
    foreign_tokens: int = 0

    @property
    def batch(self) -> int:
        """Requests that decode, or will before long."""
        return self.requests + self.foreign_requests

    def wait_s(self, now: float) -> float:
        """Until a prompt that arrives now has its turn.

        Work drains with the clock, but a worker that is slower than estimated is not idle: of n prompts that wait, at
        most one is nearly done.
        """
        if not self.waiting:
            return self.foreign_s
        left = self.waiting_s * (self.waiting - 1) / self.waiting
        return max(self.busy_until - now, left) + self.foreign_s

    def has_room(self, tokens: int, slack: int) -> bool:
        """Whether a prompt of `tokens` would not just wait for others to end. `slack`: requests beyond a full batch
        that may wait there, so that a place does not stay empty."""
        if not self.batch:
            return True
        if self.max_requests and self.batch >= self.max_requests + slack:
            return False
        return not self.capacity_tokens or self.reserved_tokens + self.foreign_tokens + tokens <= self.capacity_tokens

    def foreign(self, *, requests: int, decoding: int, pending_tokens: int, used_tokens: int) -> None:
        """What the worker reports beyond what this router knows: the work of other routers."""
        self.foreign_requests = requests
        self.foreign_decoding = decoding
        self.foreign_s = self.model.prefill_s(pending_tokens)
        self.foreign_tokens = used_tokens


@dataclass(slots=True, eq=False)
class Work:
    """One request on one worker: `start`, then perhaps `computed`, then `produced` any number of times, then `end`."""

    load: WorkerLoad
    prompt_tokens: int
    output_tokens: int
    """Expected; 0 on a prefill worker."""
    prefill_s: float
    """Estimated, of the part that this worker computes; 0 where it is sent the KV."""
    cached_tokens: int = 0
    """Of the prompt, on this worker: they take up no further room."""
    produced_tokens: int = 0
    _waits: bool = field(default=False, init=False)
    _decodes: bool = field(default=False, init=False)
    _over: bool = field(default=False, init=False)

    def start(self, now: float) -> None:
        load = self.load
        load.requests += 1
        load.reserved_tokens += self._reserved
        load.kv_tokens += self.prompt_tokens
        if self.prefill_s > 0.0:
            self._waits = True
            load.waiting += 1
            load.waiting_tokens += self.prompt_tokens
            load.waiting_s += self.prefill_s
            load.busy_until = max(load.busy_until, now) + self.prefill_s

    def computed(self, now: float) -> None:
        """The first token is there. Idempotent."""
        if self._over or self._decodes:
            return
        self._computed(now)
        self._decodes = True
        self.load.decoding += 1

    def produced(self, tokens: int) -> None:
        self.produced_tokens += tokens
        self.load.kv_tokens += tokens
        more = self.produced_tokens - self.output_tokens
        if more > 0:
            self.output_tokens += more
            self.load.reserved_tokens += more

    def end(self, now: float) -> None:
        """Idempotent."""
        if self._over:
            return
        self._computed(now)
        self._over = True
        load = self.load
        load.requests -= 1
        load.reserved_tokens -= self._reserved
        load.kv_tokens -= self.prompt_tokens + self.produced_tokens
        load.decoding -= self._decodes

    @property
    def _reserved(self) -> int:
        return self.prompt_tokens - self.cached_tokens + self.output_tokens

    def _computed(self, now: float) -> None:
        if self._waits:
            self._waits = False
            load = self.load
            load.waiting -= 1
            load.waiting_tokens -= self.prompt_tokens
            load.waiting_s = max(0.0, load.waiting_s - self.prefill_s) if load.waiting else 0.0
            load.busy_until = now + load.waiting_s
