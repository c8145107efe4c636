"""Named contexts of a store node: token ids under a name, and their KV kept from leaving until they expire.

The token ids are the lowest tier: whatever else is lost, a request with them computes the KV again, workers save it as
they save any KV, and the shelf pins it when it arrives.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from tandem.kvstore.contexts.context_files import Context, ContextFiles
from tandem.kvstore.eviction import Shares
from tandem.kvstore.identity import Namespace, prefix_chain
from tandem.kvstore.interfaces import ObjectKey, TierName
from tandem.kvstore.node import KvNode

log = logging.getLogger(__name__)

MAX_CONTEXTS = 2048
MAX_TOKENS = 1 << 20
"""Most tokens of one context."""
MAX_BYTES = 128 << 20
"""Most bytes of all token ids together, four bytes a token."""
MIN_TTL_S = 1.0
MAX_TTL_S = 30 * 86400.0
PIN_INTERVAL_S = 0.5
PINS_PER_ROUND = 8192
"""A pin takes a few microseconds."""
_NAME = re.compile(r"[A-Za-z0-9._\-]{1,64}")
_ROOT_BYTES = 32

Problem = Literal["invalid", "old_version", "full"]


class ContextRefusedError(Exception):
    def __init__(self, problem: Problem, message: str) -> None:
        super().__init__(message)
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Residency:
    """Where the KV of a context is on this node."""

    resident_tokens: int
    """Leading ones that some tier has: what a request need not compute."""
    chunks: dict[TierName, int]


@dataclass(slots=True, eq=False)
class _Held:
    context: Context
    keys: list[ObjectKey]
    pinned: int = 0
    """How many leading keys the current pass has been through."""


class ContextShelf:
    """Thread-safe. `start` keeps pins up in the background; `keep` is one round of it."""

    def __init__(
        self,
        node: KvNode,
        files: ContextFiles | None,
        chunk_tokens: int,
        clock: Callable[[], float] = time.time,
        shares: Shares | None = None,
    ) -> None:
        """Takes up what `files` have; None: contexts live as long as the process. `shares`: of owners with a quota.
        Raises ConfigError if the folder cannot be read."""
        self._shares = shares or Shares()
        self._node = node
        self._files = files
        self._chunk_tokens = chunk_tokens
        self._clock = clock
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, str], _Held] = OrderedDict()
        """Contexts by owner and name; the one whose pins were renewed longest ago is first."""
        self._bytes = 0
        self._work = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kv-contexts", daemon=True)
        if files is not None:
            self._load(files)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Pins end with the node. Idempotent."""
        self._closed = True
        self._work.set()
        if self._thread.is_alive():
            self._thread.join()

    def put(
        self, owner: str, name: str, token_ids: Sequence[int], *, root: bytes, ttl_s: float, version: int = 0
    ) -> Context:
        """Replaces an older version. `version` 0: the one after it. Raises ContextRefusedError; then nothing has
        changed."""
        now = self._clock()
        _check(owner, name, token_ids, root, ttl_s)
        context = Context(
            owner=owner,
            name=name,
            version=version,
            tokens=np.asarray(token_ids, dtype="<u4").tobytes(),
            root=root,
            chunk_tokens=self._chunk_tokens,
            created_at=now,
            expires_at=now + ttl_s,
        )
        held = _hold(context)
        with self._lock:
            self._expire(now)
            old = self._held.get((owner, name))
            held.context = context = replace(context, version=_next_version(old, context))
            self._check_room(context, old.context if old is not None else None)
            if self._files is not None:
                try:
                    self._files.save(context)
                except OSError as error:
                    raise ContextRefusedError("full", f"the context cannot be written: {error.strerror}") from error
            if old is not None:
                kept = set(held.keys)
                self._unpin(old, [key for key in old.keys if key not in kept])
            self._held[owner, name] = held
            self._bytes += len(context.tokens) - (len(old.context.tokens) if old is not None else 0)
        self._work.set()
        return context

    def get(self, owner: str, name: str) -> Context | None:
        with self._lock:
            held = self._living(owner, name)
            return None if held is None else held.context

    def list(self, owner: str | None = None) -> list[Context]:
        """Contexts of one owner or of all, by owner and name."""
        now = self._clock()
        with self._lock:
            found = [held.context for held in self._held.values() if owner in (None, held.context.owner)]
        return sorted((each for each in found if each.expires_at > now), key=lambda each: (each.owner, each.name))

    def drop(self, owner: str, name: str) -> bool:
        """Its KV may leave again. False: there is none."""
        with self._lock:
            if self._living(owner, name) is None:
                return False
            self._remove(owner, name)
            return True

    def residency(self, context: Context) -> Residency:
        """Counts the chunks of a context that each tier of this node has."""
        with self._lock:
            held = self._held.get((context.owner, context.name))
        keys = held.keys if held is not None and held.context == context else _keys(context)
        chunks: Counter[TierName] = Counter()
        leading = 0
        for index, key in enumerate(keys):
            tiers = self._node.lookups.contains(key)
            chunks.update(tiers)
            leading += bool(tiers) and leading == index
        return Residency(leading * context.chunk_tokens, dict(chunks))

    def keep(self) -> None:
        """Ends what has expired and pins what has come, or moved, since the last round. At most PINS_PER_ROUND chunks;
        the next round goes on from there."""
        with self._lock:
            now = self._clock()
            self._expire(now)
            budget = PINS_PER_ROUND
            for _ in range(len(self._held)):
                place, held = next(iter(self._held.items()))
                keys = held.keys[held.pinned : held.pinned + budget]
                for key in keys:
                    self._node.commands.pin(key, _pin_owner(held.context), held.context.expires_at - now, hard=True)
                budget -= len(keys)
                held.pinned += len(keys)
                if held.pinned < len(held.keys):
                    return
                held.pinned = 0
                self._held.move_to_end(place)

    def _run(self) -> None:
        while not self._closed:
            self._work.clear()
            self.keep()
            self._work.wait(PIN_INTERVAL_S)

    def _load(self, files: ContextFiles) -> None:
        now = self._clock()
        for context in files.load():
            if context.expires_at <= now:
                files.remove(context.owner, context.name)
            elif len(self._held) < MAX_CONTEXTS and self._bytes + len(context.tokens) <= MAX_BYTES:
                # Another chunk size has other keys. The KV of the old ones is of no use, the recipe is.
                current = replace(context, chunk_tokens=self._chunk_tokens)
                self._held[context.owner, context.name] = _hold(current)
                self._bytes += len(context.tokens)
            else:
                log.warning("context %s of %s is left on disk: too many", context.name, context.owner)
        if self._held:
            log.info("%d named contexts taken up", len(self._held))

    # Under the lock

    def _check_room(self, new: Context, old: Context | None) -> None:
        """Raises ContextRefusedError where the node, or the share of the owner, has no place for `new`. Shares shrink
        when others come: what takes no more than the `old` version did is always taken."""
        if old is not None and len(new.tokens) <= len(old.tokens):
            return
        kept = [each.context for each in self._held.values() if each.context is not old]
        mine = [len(each.tokens) for each in kept if each.owner == new.owner]
        kept_bytes = sum(len(each.tokens) for each in kept)
        places = self._may_hold(new.owner, MAX_CONTEXTS, len(kept) - len(mine))
        most_bytes = self._may_hold(new.owner, MAX_BYTES, kept_bytes - sum(mine))
        if len(kept) >= MAX_CONTEXTS or kept_bytes + len(new.tokens) > MAX_BYTES or (old is None and places == 0):
            raise ContextRefusedError(
                "full",
                f"{len(kept)} contexts of {kept_bytes >> 2} tokens are held; the limits are {MAX_CONTEXTS} and "
                f"{MAX_BYTES >> 2}. Drop some, or let them expire.",
            )
        if (old is None and len(mine) >= places) or sum(mine) + len(new.tokens) > most_bytes:
            raise ContextRefusedError(
                "invalid",
                f"name: {new.owner} holds {len(mine)} other contexts of {sum(mine) >> 2} tokens, and this one has "
                f"{new.num_tokens}; the limits of {new.owner} are now {places} contexts and {most_bytes >> 2} tokens. "
                "Drop some, or let them expire.",
            )

    def _may_hold(self, owner: str, capacity: int, others: int) -> int:
        """The owner's quota, else half of what `others` leave: whatever somebody takes, the next one finds room."""
        share = self._shares.of(owner)
        return max(int(capacity * share), 1) if share < 1.0 else (capacity - others) // 2

    def _living(self, owner: str, name: str) -> _Held | None:
        held = self._held.get((owner, name))
        return held if held is not None and held.context.expires_at > self._clock() else None

    def _expire(self, now: float) -> None:
        for owner, name in [place for place, held in self._held.items() if held.context.expires_at <= now]:
            self._remove(owner, name)

    def _remove(self, owner: str, name: str) -> None:
        held = self._held.pop((owner, name))
        self._bytes -= len(held.context.tokens)
        if self._files is not None:
            self._files.remove(owner, name)
        self._unpin(held, held.keys)

    def _unpin(self, held: _Held, keys: Sequence[ObjectKey]) -> None:
        for key in keys:
            self._node.commands.unpin(key, _pin_owner(held.context))


def open_shelf(node: KvNode, kv_disk: str, chunk_tokens: int, key: bytes) -> ContextShelf:
    """Contexts in a subfolder of the node's disk folder, which the disk tier has locked. Raises ConfigError."""
    files = ContextFiles(Path(kv_disk) / "contexts", key) if kv_disk else None
    return ContextShelf(node, files, chunk_tokens, shares=node.settings.quotas)


def _check(owner: str, name: str, token_ids: Sequence[int], root: bytes, ttl_s: float) -> None:
    for field, value in (("owner", owner), ("name", name)):
        if not _NAME.fullmatch(value):
            raise ContextRefusedError("invalid", f"{field}: 1 to 64 letters, digits and any of . _ - are allowed")
    if not 0 < len(token_ids) <= MAX_TOKENS:
        raise ContextRefusedError("invalid", f"token_ids: {len(token_ids)} tokens; 1 to {MAX_TOKENS} are allowed")
    if len(root) != _ROOT_BYTES:
        raise ContextRefusedError("invalid", f"root: must have {_ROOT_BYTES} bytes, not {len(root)}")
    if not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
        raise ContextRefusedError(
            "invalid", f"ttl_s: must be between {MIN_TTL_S:.0f} and {MAX_TTL_S:.0f} seconds (30 days)"
        )


def _next_version(old: _Held | None, new: Context) -> int:
    """The same version with the same tokens again is a retry, and renews its time."""
    last = old.context if old is not None else None
    if last is None or not new.version:
        return new.version or (last.version + 1 if last is not None else 1)
    is_retry = new.version == last.version and (new.tokens, new.root) == (last.tokens, last.root)
    if new.version <= last.version and not is_retry:
        raise ContextRefusedError(
            "old_version", f"version {new.version}: version {last.version} is there; use a higher one, or none"
        )
    return new.version


def _hold(context: Context) -> _Held:
    return _Held(context, _keys(context))


def _keys(context: Context) -> list[ObjectKey]:
    chain = prefix_chain(Namespace(context.root), context.token_ids, context.chunk_tokens)
    return [ObjectKey(key) for key in chain]


def _pin_owner(context: Context) -> str:
    return f"context:{context.owner}/{context.name}"
