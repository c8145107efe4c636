"""Which secret a `tandem serve` has: given, kept beside the KV on disk, or new."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tandem.common.errors import ConfigError
from tandem.common.secret import VARIABLE
from tandem.runtime.secret import secret_of
from tandem.runtime.settings import ServeConfig

SECRET = "a secret of enough bytes"


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def test_without_any_each_run_has_one_of_its_own() -> None:
    first, second = secret_of(ServeConfig()), secret_of(ServeConfig())
    assert len(first) == len(second) == 64
    assert first != second


def test_what_is_given_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text(SECRET)
    kept = {"kv_disk": str(tmp_path / "disk")}
    assert secret_of(ServeConfig(secret_file=str(tmp_path / "secret"), **kept)) == SECRET.encode()
    monkeypatch.setenv(VARIABLE, SECRET)
    assert secret_of(ServeConfig(**kept)) == SECRET.encode()
    assert not (tmp_path / "disk").exists()


def test_with_a_disk_it_is_kept_there_for_this_user_alone(tmp_path: Path) -> None:
    config = ServeConfig(kv_disk=str(tmp_path / "disk"))
    first = secret_of(config)
    assert secret_of(config) == first
    path = tmp_path / "disk" / "secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="readable to nobody else"):
        secret_of(config)


@pytest.mark.parametrize(
    "shared",
    [
        {"kv_remote": "redis://127.0.0.1:1/0"},
        {"kv_directory": "redis://127.0.0.1:1/0"},
        {"kv_store_socket": "/run/node.sock"},
        {"kv_peer_listen": "127.0.0.1:9301"},
    ],
)
def test_what_is_shared_with_others_needs_one_that_they_know(
    shared: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServeConfig(**shared)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"{next(iter(shared))} .*secret_file.*{VARIABLE}"):
        secret_of(config)
    monkeypatch.setenv(VARIABLE, SECRET)
    assert secret_of(config) == SECRET.encode()
