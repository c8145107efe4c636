"""What somebody sees who mistypes, or asks for help: one line that names the flag and the remedy, fast."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tandem
from tandem.common.settings import settings_of
from tandem.runtime.settings import ServeConfig
from tests.e2e.serving import environment, tandem_command

COMMANDS = ("serve", "prefill", "decode", "router", "kvstore")
ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", *(f"docs/{name}.md" for name in ("router", "tenants", "batches", "kvstore")))
ELSEWHERE = {"--help", "--config", "--node", "--owner", "--no-deps"}
"""Flags of every command, of `tandem kv` and of pip."""


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        tandem_command(*arguments), capture_output=True, text=True, timeout=60, env=environment(**variables)
    )


def refusal(*arguments: object, **variables: str) -> str:
    """What is printed by a command that must end with status 2 and without a traceback."""
    done = run(*arguments, **variables)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("serve", "--prot", "80"), "--prot"),
        (("serve", "--prot", "80"), "did you mean --port?"),
        (("serve", "--port", "eighty"), '--port: must be a whole number, not "eighty"'),
        (("serve", "--kv-cache-byte", "1"), "did you mean --kv-cache-bytes?"),
        (("serve", "--kv_cache_bytes", "much"), "a number of bytes, such as 4GiB"),
        (("serve", "a", "b"), "a word too many"),
        (("serve", "--tensor-parallel-size", "2"), "--decode"),
        (("serve", "--decode", "0"), "--decode 0: at least one"),
        (("serve", "--dtype", "float12"), "bfloat16"),
        (("serve", "--config", "/nonexistent.yaml"), "/nonexistent.yaml"),
        (("decode", "--model", "/nonexistent"), "--model /nonexistent"),
        (("prefill",), "model"),
        (("sevre",), "tandem --help"),
    ],
)
def test_mistakes_name_the_flag_and_end_with_status_2(arguments: tuple[str, ...], said: str) -> None:
    assert said in refusal(*arguments)


def test_a_port_in_use_is_noticed_before_anything_is_loaded(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: in use" in refusal("serve", "--model", tiny, "--port", port)


def test_a_worker_that_cannot_load_its_model_ends_serve_with_the_reason(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((tiny / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    done = run("serve", "--model", tmp_path / "model", "--port", 0)
    assert done.returncode == 1
    assert "giving up" in done.stderr
    assert "LlamaForCausalLM" in done.stderr


def test_a_worker_refuses_an_address_in_use(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"--listen {address}" in refusal("decode", "--model", tiny, "--listen", address)


def test_help_lists_the_commands_without_loading_torch() -> None:
    program = "import sys; from tandem.runtime.cli import main; main(['--help']); print('torch' in sys.modules)"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert time.monotonic() - started < 5.0  # 0.05 s on an idle machine
    assert all(command in done.stdout for command in ("serve", "prefill", "decode", "router", "version"))
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize("command", [*COMMANDS])
def test_the_help_of_every_command_shows_examples_and_explains_each_flag(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert "Examples:" in done.stdout
    assert f"tandem {command} --" in done.stdout
    assert "TANDEM_MODEL" in done.stdout


def test_version_is_the_package_s() -> None:
    assert run("version").stdout.strip() == tandem.__version__


def test_settings_come_from_flags_file_and_environment_in_this_order(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text("decode: 0\n")
    assert "--decode -1" in refusal("serve", TANDEM_DECODE="-1")
    assert "--decode 0" in refusal("serve", "--config", tmp_path / "serve.yaml")
    assert "--decode -1" in refusal("serve", "--config", tmp_path / "serve.yaml", TANDEM_DECODE="-1")
    assert "--decode -3" in refusal("serve", "--config", tmp_path / "serve.yaml", "--decode", "-3", TANDEM_DECODE="-1")


def test_no_secret_is_printed(tmp_path: Path) -> None:
    for arguments in (("--api-kye", "sk-x"), ("--api-key", "sk-1", "sk-x"), ("--api-key", "sk-x", "--decode", "0")):
        assert "sk-x" not in refusal("serve", *arguments)
    assert "did you mean --api-key?" in refusal("serve", "--api-kye", "sk-x")
    done = run("serve", "--api-key", "sk-x", "--print-config")
    assert done.returncode == 0
    assert "sk-x" not in done.stdout + done.stderr


def test_what_docs_name_is_a_setting_of_serve() -> None:
    named = {flag for page in PAGES for flag in re.findall(r"(?<![\w-])--[a-z][a-z_-]+", (ROOT / page).read_text())}
    assert len(named) > 20
    assert named - {setting.flag for setting in settings_of(ServeConfig).values()} <= ELSEWHERE
