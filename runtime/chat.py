"""`tandem chat`: a conversation at the terminal with a running server."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tandem.common.errors import ConfigError
from tandem.common.settings import Group, parse_settings
from tandem.runtime.client import Client, ClientSettings, ServerError

EXAMPLES = (
    ("a conversation with the server that runs here", "tandem chat"),
    ("one question", "tandem chat 'Who are you?'"),
    ("a file, with instructions", "tandem chat --system 'Sum it up in a line.' < notes.txt"),
    ("a server elsewhere", "tandem chat --url http://10.0.0.5:8000 --api-key KEY"),
)
_COMMANDS = "/clear begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig(ClientSettings):
    """Settings of `tandem chat`."""

    basics: ClassVar[Group]
    prompt: str = ""
    """Asked once, without a conversation. Empty: standard input, line by line at a terminal, else as a whole."""
    model: str = ""
    """Empty: the first that the server has."""
    system: str = ""
    """Instructions that stand before the conversation."""
    max_tokens: int | None = None
    """Most tokens of each answer. None: as many as the model's context leaves."""
    temperature: float | None = None
    """0: the likeliest token each time. None: as the model recommends."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max_tokens {self.max_tokens}: must be at least 1")


SETTINGS = ChatConfig


def main(argv: Sequence[str]) -> int:
    """Exit status: 0, or 1 when the server cannot be reached or says no. Raises ConfigError."""
    config = parse_settings(
        ChatConfig,
        argv,
        command="tandem chat",
        description="Talks to a running server: at a terminal a conversation, else one question and its answer.",
        examples=EXAMPLES,
        word="prompt",
    )
    client = Client(config)
    try:
        if not config.model:
            config = replace(config, model=json.loads(client.get("/v1/models"))["data"][0]["id"])
        if config.prompt or not sys.stdin.isatty():
            prompt = config.prompt or sys.stdin.read().strip()
            if not prompt:
                raise ConfigError("there is no question: give one as a word, or on standard input")
            _answer(client, config, [*_beginning(config), {"role": "user", "content": prompt}])
        else:
            _converse(client, config)
    except ServerError as error:
        print(f"tandem chat: {error}", file=sys.stderr)
        return 1
    return 0


def _converse(client: Client, config: ChatConfig) -> None:
    """Until the user ends it. What goes wrong with one answer ends that answer only."""
    import readline  # noqa: F401  # gives input() a history and keys

    print(f"{config.model} at {client.url}; {_COMMANDS}.")
    messages = _beginning(config)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line in ("/exit", "/quit"):
            return
        if line == "/clear":
            messages = _beginning(config)
            continue
        if line.startswith("/"):
            print(_COMMANDS)
            continue
        if not line:
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            said = _answer(client, config, asked)
        except ServerError as error:
            print(f"\n{error}", file=sys.stderr)
            continue
        if said:
            messages = [*asked, {"role": "assistant", "content": said}]


def _answer(client: Client, config: ChatConfig, messages: list[dict[str, str]]) -> str:
    """Prints it as it comes. Ctrl-C at a terminal leaves it as it is so far. Raises ServerError."""
    body: dict[str, Any] = {"model": config.model, "messages": messages, "stream": True}
    body |= {name: value for name in ("max_tokens", "temperature") if (value := getattr(config, name)) is not None}
    said = ""
    try:
        for event in client.events("/v1/chat/completions", body):
            piece = event["choices"][0]["delta"].get("content") if event.get("choices") else None
            if piece:
                said += piece
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    print(flush=True)
    return said


def _beginning(config: ChatConfig) -> list[dict[str, str]]:
    return [{"role": "system", "content": config.system}] if config.system else []
