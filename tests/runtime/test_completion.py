"""The script completes what a real bash asks of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tandem.runtime import cli, completion


@pytest.fixture(scope="module")
def script() -> str:
    program = "from tandem.runtime.cli import main; main(['completion', 'bash'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def completed(script: str, *words: str) -> set[str]:
    """What bash offers behind `words`, the last of which is begun."""
    quoted = " ".join(f"'{word}'" for word in words)
    asks = f'COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _tandem; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{script}\n{asks}"], capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("tandem", "se"), {"serve"}),
        (("tandem", "s"), {"serve", "status"}),
        (("tandem", "serve", "--kv-cache"), {"--kv-cache-bytes"}),
        (("tandem", "serve", "--dtype", "b"), {"bfloat16"}),
        (("tandem", "serve", "--decode", "2", "--max-num-s"), {"--max-num-seqs"}),
        (("tandem", "serve", "--no-"), {"--no-enable-prefix-caching", "--no-kv-near", "--no-kv-nixl"}),
        (("tandem", "kv", "loo"), {"lookup"}),
        (("tandem", "chat", "--sys"), {"--system"}),
        (("tandem", "completion", "f"), {"fish"}),
        (("tandem", "serve", "xyz"), set()),
    ],
)
def test_bash_completes_commands_flags_and_values(script: str, words: tuple[str, ...], offered: set[str]) -> None:
    got = completed(script, *words)
    assert got >= offered
    assert all(word.startswith(words[-1]) for word in got)


def test_every_command_is_in_every_script(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in completion.SHELLS:
        assert cli.main(["completion", shell]) == 0
        printed = capsys.readouterr().out
        assert all(command in printed for command in cli.COMMANDS)


def test_another_shell_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "tcsh"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err
