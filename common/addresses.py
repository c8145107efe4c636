"""Addresses of servers: names, IPv4 and IPv6."""

from __future__ import annotations

import socket

from tandem.common.secret import is_local


def in_url(host: str) -> str:
    """The host as URLs and HOST:PORT have it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def family_of(host: str, port: int) -> socket.AddressFamily:
    """The family in which a server listens on `host`, which may be a name; IPv4 where it has both. Raises OSError."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    families = {family for family, *_ in found}
    return socket.AF_INET if socket.AF_INET in families else socket.AF_INET6


def every_interface() -> str:
    """The wildcard that takes connections over IPv6 and IPv4, or over IPv4 where this machine has nothing else."""
    try:
        with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True):
            return "::"
    except (OSError, ValueError):
        return "0.0.0.0"


def beside(listen: str) -> str:
    """The host on which to serve what belongs to a server at `listen` (HOST:PORT or unix:PATH) and has no secret: the
    loopback device where `listen` is local, else every interface."""
    if not is_local(listen):
        return every_interface()
    return "::1" if listen.startswith("[") else "127.0.0.1"
