"""How C sources become libraries: for which instructions, and when again."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tandem.engine.model import native_build
from tandem.engine.model.native_build import compiled, instruction_flags

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.cache_clear()
    yield tmp_path / "tandem"
    compiled.cache_clear()


@pytest.mark.parametrize(
    ("capability", "bfloat16", "used", "unused"),
    [
        ("AVX512", True, "-mavx512bf16", "-mamx-bf16"),
        ("AVX512", False, "-mavx512f", "-mavx512bf16"),
        ("AVX2", True, "-mavx2", "-mavx512f"),
    ],
)
def test_instructions_are_those_that_torch_may_use(
    monkeypatch: pytest.MonkeyPatch, capability: str, bfloat16: bool, used: str, unused: str
) -> None:
    monkeypatch.setattr(native_build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16)
    assert used in instruction_flags()
    assert unused not in instruction_flags()


@pytest.mark.parametrize(("machine", "capability"), [("x86_64", "DEFAULT"), ("aarch64", "SVE256")])
def test_others_get_what_every_processor_has(monkeypatch: pytest.MonkeyPatch, machine: str, capability: str) -> None:
    monkeypatch.setattr(native_build.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert instruction_flags() == ()


@needs_compiler
def test_a_source_is_compiled_once_for_each_set_of_macros(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "answer.c"
    source.write_text("int answer(void) { return VALUE; }")
    for value in (1, 2, 2):
        compiled.cache_clear()
        path = compiled(source, f"VALUE={value}")
        assert path is not None
        assert ctypes.CDLL(str(path)).answer() == value
    assert len(list(cache.iterdir())) == 2


@needs_compiler
def test_a_change_of_the_source_or_the_instructions_compiles_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "answer.c"
    source.write_text("int answer(void) { return 1; }")
    compiled(source)
    source.write_text("int answer(void) { return 2; }")
    compiled.cache_clear()
    path = compiled(source)
    assert path is not None
    assert ctypes.CDLL(str(path)).answer() == 2
    monkeypatch.setattr(native_build, "instruction_flags", lambda: ("-DOTHER",))
    compiled.cache_clear()
    assert compiled(source) != path
    assert len(list(cache.iterdir())) == 3


@needs_compiler
@pytest.mark.usefixtures("cache")
def test_a_product_is_not_fused_with_a_sum(tmp_path: Path) -> None:
    source = tmp_path / "product.c"
    source.write_text("float product(float a, float b, float c) { return a * b + c; }")
    path = compiled(source)
    assert path is not None
    product = ctypes.CDLL(str(path)).product
    product.argtypes, product.restype = [ctypes.c_float] * 3, ctypes.c_float
    assert product(1 + 2**-12, 1 + 2**-12, -(1 + 2**-11)) == 0.0  # fused: 2**-24
