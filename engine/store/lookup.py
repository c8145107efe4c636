"""What the store has of a prompt, and how much of it is worth fetching. Asked while the request waits for its turn."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from tandem.engine.schedule.ranges import TokenRanges
from tandem.engine.store.cache import EngineStore
from tandem.kvstore.cost import choose_fetch
from tandem.kvstore.identity import Namespace, prefix_chain
from tandem.kvstore.interfaces import Fetch, Located, ObjectKey

logger = logging.getLogger(__name__)


class LookUp:
    """One question. Made on the engine thread, answered on the look-up thread, where it also starts the fetch; from
    `answered` on it belongs to the engine thread again."""

    def __init__(
        self,
        store: EngineStore,
        root: bytes,
        tokens: Sequence[int],
        *,
        cached_tokens: int,
        tokens_per_s: float,
        answered: Callable[[LookUp], None],
    ) -> None:
        """`tokens` are the known ones and do not change; `cached_tokens` of it are on the device; `tokens_per_s` is the
        measured prefill rate, 0: unknown."""
        self._store = store
        self._root = root
        self._tokens = tokens
        self._cached = cached_tokens
        self._rate = tokens_per_s
        self._answered = answered
        self.first_chunk = cached_tokens // store.chunk_tokens
        self.keys: list[ObjectKey] = []
        """Keys of all full chunks of the prompt."""
        self.found: list[Located] = []
        """The leading run from `first_chunk` on that the store has."""
        self.located: list[Located] = []
        """The part of it that is worth fetching."""
        self.fetch: Fetch | None = None
        """The fetch of `located`; None: nobody has asked for them yet."""
        self.fetch_began = 0.0
        """time.monotonic()."""
        self.outcome = "miss"
        self.abandoned = False
        """Set by the engine thread: nobody waits for the answer."""

    @property
    def stored(self) -> TokenRanges:
        """Tokens that `located` fills. The last known token has to be computed for its logits."""
        chunk_tokens = self._store.chunk_tokens
        end = (self.first_chunk + len(self.located)) * chunk_tokens
        return TokenRanges.of((self.first_chunk * chunk_tokens, min(end, len(self._tokens) - 1)))

    def run(self) -> None:
        """Asks the store, on a thread of look-ups. Never raises: what goes wrong means that nothing is there."""
        try:
            if not self.abandoned:
                self._ask()
        except Exception:
            logger.exception("a look-up in the KV store failed")
            self.located = []
        self._answered(self)

    def drop(self) -> None:
        pass

    def discard(self) -> None:
        """Ends the prefetch."""
        if self.fetch is not None:
            self.take_fetch().close()

    def take_fetch(self) -> Fetch:
        """The prefetch, which no longer counts as one. Raises ValueError if there is none."""
        if self.fetch is None:
            raise ValueError("nothing was prefetched")
        fetch, self.fetch = self.fetch, None
        self._store.prefetches.release()
        return fetch

    def _ask(self) -> None:
        store = self._store
        chain = prefix_chain(Namespace(self._root), self._tokens, store.chunk_tokens)
        self.keys = [ObjectKey(key) for key in chain]
        self.found = store.home.locate(self.keys[self.first_chunk :])
        if not self.found or self.abandoned:
            return
        plan = choose_fetch(self.found, store.chunk_tokens, self._cached, len(self._tokens), self._rate, store.links)
        logger.debug("look-up of %d tokens: %s", len(self._tokens), plan.why)
        self.located = self.found[: plan.num_objects]
        self.outcome = "fetch" if self.located else "recompute"
        if self.located and store.prefetches.acquire(blocking=False):
            self.fetch_began = time.monotonic()
            try:
                self.fetch = store.home.fetch(self.located, plan.recompute_s if store.overlap else 0.0)
            except BaseException:
                store.prefetches.release()
                raise
