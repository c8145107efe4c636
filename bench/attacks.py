"""Valid, and invalid, requests of one tenant that cost far more than they look: what `attack.py` sends beside a victim.

Each attack is a generator of requests that never ends. What they hold is made before the attack begins, so that the
attacker's own work takes nothing from the servers that share its machine.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

VOCABULARY = 4096
MODEL = "tandem-small"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

Sent = tuple[str, bytes]
"""Path and body."""
Attack = Callable[[], Iterator[Sent]]
Body = dict[str, Any]


def _again(path: str, body: Body) -> Attack:
    """The same request for ever."""
    return lambda: itertools.repeat((path, json.dumps(body).encode()))


def _raw(path: str, body: bytes) -> Attack:
    return lambda: itertools.repeat((path, body))


def _ask(**fields: object) -> Attack:
    return _again(COMPLETIONS, {"prompt": "a", "max_tokens": 3, **fields})


def _say(text: str = "a", **fields: object) -> Attack:
    return _again(CHAT, {"messages": [{"role": "user", "content": text}], "max_tokens": 3, **fields})


def _overlapping_rules(count: int) -> str:
    """A grammar all of whose rules match the same text: each byte of a mask is tried with each of them."""
    rules = [f"r{i}: /[a-z ]{{0,{i + 5}}}[a-m ]+/" for i in range(count)]
    return "\n".join(["start: (" + " | ".join(f"r{i}" for i in range(count)) + ")+", *rules])


def _schema(seed: int, size: int) -> Body:
    chance = random.Random(seed)
    properties = {f"f{chance.randrange(10**9)}_{i}": {"type": "string", "maxLength": i % 50 + 1} for i in range(size)}
    return {"type": "object", "properties": properties, "required": list(properties)}


def _unique_schemas() -> Iterator[Sent]:
    made = []
    for seed in range(48):
        wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": _schema(seed, 2_000)}}
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "response_format": wanted}
        made.append((CHAT, json.dumps(body).encode()))
    return itertools.cycle(made)


def _unique_expressions() -> Iterator[Sent]:
    """Each is followed in a process of its own, for which an idle one has to go."""
    for number in itertools.count():
        yield COMPLETIONS, json.dumps({"prompt": "a", "max_tokens": 3, "guided_regex": f"{number}[a-z]+"}).encode()


def _contexts() -> Iterator[Sent]:
    for number in itertools.count():
        yield "/v1/contexts", json.dumps({"name": f"c{number}", "prompt": "once upon a time " * 4}).encode()


def _nested(depth: int) -> bytes:
    return b'{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"a": ' + (
        b"[" * depth + b"]" * depth + b"}}"
    )


_LONG = "lorem ipsum dolor " * 230_000
"""4 MB."""

ATTACKS: dict[str, Attack] = {
    # A row that cannot be sampled.
    "tiny repetition_penalty": _ask(repetition_penalty=1e-40, temperature=1),
    "all tokens stop": _ask(stop_token_ids=list(range(VOCABULARY)), min_tokens=2),
    "everything biased away": _ask(logit_bias={str(i): -100 for i in range(VOCABULARY)}, temperature=1e-30),
    "nothing allowed": _ask(allowed_token_ids=[1], bad_words=["a"], logit_bias={"1": -100}, min_p=1, top_p=1e-30),
    # Masks.
    "grammar of 400 rules x n=16": _ask(guided_grammar=_overlapping_rules(400), n=16, max_tokens=50, temperature=1),
    "unique schemas": _unique_schemas,
    "unique expressions": _unique_expressions,
    "regex of many repeats": _ask(guided_regex="(([a-z]{1,100} ){1,100}){1,50}", max_tokens=50, n=8),
    # The event loop and the threads that read texts.
    "tokenize 4 MB": _again("/tokenize", {"prompt": _LONG}),
    "count tokens of 4 MB": _again(
        "/v1/messages/count_tokens", {"model": MODEL, "messages": [{"role": "user", "content": _LONG}]}
    ),
    "detokenize 8 MB of ids": _raw("/detokenize", b'{"tokens": [' + b"12, " * 2_000_000 + b"12]}"),
    "prompt of 4 million ids": _raw(COMPLETIONS, b'{"prompt": [' + b"1," * 4_000_000 + b"1]}"),
    "2 million prompts": _raw(COMPLETIONS, b'{"prompt": [' + b'"",' * 2_000_000 + b'""]}'),
    "7 MB of response_format": _say(
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"enum": [f"value {i}" for i in range(400_000)]}},
        }
    ),
    "7 MB of template variables": _say(chat_template_kwargs={f"key {i}": [i] * 3 for i in range(180_000)}),
    "100,000 messages": _again(CHAT, {"messages": [{"role": "user", "content": "a"}] * 100_000, "max_tokens": 3}),
    "20,000 tools": _say(
        tools=[{"type": "function", "function": {"name": f"f{i}", "parameters": _schema(i, 3)}} for i in range(20_000)]
    ),
    "nested 980 deep": _raw(CHAT, _nested(980)),
    "50,000 stop strings": _ask(stop=[f"stop {i}" for i in range(50_000)]),
    "bad words without end": _ask(bad_words=[f"word {i}" for i in range(50_000)]),
    "answers with all logprobs": _ask(logprobs=20, n=16, max_tokens=500, temperature=1, echo=True),
    "embeddings of 2,000 texts": _again("/v1/embeddings", {"input": ["a word or two " * 100] * 2_000}),
    # Tables and places.
    "named contexts": _contexts,
    "long answers x n=16": _ask(n=16, max_tokens=700, ignore_eos=True),
    "n=128 of long answers": _ask(n=128, max_tokens=1_500, ignore_eos=True),
}
