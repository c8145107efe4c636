"""Models and running platforms that the end-to-end tests share."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from tests.e2e.serving import Serve
from tests.models import VOCAB_SIZE, tiny_model
from tests.router.tool_models import write_tool_model

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
def tool_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tool_model(form): a random model with a chat template that writes calls in `form`; one folder per form."""

    @cache
    def make(form: str) -> Path:
        folder = tmp_path_factory.mktemp("e2e-tools")
        model = tiny_model("llama", folder / "tiny")
        spoken = write_tool_model(folder / "spoken", form)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(spoken / name, model / name)
        (model / "chat_template.jinja").unlink(missing_ok=True)
        return model

    return make


@pytest.fixture(scope="module")
def serves() -> Iterator[ServeFactory]:
    """serves(model, *flags): a running platform, started at first use and shared by the file's tests with the same
    flags."""
    running: dict[tuple[object, ...], Serve] = {}
    with ExitStack() as stack:

        def serve(model: Path, *arguments: object, api_key: str = "") -> Serve:
            key = (model, *arguments)
            if key not in running:
                running[key] = stack.enter_context(Serve(model, *arguments, api_key=api_key))
            return running[key]

        yield serve


@pytest.fixture
def prompt() -> Callable[[int], list[int]]:
    """prompt(n): n random tokens; different ones at every call, so that no prefix cache helps."""
    generator = random.Random()

    def make(length: int) -> list[int]:
        return [generator.randrange(3, VOCAB_SIZE) for _ in range(length)]

    return make
