"""Sampling against an obvious reference that looks at one request at a time, in float64, with a full sort."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tandem.engine.schedule.sequence import Sequence
from tandem.engine.step.drawing import uniform
from tandem.engine.step.sampler import Sampler, token_logprobs
from tests.engine_harness import make_sequence

VOCAB = 50
EOS = frozenset({3})
CPU = torch.device("cpu")
NOISE = [0.652448475, 0.034011662, 0.368189514, 0.517745614]
"""uniform(seed, position) of four pairs."""


def kept_distribution(logits: npt.NDArray[np.float64], sequence: Sequence) -> npt.NDArray[np.float64]:
    """The probabilities that a token of `sequence` is drawn from."""
    params, output = sequence.request.sampling, sequence.tokens[sequence.num_prompt :]
    x = logits.copy()
    for token in set(sequence.tokens):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    for token, bias in params.logit_bias.items():
        x[token] += bias
    if params.allowed_token_ids:
        banned = sorted(set(range(VOCAB)) - set(params.allowed_token_ids))
        x[banned] = -np.inf
    for word in params.bad_words:
        if output[len(output) + 1 - len(word) :] == list(word[:-1]) and len(output) >= len(word) - 1:
            x[word[-1]] = -np.inf
    if len(output) < params.min_tokens:
        x[sorted(sequence.stop_ids)] = -np.inf
    if params.temperature == 0:
        return np.eye(VOCAB)[int(np.argmax(x))]
    x = x / params.temperature
    probs = np.exp(x - x.max())
    probs /= probs.sum()
    order = sorted(range(VOCAB), key=lambda token: -probs[token])
    keep = order[: params.top_k] if params.top_k else order
    if params.top_p < 1:
        total, mass, nucleus = probs[keep].sum(), 0.0, []
        for token in keep:
            nucleus.append(token)
            mass += probs[token]
            if mass >= params.top_p * total:
                break
        keep = nucleus
    keep = [token for token in keep if probs[token] >= params.min_p * probs.max()]
    out = np.zeros(VOCAB)
    out[keep] = probs[keep]
    return out / out.sum()


def expected_token(logits: npt.NDArray[np.float64], sequence: Sequence) -> int:
    cdf = np.cumsum(kept_distribution(logits, sequence))
    return int(np.searchsorted(cdf, uniform(sequence.seed, len(sequence.tokens)), side="right"))


def fresh(sequences: list[Sequence]) -> Sampler:
    """A sampler with these sequences."""
    sampler = Sampler(len(sequences), VOCAB, CPU)
    admit(sampler, sequences)
    return sampler


def admit(sampler: Sampler, sequences: list[Sequence]) -> None:
    for row, sequence in enumerate(sequences):
        sampler.admit(sequence, row)


def sequence(index: int, **sampling: Any) -> Sequence:
    prompt = [(index * 7 + i * 3) % VOCAB for i in range(6)]
    return make_sequence(f"r{index}", prompt, eos=EOS, **({"seed": index + 1, "max_tokens": 1000} | sampling))


FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 4},
    "top_k of one": {"top_k": 1},
    "top_k beyond the vocabulary": {"top_k": 500},
    "top_p": {"top_p": 0.6},
    "tiny top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "top_p of top_k": {"top_k": 5, "top_p": 0.7, "temperature": 2.0},
    "min_p and top_p": {"min_p": 0.3, "top_p": 0.9, "temperature": 2.0},
    "all filters": {"top_k": 10, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3},
    "repetition": {"repetition_penalty": 1.7},
    "repetition below one": {"repetition_penalty": 0.8},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.9},
    "greedy with penalties": {"temperature": 0.0, "frequency_penalty": 0.9, "repetition_penalty": 1.3},
    "bias": {"logit_bias": {5: 4.0, 9: -100.0}},
    "allowed": {"allowed_token_ids": (4, 8, 15, 16)},
    "allowed with bias, greedy": {"allowed_token_ids": (4, 8), "logit_bias": {8: 50.0, 9: 90.0}, "temperature": 0.0},
    "bad words": {"bad_words": ((7,), (8, 9), (9, 10, 11)), "allowed_token_ids": (7, 8, 9, 10, 11)},
    "bad words, greedy": {"bad_words": ((30, 31), (31, 30), (30, 30)), "temperature": 0.0, "logit_bias": {30: 9.0}},
    "min_tokens": {"min_tokens": 12, "logit_bias": {3: 60.0, 7: 30.0}, "stop_token_ids": (7,)},
}


def logits_of(step: int, rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(step)) * 2


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_agrees_with_the_reference(feature: str) -> None:
    sampler = Sampler(4, VOCAB, CPU)
    sequences = [sequence(i, **FEATURES[feature]) for i in range(4)]
    admit(sampler, sequences)
    for step in range(25):
        logits = logits_of(step, 4)
        expected = [expected_token(logits[i].double().numpy(), s) for i, s in enumerate(sequences)]
        tokens, logprobs = sampler.sample(logits, sequences)
        assert tokens == expected
        assert logprobs is None
        for one, token in zip(sequences, tokens, strict=True):
            one.append(token)


@pytest.mark.parametrize("in_order", [True, False], ids=["as on a CPU", "as on a GPU"])
def test_a_mixed_batch_gives_each_request_what_it_gets_alone(in_order: bool) -> None:
    together, tokens_alone = Sampler(len(FEATURES), VOCAB, CPU), []
    together._adds_in_order = in_order
    for index, options in enumerate(FEATURES.values()):
        alone, one = Sampler(1, VOCAB, CPU), sequence(index, **options)
        alone._adds_in_order = in_order
        admit(alone, [one])
        for step in range(15):
            tokens, _ = alone.sample(logits_of(step, len(FEATURES))[index : index + 1].clone(), [one])
            one.append(tokens[0])
        tokens_alone.append(one.tokens)
    batch = [sequence(index, **options) for index, options in enumerate(FEATURES.values())]
    admit(together, batch)
    for step in range(15):
        tokens, _ = together.sample(logits_of(step, len(FEATURES)), batch)
        for one, token in zip(batch, tokens, strict=True):
            one.append(token)
    assert [one.tokens for one in batch] == tokens_alone


def test_a_row_that_was_used_before_starts_afresh() -> None:
    sampler = Sampler(1, VOCAB, CPU)
    options = {"frequency_penalty": 5.0, "logit_bias": {1: 3.0}, "temperature": 0.0}
    first, second = sequence(0, **options), sequence(0, **options)
    outputs = []
    for one in (first, second):
        admit(sampler, [one])
        for step in range(10):
            one.append(sampler.sample(logits_of(step, 1), [one])[0][0])
        outputs.append(one.tokens)
    assert outputs[0] == outputs[1]


def test_a_readmitted_request_keeps_its_penalties() -> None:
    sampler = Sampler(1, VOCAB, CPU)
    one = sequence(0, frequency_penalty=2.0, repetition_penalty=1.2, temperature=0.0)
    for step in range(20):
        if step % 5 == 0:
            admit(sampler, [one])
        logits = logits_of(step % 3, 1)
        expected = expected_token(logits[0].double().numpy(), one)
        one.append(sampler.sample(logits, [one])[0][0])
        assert one.last_token == expected


def test_the_lowest_id_wins_a_tie() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[1, 7] = logits[1, 30] = 1.0
    sequences = [sequence(0, temperature=0.0), sequence(1, temperature=0.0)]
    assert fresh(sequences).sample(logits, sequences)[0] == [0, 7]


def test_stop_tokens_are_not_masked_when_nothing_else_is_allowed() -> None:
    sampler = Sampler(1, VOCAB, CPU)
    one = sequence(0, min_tokens=5, allowed_token_ids=(3,))
    admit(sampler, [one])
    assert sampler.sample(logits_of(0, 1), [one])[0] == [3]


def test_a_bad_word_counts_in_the_output_only_and_every_time() -> None:
    one = make_sequence("r", [8], eos=EOS, temperature=0.0, max_tokens=99, bad_words=((8, 9), (9, 9)))
    sampler = Sampler(1, VOCAB, CPU)
    admit(sampler, [one])
    for wanted, expected in ((9, 9), (9, 0), (8, 8), (9, 0), (8, 8), (8, 8), (9, 0)):
        logits = torch.zeros(1, VOCAB)
        logits[0, wanted] = 5.0
        one.append(sampler.sample(logits, [one])[0][0])
        assert one.last_token == expected


def test_no_token_left_beside_bad_words_is_a_dead_end_of_that_request_alone() -> None:
    stuck = sequence(0, allowed_token_ids=(4, 5), bad_words=((4,), (5,)))
    free = sequence(1, allowed_token_ids=(4, 5), bad_words=((4,),), temperature=0.0)
    sampler = Sampler(2, VOCAB, CPU)
    admit(sampler, [stuck, free])
    tokens, _ = sampler.sample(torch.zeros(2, VOCAB), [stuck, free])
    assert sampler.dead_ends[stuck].code == "invalid_request"
    assert "bad_words" in sampler.dead_ends[stuck].message
    assert tokens[1] == 5
    assert free not in sampler.dead_ends


def test_the_noise_is_fixed_for_ever() -> None:
    """A change here changes what every seeded request of every user returns."""
    assert [uniform(seed, position) for seed, position in ((0, 0), (0, 1), (1, 0), (2**64 - 1, 4096))] == [
        pytest.approx(value, abs=1e-7) for value in NOISE
    ]
    assert uniform(5, 9) == uniform(5 + 2**64, 9)


def test_the_noise_is_even_and_uncorrelated() -> None:
    grid = np.array([[uniform(seed, position) for position in range(300)] for seed in range(100)])
    assert grid.min() >= 0
    assert grid.max() < 1
    histogram = np.histogram(grid, bins=20, range=(0, 1))[0]
    expected = grid.size / 20
    assert ((histogram - expected) ** 2 / expected).sum() < 45, "chi-squared with 19 degrees of freedom, p ~ 0.001"
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("in_order", [True, False], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.7, "top_k": 12}, {"min_p": 0.1, "temperature": 1.4}])
def test_draws_follow_the_distribution(options: dict[str, Any], in_order: bool) -> None:
    draws = 6000
    logits = logits_of(1, 1)
    probs = kept_distribution(logits[0].double().numpy(), sequence(0, **options))
    sequences = [make_sequence(f"s{i}", [1], seed=i, **options) for i in range(draws)]
    sampler = fresh(sequences)
    sampler._adds_in_order = in_order
    tokens, _ = sampler.sample(logits.expand(draws, VOCAB).clone(), sequences)
    counts = np.bincount(tokens, minlength=VOCAB)
    assert not counts[probs == 0].any()
    likely = probs * draws >= 5
    statistic = ((counts[likely] - probs[likely] * draws) ** 2 / (probs[likely] * draws)).sum()
    degrees = likely.sum() - 1
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-24])
def test_the_ends_of_the_noise_give_tokens_of_some_probability(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.engine.step.sampler.uniform", lambda seed, position: noise)
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, 10:20] = torch.randn(10, generator=torch.Generator().manual_seed(0))
    one = sequence(0)
    token = fresh([one]).sample(logits, [one])[0][0]
    assert token == (10 if noise == 0 else 19)


def test_logprobs_are_the_models_own() -> None:
    """Before temperature, penalties and bias; for those who asked, as many as they asked for."""
    sampler = Sampler(3, VOCAB, CPU)
    sequences = [
        sequence(0, temperature=0.3, logprobs=3, logit_bias={20: 100.0}, presence_penalty=1.0),
        sequence(1, temperature=0.0),
        sequence(2, logprobs=0),
    ]
    admit(sampler, sequences)
    logits = logits_of(0, 3)
    raw = torch.log_softmax(logits.double(), -1)
    tokens, logprobs = sampler.sample(logits.clone(), sequences)
    assert tokens[0] == 20
    assert logprobs is not None
    assert logprobs[1] is None
    for row, count in ((0, 3), (2, 0)):
        entry = logprobs[row]
        assert entry is not None
        assert entry.logprob == pytest.approx(raw[row, tokens[row]].item(), abs=1e-5)
        assert entry.rank == 1 + int((raw[row] > raw[row, tokens[row]]).sum())
        best = torch.sort(raw[row], descending=True)
        assert entry.top_ids == tuple(best.indices[:count].tolist())
        assert entry.top_logprobs == pytest.approx(best.values[:count].tolist(), abs=1e-5)


def test_alternatives_beyond_the_vocabulary_are_all_of_it() -> None:
    (entry,) = token_logprobs(logits_of(0, 1)[:, :5], [2], [20])
    assert sorted(entry.top_ids) == [0, 1, 2, 3, 4]


def test_plain_greedy_takes_no_detour(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [sequence(i, temperature=0.0) for i in range(4)]
    sampler = fresh(sequences)
    monkeypatch.setattr(sampler, "_edit", None)
    monkeypatch.setattr(sampler, "_choose", None)
    logits = logits_of(0, 4)
    tokens, logprobs = sampler.sample(logits, sequences)
    assert tokens == logits.argmax(-1).tolist()
    assert logprobs is None


def test_tables_exist_only_once_somebody_needs_them() -> None:
    sampler = Sampler(4, VOCAB, CPU)
    admit(sampler, [sequence(i) for i in range(4)])
    assert sampler._counts is sampler._bias is None


NOTHING_LEFT: dict[str, dict[str, Any]] = {
    "stop tokens": {"stop_token_ids": tuple(range(VOCAB)), "min_tokens": 5},
    "bad words": {"bad_words": tuple((token,) for token in range(VOCAB))},
    "allowed tokens": {"allowed_token_ids": (4, 5), "bad_words": ((4,), (5,))},
    "words of two tokens": {"bad_words": tuple((9, token) for token in range(VOCAB))},
}


@pytest.mark.parametrize("drawn", [{"temperature": 0.0}, {}, {"top_k": 3, "top_p": 0.5}])
@pytest.mark.parametrize("logprobs", [None, 3])
@pytest.mark.parametrize("settings", NOTHING_LEFT)
def test_a_row_without_a_permitted_token_ends_its_request_and_changes_no_other(
    settings: str, drawn: dict[str, Any], logprobs: int | None
) -> None:
    def rows() -> list[Sequence]:
        stuck = sequence(1, **drawn, logprobs=logprobs, **NOTHING_LEFT[settings])
        if settings == "words of two tokens":
            stuck.append(9)
        return [sequence(0, temperature=0.0), stuck, sequence(2, seed=8), sequence(3, presence_penalty=1.0, logprobs=2)]

    sampler, sequences = Sampler(4, VOCAB, CPU), rows()
    admit(sampler, sequences)
    logits = logits_of(3, 4)
    tokens, scores = sampler.sample(logits.clone(), sequences)
    assert all(0 <= token < VOCAB for token in tokens)
    stuck = sequences.pop(1)
    assert sampler.dead_ends.keys() == {stuck}
    assert sampler.dead_ends[stuck].code == "invalid_request"
    assert "leave no token" in sampler.dead_ends[stuck].message
    alone, others = Sampler(4, VOCAB, CPU), rows()
    admit(alone, others)
    del others[1]
    expected, expected_scores = alone.sample(logits[[0, 2, 3]].clone(), others)
    assert tokens[:1] + tokens[2:] == expected
    assert scores is not None
    assert expected_scores is not None
    assert scores[3] == expected_scores[2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("others", [{"temperature": 0.0}, {"seed": 4, "top_p": 0.9}, {"logprobs": 2}])
def test_a_row_of_no_finite_logits_ends_its_request_and_changes_no_other(value: float, others: dict[str, Any]) -> None:
    sequences = [sequence(0, **others), sequence(1, **others), sequence(2, **others)]
    sampler = Sampler(3, VOCAB, CPU)
    admit(sampler, sequences)
    logits = logits_of(2, 3)
    expected, _ = sampler.sample(logits.clone(), sequences)
    logits[1] = value
    tokens, scores = sampler.sample(logits, sequences)
    assert (tokens[0], tokens[2]) == (expected[0], expected[2])
    assert 0 <= tokens[1] < VOCAB
    assert {each: error.code for each, error in sampler.dead_ends.items()} == {sequences[1]: "computation_failed"}
    assert scores is None or all(math.isfinite(entry.logprob) for entry in scores if entry)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"seed": 4}, {"logprobs": 2, "top_k": 5}])
def test_a_token_whose_logit_is_no_number_is_never_chosen(value: float, options: dict[str, Any]) -> None:
    sequences = [sequence(i, **options) for i in range(3)]
    sampler = Sampler(3, VOCAB, CPU)
    admit(sampler, sequences)
    logits = logits_of(2, 3)
    logits[:, 7] = -1e30
    expected, _ = sampler.sample(logits.clone(), sequences)
    logits[:, 7] = value
    tokens, scores = sampler.sample(logits, sequences)
    assert tokens == expected
    assert not sampler.dead_ends
    assert scores is None or all(math.isfinite(entry.logprob) for entry in scores if entry)
