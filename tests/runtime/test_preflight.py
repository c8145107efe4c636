"""What cannot work is found before any process starts, and is one line."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tandem.common.errors import ConfigError
from tandem.common.memory import readable_size, usable_memory
from tandem.runtime.preflight import checked, in_a_fork
from tandem.runtime.settings import BUNDLED_MODEL, ServeConfig


def test_the_bundled_model_passes_and_keeps_its_name() -> None:
    resolved = checked(ServeConfig())
    assert Path(resolved.model) == BUNDLED_MODEL.resolve()
    assert resolved.served_model_name == "tandem-small"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kv_cache_bytes": 1 << 44}, "kv_cache_bytes of 2 workers"),
        ({"kv_host_bytes": 1 << 44}, r"kv_host_bytes \(16 TiB\)"),
        ({"model": "/nowhere"}, "/nowhere: no such folder"),
        ({"tenants_file": Path("/nowhere.yaml")}, "--tenants-file /nowhere.yaml"),
        ({"tool_format": "xml"}, "--tool-format 'xml'"),
    ],
)
def test_a_setting_that_cannot_work_is_named(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        checked(replace(ServeConfig(), **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", {"architectures": ["BertModel"]}, "BertModel"),
        ("config.json", None, "config.json"),
        ("tokenizer.json", None, "tokenizer.json"),
        ("tokenizer.json", {}, "tokenizer.json"),
    ],
)
def test_a_folder_that_cannot_be_served_is_named(
    tmp_path: Path, file: str, content: dict[str, object] | None, said: str
) -> None:
    folder = Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "model"))
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=said):
        checked(ServeConfig(model=str(folder)))


def test_a_check_in_a_fork_leaves_nothing_behind() -> None:
    def check() -> None:
        os.environ["LEFT_BEHIND"] = "1"

    in_a_fork(check)
    assert "LEFT_BEHIND" not in os.environ


def test_memory_is_that_of_the_machine_or_less() -> None:
    assert 0 < usable_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert [readable_size(size) for size in (17, 1536, 3 << 30)] == ["17 bytes", "1.5 KiB", "3 GiB"]
