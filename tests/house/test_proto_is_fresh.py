"""The committed gRPC stubs are what `make proto` makes from the .proto files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_stubs_match_their_proto_files(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(
        ["proto/generate.sh", str(tmp_path)], cwd=ROOT, check=True, env={**os.environ, "PATH": path}, timeout=60
    )
    made = {path.name: path.read_bytes() for path in (tmp_path / "tandem" / "proto").iterdir()}
    kept = {path.name: path.read_bytes() for path in (ROOT / "proto").glob("*_pb2*")}
    assert made.keys() == kept.keys()
    stale = [name for name in made if made[name] != kept[name]]
    assert not stale, f"run `make proto`: {stale}"
