"""`tandem plan`: which hardware, and how many replicas for what, before anything is bought."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tandem.common.errors import ConfigError
from tandem.common.settings import Group, parse_settings
from tandem.planner.deployment import Deployment, read_deployment, written
from tandem.planner.lengths import Lengths
from tandem.planner.model_spec import ModelSpec
from tandem.planner.objectives import Demand
from tandem.planner.pools import PoolPlan
from tandem.planner.proposals import Proposal, planned, proposals, with_pools

EXAMPLES = (
    ("ten requests a second of 1,000 tokens, answered by 200", "tandem plan chat.yaml --requests-per-s 10"),
    ("other lengths: half of the prompts short, half long", "tandem plan chat.yaml --prompt-tokens 200,4000"),
    ("the file that deploys the winner", "tandem plan chat.yaml --requests-per-s 10 --out winner.yaml"),
    ("for programs", "tandem plan chat.yaml --json"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """Settings of `tandem plan`."""

    basics: ClassVar[Group]
    """Basics"""
    deployment: Path
    """YAML with a ModelService (model, goals, pools) and the GPUClasses that may be used, with their prices."""
    requests_per_s: float = 1.0
    """How much traffic comes."""
    prompt_tokens: str = "1000"
    """Lengths of prompts, separated by commas; each stands for an equal share of the requests."""
    output_tokens: str = "200"
    """Likewise of answers."""
    cached_share: float = 0.0
    """Share of the prompt tokens whose KV is found in a cache, 0 to 1."""
    burstiness: float = 1.0
    """Squared coefficient of variation of the times between requests; 1 for independent ones (Poisson), 0 for a steady
    beat."""
    model_config: Path | None = None
    """The model's config.json, where the model's uri is not a folder of this machine."""
    out: Path | None = None
    """File to write, which deploys the winner."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        for name in ("requests_per_s", "cached_share", "burstiness"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} {getattr(self, name)}: must be finite and not negative")
        if self.cached_share > 1:
            raise ConfigError(f"cached_share {self.cached_share:g}: must be between 0 and 1")
        _ = self.demand

    @property
    def demand(self) -> Demand:
        """The traffic to plan for. Raises ConfigError for lengths that are none."""
        prompts, outputs = (_lengths(name, getattr(self, name)) for name in ("prompt_tokens", "output_tokens"))
        return Demand(self.requests_per_s, prompts, outputs, self.cached_share, self.burstiness)


SETTINGS = PlanConfig


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 where something serves the demand within the goals, 1 where nothing does. Raises ConfigError."""
    config = parse_settings(
        PlanConfig,
        argv,
        command="tandem plan",
        description="Says which hardware serves the traffic within the goals, at which cost, and what the latencies "
        "will be: one line for every way of using the classes of the file, the best first.",
        examples=EXAMPLES,
        word="deployment",
    )
    deployment = read_deployment(config.deployment)
    model = _model(deployment, config.model_config)
    own = planned(deployment, model, config.demand)
    ways = proposals(deployment, model, config.demand)
    print(json.dumps(_report(own, ways), indent=2) if config.json else _table(deployment, own, ways))
    if config.out is not None and ways[0].plan.feasible:
        service = with_pools(deployment.service, ways[0].pools)
        config.out.write_text(written([service, *deployment.classes.values()]))
        print(f"written: {config.out}", file=sys.stderr)
    return 0 if ways[0].plan.feasible else 1


def _lengths(name: str, text: str) -> Lengths:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name} {text!r}: must be numbers of tokens, such as 200,4000") from None
    if not all(1 <= value < 1e8 for value in values):
        raise ConfigError(f"{name} {text!r}: each must be at least 1 and less than 100 million")
    return Lengths.of((value, 1.0) for value in values)


def _model(deployment: Deployment, config: Path | None) -> ModelSpec:
    uri = deployment.service.spec.model.uri
    path = config or Path(uri.removeprefix("file://")) / "config.json"
    if config is None and not uri.startswith("file://"):
        raise ConfigError(f"{uri} is not on this machine; name its config.json with --model-config")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--model-config {path}: cannot be read ({error})") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"--model-config {path}: must be an object of fields")
    return ModelSpec.from_config(fields, uri.rpartition("/")[2])


def _table(deployment: Deployment, own: PoolPlan, ways: Sequence[Proposal]) -> str:
    slo, plans = deployment.slo, [("the file's pools", own), *((way.name, way.plan) for way in ways)]
    rows = [("", "cost/h", "kW", "TTFT ms", "TPOT ms", "served/s", "replicas"), *(_row(*named) for named in plans)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = [
        f"TTFT {slo.ttft_s:g} s and TPOT {slo.tpot_s:g} s for {slo.percentile:g} % of {own.requested:g} requests/s"
    ]
    for name, *figures, replicas in rows:
        aligned = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *aligned, replicas]).rstrip())
    lines += [f"! {name}: {limit.text}" for name, plan in plans for limit in plan.limited_by]
    return "\n".join(lines)


def _row(name: str, plan: PoolPlan) -> tuple[str, ...]:
    latency = [f"{seconds * 1e3:.4g}" if plan.served else "-" for seconds in (plan.ttft_s, plan.tpot_s)]
    served = f"{plan.served:.4g}" if plan.feasible else f"! {plan.served:.4g}"
    replicas = ", ".join(f"{n} {key}" for key, n in sorted(plan.counts.items())) or "none"
    return (name, f"{plan.cost_per_hour:.2f}", f"{plan.watts / 1e3:.2f}", *latency, served, replicas)


def _report(own: PoolPlan, ways: Sequence[Proposal]) -> dict[str, Any]:
    return {"file": _figures(own), "ways": [{"name": way.name, **_figures(way.plan)} for way in ways]}


def _figures(plan: PoolPlan) -> dict[str, Any]:
    return {
        "replicas": {str(key): n for key, n in plan.counts.items()},
        "feasible": plan.feasible,
        "exact": plan.exact,
        "requests_per_s": plan.served,
        "cost_per_hour": plan.cost_per_hour,
        "watts": plan.watts,
        "ttft_s": plan.ttft_s,
        "tpot_s": plan.tpot_s,
        "pools": [
            {"option": str(s.key), "replicas": s.replicas, "rate": s.rate, "capacity": s.capacity, "binds": s.binds}
            for s in plan.shares
        ],
        "limited_by": [{"kind": limit.kind, "subject": limit.subject, "text": limit.text} for limit in plan.limited_by],
    }
