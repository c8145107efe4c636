"""Workers get a GPU each, or parts of one that fit into it together."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from tandem.common.errors import ConfigError
from tandem.runtime import devices
from tandem.runtime.devices import Seat, deal_out, free_on_gpus, may_use_gpu
from tandem.runtime.processes import processes_of
from tandem.runtime.settings import ServeConfig

GIB = 1 << 30


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_gpus_are_dealt_out_evenly_and_no_more_than_is_free_on_each(gpus: int, workers: int) -> None:
    free = [(70 + index) * GIB for index in range(gpus)]
    seats = deal_out(workers, free)
    assert len(seats) == workers
    counts = Counter(seat.device for seat in seats)
    assert len(counts) == min(workers, gpus)
    assert max(counts.values()) - min(counts.values()) <= 1
    for seat in seats:
        sharing, all_of_it = counts[seat.device], free[int(seat.device.removeprefix("cuda:"))]
        if sharing == 1:
            assert seat.gpu_memory_bytes is None
        else:
            assert seat.gpu_memory_bytes is not None
            assert all_of_it - sharing < sharing * seat.gpu_memory_bytes <= all_of_it


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_without_a_gpu_workers_are_left_to_themselves(workers: int) -> None:
    assert deal_out(workers, []) == [Seat("auto")] * workers
    assert deal_out(workers, [70 * GIB], device="cpu") == [Seat("cpu")] * workers


def test_what_settings_say_goes_before() -> None:
    free = [80 * GIB, 80 * GIB]
    assert deal_out(2, free, device="cuda:1") == [Seat("cuda:1", 40 * GIB)] * 2
    assert deal_out(2, free, device="cuda") == [Seat("cuda:0"), Seat("cuda:1")]
    assert deal_out(2, free[:1], gpu_memory_bytes=30 * GIB) == [Seat("cuda:0", 30 * GIB)] * 2
    assert deal_out(2, free[:1], kv_cache_bytes=30 * GIB) == [Seat("cuda:0")] * 2


@pytest.mark.parametrize(
    ("free", "settings", "said"),
    [
        ([], {"device": "cuda"}, "device cuda: there is no such GPU, no GPU is visible"),
        ([], {"device": "cuda:0"}, "no GPU is visible"),
        ([GIB], {"device": "cuda:1"}, "device cuda:1: there is no such GPU, cuda:0 alone is visible"),
        ([GIB] * 8, {"device": "cuda:8"}, "cuda:0 to cuda:7 are visible"),
        ([80 * GIB], {"gpu_memory_bytes": 41 * GIB}, "gpu_memory_bytes .* 2 workers on cuda:0 need 82 GiB, 80 GiB"),
        ([80 * GIB], {"kv_cache_bytes": 41 * GIB}, "kv_cache_bytes .*: 2 workers on cuda:0 need 82 GiB, 80 GiB"),
        ([80 * GIB, GIB], {"kv_cache_bytes": 2 * GIB}, "1 worker on cuda:1 need"),
    ],
)
def test_what_does_not_fit_is_named(free: list[int], settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        deal_out(2, free, **settings)  # type: ignore[arg-type]


def test_serve_puts_each_worker_where_it_was_dealt() -> None:
    config = ServeConfig(model="m", prefill=1, decode=2, kv_host_bytes=0)
    *workers, router = processes_of(config, Path("/run/t"), 81, [80 * GIB, 80 * GIB])
    assert [(worker.name, worker.settings["device"], worker.settings["gpu_memory_bytes"]) for worker in workers] == [
        ("prefill-0", "cuda:0", 40 * GIB),
        ("decode-0", "cuda:1", None),
        ("decode-1", "cuda:0", 40 * GIB),
    ]
    assert "device" not in router.settings


def test_nobody_looks_for_gpus_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "_DRIVER", tmp_path / "none")
    monkeypatch.setattr(devices.subprocess, "run", None)
    assert free_on_gpus("auto") == free_on_gpus("cpu") == []
    assert not may_use_gpu("auto")
    assert may_use_gpu("cuda:1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_another_process_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_DRIVER", Path("/"))
    assert free_on_gpus("auto") == []


def test_what_the_look_found_is_read_and_what_went_wrong_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (70 + gpu, 80))
    devices.look()
    assert capsys.readouterr().out == "[70, 71]\n"
    monkeypatch.setattr(devices.sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match=r"device cuda: the GPUs cannot be looked at \(status 1\)"):
        free_on_gpus("cuda")
