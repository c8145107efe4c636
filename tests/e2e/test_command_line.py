"""What somebody sees who mistypes, or asks for help: one line that names the flag and the remedy, fast."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import tandem
from tandem.runtime.completion import describe_commands
from tests.e2e.serving import Serve, environment, tandem_command

COMMANDS = ("serve", "prefill", "decode", "router", "kvstore")
ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", *(f"docs/{name}.md" for name in ("router", "tenants", "batches", "kvstore")))
ELSEWHERE = {"--node", "--owner", "--no-deps", "--index-url", "--wheel"}
"""Flags of `tandem kv`, and of pip."""


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


def test_a_model_that_cannot_be_served_is_one_line_before_anything_starts(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((tiny / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    said = refusal("serve", "--model", tmp_path / "model", "--port", 0)
    assert "LlamaForCausalLM" in said
    assert len(said.splitlines()) == 1


def test_what_only_a_worker_can_find_is_said_once(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"rubbish")
    said = refusal("serve", "--model", tmp_path / "model", "--port", 0)
    assert len([line for line in said.splitlines() if "safetensors" in line]) == said.count("cannot start: ") == 1
    assert "starting it again" not in said


def test_a_healthy_start_ends_with_the_banner_and_a_stop_says_that_it_stopped(tiny: Path) -> None:
    command = tandem_command("serve", tiny, "--port", 0)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}  # one pipe keeps the order of lines
    with subprocess.Popen(command, **streams, text=True, env=environment()) as serve:  # type: ignore[call-overload]
        lines = list(iter(serve.stdout.readline, "  Ctrl-C stops it.\n"))
        assert not [line for line in lines if re.search(r"WARN|ERROR|cannot|fail|refuse|Traceback", line)]
        assert "/v1/chat/completions" in "".join(lines)
        serve.send_signal(signal.SIGINT)
        after = [line for line in serve.stdout if line.strip()]
        assert after[0] == "[tandem] stopping: waiting for running requests; once more to stop at once\n"
        assert after[-1] == "[tandem] stopped\n"
        assert serve.wait(60) == 0


def test_a_key_opens_the_server_and_no_process_shows_it(tiny: Path) -> None:
    with Serve(tiny, api_key="sk-2", TANDEM_API_KEY="sk-2") as serve:
        assert httpx.get(serve.url + "/v1/models", trust_env=False).status_code == 401
        key = {"TANDEM_API_KEY": "sk-2"}
        assert run("status", "--url", serve.url, "--over-s", "0", **key).returncode == 0
        assert run("chat", "Who?", "--url", serve.url, "--max-tokens", "3", **key).returncode == 0
        shown = [child.cmdline() + list(child.environ().values()) for child in serve.children().values()]
        assert len(shown) == 4
        assert "sk-2" not in {word for words in shown for word in words}
        assert run("kv", "stats", "--node", serve.node()).returncode == 0


def test_a_worker_refuses_an_address_in_use(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"--listen {address}" in refusal("decode", "--model", tiny, "--listen", address)


def test_help_lists_the_commands_without_loading_torch() -> None:
    program = "import sys; from tandem.runtime.cli import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
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


def test_what_docs_name_is_a_setting_of_a_command() -> None:
    named = {flag for page in PAGES for flag in re.findall(r"(?<![\w-])--[a-z][a-z_-]+", (ROOT / page).read_text())}
    assert len(named) > 20
    assert named - {word for command in describe_commands() for word in command.words} <= ELSEWHERE
