"""Efficiencies found from times that a roofline of other efficiencies yields."""

from __future__ import annotations

import math
import random
from functools import partial

import pytest

from tandem.planner.calibration import BOUNDS, Predict, calibrate
from tandem.planner.hardware import hardware
from tandem.planner.model_spec import ModelSpec
from tandem.planner.roofline import Efficiency, Roofline
from tests.planner import known_models as known

SPEC = ModelSpec.from_config(known.LLAMA_8B)
H100 = hardware("nvidia-h100")
TRUTH = Efficiency(0.7, 0.85, 0.3, 0.004, 2e-5, 3e-5, 2e-5)


def prefill(devices: int, tokens: int, efficiency: Efficiency) -> float:
    return Roofline(SPEC, H100, devices, efficiency).prefill_s(tokens)


def decode(devices: int, batch: int, context: int, efficiency: Efficiency) -> float:
    return Roofline(SPEC, H100, devices, efficiency).decode_step_s(batch, float(batch * context))


def draws(rng: random.Random, count: int) -> list[Predict]:
    found: list[Predict] = []
    for _ in range(count):
        devices = rng.choice([1, 2, 4, 8])
        found.append(partial(prefill, devices, round(2 ** rng.uniform(6, 14))))
        found.append(partial(decode, devices, round(2 ** rng.uniform(0, 8)), round(2 ** rng.uniform(6, 13))))
    return found


@pytest.mark.parametrize("outliers", [0, 4])
def test_it_finds_what_the_rows_were_made_with_whatever_a_few_of_them_say(outliers: int) -> None:
    rng = random.Random(7)
    rows = [(predict, predict(TRUTH) * rng.uniform(0.97, 1.03)) for predict in draws(rng, 40)]
    rows[:outliers] = [(predict, 20 * seconds) for predict, seconds in rows[:outliers]]
    found = calibrate(rows)
    errors = sorted(abs(predict(found) / predict(TRUTH) - 1) for predict in draws(random.Random(8), 40))
    first = sorted(abs(predict(Efficiency()) / predict(TRUTH) - 1) for predict in draws(random.Random(8), 40))
    assert errors[len(errors) // 2] < 0.03 < 0.15 < first[len(first) // 2]
    assert errors[-1] < 0.2


def test_it_stays_within_bounds_and_leaves_alone_what_is_not_asked_for() -> None:
    rows = [(predict, 1e-9) for predict in draws(random.Random(1), 3)]
    found = calibrate(rows, TRUTH, ("compute", "step_s"))
    assert (found.compute, found.step_s) == (BOUNDS["compute"][1], BOUNDS["step_s"][0])
    assert (found.memory, found.link, found.reduce_s) == (TRUTH.memory, TRUTH.link, TRUTH.reduce_s)


def test_rows_that_say_nothing_change_nothing() -> None:
    broken = [(predict, seconds) for predict in draws(random.Random(1), 2) for seconds in (0.0, -1.0, math.nan)]
    assert calibrate(broken, TRUTH) == calibrate([], TRUTH) == TRUTH
    alone = calibrate([(partial(prefill, 1, 4000), 0.1)], TRUTH)
    assert (alone.link, alone.reduce_s, alone.request_s) == (TRUTH.link, TRUTH.reduce_s, TRUTH.request_s)
