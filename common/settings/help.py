"""The text of `--help`: basics first, the other groups by name, each in full with `--help=GROUP`."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tandem.common.settings.fields import BASICS, REQUIRED, Setting, group_texts, settings_of, with_dashes
from tandem.common.settings.values import describe, is_switch, placeholder, plain

ALL = "all"
_LONGEST_LINE = 100
_INDENT = " " * 6
_TO_EXPLAIN = {"SIZE", "SECONDS", "TOKENS", "A,B", "NAME=SHARE,...", "KEY"}
_EVERYWHERE = """\
Everywhere:
  --config FILE     YAML with any setting, such as `max_num_seqs: 8`
  --print-config    prints the settings in force as such a file, and ends
  --help=SETTING    explains one setting
  TANDEM_MODEL=DIR  is --model DIR: each setting has such a variable
  What is given twice: a flag goes before its variable, a variable before the file.
"""


def help_text(
    config_class: type, *, command: str, description: str, examples: Sequence[tuple[str, str]], topic: str, word: str
) -> str:
    """`topic`: empty for the first page, a group, `all`, or a setting's name. Raises KeyError if it is none of them."""
    settings, groups = settings_of(config_class), group_texts(config_class)
    width = max(60, min(_LONGEST_LINE, shutil.get_terminal_size().columns))
    wanted = topic.lstrip("-").replace("-", "_")
    if wanted in settings:
        return _flags([settings[wanted]], settings, width)
    if wanted not in ("", ALL, *groups):
        raise KeyError(topic)
    shown = list(groups) if wanted == ALL else [wanted or BASICS]
    word = f" [{word.upper()}]" if word in settings else ""
    parts = []
    if not wanted or wanted == ALL:
        parts += [f"usage: {command}{word} [--SETTING VALUE ...]\n", textwrap.fill(description, width) + "\n"]
    for group in shown:
        title = groups[group] or group.capitalize()
        parts.append(textwrap.fill(title, width) + "\n")
        parts.append(_flags([each for each in settings.values() if each.group == group], settings, width))
    others = [group for group in groups if group != BASICS]
    if not wanted and others:
        parts.append(f"More settings, with `{command} --help=GROUP`, or `--help=all`:\n")
        parts.append("".join(f"  {group:<10} {_first_sentence(groups[group])}\n" for group in others))
    if wanted in ("", ALL):
        parts.append(_EVERYWHERE)
        parts.append("Examples:\n" + "\n".join(f"  # {what}\n  {line}\n" for what, line in examples))
    return "\n".join(parts)


def _flags(shown: Iterable[Setting], settings: Mapping[str, Setting], width: int) -> str:
    lines = []
    for setting in shown:
        flag = setting.flag
        if is_switch(setting):
            flag = f"{flag}, --no-{flag[2:]}"
        lines.append(f"  {flag} {placeholder(setting)}".rstrip())
        text = with_dashes(setting.text, settings).replace("None: ", "Left out: ").replace("Empty: ", "Left out: ")
        if about := _about(setting):
            text = f"{text} ({about})"
        lines.append(textwrap.fill(text, width, initial_indent=_INDENT, subsequent_indent=_INDENT))
    return "\n".join(lines) + "\n"


def _about(setting: Setting) -> str:
    """Text beyond what the placeholder says."""
    said = [describe(setting)] if placeholder(setting) in _TO_EXPLAIN else []
    if setting.default is REQUIRED:
        said.append("required")
    elif setting.default not in (None, "", (), [], {}):
        said.append(f"default {_shown(setting, plain(setting.default))}")
    return "; ".join(said)


def _shown(setting: Setting, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if setting.name.endswith("_bytes") and value:
        for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
            if value % factor == 0:
                return f"{value // factor}{unit}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _first_sentence(text: str) -> str:
    return text.partition(": ")[2] or text
