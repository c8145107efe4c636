"""Settings of a command: one dataclass, filled from flags, `TANDEM_*` environment variables and one YAML file.

Precedence, strongest first: flags, environment, `--config FILE.yaml`, defaults. To add a setting, add a field with a
docstring, which is its help text, below the `ClassVar[Group]` where it belongs. Names that end in `_bytes`, `_s`,
`_tokens` or `_len` take units (4GiB, 5m, 32k); `field(repr=False)` makes a value that is never shown.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

import yaml

from tandem.common.errors import ConfigError
from tandem.common.hidden_arguments import has_password, hide_arguments
from tandem.common.settings.fields import REQUIRED, Group, Setting, settings_of, with_dashes
from tandem.common.settings.help import help_text
from tandem.common.settings.sources import (
    CONFIG_VARIABLE,
    Foreign,
    Given,
    Known,
    read_command_line,
    read_file,
    read_variables,
)
from tandem.common.settings.values import parse_value, plain

__all__ = ["CONFIG_VARIABLE", "Foreign", "Group", "parse_settings", "plain", "settings_of", "with_dashes"]

T = TypeVar("T")


def parse_settings(
    config_class: type[T],
    argv: Sequence[str],
    *,
    command: str,
    description: str,
    examples: Sequence[tuple[str, str]],
    foreign: Mapping[str, Foreign] = MappingProxyType({}),
    short: Mapping[str, str] = MappingProxyType({}),
    word: str = "model",
) -> T:
    """Fills the dataclass `config_class` from `argv`, the environment and YAML.

    `examples` are pairs (what it does, command line), shown below the help. Flags may be written with dashes or
    underscores, never abbreviated; a word without a flag is the setting `word`. `foreign` and `short`: see `Known`.
    Secrets in `argv` are no longer shown by `ps` afterwards. Prints and raises SystemExit(0) on `--help` and
    `--print-config`; raises ConfigError naming flag and remedy.
    """
    settings = settings_of(config_class)
    known = Known(settings, foreign, short, word)
    try:
        line = read_command_line(argv, known)
        hide_arguments(_secrets(line.given, settings))
        if line.help is not None:
            print(_help(config_class, command, description, examples, line.help, word), end="")
            raise SystemExit(0)
        given = read_variables(known) | line.given
        config_file = line.config_file or os.environ.get(CONFIG_VARIABLE, "")
        if config_file:
            given = read_file(config_file, known) | given
        values = {name: _parsed(settings[name], each) for name, each in given.items()}
        for setting in settings.values():
            if setting.default is REQUIRED and setting.name not in values:
                raise ConfigError(f"{setting.flag} is required")
        filled = _fill(config_class, values, given)
    except ConfigError as error:
        message = str(error).rstrip(".")
        raise ConfigError(f"{message}{'' if message.endswith('?') else '.'} See `{command} --help`.") from error
    if line.print_config:
        print(_as_yaml(filled, settings), end="")
        raise SystemExit(0)
    return filled


def _secrets(given: Mapping[str, Given], settings: Mapping[str, Setting]) -> list[str]:
    found: list[str] = []
    for name, each in given.items():
        if settings[name].secret:
            found += each.raw if isinstance(each.raw, list) else [str(each.raw)]
    return found


def _parsed(setting: Setting, given: Given) -> object:
    try:
        return parse_value(setting, given.raw)
    except ValueError as error:
        raise ConfigError(f"{given.where}: {error}") from None


def _fill(config_class: type[T], values: Mapping[str, object], given: Mapping[str, Given]) -> T:
    try:
        return config_class(**values)
    except ConfigError as error:
        settings = settings_of(config_class)
        message = with_dashes(str(error), settings)
        elsewhere = [
            each.where
            for name, each in given.items()
            if not each.where.startswith("-") and re.search(rf"{settings[name].flag}(?![\w-])", message)
        ]
        raise ConfigError(message + (f" (as {', '.join(elsewhere)} says)" if elsewhere else "")) from error


def _help(
    config_class: type, command: str, description: str, examples: Sequence[tuple[str, str]], topic: str, word: str
) -> str:
    try:
        return help_text(
            config_class, command=command, description=description, examples=examples, topic=topic, word=word
        )
    except KeyError:
        raise ConfigError(f"--help={topic}: there is no such group or setting") from None


def _as_yaml(filled: object, settings: Mapping[str, Setting]) -> str:
    """Groups as comments; secrets, and URLs with a password, left out."""
    lines: list[str] = []
    group = ""
    for setting in settings.values():
        if setting.group != group:
            group = setting.group
            lines.append(f"# {group}\n")
        if setting.secret or has_password(str(getattr(filled, setting.name))):
            lines.append(f"# {setting.name}: not shown\n")
        else:
            value = yaml.safe_dump(plain(getattr(filled, setting.name)), default_flow_style=True, width=math.inf)
            lines.append(f"{setting.name}: {value.removesuffix('...' + chr(10))}")
    return "".join(lines)
