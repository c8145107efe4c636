"""A small model and an engine with it, which most tests of the engine need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine_harness import EngineUnderTest, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def engine(folder: Path) -> Iterator[EngineUnderTest]:
    with EngineUnderTest(folder) as running:
        yield running
