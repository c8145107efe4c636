"""What goes into the engine and what comes out: the dataclasses shared by engine, prefill and decode."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tandem.common.sampling import SamplingParams


class RequestKey(NamedTuple):
    """One attempt at a request. A later attempt has a higher epoch; outputs of an older one are dropped."""

    request_id: str
    epoch: int


class FinishReason(enum.IntEnum):
    """Values equal the FinishReason enum of worker.proto."""

    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    ERROR = 4
    HANDED_OVER = 5


class Pooling(enum.IntEnum):
    """Values equal the Pooling enum of worker.proto."""

    NONE = 0
    MEAN = 1
    """Mean of the last layer's normalised hidden states of all prompt tokens."""
    LAST = 2
    """Hidden state of the last token, normalised as for MEAN."""


class Preemption(enum.StrEnum):
    """Why a request lost its blocks, for a while: what it has generated is kept."""

    MEMORY = "memory"
    PRIORITY = "priority"
    """Given up for a request of an earlier band, or of a tenant with far fewer slots."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities of one token, and of the likeliest tokens at its place."""

    logprob: float
    rank: int
    """1: the most likely token."""
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(slots=True)
class PromptReport:
    """How the prompt was computed. Durations in seconds."""

    cached_tokens: int = 0
    cached_by_tier: dict[str, int] = field(default_factory=dict)
    """The same tokens by the tier (`kvstore.interfaces.TierName`) that they came from."""
    near_tokens: int = 0
    """Those of them that went through a codec which is not exact."""
    inexact_from: int | None = None
    """The first known token whose KV is not exact; the first output depends on it. None: all is exact."""
    queue_s: float = 0.0
    prefill_s: float = 0.0
    handover_s: float = 0.0
    """From the first token, or from when its KV was welcome on the decode worker if that was later, until all of it was
    there; with a `recompute_reason` what was lost by waiting for it."""
    handover_bytes: int = 0
    handover_transport: str = ""
    handover_codec: str = ""
    load_s: float = 0.0
    """Waited for KV from the store; part of `prefill_s`."""
    computed_by: str = ""
    recompute_reason: str = ""


@dataclass(slots=True)
class RequestOutput:
    """New tokens of one request since its previous output."""

    key: RequestKey
    start_index: int = 0
    """Index of token_ids[0] in the whole output."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error_code: str = ""
    error_message: str = ""
    stop_token_id: int | None = None
    prompt: PromptReport | None = None
    """Report that comes with the first output."""
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    """Log probabilities that come with the first output, when asked for: one entry per prompt token, the first is
    None."""
    embedding: bytes = b""
    """Little-endian float32 [hidden_size], where pooling was asked for."""
    preempted: Preemption | None = None
    """It has just lost its blocks; there are no tokens in this output."""


class KvExport(Protocol):
    """Sends the KV of a request to the worker that goes on with it. Called on the engine thread: none of these may
    block.

    From `begin` until `Engine.release(key)` is called the request's blocks stay as they are, so an exporter may read
    them from another thread.
    """

    def begin(self, key: RequestKey, tokens: Sequence[int], slots: Sequence[int], cached_tokens: int) -> None:
        """Blocks are reserved. `tokens` are those known, of prompt and output so far: the next one, which `finished`
        brings, has position len(tokens). `slots[i]` is the pool slot of token i; rows below `cached_tokens` are filled
        in every layer already."""

    def layer_ready(self, layer: int, start: int, stop: int) -> None:
        """Rows [start, stop) of the known tokens are now in `layer`."""

    def finished(self, output: RequestOutput) -> None:
        """The next token is sampled; `output` holds it (and a finish reason if it was also the last)."""

    def aborted(self, reason: str) -> None:
        """Cancelled, out of time or failed; nothing more will come. `Engine.release` is still required."""


class KvReservation(Protocol):
    """Blocks on a decode worker that wait for KV from elsewhere. Made by the engine, safe from any thread."""

    @property
    def skip_tokens(self) -> int:
        """Leading tokens whose KV this worker has already; they need not be sent."""

    def write(self, layer: int, start: int, stop: int, payload: memoryview) -> bool:
        """Puts rows [start, stop) of `layer` (layout [K|V][token][kv_head][dim]) into the reserved blocks. False:
        the request is gone; the bytes were dropped."""

    def complete(self, first: RequestOutput) -> None:
        """All rows are written. Raises ValueError if some are missing. The engine emits `first` and decodes on."""

    def fail(self, reason: str) -> None:
        """The KV will not come: compute the prompt here. Idempotent."""


class KvImport(Protocol):
    """The decode worker's side that connects a reservation to a transport. Called on the engine thread."""

    def reserved(self, reservation: KvReservation) -> None:
        """Blocks are reserved; rows may be written from now on."""

    def closed(self) -> None:
        """The request ended (cancel, deadline, completion): forget the reservation."""


@dataclass(slots=True)
class EngineRequest:
    """A request to one engine. The engine reads it on its own thread; nobody changes it once it is submitted."""

    key: RequestKey
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    """Lower runs first."""
    deadline: float | None = None
    """time.monotonic() after which the request ends with `deadline_exceeded`."""
    cache_salt: bytes = b""
    kv_export: KvExport | None = None
    """Set on a prefill worker: stop after the first token and hand over."""
    kv_import: KvImport | None = None
    """Set on a decode worker that expects KV: reserve blocks and wait."""
    tenant: str = "default"
    """Who is charged for what the KV store keeps of it, and takes turns with the others."""
    weight: float = 1.0
    """The tenant's share where tenants compete."""
    output_token_ids: list[int] = field(default_factory=list)
    """What another worker has generated of the output already: this one goes on after it."""
    near_allowed: bool = True
    """Whether KV that is not exact may be used, where the worker allows it at all."""
    pooling: Pooling = Pooling.NONE
    """Other than NONE: an embedding of the prompt is the answer, nothing is generated."""

    @property
    def token_ids(self) -> list[int]:
        """All tokens that are known when the request comes. Not to be changed."""
        return self.prompt_token_ids + self.output_token_ids if self.output_token_ids else self.prompt_token_ids
