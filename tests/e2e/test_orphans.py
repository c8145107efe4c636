"""Whatever dies, is stopped or hangs: nothing of a `tandem serve` outlives it, and it ends in time."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tandem.common.scratch import remove_abandoned
from tests.e2e.serving import READY_S, environment, eventually, tandem_command

FLAGS = ("--routers", 2, "--dtype", "float32", "--kv-cache-bytes", 8 << 20, "--kv-host-bytes", 8 << 20)
CHILDREN = ("kvstore", "prefill-0", "decode-0", "router-0", "router-1", "caretaker")
GONE_S = 180.0


class Deployment:
    """A small platform whose processes are known by name, those that its children have started as well."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.process = subprocess.Popen(
            tandem_command("serve", "--model", model, "--port", 0, *FLAGS),
            stdout=subprocess.PIPE,
            stderr=(folder / "log").open("wb"),
            text=True,
            env=environment(TMPDIR=str(folder)),
            start_new_session=True,
        )
        self.folder = folder
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("Tandem is ready"), (folder / "log").read_text()
        for _ in range(4):  # whichever router it reaches
            body = {"prompt": [5, 6], "max_tokens": 1, "structured_outputs": {"regex": "[a-z]+"}}
            httpx.post(f"{line.split()[3]}/v1/completions", json=body, timeout=60, trust_env=False)
        self.all = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        self.named = {"serve": self.all[0]}
        for process in self.all[1:]:
            command = " ".join(process.cmdline())
            name = next((name for name in CHILDREN if f"/{name}.yaml" in command or f"/{name}.py" in command), "")
            self.named[name or f"below {len(self.named)}"] = process
        assert {"serve", *CHILDREN} < set(self.named)
        self.below = sorted(name for name in self.named if name.startswith("below"))

    def left(self) -> list[str]:
        """Processes of it, also those that were started since."""
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            command = " ".join(process.info["cmdline"] or ())
            if process.info["status"] != psutil.STATUS_ZOMBIE and str(self.folder) in command:
                found.append(command)
        alive = [name for name, each in self.named.items() if name != "serve" and _runs(each)]
        return found + alive

    def run_folders(self) -> list[Path]:
        return list(self.folder.glob("tandem-*"))


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, as paths of sockets are."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        yield Path(folder)


@contextmanager
def deployed(model: Path, folder: Path) -> Iterator[Deployment]:
    deployment = Deployment(model, folder)
    try:
        yield deployment
    finally:
        for process in deployment.all:
            if _runs(process):
                process.kill()
        deployment.process.wait(GONE_S)


def subsets() -> list[tuple[str, ...]]:
    """Drawn once and for all; the supervisor is in each of them, as it starts again whatever else dies."""
    draw = random.Random(7)
    drawn = [tuple(name for name in CHILDREN if draw.random() < 0.5) for _ in range(4)]
    return [(), CHILDREN, ("caretaker",), *drawn]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("others", subsets(), ids="+".join)
def test_nothing_outlives_a_supervisor_that_is_killed_with_any_others(
    tiny: Path, folder: Path, others: tuple[str, ...]
) -> None:
    with deployed(tiny, folder) as deployment:
        mortal = [name for name in CHILDREN if name not in others and name != "caretaker"]
        for name in (*mortal[:1], deployment.below[len(others) % len(deployment.below)]):
            deployment.named[name].suspend()  # it could do nothing about its end
        for name in random.Random(len(others)).sample(["serve", *others], len(others) + 1):
            with suppress(psutil.NoSuchProcess):  # it went with the supervisor
                deployment.named[name].kill()
        deployment.process.wait(GONE_S)
        if "caretaker" in others:
            os.environ["TMPDIR"], before = str(folder), os.environ.get("TMPDIR")
            try:
                tempfile.tempdir = None
                remove_abandoned()  # as the next start does
            finally:
                tempfile.tempdir = None
                os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)
        eventually(lambda: not deployment.left(), GONE_S, f"{others}: nothing left")
        eventually(lambda: not deployment.run_folders(), GONE_S, f"{others}: no folder left")


@pytest.mark.timeout(600)
def test_what_is_killed_comes_back_and_a_closed_terminal_ends_all(tiny: Path, folder: Path) -> None:
    with deployed(tiny, folder) as deployment:
        for name in ("caretaker", "router-1", "decode-0"):
            deployment.named[name].kill()

        def back(name: str) -> bool:
            return any(
                f"/{name}.yaml" in command or f"/{name}.py" in command
                for each in psutil.Process(deployment.process.pid).children()
                if _runs(each) and (command := " ".join(each.as_dict(["cmdline"])["cmdline"] or ()))
            )

        for name in ("caretaker", "router-1", "decode-0"):
            eventually(lambda name=name: back(name), READY_S, f"{name} is back")
        deployment.named["prefill-0"].suspend()
        deployment.process.send_signal(signal.SIGHUP)
        deployment.process.send_signal(signal.SIGHUP)  # shells and the kernel both say it
        assert deployment.process.wait(60) == 0
        assert "prefill-0 does not answer; killing it" in (folder / "log").read_text()
        eventually(lambda: not deployment.left(), GONE_S, "nothing left")
        assert not deployment.run_folders()


def test_a_command_that_ignores_hangups_goes_on_after_one() -> None:
    program = "import signal; from tandem.common.ending import ending_signals; print(signal.SIGHUP in ending_signals())"
    command = [sys.executable, "-c", program]
    for prefix, expected in (([], "True"), (["nohup"], "False")):
        done = subprocess.run([*prefix, *command], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
        assert done.stdout.strip() == expected


def test_a_process_ends_at_its_deadline_even_where_python_hangs() -> None:
    """One call into C that neither returns nor lets go of Python's lock."""
    program = "import ctypes; from tandem.common.ending import end_within; end_within(0.5); ctypes.PyDLL(None).pause()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "pause" not in done.stdout
    assert 'File "<string>", line 1' in done.stderr, "it says where it hung"
