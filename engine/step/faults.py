"""What went wrong with a device: too little memory, which costs a request, or a fault, which costs the process.

After a fault (an illegal access, a lost device) a CUDA context is dead: whatever the process calls fails from then on,
while it still takes requests, and to a router it looks idle. Only a new process has a new context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SHORTAGE = ("out of memory", "_alloc_failed")
_FAULT = ("cuda error", "cublas_status", "cudnn_status", "triton error")


class DeviceLost(BaseException):
    """Nothing can be computed in this process any more. No `Exception`: what holds one request's failure apart from
    another's must let it pass."""


def is_shortage(error: BaseException) -> bool:
    """Whether `error` says that the device has too little memory; it can still compute."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SHORTAGE)
    )


@contextmanager
def device_faults(device: torch.device) -> Iterator[None]:
    """Raises DeviceLost in place of an error that the device has made, other than too little memory."""
    try:
        yield
    except Exception as error:
        if not is_shortage(error) and (_names_a_fault(error) or not _responds(device)):
            raise DeviceLost(f"{device}: {error}") from error
        raise


def _names_a_fault(error: BaseException | None) -> bool:
    while error is not None:
        named = isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _FAULT)
        if named or isinstance(error, torch.AcceleratorError):
            return True
        error = error.__cause__
    return False


def _responds(device: torch.device) -> bool:
    """Whether `device` still computes; a fault is often noticed by a call that has nothing to do with it."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        return is_shortage(error)
    return True


def free_cached(device: torch.device) -> None:
    """Gives back memory that the allocator keeps for later, before a step that found too little is computed again."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
