"""Requests that nobody has traced yet, made here: agents that call tools, at the workers' real block size.

An agent begins with the prompt of its application, and every turn adds what the last one answered and what a tool
said. So prompts grow long, most of each is cached on one worker, and what is new is short.
"""

from __future__ import annotations

import random
from itertools import count

from mock_pool import Request

BLOCK = 16
APPLICATIONS = 8
APPLICATION_TOKENS = 4096
TURNS = (4, 24)
TOOL_TOKENS = (64, 2048)
ANSWER_TOKENS = (32, 384)
TOKEN_S = 0.01
"""Of an answer, for the client: the next turn comes after all of them and the tool."""
TOOL_S = (0.5, 6.0)


def agents(sessions: int, seconds: float, seed: int) -> list[Request]:
    """Sessions that begin in Poisson order within `seconds`."""
    rng = random.Random(seed)
    fresh = count()
    starts = [_blocks(fresh, APPLICATION_TOKENS) for _ in range(APPLICATIONS)]
    requests = []
    for _ in range(sessions):
        at = rng.uniform(0.0, seconds)
        blocks, prompt = rng.choice(starts), APPLICATION_TOKENS
        for _ in range(rng.randint(*TURNS)):
            prompt += rng.randint(*TOOL_TOKENS)
            blocks = (*blocks[: (prompt // BLOCK)], *_blocks(fresh, prompt - len(blocks) * BLOCK))
            answer = rng.randint(*ANSWER_TOKENS)
            requests.append(Request(at, prompt, answer, blocks))
            prompt += answer
            blocks = blocks[: requests[-1].prompt_tokens // BLOCK]
            at += TOKEN_S * answer + rng.uniform(*TOOL_S)
    return sorted(requests, key=lambda request: request.arrival_s)


def _blocks(fresh: count[int], tokens: int) -> tuple[int, ...]:
    return tuple(next(fresh) for _ in range(-(-tokens // BLOCK)))
