"""Runs what one client library can do against a server and prints a JSON line per feature.

No part of Tandem is imported: a script that calls this may run in an environment that has the client only.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import traceback
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import version
from typing import TypeVar

E = TypeVar("E", bound=Exception)

Feature = Callable[[str, str], Awaitable[None] | None]
"""Takes the base URL of the API (ends with /v1) and the name of the model; raises where something is wrong."""

MESSAGES = [{"role": "user", "content": "Who are you?"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer", "enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
"""Arguments of the tool `get_weather`; so narrow that any model calls it well."""


def check_weather(arguments: Mapping[str, object]) -> None:
    assert arguments["city"] in ("Paris", "Rome"), arguments
    assert arguments["days"] in (1, 2), arguments


def error_of(kind: type[E], call: Callable[[], object]) -> E:
    """The error that `call` raises, which must be of `kind`."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def run(package: str, features: Mapping[str, Feature]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True, help="http://HOST:PORT/v1")
    parser.add_argument("--model", required=True)
    given = parser.parse_args()
    for name, feature in features.items():
        try:
            outcome = feature(given.url, given.model)
            if inspect.isawaitable(outcome):
                asyncio.run(_wait(outcome))
            result = "ok"
        except BaseException as error:  # a client may raise anything; the table says what
            traceback.print_exc()
            result = f"{type(error).__name__}: {error}"[:300]
        print(json.dumps({"client": f"{package} {version(package)}", "feature": name, "result": result}), flush=True)


async def _wait(outcome: Awaitable[None]) -> None:
    await outcome
