"""Drawing as a GPU does it, without a sort of the vocabulary or sums in order, against slow and obvious ways."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tandem.common.sampling import SamplingParams
from tandem.engine.step import drawing
from tandem.engine.step.drawing import drop_unlikely, exponentials, noise_key, race, splitmix64

MASK = (1 << 64) - 1
DRAWS = 20_000


def exponential(key: int, token: int) -> float:
    """In Python's integers and floats of 64 bits."""
    number = splitmix64((key + token * 0x9E3779B97F4A7C15) & MASK)
    return -math.log1p(-min((float(np.float32(number >> 33)) + 0.5) * 2.0**-31, 1.0 - 2.0**-24))


def signed(keys: list[int]) -> torch.Tensor:
    return torch.tensor(np.array(keys, dtype=np.uint64).view(np.int64)).unsqueeze(1)


def distribution(size: int, seed: int) -> torch.Tensor:
    return torch.softmax(torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) * 3, dim=-1)


def test_times_are_those_of_the_slow_way() -> None:
    keys = [0, 1, MASK, 1 << 63, noise_key(7, 9)]
    times = exponentials(signed(keys), 400).double().numpy()
    expected = [[exponential(key, token) for token in range(400)] for key in keys]
    np.testing.assert_allclose(times, expected, rtol=1e-5)


def test_times_are_never_zero_or_infinite_and_spread_as_they_should() -> None:
    times = exponentials(signed([noise_key(1, position) for position in range(50)]), 20_000).double().numpy()
    assert times.min() > 0
    assert np.isfinite(times).all()
    edges = -np.log1p(-np.arange(20) / 20)
    histogram = np.histogram(times, bins=[*edges, np.inf])[0]
    expected = times.size / 20
    assert ((histogram - expected) ** 2 / expected).sum() < 45, "chi-squared with 19 degrees of freedom, p ~ 0.001"
    assert abs(np.corrcoef(times[:, :-1].ravel(), times[:, 1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(times[:-1].ravel(), times[1:].ravel())[0, 1]) < 0.01


@pytest.mark.parametrize("sized", [3, 50, 400])
def test_a_race_is_won_as_often_as_the_probabilities_say(sized: int) -> None:
    probs = distribution(sized, sized)
    probs[0, sized // 2] = 0.0
    tokens, weights = race(probs.expand(DRAWS, sized), [noise_key(seed, 5) for seed in range(DRAWS)])
    exact = (probs[0] / probs.sum()).double().numpy()
    counts = np.bincount(tokens, minlength=sized)
    assert counts[sized // 2] == 0
    assert weights == probs[0, tokens].tolist()
    likely = exact * DRAWS >= 5
    rare = exact[~likely].sum() * DRAWS
    statistic = ((counts[likely] - exact[likely] * DRAWS) ** 2 / (exact[likely] * DRAWS)).sum()
    degrees = max(likely.sum() - 1, 1)
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)
    assert abs(counts[~likely].sum() - rare) < 4 * math.sqrt(rare + 1)


def test_a_draw_depends_on_nothing_but_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    probs = torch.cat([distribution(300, seed) for seed in range(33)])
    keys = [noise_key(seed, 3 * seed) for seed in range(33)]
    together = race(probs, keys)
    alone = [race(probs[i : i + 1], [key]) for i, key in enumerate(keys)]
    assert together == ([one[0][0] for one in alone], [one[1][0] for one in alone])
    monkeypatch.setattr(drawing, "RACE_PIECE", 2 * 300 + 1)
    assert race(probs, keys) == together
    assert race(probs.flip(0), keys[::-1]) == (together[0][::-1], together[1][::-1])


def test_no_token_of_probability_zero_is_drawn_however_small_the_others_are() -> None:
    probs = torch.zeros(2000, 64)
    probs[:, 40] = 1.2e-38
    assert race(probs, [noise_key(0, position) for position in range(2000)])[0] == [40] * 2000


def test_rows_that_hold_no_number_are_told_by_their_weight() -> None:
    probs = torch.zeros(3, 8)
    probs[0, 3] = math.nan
    probs[2] = 0.125
    _, weights = race(probs, [1, 2, 3])
    assert math.isnan(weights[0])
    assert weights[1:] == [0.0, 0.125]


FILTERS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 200},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"top_k": 30, "top_p": 0.8, "min_p": 0.01},
    {"top_k": 5000, "top_p": 0.3},
    {"top_k": 5000, "min_p": 0.3},
]


def kept(probs: npt.NDArray[np.float64], params: SamplingParams) -> set[int]:
    """One token after the other, the likeliest first."""
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    order = order[: params.top_k] if params.top_k else order
    whole, mass, found = probs[order].sum(), 0.0, set()
    for token in order:
        if found and (mass >= params.top_p * whole or probs[token] < params.min_p * probs.max()):
            break
        found.add(token)
        mass += probs[token]
    return found


@pytest.mark.parametrize("largest", [1, 16, 100, 400])
@pytest.mark.parametrize("flat", [0.05, 1.0, 4.0])
def test_what_is_kept_does_not_depend_on_how_many_are_selected_first(largest: int, flat: float) -> None:
    params = [SamplingParams(**options) for options in FILTERS]  # type: ignore[arg-type]
    logits = torch.randn(len(params), 400, generator=torch.Generator().manual_seed(2)) * flat
    probs = torch.softmax(logits, dim=-1)
    together = drop_unlikely(probs, params, largest)
    for row, one in enumerate(params):
        expected = kept(probs[row].double().numpy(), one)
        assert set(together[row].nonzero().flatten().tolist()) == expected
        alone = drop_unlikely(probs[row : row + 1], [one], largest)
        assert set(alone[0].nonzero().flatten().tolist()) == expected
