"""One `/metrics` for all processes: this router, its siblings, the workers and the store node, each sample with the
label `process`.

Workers and node are asked through the gRPC connections that the router has anyway. A process that does not answer in
time is left out and has `tandem_up` 0.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field

from tandem.router.service import Service

ANSWER_S = 2.0
"""Prometheus waits 10 s by default."""
STORE = "kvstore"
_UP = "tandem_up"


async def all_metrics(service: Service) -> bytes:
    """Prometheus text format."""
    siblings = service.siblings
    asked: dict[str, Awaitable[str | None]] = {
        client.name: client.metrics(ANSWER_S) for client in service.fleet.clients
    }
    if service.contexts is not None:
        asked[STORE] = service.contexts.metrics(ANSWER_S)
    routers, *answers = await asyncio.gather(siblings.ask("metrics"), *asked.values())
    texts: dict[str, str | None] = {_router(siblings.index, siblings.count): service.metrics.text().decode()}
    for index in range(siblings.count):
        texts.setdefault(_router(index, siblings.count), routers.get(index))
    texts |= dict(zip(asked, answers, strict=True))
    return merged(texts)


def _router(index: int, count: int) -> str:
    return "router" if count == 1 else f"router-{index}"


@dataclass(slots=True)
class _Family:
    head: dict[str, str] = field(default_factory=dict)
    """The lines HELP and TYPE."""
    samples: list[str] = field(default_factory=list)


def merged(texts: Mapping[str, str | None]) -> bytes:
    """Prometheus texts by process as one. None: the process did not answer. The texts are as `prometheus_client` writes
    them: HELP and TYPE before the samples of a family, no space in a name."""
    up = _Family(
        {"HELP": "# HELP tandem_up 1 while the process answers for its metrics", "TYPE": "# TYPE tandem_up gauge"}
    )
    families = {_UP: up}
    for process, text in texts.items():
        escaped = process.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        label = f'process="{escaped}"'
        up.samples.append(f"{_UP}{{{label}}} {0 if text is None else 1}")
        family = up
        for line in (text or "").split("\n"):
            if line.startswith("# "):
                _, kind, name, *_ = line.split(" ", 3)
                family = families.setdefault(name, _Family())
                family.head.setdefault(kind, line)
            elif line:
                family.samples.append(_labelled(line, label))
    lines = [line for family in families.values() for line in (*family.head.values(), *family.samples)]
    return "".join(f"{line}\n" for line in lines).encode()


def _labelled(sample: str, label: str) -> str:
    """`sample` with `label` before its others."""
    end = sample.index(" ")
    brace = sample.find("{", 0, end)
    if brace < 0:
        return f"{sample[:end]}{{{label}}}{sample[end:]}"
    return f"{sample[: brace + 1]}{label},{sample[brace + 1 :]}"
