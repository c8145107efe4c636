"""Where the deployment's secret comes from, what is made of it, and who may listen without one."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tandem.common.errors import ConfigError
from tandem.common.secret import VARIABLE, check_reachable, derive, is_local, new_secret, read_secret, write_secret

SECRET = b"a secret of enough bytes"


def test_a_file_goes_before_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert read_secret("") == b""
    monkeypatch.setenv(VARIABLE, f" {SECRET.decode()}\n")
    assert read_secret("") == SECRET
    path = tmp_path / "secret"
    path.write_bytes(b"another secret in a file\n")
    assert read_secret(str(path)) == b"another secret in a file"


def test_a_short_or_absent_secret_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "short")
    with pytest.raises(ConfigError, match=rf"{VARIABLE}: 5 bytes are too few"):
        read_secret("")
    with pytest.raises(ConfigError, match=r"secret_file .*cannot be read"):
        read_secret(str(tmp_path / "none"))


def test_derived_keys_are_those_of_hkdf_and_differ_by_purpose() -> None:
    assert derive(SECRET, "one") == HKDF(SHA256(), 32, b"tandem deployment secret v1", b"one").derive(SECRET)
    assert len({derive(SECRET, "one"), derive(SECRET, "two"), derive(b"another secret", "one")}) == 3


def test_what_is_written_is_for_this_user_alone(tmp_path: Path) -> None:
    path, secret = tmp_path / "secret", new_secret()
    path.write_text("an older one")
    path.chmod(0o666)
    write_secret(path, secret)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_secret(str(path)) == secret != new_secret()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("unix:/run/x.sock", True),
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.4:9100", False),
        ("127.0.0.1.example.com:1", False),
        ("localhost.example.com:1", False),
        ("db:1", False),
    ],
)
def test_only_loopback_may_be_listened_on_without_a_secret(
    address: str, local: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert is_local(address) is local
    check_reachable(SECRET, "listen", address)
    assert not caplog.records
    if local:
        check_reachable(b"", "listen", address)
        assert bool(caplog.records) is not address.startswith("unix:")
    else:
        with pytest.raises(ConfigError, match=rf"listen .*secret_file.*{VARIABLE}"):
            check_reachable(b"", "listen", address)
