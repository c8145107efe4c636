"""Greedy generation with Hugging Face transformers on the CPU, timed per request.

Reads jobs from standard input, one JSON object per line, and answers each with one line of JSON, so that one
process can serve many interleaved rounds. Models stay loaded. A job:

    {"model": DIR, "prompts": [[token ids], ...], "max_tokens": 128, "mode": "sequential" | "batched",
     "threads": 1, "dtype": "bfloat16"}

``sequential`` calls ``generate`` once per prompt; ``batched`` pads on the left and calls it once for all.
End-of-sequence tokens are ignored: every request gets ``max_tokens`` tokens. The answer:

    {"wall_s": seconds, "ttft_s": [...], "finish_s": [...], "tokens": n, "tokens_per_s": n / wall_s,
     "outputs": [[token ids], ...]}

``ttft_s`` and ``finish_s`` have one entry per prompt, in seconds since the job began: as for a client that
sends all requests at once, a sequential request's times contain its wait. A malformed job answers
``{"error": ...}``.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
import transformers

TokenIds = list[list[int]]

PAD = 0  # any id does: padding is masked


@dataclass(frozen=True, slots=True)
class Job:
    """One measurement; the fields are described in the module's docstring."""

    model: str
    prompts: TokenIds
    max_tokens: int
    mode: Literal["sequential", "batched"] = "sequential"
    threads: int = 1
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.mode not in ("sequential", "batched"):
            raise ValueError(f"mode is 'sequential' or 'batched', not {self.mode!r}")
        if not self.prompts or not all(self.prompts):
            raise ValueError("every job needs prompts, and every prompt a token")


@dataclass(slots=True)
class Answer:
    """What one job measured; times in seconds since the job began."""

    wall_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    finish_s: list[float] = field(default_factory=list)
    tokens: int = 0
    tokens_per_s: float = 0.0
    outputs: TokenIds = field(default_factory=list)


class FirstTokenClock(transformers.StoppingCriteria):
    """Notes when the first token of a ``generate`` call exists; never stops it."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self.at is None:
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@lru_cache(maxsize=2)
def load(folder: str, dtype: str) -> Any:
    """Load a model with generation settings of our own: greedy, and no end-of-sequence token to stop at."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=PAD)
    return model


def left_padded(prompts: TokenIds) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask, both [prompts, longest prompt]."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


@torch.inference_mode()
def generate(model: Any, prompts: TokenIds, max_tokens: int) -> tuple[TokenIds, float]:
    """Return the generated ids of each prompt, and the ``perf_counter`` time of the first of them."""
    ids, mask = left_padded(prompts)
    clock = FirstTokenClock()
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max_tokens,
        stopping_criteria=transformers.StoppingCriteriaList([clock]),
    )
    return output[:, ids.shape[1] :].tolist(), clock.at or time.perf_counter()


def run(job: Job) -> Answer:
    """Run one job. Loading and one short warm-up call are not timed."""
    torch.set_num_threads(job.threads)
    model = load(job.model, job.dtype)
    generate(model, [job.prompts[0][:8]], 2)
    batches = [job.prompts] if job.mode == "batched" else [[prompt] for prompt in job.prompts]
    answer = Answer()
    start = time.perf_counter()
    for batch in batches:
        outputs, first = generate(model, batch, job.max_tokens)
        answer.outputs += outputs
        answer.ttft_s += [first - start] * len(batch)
        answer.finish_s += [time.perf_counter() - start] * len(batch)
    answer.wall_s = time.perf_counter() - start
    answer.tokens = sum(map(len, answer.outputs))
    answer.tokens_per_s = answer.tokens / answer.wall_s
    return answer


def main() -> None:
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            answer = asdict(run(Job(**json.loads(line))))
        except (AttributeError, TypeError, ValueError, OSError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
