"""gRPC between routers, workers and store nodes: the one place where channels are opened and ports are added.

With a secret every connection is mutual TLS. Each process makes itself a certificate and signs it with a key that is
derived from the secret, and talks only to those whose certificate was signed with the same key: who does not know the
secret gets no further than the handshake, which the library does outside of Python. Nothing can be read, changed or
played again on the way. Without a secret connections are plain.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import grpc
import grpc.aio

from tandem.common.secret import derive

Options = Sequence[tuple[str, Any]]

KEEPALIVE_MS = 5_000
"""Silence after which the other end is asked, and time for its answer. A host that is lost without a word costs both;
then its name is looked up again."""
SERVER_OPTIONS: Options = (
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS),  # the library waits for the longer of the two
    ("grpc.http2.max_pings_without_data", 0),
    # Without these a server hangs up on clients that ask whether it is there.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    # Strangers who connect and say nothing: they are hung up on, and leave descriptors for others.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_allowed_incoming_connections", 512),
)
"""Options of a server to which `add_port` adds one."""
_CHANNEL_OPTIONS: Options = (
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
)

_NAME = "tandem"
_CURVE_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""The order of P-256."""
_FROM, _TO = datetime.datetime(2000, 1, 1), datetime.datetime(9999, 12, 31)
"""Clocks of machines differ; a certificate lives as long as its process."""


@dataclass(frozen=True, slots=True)
class _Papers:
    """PEM."""

    authority: bytes
    certificate: bytes
    key: bytes


def open_channel(target: str, secret: bytes, options: Options = ()) -> grpc.Channel:
    if not secret:
        return grpc.insecure_channel(target, options=[*_CHANNEL_OPTIONS, *options])
    return grpc.secure_channel(target, _client(secret), options=_named(options))


def open_aio_channel(target: str, secret: bytes, options: Options = ()) -> grpc.aio.Channel:
    """A channel to `target` for the event loop that runs. With a secret it is mutual TLS, without one it is plain."""
    if not secret:
        return grpc.aio.insecure_channel(target, options=[*_CHANNEL_OPTIONS, *options])
    return grpc.aio.secure_channel(target, _client(secret), options=_named(options))


def add_port(server: grpc.Server | grpc.aio.Server, address: str, secret: bytes) -> int:
    """The port that `server` will listen on. Raises RuntimeError where it cannot be had."""
    if not secret:
        return server.add_insecure_port(address)
    papers = _papers(secret)
    credentials = grpc.ssl_server_credentials(
        [(papers.key, papers.certificate)], papers.authority, require_client_auth=True
    )
    return server.add_secure_port(address, credentials)


def remedy(details: str, secret: bytes) -> str:
    """What to do where a connection failed with `details`; empty: it is not about the secret."""
    if "handshake failed" in details or (not secret and "Socket closed" in details):
        mine = "another secret than this process" if secret else "a secret, and this process has none"
        return f"; it may have {mine}: give both the same secret_file"
    return ""


def _client(secret: bytes) -> grpc.ChannelCredentials:
    papers = _papers(secret)
    return grpc.ssl_channel_credentials(papers.authority, papers.key, papers.certificate)


def _named(options: Options) -> list[tuple[str, Any]]:
    """The name in certificates is the same for all, whatever address leads to them."""
    return [*_CHANNEL_OPTIONS, *options, ("grpc.ssl_target_name_override", _NAME)]


@lru_cache(maxsize=4)
def _papers(secret: bytes) -> _Papers:
    # Imported here: it takes 50 ms, and most commands need none.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    number = int.from_bytes(derive(secret, "certificates 1") + derive(secret, "certificates 2"), "big")
    authority_key = ec.derive_private_key(number % (_CURVE_ORDER - 1) + 1, ec.SECP256R1())
    own_key = ec.generate_private_key(ec.SECP256R1())

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    def signed(name: str, key: ec.EllipticCurvePrivateKey, *, is_authority: bool) -> bytes:
        """A certificate in PEM for `key`, signed by the deployment's authority. `is_authority`: it may sign others
        itself."""
        builder = (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named("tandem deployment"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_FROM)
            .not_valid_after(_TO)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(_NAME)]), critical=False)
        )
        return builder.sign(authority_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    return _Papers(
        signed("tandem deployment", authority_key, is_authority=True),
        signed("tandem process", own_key, is_authority=False),
        own_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )
