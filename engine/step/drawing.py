"""How tokens are drawn from probabilities: which are kept, and which of those it is.

On a CPU the whole vocabulary is sorted and added up, which numpy and torch do fast and in order. A GPU adds up in
parallel, so that a sum can fall from one token to the next and an inverse CDF pick a token of probability 0; and
sorting a vocabulary costs more than its last layer. There the largest are selected, and the draw is a race: token t
arrives after an exponential time of rate p(t), and the first one wins with probability p(t) (Gumbel-max in other
words). A token of probability 0 never arrives.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from tandem.common.sampling import SamplingParams

LARGEST = 1024
"""Tokens that a GPU selects first; a nucleus is rarely larger."""
RACE_PIECE = 1 << 22
"""Elements of which a race makes noise at a time: its numbers of 64 bits take 32 MiB."""

_MASK64 = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def splitmix64(value: int) -> int:
    """An even and unpredictable looking function of `value` (SplitMix64: Steele, Lea, Flood 2014)."""
    value = (value + _GOLDEN) & _MASK64
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK64
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK64
    return value ^ (value >> 31)


def noise_key(seed: int, position: int) -> int:
    """64 bits from which all noise of one token of a request comes."""
    return splitmix64(splitmix64(seed & _MASK64) ^ position)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 24 bits, from (seed, position)."""
    return (noise_key(seed, position) >> 40) * 2.0**-24


def drop_unlikely(probs: Tensor, params: Seq[SamplingParams], largest: int) -> Tensor:
    """`probs` [F, vocab_size] with zeros where top_k, top_p and min_p of the row drop a token.

    The smallest value kept is all that is needed. It is looked for among the `largest` values of a row, or as many as
    top_k asks for, and among all of them where it is not there.
    """
    vocab_size = probs.shape[1]
    top_k = [min(p.top_k or vocab_size, vocab_size) for p in params]
    count = max(largest, *(k for k in top_k if k < vocab_size), 1)
    if count < vocab_size:
        smallest = _smallest_kept(probs, params, top_k, count)
        if smallest is not None:
            return probs * (probs >= smallest)
    smallest = _smallest_kept(probs, params, top_k, vocab_size)
    assert smallest is not None
    return probs * (probs >= smallest)


def _smallest_kept(probs: Tensor, params: Seq[SamplingParams], top_k: list[int], count: int) -> Tensor | None:
    """The smallest probability to keep [F, 1]; None where it is not among the `count` largest of some row."""
    vocab_size, device = probs.shape[1], probs.device
    ordered = _ascending(probs, count)
    largest = ordered[:, -1:]
    smallest = column([p.min_p for p in params], device) * largest
    below = torch.zeros_like(largest)
    if count < vocab_size:
        below = (probs.sum(dim=-1, keepdim=True) - ordered.sum(dim=-1, keepdim=True)).clamp_(min=0.0)
    # The mass that top_k drops is, for top_p, neither kept nor part of the whole.
    dropped = torch.zeros_like(largest)
    if any(k < vocab_size for k in top_k):
        bounded = torch.tensor([[k < vocab_size] for k in top_k], device=device)
        places = torch.tensor([[max(count - k, 0)] for k in top_k], device=device)
        by_top_k = torch.where(bounded, ordered.gather(1, places), 0.0)
        smallest = torch.maximum(smallest, by_top_k)
        dropped = torch.where(ordered < by_top_k, ordered, 0.0).sum(dim=-1, keepdim=True) + below * bounded
    if any(p.top_p < 1.0 for p in params):
        top_p = column([p.top_p for p in params], device)
        mass = ordered.cumsum(dim=-1) + below
        unneeded = dropped + (mass[:, -1:] - dropped) * (1.0 - top_p)
        if count < vocab_size and bool(((top_p < 1.0) & (unneeded < below)).any()):
            return None
        first = torch.searchsorted(mass, unneeded, right=True).clamp_(max=count - 1)
        smallest = torch.maximum(smallest, torch.where(top_p < 1.0, ordered.gather(1, first), 0.0))
    # The most likely token stays, whatever rounding does.
    return smallest.minimum(largest)


def _ascending(probs: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, from small to large."""
    if count < probs.shape[1]:
        return probs.topk(count, dim=-1).values.flip(-1)
    if probs.device.type == "cpu":
        # numpy sorts floats with vector instructions, 25 times faster than torch on one thread.
        return torch.from_numpy(np.sort(probs.numpy(), axis=-1))
    return torch.sort(probs, dim=-1).values


def inverse_cdf(probs: Tensor, noise: Tensor) -> tuple[list[int], list[float]]:
    """Picks from `probs` [R, vocab_size], not normalised, with `noise` [R, 1] in [0, 1), where sums are added up in
    order. The second value is each row's sum: where that is not finite and above 0, the pick means nothing and may lie
    outside the vocabulary."""
    cdf = probs.cumsum(dim=-1)
    total = cdf[:, -1:].contiguous()
    picked = torch.searchsorted(cdf, noise * total, right=True)
    # Where rounding reaches the total, the last token of any probability.
    tokens: list[int] = torch.minimum(picked, torch.searchsorted(cdf, total)).squeeze(1).tolist()
    sums: list[float] = total.squeeze(1).tolist()
    return tokens, sums


def race(probs: Tensor, keys: list[int]) -> tuple[list[int], list[float]]:
    """Picks from `probs` [R, vocab_size], not normalised, with the noise of `keys` [R], a row by itself. The second
    value is the weight of each pick: where that is not finite and above 0, the pick means nothing."""
    signed = torch.tensor([_signed(key) for key in keys], dtype=torch.int64, device=probs.device).unsqueeze(1)
    rows = max(RACE_PIECE // probs.shape[1], 1)
    picked = torch.cat(
        [
            (piece / exponentials(key, probs.shape[1])).argmax(dim=-1, keepdim=True)
            for piece, key in zip(torch.split(probs, rows), torch.split(signed, rows), strict=True)
        ]
    )
    tokens: list[int] = picked.squeeze(1).tolist()
    weights: list[float] = probs.gather(1, picked).squeeze(1).tolist()
    return tokens, weights


def exponentials(keys: Tensor, vocab_size: int) -> Tensor:
    """Exponentially distributed times of mean 1, float32 [R, vocab_size] from `keys` int64 [R, 1]: 31 bits each, none
    of them 0 or infinite, those that can win a race with all their digits."""
    noise = keys + torch.arange(1, vocab_size + 1, device=keys.device) * _signed(_GOLDEN)
    noise = (noise ^ _shifted(noise, 30)) * _signed(_FIRST)
    noise = (noise ^ _shifted(noise, 27)) * _signed(_SECOND)
    uniforms = (_shifted(noise ^ _shifted(noise, 31), 33).to(torch.float32) + 0.5) * 2.0**-31
    return torch.log1p(-uniforms.clamp_(max=1.0 - 2.0**-24)).neg_()


def _shifted(values: Tensor, bits: int) -> Tensor:
    """`values` int64, as if they had no sign, shifted to the right."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def column(values: list[float], device: torch.device) -> Tensor:
    """float32 [len(values), 1]"""
    return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)
