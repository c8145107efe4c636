"""Runs the kernel tests where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_pass_their_tests_under_the_interpreter() -> None:
    """In a child process: Triton chooses its interpreter when it is first imported, and other tests import it too."""
    pytest.importorskip("triton", reason="triton is not installed: install the extra `gpu` or `dev`")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process is the interpreter's")
    names = ("test_triton_attention.py", "test_triton_batch_invariant.py")
    tests = [str(Path(__file__).with_name(name)) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[3]
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]
    assert " passed" in child.stdout
    assert " skipped" not in child.stdout
