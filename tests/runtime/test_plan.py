"""`tandem plan`: what it prints, writes, and says of mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem.common.errors import ConfigError
from tandem.planner.deployment import read_deployment
from tandem.planner.queueing import Role
from tandem.runtime.plan import main

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
DEPLOYMENT = """\
apiVersion: tandem.dev/v1alpha1
kind: ModelService
metadata: {name: chat}
spec:
  model: {uri: "file://FOLDER"}
  slo: {ttft: 800ms, tpot: 40ms}
  pools:
    - {name: prefill, role: Prefill, gpuClasses: [h100], maxReplicas: 8}
    - {name: decode, role: Decode, gpuClasses: [h100, a100], capacity: Any}
---
apiVersion: tandem.dev/v1alpha1
kind: GPUClass
metadata: {name: h100}
spec: {costPerHour: {onDemand: 4.76}, inventory: 16}
---
apiVersion: tandem.dev/v1alpha1
kind: GPUClass
metadata: {name: a100}
spec: {costPerHour: {onDemand: 2.21, spot: 0.9}, inventory: 16, spotInventory: 4}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    path = tmp_path / "deployment.yaml"
    path.write_text(DEPLOYMENT.replace("FOLDER", str(tmp_path)))
    return path


def reported(
    file: Path, capsys: pytest.CaptureFixture[str], *flags: str
) -> tuple[int, dict[str, list[dict[str, object]]]]:
    status = main([str(file), "--json", *flags])
    report: dict[str, list[dict[str, object]]] = json.loads(capsys.readouterr().out)
    return status, report


def test_the_cheapest_way_comes_first_and_what_cannot_serve_comes_last(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = reported(file, capsys, "--requests-per-s", "60", "--prompt-tokens", "200,4000")
    assert status == 0
    able = [way for way in report["ways"] if way["feasible"]]
    assert able == report["ways"][: len(able)]
    costs = [float(str(way["cost_per_hour"])) for way in able]
    assert costs == sorted(costs)
    assert len(report["ways"]) == 7, "two classes alone, four pairs, and any mix"
    mix = next(way for way in report["ways"] if way["name"] == "any mix")
    assert float(str(mix["cost_per_hour"])) == pytest.approx(costs[0]), "nothing is cheaper than the best mix"
    unable = report["ways"][len(able) :]
    assert unable
    assert all(way["limited_by"] for way in unable)


def test_the_written_file_deploys_the_winner(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "winner.yaml"
    _, report = reported(file, capsys, "--requests-per-s", "10", "--out", str(out))
    winner = read_deployment(out)
    planned = {pool.role: pool.min_replicas for pool in winner.service.spec.pools}
    replicas = report["ways"][0]["replicas"]
    assert isinstance(replicas, dict)
    assert sum(planned.values()) == sum(replicas.values())
    assert set(planned) in ({Role.UNIFIED}, {Role.PREFILL, Role.DECODE}, set(Role))
    again, report = reported(out, capsys, "--requests-per-s", "10")
    assert again == 0
    assert report["file"]["feasible"]  # type: ignore[call-overload]


def test_more_than_there_is_says_what_is_missing(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file), "--requests-per-s", "100000"]) == 1
    printed = capsys.readouterr().out
    assert "all 16 devices of h100 are in use" in printed
    assert "served/s" in printed


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--requests-per-s", "nan"], "--requests-per-s"),
        (["--requests-per-s", "-1"], "--requests-per-s"),
        (["--prompt-tokens", "many"], "--prompt-tokens 'many'"),
        (["--prompt-tokens", "0"], "--prompt-tokens '0'"),
        (["--output-tokens", "inf"], "--output-tokens 'inf'"),
        (["--cached-share", "1.5"], "--cached-share"),
        (["--model-config", "/nowhere/config.json"], "--model-config /nowhere/config.json: cannot be read"),
    ],
)
def test_a_mistake_names_the_setting(file: Path, flags: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        main([str(file), *flags])


def test_a_model_elsewhere_needs_its_config(file: Path, tmp_path: Path) -> None:
    file.write_text(file.read_text().replace(f"file://{tmp_path}", "hf://meta-llama/Llama-3.1-8B"))
    with pytest.raises(ConfigError, match="--model-config"):
        main([str(file)])
    assert main([str(file), "--model-config", str(tmp_path / "config.json")]) == 0


def test_a_class_that_nobody_knows_must_be_described(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(file.read_text().replace("a100", "mystery"))
    with pytest.raises(ConfigError, match=r"GPUClass mystery: .*memory, memoryBandwidth, tflops"):
        main([str(file)])
    described = "inventory: 16, memory: 80Gi, memoryBandwidth: 2000, tflops: 300, power: {max: 400}, spotInventory"
    file.write_text(file.read_text().replace("inventory: 16, spotInventory", described))
    assert main([str(file)]) == 0
