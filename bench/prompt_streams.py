"""Streams of prompts as block numbers, to try eviction on loads that its constants were not chosen on.

`chat`, `agents`, `documents`: sessions of invented lengths and gaps. `azure`, `servegen`: arrivals, lengths and clients
of a published trace; which requests continue a conversation is invented (those whose prompt is a little longer than
what an earlier one of the client ended with). All of it follows from a seed.
"""

from __future__ import annotations

import csv
import gzip
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path

Draw = Callable[[random.Random], float]
LINKED_BLOCK_TOKENS = 128
"""Prompts of these traces are short: one to four thousand tokens."""
CONTINUED = 0.7
"""Share of the requests that could continue a conversation that do."""


def log_normal(median: float, sigma: float) -> Draw:
    return lambda rng: rng.lognormvariate(math.log(median), sigma)


def geometric(mean: float) -> Draw:
    return lambda rng: 1 + int(math.log(1 - rng.random()) / math.log(1 - 1 / mean))


class Blocks:
    def __init__(self) -> None:
        self._numbers = count()

    def new(self, number: float) -> list[int]:
        return [next(self._numbers) for _ in range(int(number))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sessions:
    """Poisson arrivals of sessions; each begins with the system prompt of an application (popularity by Zipf's law),
    has a first prompt, and grows with every turn. Lengths in blocks, times in seconds."""

    seed: int
    seconds: float
    per_second: float
    applications: int
    zipf: float
    system: Draw
    first: Draw
    turns: Draw
    growth: Draw
    gap: Draw

    def prompts(self) -> list[list[int]]:
        rng, blocks = random.Random(self.seed), Blocks()
        systems = [blocks.new(max(1, self.system(rng))) for _ in range(self.applications)]
        weights = [1 / (rank + 1) ** self.zipf for rank in range(self.applications)]
        requests: list[tuple[float, list[int]]] = []
        start = -self.seconds / 3
        while start < self.seconds:
            start += rng.expovariate(self.per_second)
            system = systems[rng.choices(range(self.applications), weights)[0]]
            context, now = system + blocks.new(self.first(rng)), start
            for _ in range(int(self.turns(rng))):
                if 0 <= now < self.seconds:
                    requests.append((now, context + blocks.new(1)))
                context = context + blocks.new(self.growth(rng))
                now += self.gap(rng)
        return [prompt for _, prompt in sorted(requests, key=lambda request: request[0])]


SESSIONS = {
    "chat": Sessions(
        seed=11,
        seconds=1800,
        per_second=1.2,
        applications=50,
        zipf=1.2,
        system=log_normal(1, 0.8),
        first=log_normal(8, 1.3),
        turns=geometric(3),
        growth=log_normal(1, 0.8),
        gap=log_normal(60, 1.0),
    ),
    "agents": Sessions(
        seed=12,
        seconds=1200,
        per_second=0.8,
        applications=40,
        zipf=1.1,
        system=log_normal(8, 0.7),
        first=log_normal(3, 0.8),
        turns=geometric(9),
        growth=log_normal(1, 0.7),
        gap=log_normal(6, 0.9),
    ),
    "documents": Sessions(
        seed=13,
        seconds=1800,
        per_second=0.5,
        applications=600,
        zipf=0.8,
        system=log_normal(24, 0.8),
        first=log_normal(1, 0.5),
        turns=geometric(1.5),
        growth=log_normal(1, 0.5),
        gap=log_normal(30, 1.0),
    ),
}


@dataclass(frozen=True, slots=True)
class Arrival:
    time_s: float
    client: str
    input_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Conversation:
    blocks: list[int]
    tokens: int = 0
    last_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Linking:
    seed: int
    gap: tuple[float, float]
    """Median and sigma of the time between turns, log-normal."""
    most_growth: int
    """Tokens between the end of one turn and the next prompt's."""


def link(arrivals: list[Arrival], how: Linking) -> list[list[int]]:
    rng, blocks, prompts = random.Random(how.seed), Blocks(), []
    lengths: dict[str, list[int]] = {}
    talks: dict[str, list[Conversation]] = {}
    for each in arrivals:
        lengths.setdefault(each.client, []).append(each.input_tokens)
    systems = {
        client: blocks.new(sorted(tokens)[len(tokens) // 20] // LINKED_BLOCK_TOKENS)
        for client, tokens in lengths.items()
    }
    for each in arrivals:
        conversations = [talk for talk in talks.get(each.client, []) if each.time_s - talk.last_s < 1800]
        candidates = [
            talk
            for talk in conversations
            if each.time_s - talk.last_s > 2 and talk.tokens < each.input_tokens <= talk.tokens + how.most_growth
        ]
        if candidates and rng.random() < CONTINUED:
            chosen = rng.choices(candidates, [_density(each.time_s - talk.last_s, how.gap) for talk in candidates])[0]
        else:
            chosen = Conversation(list(systems[each.client]))
            conversations.append(chosen)
        talks[each.client] = conversations
        full, rest = divmod(each.input_tokens, LINKED_BLOCK_TOKENS)
        chosen.blocks += blocks.new(full - len(chosen.blocks))
        prompt = chosen.blocks[:full] + blocks.new(1 if rest else 0)
        chosen.tokens, chosen.last_s = each.input_tokens + each.output_tokens, each.time_s
        chosen.blocks += blocks.new(chosen.tokens // LINKED_BLOCK_TOKENS - len(chosen.blocks))
        if prompt:
            prompts.append(prompt)
    return prompts


def _density(gap_s: float, gap: tuple[float, float]) -> float:
    median, sigma = gap
    return math.exp(-((math.log(gap_s / median) / sigma) ** 2) / 2) / gap_s + 1e-9


def azure(path: Path) -> list[list[int]]:
    with gzip.open(path, "rt") as lines:
        rows = list(csv.DictReader(lines))
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    arrivals = [
        Arrival(time_s - times[0], "", int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        for time_s, row in zip(times, rows, strict=True)
    ]
    return link(arrivals, Linking(1, (60.0, 1.0), 800))


def servegen(path: Path) -> list[list[int]]:
    with gzip.open(path, "rt") as lines:
        arrivals = [
            Arrival(
                float(row["timestamp_s"]),
                row["client"],
                int(float(row["input_tokens"])),
                int(float(row["output_tokens"])),
            )
            for row in csv.DictReader(lines)
        ]
    return link(arrivals, Linking(2, (60.0, 1.2), 3000))
