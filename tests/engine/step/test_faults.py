"""A device that has failed ends the engine; one that has too little memory costs no request that fits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.engine.engine import Engine
from tandem.engine.request import FinishReason
from tandem.engine.step.faults import DeviceLost, device_faults, is_shortage
from tandem.worker.process import DEVICE_LOST_STATUS
from tests.engine.step.test_executor import Quiet, Scene
from tests.engine_harness import EngineUnderTest

CPU = torch.device("cpu")
FAULTS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
    torch.AcceleratorError("unspecified launch failure"),
]
SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", FAULTS, ids=str)
def test_what_a_broken_device_says_is_its_loss(error: Exception) -> None:
    with pytest.raises(DeviceLost), device_faults(CPU):
        raise error
    with pytest.raises(DeviceLost), device_faults(CPU):
        raise ValueError("a kernel could not be called") from error


@pytest.mark.parametrize("error", [*SHORTAGES, ValueError("CUDA error: told by no device"), KeyError(3)], ids=str)
def test_too_little_memory_and_mistakes_of_ours_are_not(error: Exception) -> None:
    assert is_shortage(error) == (error in SHORTAGES)
    with pytest.raises(type(error)) as raised, device_faults(CPU):
        raise error
    assert raised.value is error


def test_a_mistake_is_a_loss_where_the_device_does_not_answer_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(device: torch.device) -> None:
        raise RuntimeError("context is destroyed")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(DeviceLost), device_faults(torch.device("cuda:0")):
        raise KeyError(3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with pytest.raises(KeyError), device_faults(torch.device("cuda:0")):
        raise KeyError(3)


def test_a_step_without_memory_is_computed_in_parts_and_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(folder)
    forward = scene.loaded.decoder.forward

    def small(batch: Any, *arguments: Any) -> Any:
        if len(batch.token_ids) > 15:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(batch, *arguments)

    with scene.executor.thread():
        sequences = [scene.add("a" * length, length) for length in (5, 9, 14)]
        expected = {sequence: scene.alone(sequence) for sequence in sequences}
        monkeypatch.setattr(scene.loaded.decoder, "forward", small)
        result = scene.executor.execute(scene.plan(), Quiet())
    assert result is not None
    assert not result.failed
    assert {chosen.sequence: chosen.token for chosen in result.tokens} == expected
    assert scene.executor.shortages in (1, 2), "the whole, and at most one half"


@pytest.mark.parametrize("where", ["step", "admission"])
def test_an_engine_without_its_device_says_so_once_and_takes_nothing_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    lost: list[DeviceLost] = []

    def fault(*arguments: Any) -> Any:
        raise FAULTS[0]

    with EngineUnderTest(folder) as tested:
        engine: Engine = tested.engine
        monkeypatch.setattr(engine, "_on_device_lost", lost.append)
        tested.generate("before", [5, 6, 7], max_tokens=3)
        broken = engine.loaded.decoder if where == "step" else engine._executor._sampler  # type: ignore[attr-defined]
        monkeypatch.setattr(broken, "forward" if where == "step" else "admit", fault)
        last = tested.last(tested.submit("victim", [5, 6, 7], max_tokens=3))
        assert (last.finish_reason, last.error_code) == (FinishReason.ERROR, "unavailable")
        engine._thread.join(60)
        assert not engine._thread.is_alive()
        assert len(lost) == 1


def test_a_worker_without_its_device_ends_with_a_status_of_its_own() -> None:
    code = "from tandem.worker.process import end_without_device as end; end(RuntimeError('gone'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == DEVICE_LOST_STATUS
