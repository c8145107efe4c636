"""What a worker says of itself, for routers to judge how fast it is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tandem.engine.model.config import ModelConfig
from tandem.engine.model.model import num_parameters, weight_bytes
from tandem.proto import worker_pb2
from tandem.worker.process import _hardware_class
from tests.engine_harness import EngineUnderTest, tiny_llama, wait_for
from tests.models import FAMILIES, tiny_model
from tests.worker.test_worker_sessions import Worker


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_those_of_the_model(tmp_path: Path, family: str, tied: bool) -> None:
    folder = tiny_model(family, tmp_path / "model", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = sum(parameter.numel() for parameter in model.parameters())
    config = ModelConfig.from_folder(folder)
    assert num_parameters(config) == expected
    assert weight_bytes(config, torch.bfloat16, None) == 2 * expected
    quantised = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    assert weight_bytes(config, torch.float32, "int8") == 4 * expected - 3 * quantised


@pytest.mark.parametrize(
    ("name", "slug"),
    [("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"), ("Tesla V100-SXM2-16GB", "tesla-v100-sxm2-16gb")],
)
def test_the_hardware_class_is_a_slug_of_the_devices_name(
    name: str, slug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert _hardware_class(torch.device("cuda", 0)) == slug
    assert _hardware_class(torch.device("cpu")) == "cpu"


def test_the_load_of_decodes_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EngineUnderTest(tiny_llama(tmp_path / "llama")) as engine:
        engine.slow_down(monkeypatch)
        assert (engine.engine.status().decoding, engine.engine.status().running_tokens) == (0, 0)
        keys = [engine.submit(str(n), [5 + n] * 40, max_tokens=900) for n in range(2)]
        wait_for(lambda: engine.engine.status().decoding == 2)
        assert engine.engine.status().running_tokens >= 80
        for key in keys:
            engine.engine.cancel(key)
            engine.last(key)
        assert (engine.engine.status().decoding, engine.engine.status().running_tokens) == (0, 0)


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    worker = Worker()
    await worker.start(tmp_path)
    yield worker
    await worker.stop()


async def test_the_store_node_may_become_known_late(worker: Worker) -> None:
    node = ""
    worker.service._store_node = lambda: node
    assert (await worker.stub.GetInfo(worker_pb2.GetInfoRequest())).store_node == ""
    node = "kv-1"
    assert (await worker.stub.GetInfo(worker_pb2.GetInfoRequest())).store_node == "kv-1"
