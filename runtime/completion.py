"""`tandem completion SHELL`: a script with which the shell completes commands, flags and values of `tandem`."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tandem.common.errors import ConfigError
from tandem.common.settings import settings_of
from tandem.common.settings.sources import COMMON_FLAGS
from tandem.common.settings.values import choices, is_switch

SHELLS = ("bash", "zsh", "fish")
_HOW = """\
usage: tandem completion bash|zsh|fish

Prints a script for the shell. To have it in every terminal:
  bash   tandem completion bash > ~/.local/share/bash-completion/completions/tandem
  zsh    echo 'source <(tandem completion zsh)' >> ~/.zshrc
  fish   tandem completion fish > ~/.config/fish/completions/tandem.fish
"""


@dataclass(frozen=True, slots=True)
class Command:
    """A command as the shell's script knows it."""

    name: str
    words: tuple[str, ...]
    """What may stand behind it besides files: flags, or names of its own commands."""
    values: dict[str, tuple[str, ...]]
    """Values of flags that have few."""


def main(argv: Sequence[str]) -> int:
    """Raises ConfigError."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_HOW, end="")
        return 0
    if argv[0] not in SHELLS:
        raise ConfigError(f"there is none for {argv[0][:40]!r}; give one of {', '.join(SHELLS)}")
    commands = describe_commands()
    if argv[0] == "fish":
        print(_fish(commands), end="")
    else:
        print(("autoload -U +X bashcompinit && bashcompinit\n" if argv[0] == "zsh" else "") + _bash(commands), end="")
    return 0


def describe_commands() -> list[Command]:
    """All commands, with their flags and what these may be."""
    from tandem.kvstore.process.admin import command_names
    from tandem.runtime.cli import COMMANDS

    described = []
    for name, module_name in COMMANDS.items():
        config_class = getattr(importlib.import_module(module_name), "SETTINGS", None)
        flags: list[str] = []
        values: dict[str, tuple[str, ...]] = {}
        if config_class is not None:
            for setting in settings_of(config_class).values():
                flags += [setting.flag, *(["--no-" + setting.flag[2:]] if is_switch(setting) else [])]
                if choices(setting):
                    values[setting.flag] = choices(setting)
            flags += COMMON_FLAGS
        own = {"kv": command_names(), "completion": SHELLS}.get(name, ())
        described.append(Command(name, (*own, *flags), values))
    return [*described, Command("version", (), {})]


def _bash(commands: Iterable[Command]) -> str:
    """A case by command, in it a case by the flag before; files where nothing fits."""
    commands = list(commands)
    cases = []
    for command in commands:
        values = "".join(
            f'        {command.name}:{flag}) words="{" ".join(given)}" ;;\n' for flag, given in command.values.items()
        )
        cases.append(f'{values}        {command.name}:*) words="{" ".join(command.words)}" ;;\n')
    return f"""\
_tandem() {{
    local words word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{" ".join(command.name for command in commands)}" -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}}:$before" in
{"".join(cases)}    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _tandem tandem
"""


def _fish(commands: Iterable[Command]) -> str:
    commands = list(commands)
    lines = [f"complete -c tandem -n __fish_use_subcommand -f -a '{' '.join(each.name for each in commands)}'"]
    for command in commands:
        only = f"complete -c tandem -n '__fish_seen_subcommand_from {command.name}'"
        names = [word for word in command.words if not word.startswith("--")]
        if names:
            lines.append(f"{only} -f -a '{' '.join(names)}'")
        for flag in (word for word in command.words if word.startswith("--")):
            given = command.values.get(flag)
            lines.append(f"{only} -l {flag[2:]}" + (f" -x -a '{' '.join(given)}'" if given else ""))
    return "\n".join(lines) + "\n"
