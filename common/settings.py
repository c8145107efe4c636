"""Settings of a command: one dataclass, filled from flags, `TANDEM_*` environment variables and one YAML file.

Precedence, strongest first: flags, `--config FILE.yaml`, environment, defaults. A field's docstring is its help text.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, TypeVar

from tandem.common.errors import ConfigError

T = TypeVar("T")


def parse_settings(
    config_class: type[T], argv: Sequence[str], *, command: str, description: str, examples: Sequence[tuple[str, str]]
) -> T:
    """Fills the dataclass `config_class` from `argv`, the environment and YAML.

    `examples` are pairs (what it does, command line), shown below the help. Flags may be written with dashes or
    underscores. Prints help and raises SystemExit(0) on `--help`; raises ConfigError naming flag and remedy.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    epilog = "Examples:\n" + "\n".join(f"  # {what}\n  {line}\n" for what, line in examples)
    parser = jsonargparse.ArgumentParser(
        prog=command,
        description=textwrap.fill(description, 100),
        epilog=epilog,
        formatter_class=_help_formatter(),
        default_env=True,
        env_prefix="TANDEM",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_class_arguments(config_class)
    try:
        settings = parser.parse_args([_underscored(argument) for argument in argv])
        settings.pop("config")
        filled: T = config_class(**settings.as_dict())
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(f"{_one_line(error)}. See `{command} --help`.") from error
    return filled


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _one_line(error: Exception) -> str:
    """jsonargparse explains over several lines; the first names the flag, the last ones what was given."""
    text = " ".join(str(error).split())
    if text.startswith('Parser key "'):
        key, _, rest = text.removeprefix('Parser key "').partition('":')
        text = f"--{key}:{rest}"
    return text.rstrip(".")


def _help_formatter() -> Any:
    from jsonargparse import DefaultHelpFormatter

    class RawTextFormatter(DefaultHelpFormatter):
        """Keeps the line breaks of description and examples."""

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return text

    return RawTextFormatter
