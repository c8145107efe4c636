"""The deployment's secret: one for routers, workers and store nodes. Who knows it may give them orders.

It comes from the file of `--secret-file`, or from TANDEM_SECRET. It never travels: what is sent, and what is kept, is
made with keys that are derived from it, one for each purpose.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
import secrets
from pathlib import Path

from tandem.common.errors import ConfigError

log = logging.getLogger(__name__)

VARIABLE = "TANDEM_SECRET"
MIN_SECRET_BYTES = 16
HOW_TO_MAKE = "`openssl rand -hex 32`"
_EXTRACT = b"tandem deployment secret v1"


def read_secret(path: str) -> bytes:
    """The secret in the file at `path`, or of the variable for an empty path; without white space around it. Empty:
    there is none. Raises ConfigError."""
    if path:
        where = f"secret_file {path}"
        try:
            secret = Path(path).expanduser().read_bytes().strip()
        except OSError as error:
            raise ConfigError(f"{where}: cannot be read ({error.strerror})") from error
    else:
        where, secret = VARIABLE, os.environ.get(VARIABLE, "").encode().strip()
        if not secret:
            return b""
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"{where}: {len(secret)} bytes are too few for a secret, give at least {MIN_SECRET_BYTES} ({HOW_TO_MAKE})"
        )
    return secret


def new_secret() -> bytes:
    return secrets.token_hex(32).encode()


def derive(secret: bytes, purpose: str) -> bytes:
    """32 bytes, another key for each purpose: HKDF-SHA256 (RFC 5869) with one block."""
    extracted = hmac.digest(_EXTRACT, secret, "sha256")
    return hmac.digest(extracted, purpose.encode() + b"\x01", "sha256")


def write_secret(path: Path, secret: bytes) -> None:
    """Writes the secret for this user alone, whole or not at all. Raises OSError."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret + b"\n")
    unfinished.replace(path)


def is_local(address: str) -> bool:
    """Whether only this machine can reach what listens there: unix:PATH, or HOST:PORT of the loopback device."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_reachable(secret: bytes, setting: str, address: str) -> None:
    """Raises ConfigError where others could reach `address` and nobody has to know a secret."""
    if secret or not address:
        return
    if not is_local(address):
        raise ConfigError(
            f"{setting} {address}: other machines can reach it, so a secret is needed, the same for routers, workers "
            f"and store nodes: give secret_file, or set {VARIABLE} ({HOW_TO_MAKE})"
        )
    if not address.startswith("unix:"):
        log.warning("%s %s: without a secret, every user of this machine may give orders there", setting, address)
