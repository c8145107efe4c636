"""Who a request comes from: API keys and tokens against the tenants' file, which is read again when it changes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge

from tandem.common.errors import ConfigError, TandemError
from tandem.router.tenants.caller import Caller
from tandem.router.tenants.jwt_issuer import issuer_of
from tandem.router.tenants.tenant_file import Files, Roster, read_api_keys, read_tenants, roster_of_keys, stamp

log = logging.getLogger(__name__)

POLL_S = 2.0
"""How often the files are looked at."""

MAX_TOKENS = 4096
"""Verified tokens that are remembered; the oldest go first."""

_HOW_TO_SEND = "Send it as `Authorization: Bearer KEY` or `x-api-key: KEY`."

_Entry = tuple[bytes, Caller | None, float]
"""Digest, holder, and the time at which it ends."""
_NOBODY: _Entry = (bytes(32), None, 0.0)


class _Book:
    """A roster with an index of its keys that is good for this process only.

    Looking up takes a time that depends on what is looked for, so it is done with a keyed hash that nobody outside can
    know or steer; the digests themselves are compared in constant time.
    """

    def __init__(self, roster: Roster) -> None:
        self.roster = roster
        self.by_name = {caller.tenant: caller for caller in roster.callers}
        self.fingerprint = roster.fingerprint()
        self._secret = secrets.token_bytes(32)
        self._keys: dict[bytes, _Entry] = {
            self._blind(digest): (digest, caller, math.inf) for digest, caller in roster.by_digest.items()
        }
        self._tokens: dict[bytes, _Entry] = {}
        """Tokens that were found good: checking a signature takes longer than placing a request."""

    def holder(self, credential: str) -> Caller | None:
        """The caller who has this API key, or a token that was `remember`ed and is still in force. None: nobody."""
        digest = hashlib.sha256(credential.encode()).digest()
        blinded = self._blind(digest)
        known, caller, end = self._keys.get(blinded) or self._tokens.get(blinded) or _NOBODY
        return caller if hmac.compare_digest(known, digest) and time.time() < end else None

    def remember(self, token: str, caller: Caller, end: float) -> None:
        """Keeps a verified token until `end` (seconds since 1970), so that it is not verified each time. Beyond
        `MAX_TOKENS` the oldest goes."""
        if len(self._tokens) >= MAX_TOKENS:
            self._tokens.pop(next(iter(self._tokens)))
        digest = hashlib.sha256(token.encode()).digest()
        self._tokens[self._blind(digest)] = digest, caller, end

    def _blind(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._secret, digest_size=16).digest()


class Tenants:
    """`authenticate` on the event loop; `watch` in a task of its own."""

    def __init__(self, read: Callable[[Files], Roster], registry: CollectorRegistry | None = None) -> None:
        """`read` raises ConfigError for a file that cannot be used; so does this at the start."""
        self._read = read
        self._files: Files = {}
        self._book = _Book(read(self._files))
        self._reloads = Counter(
            "tandem_router_tenant_file_reloads", "Readings of a changed tenants' file", ["result"], registry=registry
        )
        self._stale = Gauge(
            "tandem_router_tenant_file_stale",
            "1 while the tenants' file cannot be used and its last good content is in force",
            registry=registry,
        )

    @classmethod
    def open(
        cls,
        tenants_file: Path | None,
        api_keys_file: Path | None,
        registry: CollectorRegistry | None = None,
        *,
        api_keys: Sequence[str] = (),
    ) -> Tenants | None:
        """What is given of the three says who may come in; None without any: everybody may. Raises ConfigError."""
        if tenants_file is not None:
            return cls(lambda files: read_tenants(tenants_file, files), registry)
        if api_keys_file is not None:
            return cls(lambda files: read_api_keys(api_keys_file, files), registry)
        if api_keys:
            return cls(lambda files: roster_of_keys(api_keys), registry)
        return None

    @property
    def roster(self) -> Roster:
        return self._book.roster

    @property
    def fingerprint(self) -> str:
        """The same for files with the same tenants and keys."""
        return self._book.fingerprint

    def sees_all(self, caller: Caller) -> bool:
        """Whether it may read what tells of all tenants: an `admin` may, and who is the only tenant there can be."""
        return caller.admin or self._book.roster.one_tenant

    def find(self, tenant: str) -> Caller | None:
        """The tenant of this name as it is now, for work that goes on without its key; None: it has left the file."""
        return self._book.by_name.get(tenant)

    def authenticate(self, authorization: str) -> Caller:
        """`authorization`: the header's value.

        Raises TandemError `invalid_api_key`, or `permission_denied` for a genuine token that names no tenant here.
        """
        scheme, _, credential = authorization.partition(" ")
        credential = credential.strip()
        if scheme.lower() != "bearer" or not credential:
            raise TandemError("invalid_api_key", f"You did not provide an API key. {_HOW_TO_SEND}")
        book = self._book
        caller = book.holder(credential)
        if caller is not None:
            return caller
        roster = book.roster
        if roster.issuers:
            name = issuer_of(credential)
            issuer = roster.issuers.get(name) if name is not None else None
            if issuer is not None:
                claim, end = issuer.verify(credential)
                caller = roster.by_claim.get(claim)
                if caller is None:
                    raise TandemError("permission_denied", f"The token's `{issuer.claim}` names no tenant here.")
                book.remember(credential, caller, end)
                return caller
        raise TandemError("invalid_api_key", f"Incorrect API key provided. {_HOW_TO_SEND}")

    def reload(self) -> bool:
        """Reads the files again if one has changed; a file that cannot be used changes nothing. Blocks on the disk."""
        if all(stamp(path) == seen for path, seen in self._files.items()):
            return False
        files: Files = {}
        try:
            book = _Book(self._read(files))
        except ConfigError as error:
            log.error("the tenants stay as they were: %s", error)
            self._reloads.labels("failed").inc()
            self._stale.set(1)
            return False
        finally:
            self._files = files
        self._book = book
        self._reloads.labels("ok").inc()
        self._stale.set(0)
        log.info("tenants read again: %d", len(book.by_name))
        return True

    async def watch(self) -> None:
        """Until it is cancelled. A file is read when it has stopped changing: half of one can be a good file that lacks
        tenants, or their limits."""
        before: Files = {}
        while True:
            await asyncio.sleep(POLL_S)
            now = await asyncio.to_thread(lambda: {path: stamp(path) for path in self._files})
            if now == before:
                await asyncio.to_thread(self.reload)
            before = now
