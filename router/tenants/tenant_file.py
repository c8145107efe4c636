"""The two files that say who may use the router: tenants in YAML, or the simple one with one API key per line."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tandem.common.errors import ConfigError
from tandem.common.fairness import MAX_WEIGHT
from tandem.common.yaml_fields import Fields
from tandem.router.tenants import jwt_issuer
from tandem.router.tenants.caller import ANYBODY, HIGHEST_PRIORITY, LOWEST_PRIORITY, Caller, Rates
from tandem.router.tenants.jwt_issuer import Issuer

MAX_TENANTS = 10_000
MAX_RATE = 10**12

_NAME = re.compile(r"[A-Za-z0-9._\-]{1,64}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_KEY_LINE = re.compile(r"([A-Za-z0-9._\-]{1,64}):([0-9a-fA-F]{64})(?::([A-Za-z0-9._\-]{1,64}))?")
_HOW_TO_HASH = "the SHA-256 of a key in hex, made with `printf %s KEY | sha256sum`"


Stamp = tuple[int, int, int] | None
Files = dict[Path, Stamp]
"""What was read, stamped just before, also where the reading failed: a change of any makes the result old."""


def stamp(path: Path) -> Stamp:
    """Changes when the file does, also when another takes its place. None: there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


@dataclass(frozen=True, slots=True)
class Roster:
    """Everybody who may come in, as one reading of a file found it."""

    by_digest: Mapping[bytes, Caller]
    """SHA-256 of an API key -> its holder."""
    by_claim: Mapping[str, Caller]
    issuers: Mapping[str, Issuer]
    one_tenant: bool = False
    """Whoever has a key is the same tenant, and always will be: nobody hides anything from anybody."""

    def fingerprint(self) -> str:
        """Equal where the same keys and claims belong to the same tenants."""
        holders = [(digest.hex(), caller.tenant) for digest, caller in self.by_digest.items()]
        holders += [(f"claim {claim}", caller.tenant) for claim, caller in self.by_claim.items()]
        return hashlib.blake2b(repr(sorted(holders)).encode(), digest_size=8).hexdigest()

    @property
    def callers(self) -> list[Caller]:
        """Each tenant once; those with the same name in a key file are one tenant."""
        return list({caller.tenant: caller for caller in (*self.by_digest.values(), *self.by_claim.values())}.values())


def roster_of_keys(keys: Sequence[str]) -> Roster:
    """Keys as they are sent, all of one tenant without limits."""
    tenant = replace(ANYBODY, admin=False)
    return Roster({hashlib.sha256(key.encode()).digest(): tenant for key in keys}, {}, {}, one_tenant=True)


def read_api_keys(path: Path, files: Files) -> Roster:
    """Lines `name:sha256-hex-of-key[:sharing-group]`; `#` begins a comment. No limits. Raises ConfigError."""
    files[path] = stamp(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-keys-file {path}: cannot be read ({error})") from error
    by_digest: dict[bytes, Caller] = {}
    for number, line in enumerate(lines, start=1):
        stripped = line.partition("#")[0].strip()
        if not stripped:
            continue
        match = _KEY_LINE.fullmatch(stripped)
        if match is None:
            raise ConfigError(
                f"--api-keys-file {path}, line {number}: expected `name:sha256-hex-of-key[:sharing-group]`"
            )
        by_digest[bytes.fromhex(match.group(2))] = Caller(match.group(1), match.group(3) or "", priority_min=0)
    if not by_digest:
        raise ConfigError(f"--api-keys-file {path}: holds no key")
    return Roster(by_digest, {}, {})


def read_tenants(path: Path, files: Files) -> Roster:
    """Fields are described in `docs/tenants.md`. Raises ConfigError naming line, field and remedy."""
    files[path] = stamp(path)
    top = Fields.load(path, "--tenants-file")
    issuers: dict[str, Issuer] = {}
    for fields in top.mappings("issuers"):
        issuer = _issuer(fields, path.parent, files)
        if issuer.name in issuers:
            raise fields.error("issuer", f"{issuer.name} is there twice")
        issuers[issuer.name] = issuer
    by_digest: dict[bytes, Caller] = {}
    by_claim: dict[str, Caller] = {}
    names: set[str] = set()
    for fields in top.mappings("tenants"):
        caller = _caller(fields)
        if caller.tenant in names:
            raise fields.error("name", f"{caller.tenant} is there twice; a tenant may have several keys")
        names.add(caller.tenant)
        _add_keys(fields, caller, by_digest)
        _add_claims(fields, caller, by_claim, bool(issuers))
        fields.end()
    top.end()
    if not names:
        raise top.error("tenants", "must list at least one tenant, or nobody could use the router")
    if len(names) > MAX_TENANTS:
        raise top.error("tenants", f"may list at most {MAX_TENANTS} tenants, got {len(names)}")
    return Roster(by_digest, by_claim, issuers)


def _caller(fields: Fields) -> Caller:
    name = _name(fields, "name")
    priority_min = fields.integer("priority_min", low=LOWEST_PRIORITY, high=HIGHEST_PRIORITY)
    priority_max = fields.integer("priority_max", low=LOWEST_PRIORITY, high=HIGHEST_PRIORITY)
    first, last = priority_min or 0, HIGHEST_PRIORITY if priority_max is None else priority_max
    if first > last:
        raise fields.error("priority_max", f"must be at least priority_min, which is {first}, got {last}")
    models = fields.texts("models")
    if models is not None and not models:
        raise fields.error("models", "must not be empty; leave it out to allow all")
    return Caller(
        name,
        sharing_group=_name(fields, "sharing_group", ""),
        weight=fields.number("weight", 1.0, low=1 / MAX_WEIGHT, high=MAX_WEIGHT),
        priority_min=first,
        priority_max=last,
        rates=Rates(
            requests_per_minute=fields.integer("requests_per_minute", low=1, high=MAX_RATE),
            tokens_per_minute=fields.integer("tokens_per_minute", low=1, high=MAX_RATE),
            max_concurrent=fields.integer("max_concurrent", low=1, high=MAX_RATE),
        ),
        kv_quota=fields.number("kv_quota", 1.0, low=0.001, high=1.0) if fields.has("kv_quota") else None,
        models=None if models is None else frozenset(models),
        admin=fields.boolean("admin", False),
    )


def _add_keys(fields: Fields, caller: Caller, by_digest: dict[bytes, Caller]) -> None:
    for index, key in enumerate(fields.texts("keys") or ()):
        digest = key.removeprefix("sha256:")
        if not _DIGEST.fullmatch(digest):
            raise fields.error(f"keys[{index}]", f"must be {_HOW_TO_HASH}")  # without the value: it may be the key
        raw = bytes.fromhex(digest)
        if raw in by_digest:
            raise fields.error(f"keys[{index}]", f"belongs to tenant {by_digest[raw].tenant} already")
        by_digest[raw] = caller


def _add_claims(fields: Fields, caller: Caller, by_claim: dict[str, Caller], issuers: bool) -> None:
    claims = fields.texts("claims") or []
    if claims and not issuers:
        raise fields.error("claims", "need an entry in `issuers`, whose tokens make them")
    if not claims and not fields.has("keys"):
        raise fields.error("keys", "or claims are required, or nobody could be this tenant")
    for index, claim in enumerate(claims):
        if claim in by_claim:
            raise fields.error(f"claims[{index}]", f"belongs to tenant {by_claim[claim].tenant} already")
        by_claim[claim] = caller


def _issuer(fields: Fields, folder: Path, files: Files) -> Issuer:
    name = fields.text("issuer")
    audience = fields.text("audience")
    algorithm = fields.text("algorithm")
    claim = fields.text("tenant_claim", "sub")
    if algorithm not in jwt_issuer.ALGORITHMS:
        raise fields.error("algorithm", f"must be one of {', '.join(sorted(jwt_issuer.ALGORITHMS))}")
    symmetric = algorithm in jwt_issuer.SYMMETRIC
    allowed = ("secret_file",) if symmetric else ("public_key_file", "jwks_file")
    paths = {kind: fields.text(kind, "") for kind in ("secret_file", "public_key_file", "jwks_file")}
    given = [kind for kind, value in paths.items() if value]
    if len(given) != 1 or given[0] not in allowed:
        raise fields.error(given[0] if given else "issuer", f"{algorithm} needs {' or '.join(allowed)}, and only that")
    fields.end()
    path = folder / paths[given[0]]
    files[path] = stamp(path)
    try:
        keys = jwt_issuer.load_keys(
            algorithm,
            secret=path if given[0] == "secret_file" else None,
            public_key=path if given[0] == "public_key_file" else None,
            jwks=path if given[0] == "jwks_file" else None,
        )
    except (OSError, ValueError) as error:
        raise fields.error(given[0], f"{path} cannot be used: {error}") from error
    return Issuer(name, audience, algorithm, claim, keys)


def _name(fields: Fields, field: str, default: str | None = None) -> str:
    value = fields.text(field, default)
    if value != default and not _NAME.fullmatch(value):
        raise fields.error(field, "must have 1 to 64 letters, digits, dots, dashes or underscores")
    return value
