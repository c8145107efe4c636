"""docs/from-vllm.md says what becomes of each flag; this runs what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tandem.common.errors import ConfigError
from tandem.common.settings import parse_settings, settings_of
from tandem.runtime.settings import ServeConfig
from tandem.runtime.vllm_flags import SHORT_FLAGS, VLLM_FLAGS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "from-vllm.md").read_text()
ROWS = re.findall(r"^\| (`-.*?) \| (accepted|answered) \| (.*?) ?\|$", PAGE, flags=re.M)
ACCEPTED = [(flag, said) for flags, kind, said in ROWS if kind == "accepted" for flag in re.findall("`(.*?)`", flags)]
ANSWERED = [(flag, said) for flags, kind, said in ROWS if kind == "answered" for flag in re.findall("`(.*?)`", flags)]


def parse(*argv: str) -> ServeConfig:
    return parse_settings(
        ServeConfig,
        ["some/model", *argv],
        command="tandem serve",
        description="d",
        examples=(),
        foreign=VLLM_FLAGS,
        short=SHORT_FLAGS,
    )


@pytest.mark.parametrize(("flag", "said"), ACCEPTED)
def test_what_is_accepted_means_what_the_page_says(flag: str, said: str) -> None:
    ours = re.search(r"as `(.*?)`", said)
    assert parse(*flag.split()) == parse(*(ours[1].split() if ours else ()))


@pytest.mark.parametrize(("flag", "said"), ANSWERED)
def test_what_is_answered_says_what_to_do(flag: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*flag.split())
    assert flag.split()[0] in str(caught.value)
    assert said.strip("`") in str(caught.value)


def test_the_page_names_flags_in_both_directions() -> None:
    assert len(ACCEPTED) > 12
    assert len(ANSWERED) > 20
    same = re.search(r"same in both: (.*?)\. Numbers", PAGE, flags=re.S)
    assert same is not None
    known = {setting.flag for setting in settings_of(ServeConfig).values()} | {"--config"}
    assert set(re.findall(r"`(--.*?)`", same[1])) <= known


def test_no_flag_of_theirs_hides_one_of_ours() -> None:
    for name in set(VLLM_FLAGS) & set(settings_of(ServeConfig)):
        assert VLLM_FLAGS[name].becomes == name
    assert set(SHORT_FLAGS.values()) <= set(VLLM_FLAGS) | set(settings_of(ServeConfig))
    for foreign in VLLM_FLAGS.values():
        assert not foreign.becomes or foreign.becomes in settings_of(ServeConfig)
        assert foreign.becomes or foreign.remedy or foreign.fine
