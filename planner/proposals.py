"""What could be deployed for a demand: each way of using the classes of a deployment file, ranked.

Ways are: every class by itself as unified replicas; every pair of classes as prefill and decode pools; and the cheapest
mix of everything. All of them with what they cost, predict, and are limited by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
from msgspec import UNSET

from tandem.common.errors import ConfigError
from tandem.planner.deployment import Deployment, GPUClass, ModelService, Pool, size
from tandem.planner.hardware import CLASSES, UNKNOWN, Hardware, hardware
from tandem.planner.model_spec import ModelSpec
from tandem.planner.objectives import Demand
from tandem.planner.pool_plan import Planner, Problem
from tandem.planner.pools import Option, OptionKey, PoolBounds, PoolPlan
from tandem.planner.queueing import Role
from tandem.planner.roofline import Roofline

MOST_REPLICAS = 10_000


@dataclass(frozen=True, slots=True)
class Proposal:
    """One way, and the cheapest plan of that kind."""

    name: str
    plan: PoolPlan
    pools: tuple[Pool, ...]
    """What the plan asks for, as pools of a ModelService."""


def proposals(deployment: Deployment, model: ModelSpec, demand: Demand) -> list[Proposal]:
    """All ways, those that serve the whole demand first, then by cost; the others by what they serve.

    Raises:
        ConfigError: a class that is neither known nor described, or a model that cannot be split as a pool says.
    """
    everything = _options(deployment, model)
    made = [_proposal(name, deployment, options, demand) for name, options in _ways(everything)]
    return sorted(
        made, key=lambda p: (not p.plan.feasible, -p.plan.served * (not p.plan.feasible), p.plan.cost_per_hour)
    )


def planned(deployment: Deployment, model: ModelSpec, demand: Demand) -> PoolPlan:
    """The cheapest replicas for the pools of the file, within their bounds."""
    options = [
        option
        for pool in deployment.service.spec.pools
        for name in pool.gpu_classes
        for option in _bought(deployment, model, pool.name, pool.role, name, pool.parallelism.tensor, pool.capacity)
    ]
    return Planner(Problem(options, demand, deployment.slo, deployment.limits, deployment.bounds)).cheapest()


def with_pools(service: ModelService, pools: Sequence[Pool]) -> ModelService:
    """The service with other pools."""
    return msgspec.structs.replace(service, spec=msgspec.structs.replace(service.spec, pools=list(pools)))


def hardware_of(gpu_class: GPUClass) -> Hardware:
    """The built-in class of that name, with what the file says of it.

    Raises:
        ConfigError: there is no such class, and the file does not say enough of it.
    """
    name, spec = gpu_class.metadata.name, gpu_class.spec
    known = next(
        (found for n in (name, f"nvidia-{name}", f"amd-{name}") if (found := hardware(n)) is not UNKNOWN), None
    )
    missing = [field for field in ("memory", "memory_bandwidth", "tflops") if getattr(spec, field) is UNSET]
    if known is None and missing:
        encoded = {field.name: field.encode_name for field in msgspec.structs.fields(type(spec))}
        fields = ", ".join(encoded[field] for field in missing)
        raise ConfigError(
            f"GPUClass {name}: is not one of the built-in classes ({', '.join(CLASSES)}); give its {fields} under spec"
        )
    found = known or UNKNOWN
    if spec.tflops is not UNSET:
        found = replace(found, flops=spec.tflops * 1e12)
    if spec.memory_bandwidth is not UNSET:
        found = replace(found, bytes_per_s=spec.memory_bandwidth * 1e9)
    if spec.memory is not UNSET:
        found = replace(found, memory_bytes=float(size(spec.memory)))
    if spec.interconnect is not UNSET:
        near, far = spec.interconnect.intra_node * 1e9, spec.interconnect.network * 1e9
        found = replace(found, node_bytes_per_s=near, network_bytes_per_s=far)
    return found if spec.power is UNSET else replace(found, watts=spec.power.max)


def _options(deployment: Deployment, model: ModelSpec) -> list[Option]:
    """Every class in every role, as many devices to a replica as the pools that name it say."""
    options: list[Option] = []
    for name in deployment.classes:
        pools = [pool for pool in deployment.service.spec.pools if name in pool.gpu_classes]
        tensor = max((pool.parallelism.tensor for pool in pools), default=1)
        capacity = "Any" if any(pool.capacity != "OnDemand" for pool in pools) else "OnDemand"
        for role in Role:
            options += _bought(deployment, model, role.lower(), role, name, tensor, capacity)
    return options


def _bought(
    deployment: Deployment, model: ModelSpec, pool: str, role: Role, name: str, tensor: int, capacity: str
) -> Iterator[Option]:
    """A replica on a class, on demand or spot as `capacity` allows."""
    gpu_class = deployment.classes[name]
    hardware = hardware_of(gpu_class)
    cost = gpu_class.spec.cost_per_hour
    replica = Roofline(model, hardware, tensor)
    for spot in (False, True):
        price = cost.spot if spot else cost.on_demand
        if capacity not in ("Any", "Spot" if spot else "OnDemand") or price is UNSET:
            continue
        key = OptionKey(pool, name, spot)
        yield Option(key, role, replica, price * tensor, hardware.watts * tensor, tensor)


def _ways(options: Sequence[Option]) -> Iterator[tuple[str, list[Option]]]:
    names = list(dict.fromkeys(option.key.hardware for option in options))
    for name in names:
        yield f"unified on {name}", [o for o in options if o.role is Role.UNIFIED and o.key.hardware == name]
    for prefill in names:
        for decode in names:
            on: Mapping[Role, str] = {Role.PREFILL: prefill, Role.DECODE: decode}
            where = prefill if prefill == decode else f"{prefill}, decode on {decode}"
            yield f"prefill on {where}", [o for o in options if on.get(o.role) == o.key.hardware]
    if len(names) > 1:
        yield "any mix", list(options)


def _proposal(name: str, deployment: Deployment, options: Sequence[Option], demand: Demand) -> Proposal:
    bounds = {option.key.pool: PoolBounds(0, MOST_REPLICAS) for option in options}
    plan = Planner(Problem(options, demand, deployment.slo, deployment.limits, bounds)).cheapest()
    return Proposal(name, plan, tuple(_pools(deployment, plan)))


def _pools(deployment: Deployment, plan: PoolPlan) -> Iterator[Pool]:
    """One pool for each role that the plan uses, which begins with the planned replicas and may double."""
    for role in Role:
        used = {key: n for key, n in plan.counts.items() if key.pool == role.lower()}
        if not used:
            continue
        total, classes = sum(used.values()), list(dict.fromkeys(key.hardware for key in used))
        named = [pool for pool in deployment.service.spec.pools if set(classes) & set(pool.gpu_classes)]
        spot = {key.spot for key in used}
        capacity = "Any" if len(spot) == 2 else "Spot" if True in spot else "OnDemand"
        parallelism = max((pool.parallelism for pool in named), key=lambda p: p.tensor, default=None)
        pool = Pool(name=role.lower(), role=role, gpu_classes=classes, min_replicas=total, max_replicas=2 * total)
        pool = msgspec.structs.replace(pool, capacity=capacity)
        yield pool if parallelism is None else msgspec.structs.replace(pool, parallelism=parallelism)
