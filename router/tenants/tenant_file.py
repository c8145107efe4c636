"""The two files that say who may use the router: tenants in YAML, or the simple one with one API key per line."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from tandem.common.errors import ConfigError
from tandem.common.fairness import MAX_WEIGHT
from tandem.common.yaml_file import YamlDocument, read_document
from tandem.router.tenants import jwt_issuer
from tandem.router.tenants.caller import ANYBODY, HIGHEST_PRIORITY, LOWEST_PRIORITY, Caller, Rates
from tandem.router.tenants.jwt_issuer import Issuer

MAX_TENANTS = 10_000
MAX_RATE = 10**12

_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_KEY_LINE = re.compile(r"([A-Za-z0-9._\-]{1,64}):([0-9a-fA-F]{64})(?::([A-Za-z0-9._\-]{1,64}))?")
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._\-]{1,64}\Z")]
Text = Annotated[str, Meta(min_length=1)]
Limit = Annotated[int, Meta(ge=1, le=MAX_RATE)]
Priority = Annotated[int, Meta(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY)]
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


class _Tenant(msgspec.Struct, forbid_unknown_fields=True):
    name: Name
    keys: list[str] | None = None
    claims: list[Text] = []
    sharing_group: Name | Literal[""] = ""
    weight: Annotated[float, Meta(ge=1 / MAX_WEIGHT, le=MAX_WEIGHT)] = 1.0
    priority_min: Priority | None = None
    priority_max: Priority | None = None
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    max_concurrent: Limit | None = None
    kv_quota: Annotated[float, Meta(ge=0.001, le=1.0)] | None = None
    models: Annotated[list[Text], Meta(min_length=1)] | None = None
    admin: bool = False


class _Issuer(msgspec.Struct, forbid_unknown_fields=True):
    issuer: Text
    audience: Text
    algorithm: Text
    tenant_claim: Text = "sub"
    secret_file: str = ""
    public_key_file: str = ""
    jwks_file: str = ""


class _TenantsFile(msgspec.Struct, forbid_unknown_fields=True):
    tenants: Annotated[list[_Tenant], Meta(min_length=1, max_length=MAX_TENANTS)]
    issuers: list[_Issuer] = []


def read_tenants(path: Path, files: Files) -> Roster:
    """Tenants of a file whose fields `docs/tenants.md` describes. Raises ConfigError naming line, field and remedy."""
    files[path] = stamp(path)
    file = read_document(path, "--tenants-file")
    read = file.read(_TenantsFile)
    issuers: dict[str, Issuer] = {}
    for index, entry in enumerate(read.issuers):
        if entry.issuer in issuers:
            raise file.error(f"issuers[{index}].issuer", f"{entry.issuer} is there twice")
        issuers[entry.issuer] = _issuer(entry, f"issuers[{index}]", file, path.parent, files)
    by_digest: dict[bytes, Caller] = {}
    by_claim: dict[str, Caller] = {}
    names: set[str] = set()
    for index, tenant in enumerate(read.tenants):
        place = f"tenants[{index}]"
        if tenant.name in names:
            raise file.error(f"{place}.name", f"{tenant.name} is there twice; a tenant may have several keys")
        names.add(tenant.name)
        caller = _caller(tenant, place, file)
        _add_keys(tenant.keys or [], caller, by_digest, f"{place}.keys", file)
        if tenant.claims and not issuers:
            raise file.error(f"{place}.claims", "need an entry in `issuers`, whose tokens make them")
        if not tenant.claims and tenant.keys is None:
            raise file.error(f"{place}.keys", "or claims are required, or nobody could be this tenant")
        _add_claims(tenant.claims, caller, by_claim, f"{place}.claims", file)
    return Roster(by_digest, by_claim, issuers)


def _caller(tenant: _Tenant, place: str, file: YamlDocument) -> Caller:
    first = tenant.priority_min or 0
    last = HIGHEST_PRIORITY if tenant.priority_max is None else tenant.priority_max
    if first > last:
        raise file.error(f"{place}.priority_max", f"must be at least priority_min, which is {first}, got {last}")
    return Caller(
        tenant.name,
        sharing_group=tenant.sharing_group,
        weight=tenant.weight,
        priority_min=first,
        priority_max=last,
        rates=Rates(tenant.requests_per_minute, tenant.tokens_per_minute, tenant.max_concurrent),
        kv_quota=tenant.kv_quota,
        models=None if tenant.models is None else frozenset(tenant.models),
        admin=tenant.admin,
    )


def _add_keys(keys: list[str], caller: Caller, by_digest: dict[bytes, Caller], place: str, file: YamlDocument) -> None:
    for index, key in enumerate(keys):
        digest = key.removeprefix("sha256:")
        if not _DIGEST.fullmatch(digest):  # said without the value: it may be the key
            raise file.error(f"{place}[{index}]", f"must be {_HOW_TO_HASH}")
        raw = bytes.fromhex(digest)
        if raw in by_digest:
            raise file.error(f"{place}[{index}]", f"belongs to tenant {by_digest[raw].tenant} already")
        by_digest[raw] = caller


def _add_claims(claims: list[str], caller: Caller, by_claim: dict[str, Caller], place: str, file: YamlDocument) -> None:
    for index, claim in enumerate(claims):
        if claim in by_claim:
            raise file.error(f"{place}[{index}]", f"belongs to tenant {by_claim[claim].tenant} already")
        by_claim[claim] = caller


def _issuer(entry: _Issuer, place: str, file: YamlDocument, folder: Path, files: Files) -> Issuer:
    algorithm = entry.algorithm
    if algorithm not in jwt_issuer.ALGORITHMS:
        raise file.error(f"{place}.algorithm", f"must be one of {', '.join(sorted(jwt_issuer.ALGORITHMS))}")
    allowed = ("secret_file",) if algorithm in jwt_issuer.SYMMETRIC else ("public_key_file", "jwks_file")
    paths = {"secret_file": entry.secret_file, "public_key_file": entry.public_key_file, "jwks_file": entry.jwks_file}
    given = [kind for kind, value in paths.items() if value]
    if len(given) != 1 or given[0] not in allowed:
        wrong = f"{place}.{given[0]}" if given else place
        raise file.error(wrong, f"{algorithm} needs {' or '.join(allowed)}, and only that")
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
        raise file.error(f"{place}.{given[0]}", f"{path} cannot be used: {error}") from error
    return Issuer(entry.issuer, entry.audience, algorithm, entry.tenant_claim, keys)
