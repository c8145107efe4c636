"""Compiles the C sources of this room for the instructions that this process may use.

Which ones is torch's decision: what the processor has, unless `ATEN_CPU_CAPABILITY` allows less. Each source is
compiled once per machine, in seconds, by the C compiler that is there, and kept in the user's cache folder.

No product is fused with a sum unless the source says so: one C function gives the same bits wherever it is inlined.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from blake3 import blake3

from tandem.common.caretaker import RUN_FOLDER_VARIABLE
from tandem.common.scratch import PREFIX

logger = logging.getLogger(__name__)

_COMPILE_SECONDS = 120
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=off")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")


def instruction_flags() -> tuple[str, ...]:
    """Compiler flags for the instructions that this process may use; none: those that every processor of this kind
    has."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX2":
        return _AVX2
    if capability.startswith("AVX512"):
        return (*_AVX512, "-mavx512bf16") if torch.cpu._is_avx512_bf16_supported() else _AVX512
    return ()


@functools.cache
def compiled(source: Path, *macros: str) -> Path | None:
    """The shared library of `source`, with `macros` (NAME or NAME=VALUE) defined. None, with the reason in the log,
    where it cannot be made."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        logger.info("no C compiler (cc, gcc or clang) for %s: torch does the same work, more slowly", source.name)
        return None
    try:
        return _build(compiler, source, macros, _cache_folder())
    except subprocess.CalledProcessError as error:
        logger.warning("compiling %s failed, torch kernels are used instead: %s", source.name, error.stderr[-500:])
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("compiling %s failed, torch kernels are used instead: %s", source.name, error)
    return None


def _build(compiler: str, source: Path, macros: tuple[str, ...], folder: Path) -> Path:
    flags = (*_FLAGS, *instruction_flags(), *(f"-D{macro}" for macro in macros))
    parts = [source.read_bytes(), _version(compiler), *(flag.encode() for flag in flags)]
    digest = blake3(b"\0".join(parts)).hexdigest()[:32]
    path = folder / f"{source.stem}-{digest}.so"
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / path.name
            command = [compiler, *flags, str(source), "-o", str(built), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
            built.replace(path)
    return path


def _version(compiler: str) -> bytes:
    """What tells this compiler from one that replaces it."""
    path = os.path.realpath(compiler)
    return f"{path} {os.stat(path).st_size} {os.stat(path).st_mtime_ns}".encode()


def user_cache() -> Path:
    """The folder for what this machine need not make twice. It may be missing or not writable."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"


def _cache_folder() -> Path:
    folder = user_cache()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return _new_folder()
    return folder if os.access(folder, os.W_OK) else _new_folder()


def _new_folder() -> Path:
    """Goes with the supervisor's, where there is one; else it stays, as what was loaded from it does."""
    return Path(tempfile.mkdtemp(prefix=PREFIX, dir=os.environ.get(RUN_FOLDER_VARIABLE)))
