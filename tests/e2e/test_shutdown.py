"""Leaving: running requests finish, nothing stays behind, and a second signal is obeyed at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.e2e.serving import Serve, eventually

MakePrompt = Callable[[int], list[int]]
FLAGS = ("--disaggregate", "always", "--dtype", "float32")


def run_directory(serve: Serve) -> Path:
    command = serve.children()["router"].cmdline()
    return Path(command[-1]).parent


def gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_sigterm_finishes_running_requests_and_exits_cleanly(tiny: Path, prompt: MakePrompt) -> None:
    with Serve(tiny, *FLAGS) as serve:
        directory, children = run_directory(serve), list(serve.children().values())
        assert directory.stat().st_mode & 0o777 == 0o700
        events = serve.stream(prompt(30), 400)
        next(events)
        serve.process.send_signal(signal.SIGTERM)
        received = [event for event in events if event.get("choices")]
        assert received[-1]["choices"][0]["finish_reason"] == "length"
        assert serve.process.wait(180) == 0
        assert gone(children)
        assert not directory.exists()


def test_a_killed_supervisor_leaves_no_orphans(tiny: Path) -> None:
    with Serve(tiny, *FLAGS) as serve:
        directory, children = run_directory(serve), list(serve.children().values())
        assert len(children) == 4
        serve.process.send_signal(signal.SIGKILL)
        eventually(lambda: gone(children), what="children gone")
        eventually(lambda: not directory.exists(), what="directory removed")


def test_a_second_signal_stops_at_once(slow_model: Path, prompt: MakePrompt) -> None:
    with Serve(slow_model, *FLAGS) as serve:
        children = list(serve.children().values())
        events = serve.stream(prompt(30), 3500)
        next(events)
        serve.process.send_signal(signal.SIGINT)
        eventually(lambda: any("stopping" in line for line in serve.log), what="the first signal is noticed")
        serve.process.send_signal(signal.SIGINT)
        assert serve.process.wait(180) == 130
        assert gone(children)
