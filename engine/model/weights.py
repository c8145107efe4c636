"""Weights of a model folder: safetensors only, one file or sharded, checked by name and shape before any is read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tandem.common.checkpoint import INDEX_FILE, WEIGHTS_FILE, weight_map
from tandem.common.errors import ConfigError

logger = logging.getLogger(__name__)

_TOLERATED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Buffers that old checkpoints carry and every implementation computes itself."""
_LFS_POINTER = b"version https://git-lfs"
_LISTED = 8
"""Names an error lists at most."""


class Checkpoint:
    """The tensors of a folder by name. A context manager: files are mapped while it is open."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError where there are no safetensors files or the index does not fit them."""
        self.folder = folder
        self.files = _weight_files(folder)
        self._stack = ExitStack()
        self._handles: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}

    def __enter__(self) -> Checkpoint:
        for path in self.files:
            try:
                handle = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                self._stack.close()
                problem = "a Git LFS pointer; run `git lfs pull` in the folder" if _is_lfs_pointer(path) else error
                raise ConfigError(f"{path}: not a usable safetensors file ({problem})") from error
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not a dict
                if name in self._handles:
                    self._stack.close()
                    raise ConfigError(f"{path}: {name} is in more than one file of {self.folder}")
                self._handles[name] = handle
                self._paths[name] = path
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles.clear()
        self._stack.close()

    def check(self, expected: Mapping[str, tuple[int, ...]], tolerated: Iterable[str] = ()) -> None:
        """Raises ConfigError unless the names are exactly `expected`, with these shapes. Names in `tolerated` may be
        there too."""
        present = set(self._handles)
        spare = set(tolerated)
        missing = sorted(set(expected) - present)
        unexpected = sorted(name for name in present - set(expected) - spare if not name.endswith(_TOLERATED_SUFFIXES))
        wrong = []
        for name in sorted(present & set(expected)):
            shape = tuple(self._handles[name].get_slice(name).get_shape())
            if shape != expected[name]:
                wrong.append(f"{name} is {list(shape)} instead of {list(expected[name])}")
        problems = [
            f"{title}: {_listed(names)}"
            for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
            if names
        ]
        if problems:
            raise ConfigError(f"{self.folder}: the weights do not fit config.json; " + "; ".join(problems))

    def read(self, name: str) -> Tensor:
        """A tensor that `check` has seen, in the dtype of the file."""
        tensor = self._handles[name].get_tensor(name)
        if not tensor.dtype.is_floating_point:
            raise ConfigError(f"{self.folder}: {name} holds {tensor.dtype}; only floating point weights are supported")
        return tensor  # type: ignore[no-any-return]

    def warn_of(self, names: Sequence[str], problem: str) -> None:
        """Says that these tensors, which are used all the same, hold what they should not."""
        if names:
            files = sorted({self._paths[name].name for name in names})
            logger.warning("%s: %s: %s hold %s", self.folder, _listed(files), _listed(list(names)), problem)

    def digest(self) -> bytes:
        """32 bytes that identify the content of the weight files, in the order of their names."""
        total = blake3()
        for path in self.files:
            total.update(blake3(max_threads=blake3.AUTO).update_mmap(path).digest())
        return total.digest()


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def _listed(names: list[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.is_file():
        return _indexed_files(folder, index)
    single = folder / WEIGHTS_FILE
    if single.is_file():
        return [single]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ConfigError(
            f"{folder}: has only pickled weights (.bin, .pt), which can run code when loaded and are not read; "
            "convert them to safetensors"
        )
    raise ConfigError(f"{folder}: has neither {WEIGHTS_FILE} nor {INDEX_FILE}")


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    names = sorted(weight_map(index))
    for name in names:
        if not (folder / name).is_file():
            raise ConfigError(f"{index}: weight_map: {name} is missing from the folder")
    return [folder / name for name in names]
