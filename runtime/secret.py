"""The secret of a `tandem serve`: given, kept beside the KV that is named with it, or made anew for one run."""

from __future__ import annotations

import os
from pathlib import Path

from tandem.common.errors import ConfigError
from tandem.common.secret import HOW_TO_MAKE, VARIABLE, new_secret, read_secret, write_secret
from tandem.runtime.settings import ServeConfig

FILE = "secret"
"""Its name in the run directory, for the children and for `tandem kv`; and in the folder of `kv_disk`."""
_SHARED = ("kv_store_socket", "kv_directory", "kv_peer_listen", "kv_remote")
"""Settings by which the server meets others, who must know its secret."""


def secret_of(config: ServeConfig) -> bytes:
    """Not empty: other users of the machine reach the loopback device, too. Raises ConfigError."""
    given = read_secret(config.secret_file)
    if given:
        return given
    for setting in _SHARED:
        if value := getattr(config, setting):
            raise ConfigError(
                f"{setting} {value}: this server shares KV with others, so all of them need one secret: give "
                f"secret_file, or set {VARIABLE} ({HOW_TO_MAKE})"
            )
    return _kept(Path(config.kv_disk) / FILE) if config.kv_disk else new_secret()


def _kept(path: Path) -> bytes:
    """The names of stored KV depend on the secret: without it, what is on the disk would never be found again."""
    if path.exists():
        status = path.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise ConfigError(f"kv_disk: {path} must belong to this user and be readable to nobody else (chmod 600)")
        return read_secret(str(path))
    secret = new_secret()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_secret(path, secret)
    except OSError as error:
        raise ConfigError(f"kv_disk: cannot write {path}: {error.strerror}; choose a writable folder") from error
    return secret
