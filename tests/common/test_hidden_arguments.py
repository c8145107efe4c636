"""Secrets on a command line are not to be read there by others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tandem.common.settings import parse_settings
from tandem.router.settings import RouterConfig

PROGRAM = """
import sys
from pathlib import Path
from tandem.common.settings import parse_settings
from tandem.router.settings import RouterConfig

config = parse_settings(RouterConfig, sys.argv[1:], command="tandem router", description="", examples=())
print(Path("/proc/self/cmdline").read_bytes().decode().replace("\\0", " "))
print(config.redis, config.api_key)
"""


def run(*words: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-2:]


def test_keys_and_passwords_are_stars() -> None:
    shown, read = run("small", "--redis=redis://me:pass@word/0", "--api-key", "sk-one", "--api-key=sk-two", "--port=80")
    assert read == "redis://me:pass@word/0 ['sk-one', 'sk-two']"
    assert shown.split()[-6:] == [
        "small",
        "--redis=redis://me:****@word/0",
        "--api-key",
        "******",
        "--api-key=******",
        "--port=80",
    ]


def test_what_is_no_secret_stays() -> None:
    shown, _ = run("small", "--redis", "redis://host:6379/0", "--api-key=s", "--served-model-name=s-s")
    assert shown.split()[-5:] == ["small", "--redis", "redis://host:6379/0", "--api-key=*", "--served-model-name=s-s"]


def test_printed_settings_hold_no_password(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["small", "--redis=redis://:hidden@host", "--print-config"]
    with pytest.raises(SystemExit):
        parse_settings(RouterConfig, words, command="tandem router", description="", examples=())
    printed = capsys.readouterr().out
    assert "hidden" not in printed
    assert "# redis: not shown" in printed
