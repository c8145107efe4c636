"""Models and running platforms that the end-to-end tests share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.serving import Serve
from tests.models import VOCAB_SIZE, tiny_model

ServeFactory = Callable[..., Serve]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("e2e") / "tiny")


@pytest.fixture(scope="session")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes seconds for a long prompt: time enough to kill a worker."""
    return tiny_model(
        "llama",
        tmp_path_factory.mktemp("e2e") / "slow",
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        max_position_embeddings=4096,
        initializer_range=0.05,
    )


@pytest.fixture(scope="session")
def serves() -> Iterator[ServeFactory]:
    """serves(model, *flags): a running platform, started at first use and shared by all tests with the same flags."""
    running: dict[tuple[object, ...], Serve] = {}
    with ExitStack() as stack:

        def serve(model: Path, *arguments: object) -> Serve:
            key = (model, *arguments)
            if key not in running:
                running[key] = stack.enter_context(Serve(model, *arguments))
            return running[key]

        yield serve


@pytest.fixture
def prompt() -> Callable[[int], list[int]]:
    """prompt(n): n random tokens; different ones at every call, so that no prefix cache helps."""
    generator = random.Random()

    def make(length: int) -> list[int]:
        return [generator.randrange(3, VOCAB_SIZE) for _ in range(length)]

    return make
