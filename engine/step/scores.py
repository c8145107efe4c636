"""Log-probabilities under the model's own logits: of chosen tokens, and of the tokens of a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from tandem.common.errors import TandemError
from tandem.engine.request import TokenLogprobs
from tandem.engine.schedule.plan import Chunk


def token_logprobs(raw: Tensor, tokens: Seq[int], wanted: Seq[int]) -> list[TokenLogprobs]:
    """Scores `tokens` [R] under the model's logits `raw` [R, vocab_size] float32, with `wanted[i]` alternatives each.

    The rank counts strictly more likely tokens; alternatives of equal probability are listed by id.
    """
    chosen = torch.tensor(tokens, device=raw.device).unsqueeze(1)
    # Row by row: together they may be added up in another order.
    norm = torch.stack([row.logsumexp(dim=-1, keepdim=True) for row in raw])
    value = raw.gather(1, chosen)
    ranks = ((raw > value).sum(dim=-1) + 1).tolist()
    logprobs = (value - norm).squeeze(1).tolist()
    most = min(max(wanted), raw.shape[1])
    top = torch.topk(raw, most, dim=-1) if most else None
    top_ids = top.indices.tolist() if top is not None else [[]] * len(tokens)
    top_values = (top.values - norm).tolist() if top is not None else [[]] * len(tokens)
    entries: list[TokenLogprobs] = []
    for i, count in enumerate(wanted):
        best = sorted(zip(top_values[i], top_ids[i], strict=True), key=lambda pair: (-pair[0], pair[1]))[:count]
        entries.append(
            TokenLogprobs(logprobs[i], ranks[i], tuple(token for _, token in best), tuple(value for value, _ in best))
        )
    return entries


def prompt_scores(chunk: Chunk, logits: Tensor) -> list[TokenLogprobs]:
    """Scores the prompt tokens that follow the rows of `chunk`, whose `logits` [num_tokens, vocab_size] these are; to
    be called before the chunk counts as computed. Raises TandemError where the model computed no number for a row."""
    sequence = chunk.sequence
    start = sequence.num_computed + 1
    targets = sequence.tokens[start : min(start + chunk.num_tokens, sequence.num_prompt)]
    if not targets:
        return []
    rows = logits[: len(targets)]
    finite = math.isfinite(float(rows.sum()))
    if not finite:
        rows = rows.masked_fill(~torch.isfinite(rows), -torch.inf)
    scores = token_logprobs(rows, targets, [sequence.request.sampling.prompt_logprobs or 0] * len(targets))
    if not finite and any(math.isnan(score.logprob) for score in scores):
        raise nothing_finite()
    return scores


def nothing_finite() -> TandemError:
    """What a request is told whose logits hold no number in a row."""
    return TandemError("computation_failed", "the model computed no finite number for any token")
