"""JSON Web Tokens of one issuer: its keys are read from files, never fetched from where a token says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt

from tandem.common.errors import TandemError

LEEWAY_S = 10.0
"""Clocks of issuer and router may differ by this much."""
MAX_TOKEN_CHARACTERS = 16 * 1024

SYMMETRIC = frozenset({"HS256", "HS384", "HS512"})
ASYMMETRIC = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"})
ALGORITHMS = SYMMETRIC | ASYMMETRIC


@dataclass(frozen=True, slots=True)
class Issuer:
    """One issuer of tokens, and what its tokens must say."""

    name: str
    """The tokens' `iss`."""
    audience: str
    """One of the tokens' `aud`."""
    algorithm: str
    """The one that is accepted, whatever a token's header says."""
    claim: str
    """The claim that names the tenant."""
    keys: Mapping[str, Any]
    """Public keys by key id; "" for a single key without one."""

    def verify(self, token: str) -> tuple[str, float]:
        """What names the tenant, and when the token ends, in seconds since 1970.

        Raises TandemError `invalid_api_key` unless the token is genuine, in force and names a tenant.
        """
        try:
            key_id = jwt.get_unverified_header(token).get("kid", "")
            key = self.keys.get(key_id) or self.keys.get("")
            if key is None:
                raise _refused("its key id is not known")
            claims = jwt.decode(
                token,
                key,
                algorithms=[self.algorithm],
                audience=self.audience,
                issuer=self.name,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud"]},
            )
            end = float(claims["exp"])
        except jwt.ExpiredSignatureError as error:
            raise _refused("it has expired") from error
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise _refused(f"{type(error).__name__.removesuffix('Error')}") from error
        value = claims.get(self.claim)
        if not isinstance(value, str) or not value:
            raise _refused(f"it has no claim `{self.claim}`")
        return value, end


def issuer_of(token: str) -> str | None:
    """The `iss` of what looks like a token, not verified: it only chooses whose keys are tried."""
    if token.count(".") != 2 or len(token) > MAX_TOKEN_CHARACTERS:
        return None
    try:
        claims = jwt.decode(token, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
        return None
    issuer = claims.get("iss")
    return issuer if isinstance(issuer, str) else None


def load_keys(algorithm: str, *, secret: Path | None, public_key: Path | None, jwks: Path | None) -> dict[str, Any]:
    """Keys by id, from the one file that is given. Raises OSError, ValueError with what is wrong."""
    if secret is not None:
        value = secret.read_bytes().strip()
        needed = int(algorithm.removeprefix("HS")) // 8  # as many as the hash has: RFC 7518, section 3.2
        if len(value) < needed:
            raise ValueError(f"the secret has {len(value)} bytes, {algorithm} needs at least {needed}")
        return {"": value}
    handler = jwt.get_algorithm_by_name(algorithm)
    try:
        if public_key is not None:
            return {"": _public(handler.prepare_key(public_key.read_text(encoding="utf-8")))}
        assert jwks is not None
        entries = json.loads(jwks.read_text(encoding="utf-8"))["keys"]
        return _usable_keys(entries, algorithm, handler)
    except (jwt.PyJWTError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no key for {algorithm} can be read from it ({error or type(error).__name__})") from error


def _usable_keys(entries: list[dict[str, Any]], algorithm: str, handler: Any) -> dict[str, Any]:
    """Entries for other algorithms and for encryption are passed over: issuers publish all their keys in one set."""
    keys: dict[str, Any] = {}
    for entry in entries:
        if entry.get("use", "sig") != "sig" or entry.get("alg", algorithm) != algorithm:
            continue
        try:
            keys[str(entry.get("kid", ""))] = _public(handler.from_jwk(entry))
        except jwt.PyJWTError:
            continue
    if not keys:
        raise ValueError(f"it holds no key for {algorithm}")
    return keys


def _public(key: Any) -> Any:
    """A private key was put there by mistake: saying so is better than using it."""
    if hasattr(key, "sign"):
        raise ValueError("it holds a private key; give the public one")
    return key


def _refused(problem: str) -> TandemError:
    return TandemError("invalid_api_key", f"The token is not accepted: {problem}.")
