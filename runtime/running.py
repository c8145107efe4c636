"""Where the `tandem serve` processes of this user are: each keeps a file in its run directory, which others find."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tandem.common.addresses import in_url
from tandem.common.errors import ConfigError
from tandem.common.scratch import PREFIX, scratch_roots

_FILE = "serve.json"


@dataclass(frozen=True, slots=True)
class Running:
    """One `tandem serve` that runs, as its file describes it."""

    url: str
    model: str
    node: str
    """gRPC address of its store node; empty: it runs none."""
    secret_file: str
    """File with its secret."""
    folder: str
    """Its run directory, where its workers listen."""
    pid: int
    started: float
    """Tells a process from a later one with its number."""


def reachable(host: str) -> str:
    """An address of this machine, as URLs have it, for a server that listens on `host`."""
    return in_url({"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host))


def announce(run_directory: Path, url: str, model: str, node: str, secret_file: str) -> None:
    """Lets `find_running` find it, until the directory goes."""
    process = psutil.Process()
    running = Running(url, model, node, secret_file, str(run_directory), process.pid, process.create_time())
    path = run_directory / _FILE
    path.touch(mode=0o600)
    path.write_text(json.dumps(asdict(running)))


def find_running() -> list[Running]:
    """Those that are alive, the first that was started first. What other users put there is not looked at."""
    found = []
    for path in (path for folder in scratch_roots() for path in folder.glob(f"{PREFIX}*/{_FILE}")):
        try:
            if path.stat().st_uid != os.getuid() or path.parent.stat().st_uid != os.getuid():
                continue
            running = Running(**json.loads(path.read_text()))
            if psutil.Process(running.pid).create_time() == running.started:
                found.append(running)
        except (OSError, ValueError, TypeError, psutil.Error):
            continue  # it ends just now, or is another version's
    return sorted(found, key=lambda running: running.started)


def only_running(flag: str) -> Running | None:
    """The one that runs; None without any. Raises ConfigError that lists several, from which `flag` chooses."""
    found = find_running()
    if len(found) > 1:
        listed = "; ".join(f"{each.url} with {each.model}: {flag} {_chosen(each, flag)}" for each in found)
        raise ConfigError(f"several servers run here, name one: {listed}")
    return found[0] if found else None


def worker_named(name: str) -> tuple[str, str]:
    """Address and secret file of the worker `name` of a `tandem serve`; an address is itself, without a file. Raises
    ConfigError unless there is one."""
    if ":" in name:
        return name, ""
    sockets = {each: Path(each.folder) / f"{name}.sock" for each in find_running()}
    found = [(f"unix:{path}", each.secret_file) for each, path in sockets.items() if path.exists()]
    if len(found) > 1:
        raise ConfigError(f"several servers here have a worker {name}, give its address: {[each for each, _ in found]}")
    if not found:
        others = sorted({path.stem for each in sockets for path in Path(each.folder).glob("*-*.sock")})
        there = f"there are {', '.join(others)}" if others else "no `tandem serve` runs here"
        raise ConfigError(f"no worker {name!r} runs here ({there}); or give an address, HOST:PORT or unix:/path")
    return found[0]


def _chosen(running: Running, flag: str) -> str:
    return running.url if flag == "--url" else running.node or "(it has no store node)"
