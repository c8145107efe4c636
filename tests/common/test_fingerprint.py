"""A model is told from another one with the same shapes without reading all of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tandem.common.errors import ConfigError
from tandem.common.fingerprint import SAMPLE_BYTES, SAMPLES, fingerprint, shown


def model(folder: Path, weights: bytes, tokenizer: str = "{}") -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").write_text(tokenizer)
    return folder


def test_it_is_the_same_wherever_the_folder_lies_and_another_for_other_contents(tmp_path: Path) -> None:
    weights = bytes(range(256)) * 4096
    first = fingerprint(model(tmp_path / "a", weights))
    assert len(first) == 32
    assert first.hex().startswith(shown(first))
    assert fingerprint(model(tmp_path / "b", weights)) == first
    others = [
        fingerprint(model(tmp_path / "c", weights, '{"a": 1}')),
        fingerprint(model(tmp_path / "d", weights + b"x")),
        fingerprint(model(tmp_path / "e", weights[:-1] + b"x")),
        fingerprint(model(tmp_path / "f", b"x" + weights[1:])),
        fingerprint(model(tmp_path / "g", bytes(255 - byte for byte in weights))),
    ]
    assert len({first, *others}) == 6


@pytest.mark.parametrize("size", [0, 1, SAMPLE_BYTES, SAMPLE_BYTES + 1])
def test_a_small_file_is_read_as_a_whole(size: int, tmp_path: Path) -> None:
    assert fingerprint(model(tmp_path / "a", b"x" * size)) != fingerprint(model(tmp_path / "b", b"y" * size + b"z"))


def test_of_a_large_file_little_is_read(tmp_path: Path) -> None:
    folder = model(tmp_path / "a", b"")
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(1 << 40)  # a hole: reading a terabyte would take minutes
    first = fingerprint(folder)
    with weights.open("r+b") as file:
        file.seek(((1 << 40) - SAMPLE_BYTES) // (SAMPLES - 1))
        file.write(b"x")
    assert fingerprint(folder) != first


def test_a_folder_without_all_weights_has_none(tmp_path: Path) -> None:
    folder = model(tmp_path / "a", b"x")
    names = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(names))
    shutil.copy(folder / "model.safetensors", folder / "model-1.safetensors")
    assert fingerprint(folder) == b""
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")
    assert fingerprint(folder) != b""
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ConfigError, match="weight_map"):
        fingerprint(folder)
