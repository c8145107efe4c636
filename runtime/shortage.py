"""Too little address space (`ulimit -v`) in one clear line: libraries say it in many ways, or abort the process."""

from __future__ import annotations

import errno
import resource

from tandem.common.errors import ConfigError

_LEAST_BYTES = {
    "router": 256 << 20,
    "kvstore": 384 << 20,
    "prefill": 1 << 30,
    "decode": 1 << 30,
}
"""Where the libraries alone take more than that and abort."""
_SIGNS = ("failed to map segment", "cannot allocate memory", "can't allocate memory", "can't start new thread")


def check_address_space(command: str) -> None:
    """Raises ConfigError where `tandem COMMAND` cannot work."""
    limit = _limit()
    if limit is not None and limit < _LEAST_BYTES.get(command, 0):
        raise _too_little(limit)


def is_shortage(error: BaseException) -> bool:
    """Whether `error`, or what it came from, tells of too little memory."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno == errno.ENOMEM):
            return True
        if isinstance(seen, ImportError | RuntimeError) and any(sign in str(seen).lower() for sign in _SIGNS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def explained(error: Exception) -> ConfigError | None:
    """The clear line for an error at the start; None where it has another reason."""
    limit = _limit()
    return _too_little(limit) if limit is not None and is_shortage(error) else None


def _limit() -> int | None:
    """None: there is none."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def _too_little(limit: int) -> ConfigError:
    return ConfigError(
        f"the address space of a process is limited to {limit >> 20} MiB, which is too little; raise it with "
        "`ulimit -v unlimited`"
    )
