"""A limit of address space that is too small is one clear line, in every kind of process."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.runtime.settings import BUNDLED_MODEL
from tandem.runtime.shortage import explained, is_shortage

COMMANDS = {
    "router": ["--model", str(BUNDLED_MODEL), "--decode-workers", "unix:/tmp/nobody.sock", "--port", "0"],
    "kvstore": [],
    "prefill": ["--model", str(BUNDLED_MODEL)],
    "decode": ["--model", str(BUNDLED_MODEL)],
    "serve": ["--port", "0"],
}


@pytest.mark.processes
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kib", [80_000, 200_000])
def test_it_is_one_line(command: str, kib: int, tmp_path: Path) -> None:
    listen = [] if command in ("router", "serve") else ["--listen", f"unix:{tmp_path}/s"]
    limited = ["bash", "-c", f'ulimit -v {kib}; exec "$@"', "-", sys.executable, "-m", "tandem.runtime.cli"]
    done = subprocess.run(
        [*limited, command, *COMMANDS[command], *listen],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"tandem {command}: ")
    assert "memory" in line or "`ulimit -v unlimited`" in line


def test_libraries_say_it_in_many_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    shortages: list[Exception] = [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("can't start new thread"),
    ]
    late = ValueError("closing failed as well")
    late.__context__ = MemoryError()
    assert all(map(is_shortage, [*shortages, late]))
    assert not any(map(is_shortage, [ValueError("no"), OSError(errno.ENOENT, "no"), ImportError("No module named x")]))
    for limit, clear in ((1 << 30, True), (resource.RLIM_INFINITY, False)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert (explained(shortages[0]) is not None) == clear
        assert explained(ValueError("no")) is None


def test_a_process_never_asks_for_more_than_it_may_have() -> None:
    program = (
        "import resource; from tandem.common.memory import limit_address_space as limit\n"
        "for size in (3 << 30, 1 << 30, 2 << 30): limit(size)\n"
        "print(resource.getrlimit(resource.RLIMIT_AS))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str((1 << 30, 1 << 30))
