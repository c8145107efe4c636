"""The deployment file: what runs (ModelService) and on what (GPUClass), in the form of the operator's custom resources.

One or more YAML documents. `tandem plan` and `tandem simulate` read it from a file, the operator from the cluster; the
rules that go beyond types are in `problems`, one list for all of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from tandem.common.errors import ConfigError
from tandem.common.yaml_file import YamlDocument, read_documents
from tandem.planner.objectives import Slo
from tandem.planner.pools import Limits, PoolBounds
from tandem.planner.queueing import Role

API_VERSION = "tandem.dev/v1alpha1"
MAX_POOLS = 8

Name = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9]([-a-z0-9.]{0,38}[a-z0-9])?\Z", description="a name of lower case letters, digits, - and ."
    ),
]
Duration = Annotated[
    str, Meta(pattern=r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+\Z", description="a time with its unit, such as 800ms or 1m30s")
]
Quantity = Annotated[
    str, Meta(pattern=r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?\Z", description="a number of bytes, such as 80Gi")
]
Count = Annotated[int, Meta(ge=0, le=100_000)]
Positive = Annotated[float, Meta(gt=0, le=1e12)]
NotNegative = Annotated[float, Meta(ge=0, le=1e12)]
Percentile = Annotated[float, Meta(ge=1, le=99.99)]

_PARTS = re.compile(r"([0-9.]+)(ms|s|m|h)")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_BYTES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BYTES |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


class _Fields(Struct, frozen=True, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """Fields are written in camelCase; one that there is not is refused."""


class Metadata(_Fields, frozen=True, kw_only=True):
    """The name of an object."""

    name: Name
    namespace: Name = "default"
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class Model(_Fields, frozen=True, kw_only=True):
    """What is served."""

    uri: Annotated[
        str, Meta(pattern=r"^(hf|pvc|s3|file)://.+", description="hf://, pvc://, s3:// or file:// and a place")
    ]
    served_name: str | UnsetType = UNSET
    """Name in requests; the last part of `uri` where not given."""


class Goals(_Fields, frozen=True, kw_only=True):
    """What `percentile` percent of the requests get."""

    ttft: Duration
    """Time to the first token."""
    tpot: Duration
    """Time for each token after it."""
    percentile: Percentile = 95.0


class Parallelism(_Fields, frozen=True, kw_only=True):
    """Devices of a replica."""

    tensor: Annotated[int, Meta(ge=1, le=64)] = 1

    @property
    def devices(self) -> int:
        return self.tensor


class Pool(_Fields, frozen=True, kw_only=True):
    """Replicas of one role."""

    name: Name
    role: Role
    gpu_classes: Annotated[list[Name], Meta(min_length=1, max_length=16)]
    """Classes that may be used; the planner chooses how many of each."""
    min_replicas: Count = 1
    max_replicas: Count = 16
    parallelism: Parallelism = Parallelism()
    capacity: Literal["OnDemand", "Spot", "Any"] = "OnDemand"


class Autoscaling(_Fields, frozen=True, kw_only=True):
    """How far and how quickly pools change."""

    mode: Literal["Auto", "Recommend", "Off"] = "Auto"
    interval: Duration = "15s"
    scale_down_window: Duration = "5m"
    metrics_stale_after: Duration = "60s"
    max_cost_per_hour: Positive | UnsetType = UNSET
    max_power_watts: Positive | UnsetType = UNSET


class ModelServiceSpec(_Fields, frozen=True, kw_only=True):
    """A model that is served within its goals."""

    model: Model
    slo: Goals
    pools: Annotated[list[Pool], Meta(min_length=1, max_length=MAX_POOLS)]
    autoscaling: Autoscaling = Autoscaling()


class ModelService(_Fields, frozen=True, kw_only=True):
    """Custom resource; short name `ms`."""

    api_version: Literal["tandem.dev/v1alpha1"]
    kind: Literal["ModelService"]
    metadata: Metadata
    spec: ModelServiceSpec


class Interconnect(_Fields, frozen=True, kw_only=True):
    """GB/s to devices of the same machine and to other machines."""

    intra_node: Positive = 32.0
    network: Positive = 12.5


class Power(_Fields, frozen=True, kw_only=True):
    """Watts of one device."""

    idle: NotNegative = 0.0
    max: NotNegative = 0.0


class Cost(_Fields, frozen=True, kw_only=True):
    """Price of one device for an hour, in any currency."""

    on_demand: NotNegative
    spot: NotNegative | UnsetType = UNSET


class GPUClassSpec(_Fields, frozen=True, kw_only=True):
    """Devices that are alike."""

    resource_name: str = "nvidia.com/gpu"
    node_selector: dict[str, str] = {}
    memory: Quantity | UnsetType = UNSET
    """What is not given is that of the built-in class of this name."""
    memory_bandwidth: Positive | UnsetType = UNSET
    """GB/s."""
    tflops: Positive | UnsetType = UNSET
    """Dense, in half precision."""
    interconnect: Interconnect | UnsetType = UNSET
    power: Power | UnsetType = UNSET
    cost_per_hour: Cost
    inventory: Count | UnsetType = UNSET
    """Devices to plan with, on demand; the operator counts those of the cluster."""
    spot_inventory: Count = 0


class GPUClass(_Fields, frozen=True, kw_only=True):
    """Custom resource without a namespace; short name `gpuc`."""

    api_version: Literal["tandem.dev/v1alpha1"]
    kind: Literal["GPUClass"]
    metadata: Metadata
    spec: GPUClassSpec


@dataclass(frozen=True, slots=True)
class Deployment:
    """One model service and the classes that it may run on."""

    service: ModelService
    classes: Mapping[str, GPUClass]

    @property
    def slo(self) -> Slo:
        goals = self.service.spec.slo
        return Slo(seconds(goals.ttft), seconds(goals.tpot), goals.percentile)

    @property
    def bounds(self) -> dict[str, PoolBounds]:
        """Replicas by pool."""
        return {pool.name: PoolBounds(pool.min_replicas, pool.max_replicas) for pool in self.service.spec.pools}

    @property
    def limits(self) -> Limits:
        """Devices, cost and power in all."""
        inventory: dict[tuple[str, bool], int] = {}
        for name, gpu_class in self.classes.items():
            on_demand = gpu_class.spec.inventory
            inventory[name, False] = _UNBOUNDED if on_demand is UNSET else on_demand
            inventory[name, True] = gpu_class.spec.spot_inventory
        autoscaling = self.service.spec.autoscaling
        return Limits(inventory, _or_infinite(autoscaling.max_cost_per_hour), _or_infinite(autoscaling.max_power_watts))


_UNBOUNDED = 10_000


def read_deployment(path: Path) -> Deployment:
    """Reads a file with one ModelService and the GPUClasses that it names.

    Raises:
        ConfigError: names file, line, field and remedy.
    """
    services: list[tuple[YamlDocument, ModelService]] = []
    classes: dict[str, GPUClass] = {}
    for document in read_documents(path, "deployment"):
        kind = document.value_of("kind")
        if kind == "ModelService":
            services.append((document, document.read(ModelService)))
        elif kind == "GPUClass":
            gpu_class = document.read(GPUClass)
            if gpu_class.metadata.name in classes:
                raise document.error("metadata.name", f"GPUClass {gpu_class.metadata.name} is there twice")
            classes[gpu_class.metadata.name] = gpu_class
        else:
            raise document.error("kind", f"must be ModelService or GPUClass, not {kind!r}")
    if len(services) != 1:
        raise ConfigError(f"deployment {path}: must have one ModelService, not {len(services)}")
    document, service = services[0]
    for place, problem in problems(service.spec, classes):
        raise document.error(f"spec.{place}", problem)
    return Deployment(service, classes)


def problems(spec: ModelServiceSpec, classes: Mapping[str, GPUClass] | None = None) -> Iterator[tuple[str, str]]:
    """What is wrong with a service whose fields have the right types: (place, problem with its remedy)."""
    roles = {pool.role for pool in spec.pools}
    if (Role.PREFILL in roles) != (Role.DECODE in roles):
        missing = Role.DECODE if Role.PREFILL in roles else Role.PREFILL
        yield "pools", f"need a {missing} pool beside the {'Prefill' if missing is Role.DECODE else 'Decode'} pool"
    for index, pool in enumerate(spec.pools):
        here = f"pools[{index}]"
        if pool.min_replicas > pool.max_replicas:
            yield f"{here}.minReplicas", f"{pool.min_replicas} must not be more than maxReplicas {pool.max_replicas}"
        if pool.name in {other.name for other in spec.pools[:index]}:
            yield f"{here}.name", f"{pool.name} is the name of another pool"
        if twice := _twice(pool.gpu_classes):
            yield f"{here}.gpuClasses", f"names {twice} twice"
        for place, name in enumerate(pool.gpu_classes):
            if classes is not None and name not in classes:
                known = ", ".join(sorted(classes)) or "none"
                yield f"{here}.gpuClasses[{place}]", f"{name} is no GPUClass of this file; there is {known}"
    for name in ("ttft", "tpot"):
        if seconds(getattr(spec.slo, name)) <= 0:
            yield f"slo.{name}", "must be more than 0"


def seconds(duration: str) -> float:
    """A duration such as `1m30s`."""
    return sum(float(number) * _SECONDS[unit] for number, unit in _PARTS.findall(duration))


def size(quantity: str) -> int:
    """Bytes of a quantity such as `80Gi`."""
    number = quantity.rstrip("KMGTik")
    return int(float(number) * _BYTES[quantity[len(number) :]])


def written(documents: Sequence[ModelService | GPUClass]) -> str:
    """YAML that `read_deployment` reads."""
    return "---\n".join(msgspec.yaml.encode(document).decode() for document in documents)


def _twice(names: Sequence[str]) -> str | None:
    return next((name for index, name in enumerate(names) if name in names[:index]), None)


def _or_infinite(value: float | UnsetType) -> float:
    return math.inf if value is UNSET else value
