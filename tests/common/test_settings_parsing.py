"""One dataclass, filled from flags, environment and YAML; mistakes name the flag and say what to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tandem.common.errors import ConfigError
from tandem.common.settings import parse_settings


@dataclass(frozen=True, slots=True)
class Colours:
    """Of the house."""

    walls: str
    """What visitors see first."""
    num_windows: int | None = None
    """None: as many as fit."""
    rooms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_windows == 0:
            raise ConfigError("--num_windows 0: it would be dark")


def parse(*argv: str) -> Colours:
    return parse_settings(
        Colours, argv, command="paint", description="Paints.", examples=[("all white", "paint --walls white")]
    )


def test_dashes_and_underscores_are_the_same() -> None:
    assert parse("--walls", "red-ish", "--num-windows=3") == parse("--num_windows", "3", "--walls=red-ish")


def test_flags_win_over_the_file_and_the_file_over_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "paint.yaml").write_text("walls: blue\nnum_windows: 2\n")
    monkeypatch.setenv("TANDEM_WALLS", "green")
    monkeypatch.setenv("TANDEM_ROOMS", "[attic]")
    assert parse() == Colours("green", None, ("attic",))
    assert parse("--config", str(tmp_path / "paint.yaml"), "--num-windows", "5") == Colours("blue", 5, ("attic",))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "walls"),
        (("--walls", "red", "--num-windows", "many"), "--num_windows"),
        (("--walls", "red", "--num-windows", "0"), "it would be dark"),
        (("--walls", "red", "--doors", "1"), "--doors"),
        (("--config", "/nowhere.yaml"), "/nowhere.yaml"),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(argv: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_shows_docstrings_defaults_variables_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for part in ("What visitors see first", "TANDEM_NUM_WINDOWS", "# all white\n  paint --walls white", "required"):
        assert part in text


def test_a_value_that_looks_like_a_flag_name_is_left_alone() -> None:
    parsed: Any = parse("--walls=off-white")
    assert parsed.walls == "off-white"
