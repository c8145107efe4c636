"""Which GPU each worker of `tandem serve` computes on, and how much of its memory it may take.

Workers start at the same moment, so that none can see what the others will take: it is dealt out before.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.common.errors import ConfigError
from tandem.common.memory import readable_size

_DRIVER = Path("/dev/nvidiactl")
_LOOK_S = 120.0
"""Loading torch from a cold disk, and a context on each of eight GPUs."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Where one worker computes, as settings of its engine."""

    device: str
    gpu_memory_bytes: int | None = None


def deal_out(
    workers: int,
    free: Sequence[int],
    *,
    device: str = "auto",
    gpu_memory_bytes: int | None = None,
    kv_cache_bytes: int | None = None,
) -> list[Seat]:
    """A seat for each of `workers`, in their order; the other settings are those of `tandem serve`.

    `free` are the bytes that are free on each visible GPU. Each worker has a GPU to itself where there are enough;
    otherwise their numbers on a GPU differ by one at most, and those on one GPU get equal parts of what is free, unless
    settings say how much it shall be. `device` cuda:N puts all of them there. Raises ConfigError where a GPU is not
    there, or cannot hold what settings ask for.
    """
    if not _names_gpus(device) or (device == "auto" and not free):
        return [Seat(device, gpu_memory_bytes)] * workers
    gpus = _gpus(device, len(free))
    taken_by = [gpus[index % len(gpus)] for index in range(workers)]
    seats: list[Seat] = []
    for gpu in taken_by:
        sharing = taken_by.count(gpu)
        for name, each in (("gpu_memory_bytes", gpu_memory_bytes), ("kv_cache_bytes", kv_cache_bytes)):
            if each is not None and sharing * each > free[gpu]:
                raise ConfigError(
                    f"{name} {each}: {sharing} worker{'s' if sharing > 1 else ''} on cuda:{gpu} need "
                    f"{readable_size(sharing * each)}, {readable_size(free[gpu])} are free; give less, or start fewer "
                    "workers"
                )
        reserved = gpu_memory_bytes
        if reserved is None and kv_cache_bytes is None and sharing > 1:
            reserved = free[gpu] // sharing
        seats.append(Seat(f"cuda:{gpu}", reserved))
    return seats


def may_use_gpu(device: str) -> bool:
    """Whether workers with this setting may compute on a GPU of this machine."""
    return _names_gpus(device) and (device != "auto" or _DRIVER.exists())


def free_on_gpus(device: str) -> list[int]:
    """Bytes that are free on each GPU that this process may see; none where `device` does not want any.

    Another process looks: torch and a context on each GPU would stay in this one. Raises ConfigError if it fails.
    """
    if not may_use_gpu(device):
        return []
    look = [sys.executable, "-c", f"from {__name__} import look; look()"]
    try:
        done = subprocess.run(look, capture_output=True, text=True, timeout=_LOOK_S, check=True)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"device {device}: the GPUs do not answer within {_LOOK_S:g} s; use cpu") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"status {error.returncode}"])[-1]
        raise ConfigError(f"device {device}: the GPUs cannot be looked at ({last}); use cpu") from error
    return [int(each) for each in json.loads(done.stdout.splitlines()[-1])]


def look() -> None:
    """Prints what `free_on_gpus` returns."""
    import torch

    print(json.dumps([torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count())]))


def _names_gpus(device: str) -> bool:
    return device in ("auto", "cuda") or re.fullmatch(r"cuda:\d+", device) is not None


def _gpus(device: str, count: int) -> list[int]:
    """Those that `device` names, of `count`. Raises ConfigError."""
    number = device.partition(":")[2]
    if count <= int(number or 0):
        visible = f"cuda:0 to cuda:{count - 1} are" if count > 1 else "cuda:0 alone is" if count else "no GPU is"
        raise ConfigError(f"device {device}: there is no such GPU, {visible} visible; use auto, cpu or one that is")
    return [int(number)] if number else list(range(count))
