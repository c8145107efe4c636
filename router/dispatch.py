"""Applies the placement policy to the live fleet and starts attempts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tandem.common.sampling import SamplingParams
from tandem.kvstore.identity import BlockHash, Namespace, salted
from tandem.proto import worker_pb2
from tandem.router.api_keys import Caller
from tandem.router.attempt import Attempt, Listener
from tandem.router.metrics import RouterMetrics
from tandem.router.placement import DecodeCandidate, PrefillCandidate, PrefixAffinity, RequestFacts, place
from tandem.router.served_model import Prompt
from tandem.router.session import WorkerSession
from tandem.router.settings import Disaggregate
from tandem.router.workers import Fleet, no_worker


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """One prompt with one set of sampling parameters: what a worker gets."""

    prompt: Prompt
    sampling: SamplingParams
    caller: Caller
    wanted_salt: str = ""
    """The request's own `cache_salt`."""
    priority: int = 0

    @property
    def cache_salt(self) -> bytes:
        return self.caller.cache_salt(self.wanted_salt)


class Dispatcher:
    def __init__(self, fleet: Fleet, metrics: RouterMetrics, disaggregate: Disaggregate) -> None:
        self.fleet = fleet
        self._metrics = metrics
        self._disaggregate = disaggregate
        self._affinity = PrefixAffinity()

    def start(
        self,
        key: worker_pb2.RequestKey,
        sequence: SequenceSpec,
        listener: Listener,
        *,
        timeout_s: float,
        traceparent: str = "",
        avoid: Collection[tuple[str, int]] = (),
    ) -> Attempt:
        """Raises TandemError `unavailable` where no decode worker outside `avoid` is connected."""
        decodes = [session for session in self.fleet.decode if session.identity not in avoid]
        if not decodes:
            raise no_worker()
        chain = self._chain(sequence, decodes[0])
        block_size = decodes[0].info.block_size
        match = self._affinity.match(chain)
        prefills = self.fleet.prefill
        placement = place(
            [
                DecodeCandidate(
                    requests=session.requests,
                    prefix_tokens=match.sent_blocks * block_size if session.identity == match.worker else 0,
                    cached_tokens=match.computed_blocks * block_size if session.identity == match.worker else 0,
                    prefill_tokens_per_s=session.status.prefill_tokens_per_s,
                    picks=session.picks,
                )
                for session in decodes
            ],
            [PrefillCandidate(session.prompt_tokens, session.picks) for session in prefills],
            RequestFacts(len(sequence.prompt.token_ids), sequence.sampling.prompt_logprobs is not None),
            self._disaggregate,
        )
        decode = decodes[placement.decode]
        prefill = None if placement.prefill is None else prefills[placement.prefill]
        self._affinity.sent(chain, decode.identity)
        self._metrics.placements.labels(placement.reason).inc()
        submit = worker_pb2.Submit(
            key=key,
            prompt_token_ids=sequence.prompt.token_ids,
            sampling=sequence.sampling.to_proto(),
            priority=sequence.priority,
            timeout_s=timeout_s,
            cache_salt=sequence.cache_salt,
            tenant=sequence.caller.tenant,
            traceparent=traceparent,
        )
        return Attempt(submit, decode, prefill, listener)

    def prompt_computed(self, sequence: SequenceSpec, decode: WorkerSession) -> None:
        """The first token is here, so `decode` has the KV of the prompt."""
        self._affinity.computed(self._chain(sequence, decode), decode.identity)

    def _chain(self, sequence: SequenceSpec, decode: WorkerSession) -> list[BlockHash]:
        root = salted(Namespace(decode.info.namespace), sequence.cache_salt)
        return sequence.prompt.chain(root, decode.info.block_size)
