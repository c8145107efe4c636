"""Fair turns against first come, first served: the same requests, the same workers, in virtual time.

    python bench/fairness.py --trace TRACE.csv.gz [--seconds 600] [--json FILE]

The trace is a sample of ServeGen's clients (timestamp_s, client, input_tokens, output_tokens). Two loads are made here:
`pair`, one greedy tenant with most of the traffic and one light one, and `rivals`, two that both want more than half.
Each load is offered at more than what the workers can do, so that somebody has to wait. Prints a table on stderr and
JSON on stdout.

Real: `Admission`, `FairQueue` and `ServiceCounters`; first come, first served is the same `Admission` with all requests
in one tenant's name. Modelled: the workers (one prompt at a time, a decode step that grows with the batch), the status
that tells a replica of the others' requests (0.1 s old at most), and Redis, by the rules of `shared_service.py` with an
exchange every 0.1 s (the tests run these against a real server). With three replicas, four in five requests of a tenant
come in through one of them, and the heaviest tenants through the same.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import random
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from systems import machine

from tandem.common.fair_queue import QUANTUM
from tandem.common.fairness import INPUT_COST, OUTPUT_COST, AccountKey, ServiceCounters
from tandem.router.turns.admission import Admission, Waiting

TICK_S = 0.05
EXCHANGE_S = 0.1
OVERLOAD = {"pair": 1.15, "rivals": 1.6, "servegen": 1.15}
"""Offered over what the workers can do."""
MAX_NUM_SEQS = 32
SLACK = 2
PREFILL_TOKENS_PER_S = 12_000.0
STEP_S, STEP_PER_SEQUENCE_S = 0.012, 0.0004
DECODE_S = (STEP_S + STEP_PER_SEQUENCE_S * MAX_NUM_SEQS) / MAX_NUM_SEQS
"""An output token of a full batch."""
WORKERS = 4
WINDOW_S = 60.0
SAMPLE_S = 5.0


@dataclass(frozen=True, slots=True)
class Request:
    at: float
    tenant: str
    input_tokens: int
    output_tokens: int

    @property
    def service(self) -> float:
        return self.input_tokens * INPUT_COST + self.output_tokens * OUTPUT_COST


@dataclass(eq=False, slots=True)
class Running:
    request: Request
    to_prefill: float
    waiting: Waiting
    router: Router
    produced: float = 0.0


@dataclass(slots=True)
class Worker:
    speed: float
    prompts: deque[Running] = field(default_factory=deque)
    decoding: list[Running] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return len(self.prompts) + len(self.decoding)

    @property
    def pending_s(self) -> float:
        return sum(each.to_prefill for each in self.prompts) / PREFILL_TOKENS_PER_S / self.speed

    def run(self, now: float, play: Play) -> None:
        """One tick that ends at `now`."""
        left = TICK_S * self.speed
        while self.prompts and left > 0:
            head = self.prompts[0]
            tokens = min(head.to_prefill, left * PREFILL_TOKENS_PER_S)
            head.to_prefill -= tokens
            left -= tokens / PREFILL_TOKENS_PER_S
            if head.to_prefill > 1e-6:
                break
            self.prompts.popleft()
            self.decoding.append(head)
            play.first_token(head, now - left / self.speed)
        if not self.decoding or left <= 0:
            return
        steps = left / (STEP_S + STEP_PER_SEQUENCE_S * len(self.decoding))
        for each in self.decoding:
            before = int(each.produced)
            each.produced = min(each.produced + steps, each.request.output_tokens)
            if new := int(each.produced) - before:
                each.router.admission.produced(each.waiting, new)
                play.serve(each.request.tenant, new * OUTPUT_COST, new * DECODE_S, now)
        done = [each for each in self.decoding if each.produced >= each.request.output_tokens]
        if done:
            self.decoding = [each for each in self.decoding if each.produced < each.request.output_tokens]
            play.finished += len(done)


class Router:
    """One replica: a real `Admission`; it knows the load of workers from their last status and its own requests."""

    def __init__(self, play: Play, workers: Sequence[Worker]) -> None:
        self.counters = ServiceCounters()
        self.admission = Admission(
            self.counters,
            max_requests=10**6,
            max_tokens=10**12,
            room=lambda *_: self._best() is not None,
            wait_s=lambda _: 0.0,
            clock=lambda: play.now,
        )
        self._play = play
        self._workers = workers
        self._requests = [0] * len(workers)
        self._pending_s = [0.0] * len(workers)

    def hear(self) -> None:
        """The status of all workers."""
        self._requests = [worker.requests for worker in self._workers]
        self._pending_s = [worker.pending_s for worker in self._workers]

    def arrive(self, request: Request, tenant: str) -> None:
        def granted() -> None:
            index = self._best()
            assert index is not None
            self._requests[index] += 1
            worker = self._workers[index]
            self._pending_s[index] += request.input_tokens / PREFILL_TOKENS_PER_S / worker.speed
            worker.prompts.append(Running(request, request.input_tokens, waiting, self))
            self._play.waiting[request.tenant] -= 1

        waiting = Waiting(
            tenant=tenant,
            weight=1.0,
            priority=0,
            prompt_tokens=request.input_tokens,
            deadline=math.inf,
            cached_tokens=lambda: 0,
            granted=granted,
            refused=_never,
        )
        self._play.waiting[request.tenant] += 1
        self.admission.submit(waiting)

    def _best(self) -> int | None:
        free = [
            index
            for index in range(len(self._workers))
            if self._requests[index] < MAX_NUM_SEQS + SLACK and self._pending_s[index] <= 0.25
        ]
        return min(free, key=lambda index: (self._requests[index], self._pending_s[index]), default=None)


def _never(error: Exception) -> None:
    raise AssertionError("nothing is refused here") from error


class SharedStore:
    """Redis by the rules of `shared_service.py`."""

    def __init__(self) -> None:
        self.totals: dict[AccountKey, float] = {}
        self.floor = 0.0
        self._least: dict[int, tuple[float, bool]] = {}

    def exchange(self, replica: int, counters: ServiceCounters) -> None:
        counters.alone = False
        changes = counters.take_changes()
        for key, (added, at_least) in changes.accounts.items():
            self.totals[key] = max(self.totals.get(key, 0.0) + added, at_least)
        self._least.pop(replica, None)
        if 0 in changes.least:
            self._least[replica] = changes.least[0], 0 in changes.waiting
        if self._least:
            self.floor = max(self.floor, counters.floor(0), min(value for value, _ in self._least.values()))
        others = [value for other, (value, waits) in self._least.items() if other != replica and waits]
        counters.merge(
            {key: self.totals[key] for key in changes.accounts}, {0: self.floor}, {0: min(others)} if others else {}
        )


class Play:
    """One run of one load."""

    def __init__(self, requests: Sequence[Request], speed: float, replicas: int, fair: bool, shared: bool) -> None:
        self.now = 0.0
        self.finished = 0
        self.waiting: dict[str, int] = defaultdict(int)
        self.ttft: dict[str, list[float]] = defaultdict(list)
        self.service: dict[str, float] = defaultdict(float)
        self.in_time = 0.0
        """Work done until the last arrival, seconds of a worker of speed 1."""
        self.samples: list[tuple[dict[str, float], dict[str, int]]] = []
        self._requests = requests
        self._fair = fair
        self._shared = shared
        self._workers = [Worker(speed) for _ in range(WORKERS)]
        self._routers = [Router(self, self._workers) for _ in range(replicas)]
        self._home = ingress(requests, replicas)

    def first_token(self, running: Running, at: float) -> None:
        request = running.request
        running.router.admission.computed(running.waiting, request.input_tokens)
        self.ttft[request.tenant].append(at - request.at)
        work_s = request.input_tokens / PREFILL_TOKENS_PER_S
        self.serve(request.tenant, request.input_tokens * INPUT_COST, work_s, at)

    def serve(self, tenant: str, service: float, work_s: float, at: float) -> None:
        self.service[tenant] += service
        if at <= self._requests[-1].at:
            self.in_time += work_s

    def run(self) -> None:
        store, upcoming = SharedStore(), deque(self._requests)
        coin = random.Random(2)
        tick = 0
        last = self._requests[-1].at
        while self.finished < len(self._requests):
            self.now = tick * TICK_S
            while upcoming and upcoming[0].at <= self.now:
                request = upcoming.popleft()
                router = self._home[request.tenant] if coin.random() < 0.8 else coin.randrange(len(self._routers))
                self._routers[router].arrive(request, request.tenant if self._fair else "all")
            for worker in self._workers:
                worker.run(self.now, self)
            if tick % round(EXCHANGE_S / TICK_S) == 0 and self._shared and len(self._routers) > 1:
                for index, router in enumerate(self._routers):
                    store.exchange(index, router.counters)
            first = tick % len(self._routers)
            for router in self._routers[first:] + self._routers[:first]:
                router.hear()
                while router.admission.pump():
                    pass
            if tick % round(SAMPLE_S / TICK_S) == 0 and self.now <= last:
                self.samples.append((dict(self.service), {name: n for name, n in self.waiting.items() if n}))
            tick += 1


def ingress(requests: Sequence[Request], replicas: int) -> dict[str, int]:
    """Where most requests of a tenant come in: the heaviest third of the traffic's tenants through replica 0, ..."""
    offered: dict[str, float] = defaultdict(float)
    for request in requests:
        offered[request.tenant] += request.service
    ranked = sorted(offered, key=lambda tenant: -offered[tenant])
    return {tenant: rank * replicas // len(ranked) for rank, tenant in enumerate(ranked)}


@dataclass(frozen=True, slots=True)
class Result:
    load: str
    replicas: int
    policy: str
    gap_mean: float
    """Of windows of a minute: most minus least service among tenants that waited all the time, over their mean service.
    NaN (in JSON null): there were no two."""
    gap_max: float
    light_ttft_p50_s: float
    light_ttft_p99_s: float
    heavy_ttft_p50_s: float
    heavy_ttft_p99_s: float
    throughput: float
    """Work done while requests arrived, over what workers with full batches can do."""
    makespan_s: float
    gap_series: list[float]


def light_tenants(requests: Sequence[Request], capacity: float) -> set[str]:
    """Those who ask for less than the share that everybody could have."""
    offered: dict[str, float] = defaultdict(float)
    for request in requests:
        offered[request.tenant] += request.service
    left, light = capacity, set[str]()
    for rank, tenant in enumerate(sorted(offered, key=lambda name: offered[name])):
        if offered[tenant] > left / (len(offered) - rank):
            break
        left -= offered[tenant]
        light.add(tenant)
    return light


def measure(load: str, requests: Sequence[Request], speed: float, replicas: int, policy: str) -> Result:
    play = Play(requests, speed, replicas, fair=policy != "fcfs", shared=policy == "fair")
    play.run()
    light = light_tenants(requests, sum(request.service for request in requests) / OVERLOAD[load])
    ttft: dict[bool, list[float]] = {True: [], False: []}
    for tenant, values in play.ttft.items():
        ttft[tenant in light] += values
    gaps: list[float] = []
    span = round(WINDOW_S / SAMPLE_S)
    for start in range(len(play.samples) - span):
        window = play.samples[start : start + span + 1]
        tenants = set.intersection(*(set(waiting) for _, waiting in window))
        if len(tenants) > 1:
            got = [window[-1][0].get(each, 0.0) - window[0][0].get(each, 0.0) for each in tenants]
            gaps.append((max(got) - min(got)) / max(statistics.fmean(got), 1.0))
    return Result(
        load=load,
        replicas=replicas,
        policy=policy,
        gap_mean=statistics.fmean(gaps) if gaps else math.nan,
        gap_max=max(gaps, default=math.nan),
        light_ttft_p50_s=percentile(ttft[True], 0.5),
        light_ttft_p99_s=percentile(ttft[True], 0.99),
        heavy_ttft_p50_s=percentile(ttft[False], 0.5),
        heavy_ttft_p99_s=percentile(ttft[False], 0.99),
        throughput=play.in_time / (requests[-1].at * WORKERS * speed),
        makespan_s=play.now,
        gap_series=[round(gap, 3) for gap in gaps[:: max(1, len(gaps) // 40)]],
    )


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan


def read_trace(path: Path, seconds: float) -> list[Request]:
    with gzip.open(path, "rt") as lines:
        rows = [
            Request(
                float(row["timestamp_s"]),
                f"client-{row['client']}",
                int(row["input_tokens"]),
                max(1, int(row["output_tokens"])),
            )
            for row in csv.DictReader(lines)
        ]
    return [row for row in sorted(rows, key=lambda row: row.at) if row.at < seconds]


def two_tenants(seconds: float, tenants: Sequence[tuple[str, float, int]]) -> list[Request]:
    """Poisson arrivals of (name, requests per second, mean prompt)."""
    dice = random.Random(1)
    requests: list[Request] = []
    for tenant, per_s, prompt in tenants:
        at = dice.expovariate(per_s)
        while at < seconds:
            output = 20 + int(dice.expovariate(1 / 250))
            requests.append(Request(at, tenant, dice.randrange(prompt // 2, prompt * 3 // 2), output))
            at += dice.expovariate(per_s)
    return sorted(requests, key=lambda request: request.at)


def speed_for(requests: Sequence[Request], overload: float) -> float:
    """So fast are workers that can do 1 / overload of this, with full batches."""
    prompts = sum(request.input_tokens for request in requests) / PREFILL_TOKENS_PER_S
    outputs = sum(request.output_tokens for request in requests) * DECODE_S
    return (prompts + outputs) / WORKERS / requests[-1].at / overload


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trace", type=Path, help="ServeGen sample; without it only the made load runs")
    parser.add_argument("--seconds", type=float, default=600.0, help="of each load, in virtual time")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    loads: dict[str, Callable[[], list[Request]]] = {
        "pair": lambda: two_tenants(options.seconds, (("greedy", 6.0, 1500), ("light", 0.8, 500))),
        "rivals": lambda: two_tenants(options.seconds, (("more", 5.0, 1000), ("less", 3.0, 1000))),
    }
    if options.trace is not None:
        loads["servegen"] = lambda: read_trace(options.trace, options.seconds)
    results: list[Result] = []
    began = time.perf_counter()
    print(
        f"{'load':9}{'replicas':>9} {'policy':10}{'gap mean':>9}{'gap max':>9}{'light p50':>10}{'light p99':>10}"
        f"{'heavy p50':>10}{'heavy p99':>10}{'throughput':>11}{'makespan':>10}",
        file=sys.stderr,
    )
    for load, make in loads.items():
        requests = make()
        speed = speed_for(requests, OVERLOAD[load])
        for replicas in (1, 3):
            for policy in ("fcfs", "fair") if replicas == 1 else ("fcfs", "not shared", "fair"):
                result = measure(load, requests, speed, replicas, policy)
                results.append(result)
                print(
                    f"{load:9}{replicas:9} {policy:10}{result.gap_mean:9.2f}{result.gap_max:9.2f}"
                    f"{result.light_ttft_p50_s:10.2f}{result.light_ttft_p99_s:10.2f}{result.heavy_ttft_p50_s:10.1f}"
                    f"{result.heavy_ttft_p99_s:10.1f}{result.throughput:11.3f}{result.makespan_s:10.1f}",
                    file=sys.stderr,
                )
    report = {
        "bench": "fairness",
        "machine": machine(),
        "virtual_time": True,
        "redis": f"modelled, an exchange every {EXCHANGE_S} s",
        "overload": OVERLOAD,
        "quantum": QUANTUM,
        "seconds": options.seconds,
        "took_s": round(time.perf_counter() - began, 1),
        "results": [
            {name: None if value != value else value for name, value in asdict(result).items()} for result in results
        ],
    }
    text = json.dumps(report, indent=1)
    if options.json is not None:
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
