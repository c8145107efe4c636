"""Opens `tokenizer.json`, which may be anything: what cannot be used is an error that names it, before anybody is
served."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from tandem.common.checkpoint import MAX_LONG_BYTES, read_text
from tandem.common.errors import ConfigError, TandemError

MAX_ADDED_TOKENS = 1 << 15
"""The library's time grows with their square: these take ten seconds. Models have a few thousand at most."""
PROBE_S = 1.0
"""Processor time in which a few hundred characters are tokenized; an expression that goes back and forth takes more."""
_PROBES = tuple(f"{unit * 200}!" for unit in ("a", " ", "1", "a1 ", "'s", "é", "\n\t", "中", ".-", "Ab", "😀"))


class _File(msgspec.Struct):
    added_tokens: list[Any] | None = None


def open_tokenizer(path: Path) -> Tokenizer:
    """Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(
            f"{path}: is missing; where there is only tokenizer.model or vocab.json, make it with "
            "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    text = read_text(path, MAX_LONG_BYTES)
    try:
        added = len(msgspec.json.decode(text, type=_File).added_tokens or ())
        if added > MAX_ADDED_TOKENS:
            raise ConfigError(f"{path}: added_tokens: {added} are more than the {MAX_ADDED_TOKENS} that can be read")
        with whole_failures():
            tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _try(tokenizer)
    except ConfigError:
        raise
    except Exception as error:  # the library raises bare Exception
        problem = " ".join(str(error)[:200].split())
        raise ConfigError(f"{path}: cannot be used as a tokenizer ({problem})") from error
    return tokenizer


@contextlib.contextmanager
def whole_failures() -> Iterator[None]:
    """A panic of the library is no Exception; here it becomes one."""
    try:
        yield
    except (Exception, asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise TokenizerPanic(str(error)[:200]) from error


class TokenizerPanic(TandemError):
    def __init__(self, problem: str) -> None:
        super().__init__("invalid_request", f"the model's tokenizer fails on this text ({problem})")


def _try(tokenizer: Tokenizer) -> None:
    """Raises what the library does, ConfigError where it takes too long."""
    for probe in _PROBES:
        started = time.thread_time()
        with whole_failures():
            ids = tokenizer.encode_batch_fast([probe], add_special_tokens=True)[0].ids
            tokenizer.decode(ids)
        if time.thread_time() - started > PROBE_S:
            raise TimeoutError(f"{len(probe)} characters take it more than {PROBE_S:g} s")
