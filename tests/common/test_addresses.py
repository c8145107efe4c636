"""Servers are found over IPv4 and IPv6, by address and by name."""

from __future__ import annotations

import socket
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Gauge

from tandem.common.addresses import beside, every_interface, family_of, in_url
from tandem.common.telemetry import serve_metrics


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def free_port(host: str) -> int:
    with socket.create_server((host, 0), family=family_of(host, 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def test_ipv6_has_brackets_in_urls() -> None:
    assert [in_url(host) for host in ("::1", "10.0.0.5", "decode-0")] == ["[::1]", "10.0.0.5", "decode-0"]


def test_a_server_listens_in_the_family_of_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert family_of("127.0.0.1", 0) is family_of("0.0.0.0", 0) is family_of("", 0) is socket.AF_INET
    assert family_of("::1", 0) is family_of("::", 0) is socket.AF_INET6
    six = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::5", 80, 0, 0))
    four = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.5", 80))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [six])
    assert family_of("name-with-ipv6-alone", 80) is socket.AF_INET6
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [six, four])
    assert family_of("name-with-both", 80) is socket.AF_INET


def test_what_has_no_secret_is_no_more_reachable_than_the_server_beside_it() -> None:
    assert [beside(listen) for listen in ("unix:/run/s", "127.0.0.1:9100", "localhost:9100")] == ["127.0.0.1"] * 3
    assert beside("[::1]:9100") == "::1"
    assert beside("10.0.0.5:9100") == beside("[fd00::5]:9100") == every_interface()


@needs_ipv6
@pytest.mark.parametrize(("host", "seen_from"), [("::1", ["::1"]), ("::", ["::1", "127.0.0.1"])])
def test_metrics_are_served_over_ipv6(host: str, seen_from: list[str]) -> None:
    registry = CollectorRegistry()
    Gauge("answer", "What it is", registry=registry).set(42)
    port = free_port(host)
    serve_metrics(host, port, registry)
    for address in seen_from:
        with urllib.request.urlopen(f"http://{in_url(address)}:{port}/metrics", timeout=60) as response:
            assert b"answer 42.0" in response.read()
