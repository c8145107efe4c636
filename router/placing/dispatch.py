"""Applies the placement policy to the live fleet and starts attempts."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from tandem.common.fairness import LAST_BAND
from tandem.common.sampling import SamplingParams
from tandem.kvstore.identity import BlockHash, Namespace, keyed_salt, prefix_chain, request_namespace
from tandem.kvstore.interfaces import ObjectKey
from tandem.proto import worker_pb2
from tandem.router.fleet.load import Work, WorkerLoad
from tandem.router.fleet.session import WorkerSession
from tandem.router.fleet.workers import Fleet, no_worker
from tandem.router.metrics.router_metrics import RouterMetrics
from tandem.router.placing.attempt import Attempt, Listener
from tandem.router.placing.placement import Hits, Placement, Request, Stored, left_over, place
from tandem.router.placing.pool import Placed, Pool, WorkerState
from tandem.router.placing.prefix_index import MAX_BLOCKS
from tandem.router.placing.store_view import StoreView
from tandem.router.placing.targets import Targets
from tandem.router.settings import Disaggregate
from tandem.router.tenants.caller import Caller
from tandem.router.text.served_model import Prompt

READY_S = 0.25
"""Requests are given to workers while some worker's prompts take no longer than this: enough that none runs dry between
two decisions, and little enough that the order of the rest is still the router's."""
LEAST_LIMIT_S = 1.0
"""A hand-over between hosts is not given up earlier."""
SLACK_REQUESTS = 2
"""Requests beyond a full batch, so that a place does not stay empty for a round trip."""


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """One prompt with one set of sampling parameters: what a worker gets."""

    prompt: Prompt
    sampling: SamplingParams
    caller: Caller
    wanted_salt: str = ""
    """The request's own `cache_salt`."""
    priority: int = 0
    pooling: worker_pb2.Pooling.ValueType = worker_pb2.POOLING_NONE
    """Other than NONE: an embedding of the prompt is wanted, no output."""
    exact_kv: bool = False
    """No KV that is not exact may be used, so that all of it can be saved."""

    @property
    def cache_salt(self) -> bytes:
        return self.caller.cache_salt(self.wanted_salt)


class Dispatcher:
    """Starts sequences on the workers that `placement.place` chooses. On the event loop."""

    def __init__(
        self,
        fleet: Fleet,
        metrics: RouterMetrics,
        disaggregate: Disaggregate,
        store: StoreView | None = None,
        salt_key: bytes = bytes(32),
        max_index_blocks: int = MAX_BLOCKS,
        *,
        targets: Targets | None = None,
    ) -> None:
        """`store`: what the KV store holds; without it only the workers' own caches count. `salt_key`: of
        `keyed_salt`. `max_index_blocks`: see RouterConfig. `targets`: what the deployment has promised."""
        self.fleet = fleet
        self.pool = Pool(max_index_blocks)
        metrics.watch_index(self.pool.index)
        self._metrics = metrics
        self._disaggregate = disaggregate
        self._store = store
        self._salt_key = salt_key
        self._targets = targets
        self._turn = 0

    def start(
        self,
        key: worker_pb2.RequestKey,
        sequence: SequenceSpec,
        listener: Listener,
        *,
        timeout_s: float,
        traceparent: str = "",
        avoid: Collection[tuple[str, int]] = (),
        output_token_ids: Sequence[int] = (),
    ) -> Attempt:
        """`output_token_ids`: what another worker has produced already; this attempt goes on after it.

        Raises TandemError `unavailable` where no decode worker outside `avoid` is connected.
        """
        decodes, prefills = self.workers(sequence.priority, avoid)
        if not decodes:
            raise no_worker()
        chain, block_size = self._chain(sequence, decodes[0]), decodes[0].info.block_size
        hits = self._hits(chain, block_size)
        decoding, prefilling = [self.pool.state(s) for s in decodes], [self.pool.state(s) for s in prefills]
        self._turn += 1
        request = self._request(sequence, len(output_token_ids), decoding + prefilling)
        if len(prefills) < len(self.fleet.prefill):
            request = replace(request, one_place=request.one_place or ("" if prefills else "left_free"))
        placement = place(
            [state.load for state in decoding],
            [state.load for state in prefilling],
            request,
            hits,
            time.monotonic(),
            disaggregate=self._disaggregate,
            targets=self._targets,
            turn=self._turn,
        )
        self._metrics.placements.inc(placement.reason)
        decode = decoding[placement.decode]
        prefill = None if placement.prefill is None else prefilling[placement.prefill]
        resumed, caller = bool(output_token_ids), sequence.caller
        self._account(key, request, placement, decode, prefill, chain, hits, block_size, resumed, caller)
        message = worker_pb2.SessionRequest()
        submit = message.submit  # filled in place: a message that is put into another one is encoded and decoded
        submit.key.CopyFrom(key)
        submit.prompt_token_ids.extend(sequence.prompt.token_ids)
        submit.sampling.CopyFrom(sequence.sampling.to_proto())
        submit.priority = sequence.priority
        submit.timeout_s = timeout_s
        submit.cache_salt = self._salt(sequence)
        submit.tenant = sequence.caller.tenant
        submit.traceparent = traceparent
        submit.weight = sequence.caller.weight
        submit.output_token_ids.extend(output_token_ids)
        submit.pooling = sequence.pooling
        submit.exact_kv = sequence.exact_kv
        if prefill is not None:
            submit.handover_limit_s = self._handover_limit_s(request, prefill.load, decode.load)
        return Attempt(message, decode.session, None if prefill is None else prefill.session, listener, placement)

    def _handover_limit_s(self, request: Request, source: WorkerLoad, target: WorkerLoad) -> float:
        """How long after the first token a hand-over between hosts is given up: once the decode worker would have
        computed the prompt itself. 0: never. Notes that the link is tried."""
        link, now, model = (source.host, target.host), time.monotonic(), target.model
        limit_s = 0.0
        if source.host != target.host and self._disaggregate == "auto":
            believed_s = model.handover_s(request.prompt_tokens, link, now)
            limit_s = max(LEAST_LIMIT_S, model.prefill_s(request.prompt_tokens), 2.0 * believed_s)
        model.handover_tried(link, now)
        return limit_s

    def workers(
        self, priority: int, avoid: Collection[tuple[str, int]] = ()
    ) -> tuple[list[WorkerSession], list[WorkerSession]]:
        """Decode and prefill workers that a request of this band may use. The last band leaves one of each to others,
        unless it cannot be served then."""
        decodes = [session for session in self.fleet.decode if session.identity not in avoid]
        prefills = list(self.fleet.prefill)
        if priority != LAST_BAND:
            return decodes, prefills
        needed = prefills if self._disaggregate == "always" else []
        return self._left_over(decodes) or decodes, self._left_over(prefills) or needed

    def _left_over(self, sessions: Sequence[WorkerSession]) -> list[WorkerSession]:
        return [sessions[index] for index in left_over([self.pool.state(session).load for session in sessions])]

    def room(self, waiting_tokens: int, priority: int) -> bool:
        """Whether a worker can begin with a prompt of `waiting_tokens` soon, rather than keep it in its queue; those of
        later bands it displaces. False while there is no decode worker."""
        decodes, prefills = self.workers(priority)
        if not any(
            self.pool.state(session).load.has_room(waiting_tokens, SLACK_REQUESTS, priority) for session in decodes
        ):
            return False
        return self._prompt_wait_s(decodes, prefills, priority) <= READY_S

    def claims(self, tenant: str, weight: float, priority: int) -> bool:
        """Whether a worker without room would give a request of `tenant` a slot that somebody with far more has. That
        one's prompts, which wait there, it passes."""
        decodes, _ = self.workers(priority)
        return any(self.pool.state(session).load.yields_to(tenant, weight, priority) for session in decodes)

    def wait_s(self, priority: int) -> float:
        """The least time until a new prompt of this band has its turn; 0 where nobody is connected."""
        decodes, prefills = self.workers(priority)
        return self._prompt_wait_s(decodes, prefills, priority) if decodes else 0.0

    def cached_tokens(self, sequence: SequenceSpec) -> int:
        """The longest prefix of the prompt that any one worker holds or will hold soon."""
        decodes = self.fleet.decode
        if not decodes:
            return 0
        matches = self.pool.index.match(self._chain(sequence, decodes[0]))
        return max((present + promised for _, present, promised in matches), default=0) * decodes[0].info.block_size

    def _prompt_wait_s(self, decodes: list[WorkerSession], prefills: list[WorkerSession], priority: int) -> float:
        computing = [*decodes, *prefills] if self._disaggregate != "always" else prefills or decodes
        now = time.monotonic()
        return min(self.pool.state(session).load.wait_s(now, priority) for session in computing)

    def _hits(self, chain: Sequence[BlockHash], block_size: int) -> Hits:
        return {
            slot: (present * block_size, promised * block_size)
            for slot, present, promised in self.pool.index.match(chain)
        }

    def _request(self, sequence: SequenceSpec, resumed_tokens: int, states: Sequence[WorkerState]) -> Request:
        one_place, output_tokens = "", min(round(self.pool.output_tokens), sequence.sampling.max_tokens)
        if sequence.pooling:
            one_place, output_tokens = "pooling", 0
        elif sequence.sampling.prompt_logprobs is not None:
            one_place = "prompt_logprobs"
        return Request(
            prompt_tokens=len(sequence.prompt.token_ids) + resumed_tokens,
            output_tokens=output_tokens,
            priority=sequence.priority,
            one_place=one_place,
            stored=self._stored(sequence, states),
        )

    def _stored(self, sequence: SequenceSpec, states: Sequence[WorkerState]) -> Stored:
        if self._store is None or not len(self._store):
            return {}
        nodes = {state.load.store_node for state in states if state.load.store_node}
        chunk_tokens = max(state.session.info.chunk_tokens for state in states)
        if not nodes or not chunk_tokens:
            return {}
        root = self._root(sequence, states[0].session)
        keys = [ObjectKey(key) for key in prefix_chain(root, sequence.prompt.token_ids, chunk_tokens)]
        return self._store.reach(keys, chunk_tokens, nodes)

    def _account(
        self,
        key: worker_pb2.RequestKey,
        request: Request,
        placement: Placement,
        decode: WorkerState,
        prefill: WorkerState | None,
        chain: Sequence[BlockHash],
        hits: Hits,
        block_size: int,
        resumed: bool,
        caller: Caller,
    ) -> None:
        """Counts the request on its workers, before it is sent to them."""
        for state, output_tokens in ((decode, request.output_tokens), (prefill, 0)):
            if state is None:
                continue
            cached = min(sum(hits.get(state.load.slot, (0, 0))), request.prompt_tokens)
            computes = state is prefill or prefill is None
            work = Work(
                state.load,
                request.prompt_tokens,
                output_tokens,
                prefill_s=placement.prefill_s if computes else 0.0,
                cached_tokens=cached,
                priority=request.priority,
                tenant=caller.tenant,
                weight=caller.weight,
                stall_s=placement.stall_s if state is decode else 0.0,
            )
            source = prefill if state is decode else None
            placed = Placed(self.pool, state, work, chain, cached // block_size, source=source, resumed=resumed)
            state.session.watch(key, placed)

    def _chain(self, sequence: SequenceSpec, worker: WorkerSession) -> list[BlockHash]:
        return sequence.prompt.chain(self._root(sequence, worker), worker.info.block_size)

    def _root(self, sequence: SequenceSpec, worker: WorkerSession) -> Namespace:
        """The parent of the prefix chains of `sequence`, as `worker` makes them."""
        return request_namespace(Namespace(worker.info.namespace), self._salt(sequence))

    def _salt(self, sequence: SequenceSpec) -> bytes:
        return keyed_salt(self._salt_key, sequence.cache_salt)
