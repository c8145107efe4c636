"""The deployment file: what it means, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.common.errors import ConfigError
from tandem.planner.deployment import read_deployment, seconds, size, written
from tandem.planner.objectives import Slo
from tandem.planner.pools import PoolBounds

TEXT = """\
apiVersion: tandem.dev/v1alpha1
kind: ModelService
metadata: {name: chat}
spec:
  model: {uri: "hf://meta-llama/Llama-3.1-8B"}
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
spec: {costPerHour: {onDemand: 2.21, spot: 0.9}, inventory: 12, spotInventory: 4}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "deployment.yaml"
    path.write_text(TEXT)
    return path


def test_goals_bounds_and_limits_are_what_the_file_says(file: Path) -> None:
    deployment = read_deployment(file)
    assert deployment.slo == Slo(0.8, 0.04, 95.0)
    assert deployment.bounds == {"prefill": PoolBounds(1, 8), "decode": PoolBounds(1, 16)}
    assert deployment.limits.inventory == {
        ("h100", False): 16,
        ("h100", True): 0,
        ("a100", False): 12,
        ("a100", True): 4,
    }


def test_the_file_of_the_docs_is_read(file: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "pool-plan.md"
    file.write_text(page.read_text().split("```yaml\n")[1].split("```")[0])
    assert set(read_deployment(file).classes) == {"h100", "a100"}


def test_what_is_written_reads_back_the_same(file: Path) -> None:
    deployment = read_deployment(file)
    file.write_text(written([deployment.service, *deployment.classes.values()]))
    assert read_deployment(file) == deployment


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("800ms", "800", 6, "spec.slo.ttft must be text, got a whole number; put it in quotes"),
        ("800ms", "fast", 6, "spec.slo.ttft must be a time with its unit, such as 800ms"),
        ("tpot: 40ms", "tpot: 0ms", 6, "spec.slo.tpot must be more than 0"),
        ("ttft", "tttft", 6, "spec.slo.tttft is not a field; did you mean ttft?"),
        ("role: Decode", "role: decode", 9, "spec.pools[1].role must be one of Prefill, Decode, Unified"),
        (
            "h100, a100",
            "h100, h200",
            9,
            "spec.pools[1].gpuClasses[1] h200 is no GPUClass of this file; there is a100, h100",
        ),
        ("h100, a100", "h100, h100", 9, "spec.pools[1].gpuClasses names h100 twice"),
        ("maxReplicas: 8", "maxReplicas: 0", 8, "spec.pools[0].minReplicas 1 must not be more than maxReplicas 0"),
        ("name: decode", "name: prefill", 9, "spec.pools[1].name prefill is the name of another pool"),
        ("role: Prefill", "role: Decode", 8, "spec.pools need a Prefill pool beside the Decode pool"),
        ("kind: GPUClass", "kind: GpuClass", 12, "kind must be ModelService or GPUClass, not 'GpuClass'"),
        ("/v1alpha1\nkind: Model", "/v1\nkind: Model", 1, "apiVersion must be one of tandem.dev/v1alpha1"),
        ("onDemand: 2.21", "onDemand: .nan", 19, "spec.costPerHour.onDemand must be"),
        ("onDemand: 2.21", "onDemand: .inf", 19, "spec.costPerHour.onDemand must be"),
        ("inventory: 16", "inventory: -1", 14, "spec.inventory must be"),
        ("name: a100", "name: h100", 18, "metadata.name GPUClass h100 is there twice"),
        ("name: chat", "name: Chat_1", 3, "metadata.name must be a name of lower case letters"),
        ("capacity: Any", "capacity: Free", 9, "spec.pools[1].capacity must be one of Any, OnDemand, Spot"),
    ],
)
def test_a_mistake_names_line_field_and_remedy(file: Path, old: str, new: str, line: int, says: str) -> None:
    assert old in TEXT
    file.write_text(TEXT.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        read_deployment(file)
    assert f"line {line}: {says}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("---\n---\n", "is empty"),
        ("- 1\n", "must be a mapping"),
        (TEXT.split("---")[1], "must have one ModelService, not 0"),
        (TEXT.split("---")[0] * 1 + "---\n" + TEXT, "must have one ModelService, not 2"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_files_that_are_no_deployment_are_refused(file: Path, text: str, says: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_deployment(file)


def test_units_are_understood() -> None:
    assert seconds("1m30s") == 90.0
    assert seconds("1.5h") == 5400.0
    assert seconds("800ms") == pytest.approx(0.8)
    assert size("80Gi") == 80 << 30
    assert size("1.5k") == 1500
    assert size("7") == 7
