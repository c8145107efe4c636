"""Reads what the command line, the environment and a YAML file say, with where each was said. All raise ConfigError."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tandem.common.errors import ConfigError
from tandem.common.settings.fields import Setting
from tandem.common.settings.values import BOOLEANS, Raw, close_to, is_repeatable, is_switch
from tandem.common.yaml_file import read_document

log = logging.getLogger(__name__)

RENAMED = {
    "kv_node": "kv_store_socket",
    "kv_store": "kv_store_address",
    "store_listen": "kv_peer_listen",
    "kv_listen": "handover_listen",
    "kv_replicas": "kv_copies",
}
"""Settings that had another name. It is refused wherever the new one is known."""
COMMON_FLAGS = ("--help", "--config", "--print-config")
CONFIG_VARIABLE = "TANDEM_CONFIG"
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://[0-9A-Fa-f.:\[\]]+:\d{1,5}")
"""What Kubernetes writes into TANDEM_PORT for a Service called tandem, into TANDEM_GRPC_PORT for tandem-grpc. No
setting has such values."""
_NULL = "tag:yaml.org,2002:null"


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """A flag that users bring along from another server: it becomes one of ours, asks for what is so anyway, or is
    answered."""

    becomes: str = ""
    """Our setting, which takes its value; may have the same name, for the sake of `values`."""
    values: Mapping[str, str] = field(default_factory=dict)
    """Values that have another name here."""
    fine: frozenset[str] = frozenset()
    """Values, in small letters, with which things are as asked for. A switch has `true` or `false`."""
    switch: bool = False
    """Whether it takes no value."""
    remedy: str = ""
    """What to do about other values."""


@dataclass(frozen=True, slots=True)
class Given:
    raw: Raw
    where: str
    """Place for errors to name, such as `--port`, `TANDEM_PORT` or `serve.yaml, line 3: port`."""


@dataclass(frozen=True, slots=True)
class Known:
    """What may be said."""

    settings: Mapping[str, Setting]
    foreign: Mapping[str, Foreign]
    short: Mapping[str, str]
    """Flags with one dash, such as `tp`, and the name that each stands for."""
    word: str
    """The setting that a word without a flag gives."""

    def translate(self, name: str, value: str, where: str) -> tuple[str, str] | None:
        """Our setting and its value for a foreign flag; None: there is nothing to do."""
        foreign = self.foreign[name]
        if foreign.becomes:
            return foreign.becomes, foreign.values.get(value, value)
        if value.lower() not in foreign.fine:
            raise ConfigError(f"{where}: {foreign.remedy}")
        return None

    def renamed(self, name: str, raw: Raw) -> Raw:
        """A value of our own setting, where another server has a name of its own for it."""
        values = self.foreign[name].values if name in self.foreign else {}
        return values.get(raw, raw) if isinstance(raw, str) else raw

    def check_current(self, name: str, where: str) -> None:
        """Raises ConfigError for the old name of a setting."""
        setting = self.settings.get(RENAMED.get(name, ""))
        if setting is not None:
            alike = setting.flag if where.startswith("-") else setting.variable
            raise ConfigError(f"{where} is called {alike if where.startswith(('-', 'TANDEM_')) else setting.name} now")

    def nearest(self, name: str) -> str:
        """`; did you mean X?`, in the way `name` is written."""
        flags = [*COMMON_FLAGS, *("--" + each.replace("_", "-") for each in (*self.settings, *self.foreign))]
        if name.startswith("-"):
            return close_to(name.replace("_", "-"), flags)
        return close_to(name, [*self.settings, *self.foreign])


@dataclass(slots=True)
class CommandLine:
    """What a command line says: settings as they were given, and the options that are no settings."""

    given: dict[str, Given] = field(default_factory=dict)
    config_file: str = ""
    print_config: bool = False
    help: str | None = None
    """What help is asked for; empty: the first page."""


def read_command_line(argv: Sequence[str], known: Known) -> CommandLine:
    """Reads the words after the command's name. Stops at --help. Raises ConfigError for a flag that is unknown or lacks
    its value."""
    line = CommandLine()
    words = list(argv)
    before = "the command"
    while words and line.help is None:
        word = words.pop(0)
        flag, equals, inline = word.partition("=")
        value = inline if equals else None
        if not word.startswith("-"):
            _take_word(line, known, word, before)
        elif flag in ("-h", "--help"):
            line.help = value or (words[0] if words and not words[0].startswith("-") else "")
        elif flag == "--config":
            line.config_file = _value(flag, value, words)
        elif flag.replace("_", "-") == "--print-config":
            line.print_config = True
        else:
            _take_flag(line.given, known, flag, value, words)
        before = flag
    return line


def read_variables(known: Known) -> dict[str, Given]:
    """Settings that environment variables (TANDEM_...) give, by setting. Raises ConfigError for the variable of a
    setting that was renamed."""
    for old in RENAMED:
        if (variable := f"TANDEM_{old.upper()}") in os.environ:
            known.check_current(old, variable)
    given = {}
    for setting in known.settings.values():
        raw = os.environ.get(setting.variable)
        if raw is None:
            continue
        if _SERVICE_LINK.fullmatch(raw):
            log.warning("%s=%s is Kubernetes's link to a Service, and no setting", setting.variable, raw)
        else:
            given[setting.name] = Given(raw, setting.variable)
    return given


def read_file(path: str, known: Known) -> dict[str, Given]:
    """Settings that the YAML file at `path` gives, by setting. Keys of other servers that `known` translates are taken,
    too. Raises ConfigError with the line for a key that is no setting."""
    given = {}
    for key, node in read_document(Path(path).expanduser(), "--config").items:
        name = key.replace("-", "_")
        where = f"{path}, line {node.start_mark.line + 1}: {key}"
        raw = _raw(node, where)
        if name in known.settings:
            given[name] = Given(known.renamed(name, raw), where)
        elif name in known.foreign:
            ours = known.translate(name, raw if isinstance(raw, str) else "", where)
            if ours is not None:
                given[ours[0]] = Given(ours[1], where)
        else:
            known.check_current(name, where)
            raise ConfigError(f"{where} is not a setting{known.nearest(name)}")
    return given


def _take_word(line: CommandLine, known: Known, word: str, before: str) -> None:
    flag_before = known.settings.get(before.removeprefix("--").replace("-", "_"))
    if known.word not in known.settings or known.word in line.given or (flag_before is not None and flag_before.secret):
        # Without the word, which may be a second secret.
        raise ConfigError(f"there is a word too many behind {before}; a flag takes one value, and may be repeated")
    line.given[known.word] = Given(word, known.word.upper())


def _take_flag(given: dict[str, Given], known: Known, flag: str, value: str | None, words: list[str]) -> None:
    name = flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else known.short.get(flag[1:], "")
    positive = name.removeprefix("no_")
    setting = known.settings.get(name)
    if setting is not None and is_switch(setting):
        given[name] = Given(_switch_value(value, words), flag)
    elif setting is not None:
        raw: Raw = _value(flag, value, words)
        if name == known.word and name in given and given[name].where != flag:
            raise ConfigError(f"{flag} is given twice")
        before = given.get(name)
        if is_repeatable(setting) and before is not None:
            raw = [*(before.raw if isinstance(before.raw, list) else [str(before.raw)]), str(raw)]
        given[name] = Given(known.renamed(name, raw), flag)
    elif positive in known.settings and is_switch(known.settings[positive]):
        given[positive] = Given("false", flag)
    elif (outer := name.partition(".")[0]) in known.foreign:
        foreign = known.foreign[outer]
        text = _switch_value(value, words) if foreign.switch else _value(flag, value, words)
        _take_foreign(given, known, outer, text, flag)
    elif positive in known.foreign and known.foreign[positive].switch:
        _take_foreign(given, known, positive, "false", flag)
    else:
        known.check_current(name, flag)
        raise ConfigError(f"there is no flag {flag}{known.nearest(flag)}")


def _take_foreign(given: dict[str, Given], known: Known, name: str, value: str, flag: str) -> None:
    ours = known.translate(name, value, flag)
    if ours is not None:
        given[ours[0]] = Given(ours[1], flag)


def _value(flag: str, value: str | None, words: list[str]) -> str:
    if value is not None:
        return value
    if not words or words[0].startswith("--"):
        raise ConfigError(f"{flag} needs a value")
    return words.pop(0)


def _switch_value(value: str | None, words: list[str]) -> str:
    if value is not None:
        return value
    return words.pop(0) if words and words[0].lower() in BOOLEANS else "true"


def _raw(node: yaml.Node, where: str) -> Raw:
    match node:
        case yaml.ScalarNode():
            return None if node.tag == _NULL else str(node.value)
        case yaml.SequenceNode():
            return [_raw_text(item, where) for item in node.value]
        case yaml.MappingNode():
            return {_raw_text(key, where): _raw_text(value, where) for key, value in node.value}
    raise ConfigError(f"{where} cannot be read")


def _raw_text(node: yaml.Node, where: str) -> str:
    raw = _raw(node, where)
    if not isinstance(raw, str):
        raise ConfigError(f"{where} is nested too deeply")
    return raw
