"""Kubernetes sets variables for each Service; one that is called tandem stops no process."""

from __future__ import annotations

import importlib

import pytest

from tandem.common.settings import parse_settings, settings_of
from tandem.runtime.cli import COMMANDS

REQUIRED = {
    "router": ["--model", "m"],
    "prefill": ["--model", "m"],
    "decode": ["--model", "m"],
    "drain": ["--target", "h:1"],
    "plan": ["--deployment", "d.yaml"],
    "profile": ["--target", "h:1"],
}


def links(service: str) -> dict[str, str]:
    """As the kubelet makes them for a Service with a port called http."""
    name = service.upper().replace("-", "_")
    return {
        f"{name}_SERVICE_HOST": "10.0.0.1",
        f"{name}_SERVICE_PORT": "80",
        f"{name}_SERVICE_PORT_HTTP": "80",
        f"{name}_PORT": "tcp://10.0.0.1:80",
        f"{name}_PORT_80_TCP": "tcp://10.0.0.1:80",
        f"{name}_PORT_80_TCP_PROTO": "tcp",
        f"{name}_PORT_80_TCP_PORT": "80",
        f"{name}_PORT_80_TCP_ADDR": "10.0.0.1",
    }


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("kv", "completion")])
def test_services_change_no_setting(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = getattr(importlib.import_module(COMMANDS[command]), "SETTINGS", None)
    if settings is None:
        pytest.skip("it has no settings")
    before = parse_settings(settings, REQUIRED.get(command, []), command=command, description="", examples=())
    names = [setting.name.removesuffix("_port").replace("_", "-") for setting in settings_of(settings).values()]
    for service in ("tandem", *(f"tandem-{name}" for name in names if name != "port")):
        for variable, value in links(service).items():
            monkeypatch.setenv(variable, value)
    assert parse_settings(settings, REQUIRED.get(command, []), command=command, description="", examples=()) == before
