"""From plans to steps: what to start, withdraw, drain or turn to another role now, without going to and fro.

- *Up at once*: where what is ready and what is starting do not carry the demand, the missing replicas are started.
- *Down late*: replicas go only when the rest carries the highest demand of the last `window_s`, and a dead band more.
- What is starting counts as arriving, is withdrawn first, and no longer counts once it takes far longer than it should.
- A ready replica that its pool can spare changes its role, where that is faster than to start another.
- While the demand is stale only losses are made good.

Pure: time, demand and replicas are passed in. How long replicas take to start is learned from what is reported.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from tandem.planner.objectives import Demand
from tandem.planner.pool_plan import Planner, Problem
from tandem.planner.pools import Option, OptionKey, PoolPlan

_OUTPUT_WEIGHT = 4.0
"""An output token counts as so many prompt tokens where demands of different lengths are compared."""


@dataclass(frozen=True, slots=True)
class StabilizerSettings:
    """How patient it is."""

    window_s: float = 300.0
    """Replicas are kept for the highest demand of so long."""
    dead_band: float = 0.1
    """Share of the demand that must be free in what is left after replicas go."""
    role_change_s: float = 5.0
    """How long a replica takes to change its role, at first."""
    start_s: float = 120.0
    """How long a replica takes to start, until one was seen."""
    stuck_factor: float = 4.0
    """A replica that starts for so many times longer than others did does not count any more."""


@dataclass(frozen=True, slots=True)
class Replicas:
    """What one option has."""

    ready: int = 0
    starting: tuple[float, ...] = ()
    """When each of those that are not ready yet was asked for, seconds."""


class StepKind(StrEnum):
    """What is done with replicas."""

    START = "Start"
    WITHDRAW = "Withdraw"
    DRAIN = "Drain"
    CHANGE_ROLE = "ChangeRole"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do."""

    kind: StepKind
    key: OptionKey
    replicas: int
    to: OptionKey | None = None
    """The option that a replica with a new role belongs to."""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """Steps, and what they are based on."""

    steps: tuple[Step, ...]
    target: PoolPlan
    """What the replicas will be once all is done."""
    demand: float
    """Requests per second that were asked for."""
    peak: float
    """The highest of the window, at today's lengths."""
    carried: float
    """What ready and starting replicas carry."""
    stuck: Mapping[OptionKey, int] = field(default_factory=dict)
    held: str = ""
    """Why nothing was changed although the demand may have."""


class Stabilizer:
    """Remembers demands, the last target and start-up times."""

    def __init__(self, settings: StabilizerSettings | None = None) -> None:
        self._settings = settings or StabilizerSettings()
        self._demands: deque[tuple[float, float]] = deque()
        """(seconds, rate x work of a request), falling: only what can still be the highest."""
        self._starts: dict[str, deque[float]] = {}
        self._target: dict[OptionKey, int] = {}

    def observe_start(self, hardware: str, seconds: float) -> None:
        """A replica on this class became ready `seconds` after it was asked for."""
        if seconds >= 0:
            self._starts.setdefault(hardware, deque(maxlen=16)).append(seconds)

    def start_s(self, hardware: str) -> float:
        """How long a replica on this class takes to start: longer than four of five that were seen."""
        seen = sorted(self._starts.get(hardware, ()))
        return seen[int(0.8 * (len(seen) - 1) + 0.5)] if seen else self._settings.start_s

    def decide(
        self, now_s: float, planner: Planner, rate: float, fleet: Mapping[OptionKey, Replicas], stale: bool
    ) -> Decision:
        """The steps to take now.

        Args:
            planner: options, limits, and the kind of requests.
            rate: requests per second to serve.
            fleet: ready and starting replicas; those that drain are not among them.
            stale: whether the demand is not known for certain.
        """
        stuck = {key: n for key, n in ((key, self._stuck(now_s, key, r)) for key, r in fleet.items()) if n}
        ready = {key: replicas.ready for key, replicas in fleet.items() if replicas.ready}
        arriving = {key: n for key, r in fleet.items() if (n := r.ready + len(r.starting) - stuck.get(key, 0)) > 0}
        if stale:
            return self._hold(planner, rate, arriving, stuck)
        peak = self._peak(now_s, rate, planner.problem.demand)
        carried = planner.carried_by(arriving)
        if carried < rate or _too_few(planner.problem, arriving):
            target = _up(planner, rate, arriving, ready)
        else:
            target = self._down(planner, arriving, ready, peak)
        steps = self._steps(planner, rate, target, fleet, ready, arriving, peak, carried)
        self._target = dict(target)
        described = planner.describe(target, rate)
        if described.served < rate:
            described = replace(described, limited_by=planner.cheapest(rate).limited_by)
        return Decision(steps, described, rate, peak, carried, stuck)

    def _down(
        self, planner: Planner, arriving: Mapping[OptionKey, int], ready: Mapping[OptionKey, int], peak: float
    ) -> Mapping[OptionKey, int]:
        """The cheapest part of what there is that carries the peak and the dead band; all of it where none does.

        What is ready must carry them without what still starts before any of it may go."""
        rate = peak * (1 + self._settings.dead_band)
        if planner.carried_by(arriving) < rate:
            return arriving
        part = planner.cheapest(rate, at_most=arriving)
        if not part.feasible:
            return arriving
        kept = {key: min(n, ready.get(key, 0)) for key, n in part.counts.items()}
        if planner.carried_by(kept) >= rate:
            return part.counts
        return {key: max(part.counts.get(key, 0), ready.get(key, 0)) for key in {*part.counts, *ready}}

    def _steps(
        self,
        planner: Planner,
        rate: float,
        target: Mapping[OptionKey, int],
        fleet: Mapping[OptionKey, Replicas],
        ready: Mapping[OptionKey, int],
        arriving: Mapping[OptionKey, int],
        peak: float,
        carried: float,
    ) -> tuple[Step, ...]:
        steps: list[Step] = []
        more = {o.key: n for o in planner.problem.options if (n := target.get(o.key, 0) - arriving.get(o.key, 0)) > 0}
        why = f"{rate:.3g} requests/s, {carried:.3g} carried"
        for donor, receiver in self._role_changes(planner, target, ready, more, peak):
            more[receiver] -= 1
            steps.append(Step(StepKind.CHANGE_ROLE, donor, 1, receiver, f"{why}; faster than a new replica"))
        steps += [Step(StepKind.START, key, n, reason=why) for key, n in more.items() if n]
        for key, replicas in fleet.items():
            less = replicas.ready + len(replicas.starting) - target.get(key, 0)
            withdrawn = min(max(less, 0), len(replicas.starting))
            spare = f"a peak of {peak:.3g} requests/s is carried without"
            if withdrawn:
                steps.append(Step(StepKind.WITHDRAW, key, withdrawn, reason=spare))
            if less > withdrawn:
                steps.append(Step(StepKind.DRAIN, key, less - withdrawn, reason=spare))
        return tuple(steps)

    def _role_changes(
        self,
        planner: Planner,
        target: Mapping[OptionKey, int],
        ready: Mapping[OptionKey, int],
        more: Mapping[OptionKey, int],
        peak: float,
    ) -> list[tuple[OptionKey, OptionKey]]:
        """(from, to): ready replicas that can be spared where the same device is missed in another role."""
        options = {option.key: option for option in planner.problem.options}
        left, changes = dict(target), []
        for receiver, wanted in more.items():
            if self.start_s(receiver.hardware) <= self._settings.role_change_s:
                continue
            donors = [key for key in ready if key in options and _same_devices(options[key], options[receiver])]
            for donor in donors:
                while wanted and min(left.get(donor, 0), ready[donor]) > 0:
                    without = {**left, donor: left[donor] - 1}
                    if planner.carried_by(without) < peak or _too_few(planner.problem, without):
                        break
                    left, wanted = without, wanted - 1
                    changes.append((donor, receiver))
        return changes

    def _hold(
        self, planner: Planner, rate: float, arriving: Mapping[OptionKey, int], stuck: Mapping[OptionKey, int]
    ) -> Decision:
        """Makes good what was lost since the last decision."""
        target = {key: max(self._target.get(key, 0), arriving.get(key, 0)) for key in {*self._target, *arriving}}
        steps = tuple(
            Step(StepKind.START, key, n - arriving.get(key, 0), reason="replicas were lost; the demand is not known")
            for key, n in target.items()
            if n > arriving.get(key, 0)
        )
        carried = planner.carried_by(arriving)
        held = "the demand is not known for certain"
        return Decision(steps, planner.describe(target, rate), rate, rate, carried, stuck, held)

    def _stuck(self, now_s: float, key: OptionKey, replicas: Replicas) -> int:
        patience = self._settings.stuck_factor * max(self.start_s(key.hardware), 1.0)
        return sum(now_s - asked > patience for asked in replicas.starting)

    def _peak(self, now_s: float, rate: float, demand: Demand) -> float:
        """The highest demand of the window, as requests of today's lengths per second."""
        work = _work(demand)
        today = rate * work
        while self._demands and self._demands[-1][1] <= today:
            self._demands.pop()
        self._demands.append((now_s, today))
        while self._demands[0][0] < now_s - self._settings.window_s:
            self._demands.popleft()
        return self._demands[0][1] / work if work > 0 else rate


def _up(
    planner: Planner, rate: float, arriving: Mapping[OptionKey, int], ready: Mapping[OptionKey, int]
) -> Mapping[OptionKey, int]:
    """The cheapest addition that carries the demand; where it must be, in place of what only starts."""
    kept, replaced = planner.cheapest(rate, at_least=arriving), None
    if not kept.feasible and ready != arriving:
        replaced = planner.cheapest(rate, at_least=ready)
    return replaced.counts if replaced is not None and replaced.served > kept.served else kept.counts


def _too_few(problem: Problem, counts: Mapping[OptionKey, int]) -> bool:
    """Whether a pool has fewer replicas than it must."""
    have: dict[str, int] = {}
    for key, n in counts.items():
        have[key.pool] = have.get(key.pool, 0) + n
    return any(have.get(pool, 0) < bound.min_replicas for pool, bound in problem.bounds.items())


def _work(demand: Demand) -> float:
    """Prompt tokens that a request stands for."""
    return demand.prompt_tokens.mean * (1 - demand.cached_share) + _OUTPUT_WEIGHT * demand.output_tokens.mean


def _same_devices(a: Option, b: Option) -> bool:
    """Whether a replica of one option can become one of the other where it runs."""
    return a.key != b.key and (a.key.hardware, a.key.spot, a.devices) == (b.key.hardware, b.key.spot, b.devices)
