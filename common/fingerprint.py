"""What tells a model from another one with the same shapes, cheaply: routers and workers compare it."""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3

from tandem.common.checkpoint import INDEX_FILE, WEIGHTS_FILE, weight_map
from tandem.common.errors import ConfigError

SAMPLES = 64
"""Places in each file of weights. Training changes nearly every number, so any of them tells."""
SAMPLE_BYTES = 4096
SHOWN_DIGITS = 16


def fingerprint(folder: Path) -> bytes:
    """32 bytes of the tokenizer and of samples of the weights: at most 256 KiB of each file are read. Empty where the
    folder does not have all weights. Raises ConfigError where one cannot be read."""
    index = folder / INDEX_FILE
    names = sorted(weight_map(index)) if index.is_file() else [WEIGHTS_FILE]
    paths = [folder / name for name in names]
    if not all(path.is_file() for path in paths):
        return b""
    total = blake3()
    try:
        for path in paths:
            total.update(_sampled(path))
        tokenizer = folder / "tokenizer.json"
        if tokenizer.is_file():
            total.update(_sampled(tokenizer))
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return total.digest()


def shown(value: bytes) -> str:
    """Hexadecimal, as logs and errors have it and as a setting may give it."""
    return value.hex()[:SHOWN_DIGITS]


def _sampled(path: Path) -> bytes:
    """A digest of the file's size and of evenly spread pieces, its first and last among them."""
    size = path.stat().st_size
    total = blake3(size.to_bytes(8, "little"))
    last = max(0, size - SAMPLE_BYTES)
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(last * number // (SAMPLES - 1))
            total.update(file.read(SAMPLE_BYTES))
    return total.digest()
