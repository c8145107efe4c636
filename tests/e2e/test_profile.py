"""`tandem profile` of a real worker: its table is one that the planner's model reads."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tandem.planner.measured import Table, read_points
from tests.e2e.running import Running
from tests.e2e.serving import environment, tandem_command

pytestmark = pytest.mark.processes


def test_a_worker_is_measured_and_the_table_read(tiny: Path, tmp_path: Path) -> None:
    address, out = f"unix:{tmp_path}/w", tmp_path / "table.csv"
    worker = Running("decode")
    worker.run(tandem_command("decode", "--model", tiny, "--listen", address), environment())
    try:
        worker.wait_ready()
        done = subprocess.run(
            tandem_command(
                "profile", address, "--batch", "1", "--context", "20,60", "--repeats", "2", "--out", str(out)
            ),
            capture_output=True,
            text=True,
            timeout=300,
            env=environment(),
        )
    finally:
        worker.kill()
    assert done.returncode == 0, done.stderr
    points = read_points(out.read_text().splitlines(keepends=True))
    prompts = [(p.tokens, p.context) for p in points if p.phase == "prefill"]
    assert prompts[:2] == [(20, 0), (60, 0)]
    assert all(tokens + context in (5 * 20, 5 * 60) and context > 0 for tokens, context in prompts[2:4])
    assert {p.tokens for p in points if p.phase == "decode"} == {1}
    assert len(points) == 2 * (4 + 2)
    assert all(0 < p.seconds < 100 for p in points)
    assert "12/12" in done.stderr
    assert Table(points, 1000).step_s((), 1, 80) > 0
