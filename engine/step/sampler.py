"""From logits to tokens, for a whole batch at once.

The distribution of one request, in this order:

1. log-probabilities that are reported come from the model's own logits, before anything below (as in vLLM);
2. repetition, presence and frequency penalties;
3. `logit_bias`, then `allowed_token_ids`, then tokens masked that would end a bad word, then those that the constraint
   forbids, then stop tokens while `min_tokens` is not reached, unless the constraint allows nothing else;
4. temperature 0: the largest logit, ties to the lowest id. Otherwise softmax(logits / temperature) in float32;
5. `top_k`, `top_p` and `min_p` each give a smallest probability to keep; what is below the largest of the three is
   dropped. `top_p` is measured on what `top_k` keeps. Tokens tied with the last one kept are kept;
6. one uniform number per token picks by inverse CDF, in the order of token ids; on a GPU one exponential number for
   each token of the vocabulary, by a race (`drawing.py`).

A logit that is no finite number is as good as forbidden. A row in which no token is left, or has a finite weight, ends
its own request (`Sampler.dead_ends`) and leaves the others as they are.

These numbers are integer hashes of (seed, position of the token), so a request's noise depends neither on the
batch it runs in nor on the worker nor on earlier draws.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tandem.common.errors import TandemError
from tandem.common.sampling import SamplingParams
from tandem.engine.request import TokenLogprobs
from tandem.engine.schedule.sequence import Sequence
from tandem.engine.step.constraint import TokenMasks, allows_only
from tandem.engine.step.drawing import LARGEST, column, drop_unlikely, inverse_cdf, noise_key, race, uniform
from tandem.engine.step.scores import nothing_finite, token_logprobs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Traits:
    """Which stages a request needs; computed once."""

    greedy: bool
    penalised: bool
    biased: bool
    filtered: bool
    bad_words: dict[int, list[tuple[int, ...]]]
    """Those of several tokens, by the last token but one."""
    min_tokens: int
    """0 where no stop token would have to be masked."""
    logprobs: int | None
    plain_greedy: bool
    """The next token is the largest logit and nothing else is asked for."""

    @classmethod
    def of(cls, params: SamplingParams, stop_ids: frozenset[int]) -> Traits:
        """Which stages `params` need. `stop_ids`: tokens that end this output."""
        greedy = params.temperature == 0.0
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        penalised = penalties != (1.0, 0.0, 0.0)
        biased = bool(params.logit_bias or params.allowed_token_ids) or any(len(word) == 1 for word in params.bad_words)
        min_tokens = params.min_tokens if stop_ids and not params.only_stops(stop_ids) else 0
        bad_words: dict[int, list[tuple[int, ...]]] = {}
        for word in params.bad_words:
            if len(word) > 1:
                bad_words.setdefault(word[-2], []).append(word)
        return cls(
            greedy=greedy,
            penalised=penalised,
            biased=biased,
            filtered=params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0,
            bad_words=bad_words,
            min_tokens=min_tokens,
            logprobs=params.logprobs,
            plain_greedy=greedy
            and not (penalised or biased or params.bad_words or min_tokens)
            and params.logprobs is None
            and params.constraint is None,
        )


@dataclass(frozen=True, slots=True)
class Admitted:
    """A running sequence as the sampler sees it."""

    sequence: Sequence
    traits: Traits
    row: int
    """Its row of the tables."""


class Sampler:
    """Holds what penalties and biases need, one row per running sequence.

    The tables are [max_num_seqs, vocab_size] and exist from the first request on that needs them.
    """

    def __init__(
        self, max_num_seqs: int, vocab_size: int, device: torch.device, *, batch_invariant: bool = False
    ) -> None:
        """`batch_invariant`: tokens are drawn on the CPU, row by row, as libraries may add up several rows in another
        order than one, and a GPU a row in another order each time."""
        device = torch.device("cpu") if batch_invariant else device
        self._row_by_row = batch_invariant
        self._adds_in_order = device.type == "cpu"
        self._shape = (max_num_seqs, vocab_size)
        self._masks = TokenMasks(vocab_size, device)
        self._device = device
        self._counts: Tensor | None = None
        """float32: how often a token is in the output."""
        self._in_prompt: Tensor | None = None
        self._bias: Tensor | None = None
        """float32: logit_bias, and -inf for bad words of one token and where allowed_token_ids does not allow."""
        self._stops: dict[int, Tensor] = {}
        """int64 by row: the stop tokens of a request with min_tokens."""
        self._told = False
        self._admitted: dict[Sequence, Admitted] = {}
        self.dead_ends: dict[Sequence, TandemError] = {}
        """Why no token could be chosen for a sequence of the last batch."""

    def admit(self, sequence: Sequence, row: int) -> None:
        """`sequence` got its `row`: fills the row's state from the prompt and the output so far."""
        params = sequence.request.sampling
        traits = Traits.of(params, sequence.stop_ids)
        self._admitted[sequence] = Admitted(sequence, traits, row)
        if traits.penalised:
            if self._counts is None or self._in_prompt is None:
                self._counts = torch.zeros(self._shape, device=self._device)
                self._in_prompt = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
            self._in_prompt[row].zero_()
            self._in_prompt[row, torch.tensor(sequence.tokens[: sequence.num_prompt], device=self._device)] = True
            output = torch.tensor(sequence.tokens[sequence.num_prompt :], dtype=torch.int64, device=self._device)
            self._counts[row] = torch.bincount(output, minlength=self._shape[1])
        if traits.biased:
            if self._bias is None:
                self._bias = torch.zeros(self._shape, device=self._device)
            bias = self._bias[row]
            bias.fill_(-torch.inf if params.allowed_token_ids else 0.0)
            if params.allowed_token_ids:
                bias[torch.tensor(params.allowed_token_ids, device=self._device)] = 0.0
            if params.logit_bias:
                ids = torch.tensor(list(params.logit_bias), device=self._device)
                bias[ids] += torch.tensor(list(params.logit_bias.values()), device=self._device)
            bias[[word[0] for word in params.bad_words if len(word) == 1]] = -torch.inf
        if traits.min_tokens:
            self._stops[row] = torch.tensor(sorted(sequence.stop_ids), device=self._device)

    def release(self, sequence: Sequence) -> None:
        """Forgets `sequence`, if it was admitted."""
        self._admitted.pop(sequence, None)

    def sample(self, logits: Tensor, sequences: Seq[Sequence]) -> tuple[list[int], list[TokenLogprobs | None] | None]:
        """One token per row of `logits` [R, vocab_size] float32, which it may overwrite, for `sequences` [R], all
        admitted.

        The second value holds log-probabilities for those who want them; None if nobody does. The token of a sequence
        in `dead_ends` means nothing.
        """
        admitted = self._admitted
        batch = [admitted[sequence] for sequence in sequences]
        if self.dead_ends:
            self.dead_ends = {}
        if all(each.traits.plain_greedy for each in batch):
            tokens = _argmax(logits)
            if all(map(math.isfinite, _values(logits, tokens))):  # the largest: NaN and infinity would be it
                return tokens, None
        logits = logits.to(self._device)
        if not math.isfinite(float(logits.sum())):
            self._mend(logits, batch)
        scored = [i for i, each in enumerate(batch) if each.traits.logprobs is not None]
        raw = logits[torch.tensor(scored, device=self._device)] if scored else None
        self._edit(logits, batch)
        if self._row_by_row:
            tokens = [self._choose(logits[i : i + 1], batch[i : i + 1])[0] for i in range(len(batch))]
        else:
            tokens = self._choose(logits, batch)
        if raw is None:
            self._count(tokens, batch)
            return tokens, None
        logprobs: list[TokenLogprobs | None] = [None] * len(batch)
        wanted = [batch[i].traits.logprobs or 0 for i in scored]
        for i, entry in zip(scored, token_logprobs(raw, [tokens[i] for i in scored], wanted), strict=True):
            logprobs[i] = entry
        self._count(tokens, batch)
        return tokens, logprobs

    def _mend(self, logits: Tensor, batch: Seq[Admitted]) -> None:
        """Takes what is not finite out of the model's logits: a token for which they hold no number, because its row of
        the last layer is damaged, is never chosen; a request for which they hold none at all ends."""
        finite = torch.isfinite(logits)
        logits.masked_fill_(~finite, -torch.inf)
        some = finite.any(dim=1).tolist()
        for i, each in enumerate(batch):
            if not some[i]:
                self.dead_ends[each.sequence] = nothing_finite()
                logits[i] = 0.0
        if not self._told and not all(finite[i].all() for i, each in enumerate(some) if each):
            self._told = True
            logger.warning("the model's logits are not all finite: these tokens are never chosen (said once)")

    def _edit(self, logits: Tensor, batch: Seq[Admitted]) -> None:
        penalised = [i for i, each in enumerate(batch) if each.traits.penalised]
        if penalised and self._counts is not None and self._in_prompt is not None:
            index, rows = self._rows(penalised, batch)
            params = [batch[i].sequence.request.sampling for i in penalised]
            counts = self._counts[rows]
            appeared = counts > 0
            x = logits[index]
            repetition = self._column([p.repetition_penalty for p in params])
            x = torch.where(appeared | self._in_prompt[rows], torch.where(x > 0, x / repetition, x * repetition), x)
            x -= self._column([p.frequency_penalty for p in params]) * counts
            x -= self._column([p.presence_penalty for p in params]) * appeared
            logits[index] = x
        biased = [i for i, each in enumerate(batch) if each.traits.biased]
        if biased and self._bias is not None:
            index, rows = self._rows(biased, batch)
            logits[index] += self._bias[rows]
        for i, each in enumerate(batch):
            if each.traits.bad_words and (endings := _word_endings(each)):
                logits[i, torch.tensor(endings, device=self._device)] = -torch.inf
        must_stop = self._constrain(logits, batch)
        for i, each in enumerate(batch):
            if each.sequence.num_output < each.traits.min_tokens and i not in must_stop:
                logits[i, self._stops[each.row]] = -torch.inf

    def _constrain(self, logits: Tensor, batch: Seq[Admitted]) -> list[int]:
        """Masks what constraints forbid. Returns the rows in which only stop tokens are left.

        A sequence whose constraint forbids all that the rest allows is in `dead_ends` afterwards; its row is then of no
        use."""
        guided = [(i, each.sequence.guide) for i, each in enumerate(batch) if each.sequence.guide is not None]
        if not guided:
            return []
        bits = self._masks.of([guide for _, guide in guided])
        index = torch.tensor([i for i, _ in guided], device=self._device)
        masked = logits[index].masked_fill_(~self._masks.unpack(bits), -torch.inf)
        for row, highest in enumerate(masked.amax(dim=1).tolist()):
            if highest == -torch.inf:
                self.dead_ends[batch[guided[row][0]].sequence] = TandemError(
                    "invalid_request", "the constraint and the request's other settings leave no token to choose"
                )
                masked[row] = 0.0
        logits[index] = masked
        return [i for row, (i, _) in enumerate(guided) if allows_only(bits[row], batch[i].sequence.stop_ids)]

    def _choose(self, logits: Tensor, batch: Seq[Admitted]) -> list[int]:
        random = [i for i, each in enumerate(batch) if not each.traits.greedy]
        everybody = len(random) == len(batch)
        tokens = [0] * len(batch) if everybody else _argmax(logits)
        weights = [1.0] * len(batch) if everybody else _values(logits, tokens)
        if not random:
            return self._without_dead_ends(tokens, weights, logits, batch)
        x = logits if everybody else logits[torch.tensor(random, device=self._device)]
        chosen = [batch[i].sequence for i in random]
        scale = self._column([1.0 / max(sequence.request.sampling.temperature, 1e-5) for sequence in chosen])
        probs = torch.softmax(x * scale, dim=-1)
        largest = self._shape[1] if self._adds_in_order else LARGEST
        filtered = [place for place, i in enumerate(random) if batch[i].traits.filtered]
        if len(filtered) == len(chosen):
            probs = drop_unlikely(probs, [sequence.request.sampling for sequence in chosen], largest)
        elif filtered:
            index = torch.tensor(filtered, device=self._device)
            probs[index] = drop_unlikely(probs[index], [chosen[i].request.sampling for i in filtered], largest)
        places = [(sequence.seed, len(sequence.tokens)) for sequence in chosen]
        if self._adds_in_order:
            drawn = inverse_cdf(probs, self._column([uniform(*place) for place in places]))
        else:
            drawn = race(probs, [noise_key(*place) for place in places])
        for i, token, total in zip(random, *drawn, strict=True):
            tokens[i], weights[i] = token, total if total > 0.0 else math.nan
        return self._without_dead_ends(tokens, weights, logits, batch)

    def _without_dead_ends(
        self, tokens: list[int], weights: list[float], logits: Tensor, batch: Seq[Admitted]
    ) -> list[int]:
        """`tokens`, where the weight that a token was chosen by is finite. The others could not be chosen at all: their
        requests end, and the token in their place means nothing."""
        for i, weight in enumerate(weights):
            if not math.isfinite(weight):
                tokens[i] = 0
                sequence = batch[i].sequence
                if sequence not in self.dead_ends:
                    self.dead_ends[sequence] = _dead_end(batch[i], float(logits[i].max()))
        return tokens

    def _count(self, tokens: list[int], batch: Seq[Admitted]) -> None:
        penalised = [i for i, each in enumerate(batch) if each.traits.penalised]
        if penalised and self._counts is not None:
            _, rows = self._rows(penalised, batch)
            picked = torch.tensor([tokens[i] for i in penalised], device=self._device)
            self._counts[rows, picked] += 1.0

    def _rows(self, indices: list[int], batch: Seq[Admitted]) -> tuple[Tensor, Tensor]:
        rows = [batch[i].row for i in indices]
        return torch.tensor(indices, device=self._device), torch.tensor(rows, device=self._device)

    def _column(self, values: list[float]) -> Tensor:
        return column(values, self._device)


def _word_endings(admitted: Admitted) -> list[int]:
    """Tokens that would complete a bad word of several tokens in the output of a sequence."""
    sequence = admitted.sequence
    words = admitted.traits.bad_words.get(sequence.last_token, ())
    fitting = [word for word in words if len(word) <= sequence.num_output + 1]
    return [word[-1] for word in fitting if tuple(sequence.tokens[1 - len(word) :]) == word[:-1]]


def _dead_end(admitted: Admitted, highest: float) -> TandemError:
    """Why none of the logits of a sequence, as its settings left them, can be chosen; `highest` is their largest."""
    if highest != -math.inf:
        return TandemError("computation_failed", "the logits, as the request's settings change them, are not finite")
    sequence, params = admitted.sequence, admitted.sequence.request.sampling
    settings = {
        "allowed_token_ids": bool(params.allowed_token_ids),
        "bad_words": bool(params.bad_words),
        "min_tokens with its stop tokens": sequence.num_output < admitted.traits.min_tokens,
        "the constraint": params.constraint is not None,
    }
    named = ", ".join(name for name, used in settings.items() if used)
    return TandemError("invalid_request", f"{named} leave no token to choose at token {sequence.num_output}")


def _argmax(logits: Tensor) -> list[int]:
    """The largest of each row, the lowest id among equals."""
    if logits.device.type == "cpu":
        # numpy's is an order of magnitude faster on one thread, and defined to return the first.
        tokens: list[int] = logits.numpy().argmax(axis=-1).tolist()
        return tokens
    tokens = logits.argmax(dim=-1).tolist()
    return tokens


def _values(logits: Tensor, tokens: list[int]) -> list[float]:
    """The logit of one token of each row."""
    values: list[float]
    if logits.device.type == "cpu":
        values = logits.numpy()[np.arange(len(tokens)), tokens].tolist()
    else:
        values = logits.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    return values
