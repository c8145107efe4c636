"""A small HTTP client of a running server, for `tandem chat` and `tandem status`: standard library only, as a terminal
command should start at once."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import urlsplit

from tandem.common.errors import ConfigError
from tandem.common.settings import Group
from tandem.runtime.running import only_running

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 600.0
"""Longest time between two pieces of an answer."""


@dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """Settings of every command that asks a running server."""

    basics: ClassVar[Group]
    """Basics"""
    url: str = ""
    """Address of the server. Empty: the `tandem serve` that runs here, or http://127.0.0.1:8000."""
    api_key: list[str] = field(default_factory=list, repr=False)
    """What the server asks for. Empty: the variable OPENAI_API_KEY, if it is set."""


class ServerError(Exception):
    """The server cannot be reached, or said no. The message is for people."""


class Client:
    """A client of one server; each call opens a connection of its own and blocks."""

    def __init__(self, settings: ClientSettings) -> None:
        """Raises ConfigError."""
        url = settings.url
        if not url:
            running = only_running("--url")
            url = running.url if running is not None else DEFAULT_URL
        self.url = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
        self._key = settings.api_key[-1] if settings.api_key else os.environ.get("OPENAI_API_KEY", "")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url {url}: must be http://HOST:PORT")
        self._parts = parts

    def get(self, path: str, *, well: Sequence[int] = (200,)) -> str:
        """Raises ServerError unless the status is one of `well`."""
        connection, response = self._ask("GET", path, None, 10.0)
        with contextlib.closing(connection):
            body = response.read().decode(errors="replace")
            if response.status not in well:
                raise ServerError(self._refusal(response.status, body))
            return body

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Posts, and yields the events of the stream as they come. Raises ServerError, also in mid-stream."""
        connection, response = self._ask("POST", path, body, TIMEOUT_S)
        with contextlib.closing(connection):
            if response.status != 200:
                raise ServerError(self._refusal(response.status, response.read().decode(errors="replace")))
            try:
                for line in response:
                    data = line.decode(errors="replace").strip().removeprefix("data: ")
                    if data == "[DONE]":
                        return
                    if data.startswith("{"):
                        event = json.loads(data)
                        if "error" in event:
                            raise ServerError(str(event["error"].get("message", event["error"])))
                        yield event
            except (OSError, http.client.HTTPException) as error:
                raise ServerError(f"the connection to {self.url} broke ({error})") from error
        raise ServerError(f"{self.url} ended the answer before it was whole")

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=timeout_s)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        try:
            connection.request(method, self._parts.path + path, json.dumps(body) if body is not None else None, headers)
            return connection, connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ServerError(f"no server answers at {self.url} ({reason}); start one with `tandem serve`") from error

    def _refusal(self, status: int, body: str) -> str:
        try:
            message = json.loads(body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = body.strip()[:200] or "without a reason"
        hint = " (--api-key, or TANDEM_API_KEY)" if status == 401 else ""
        return f"{self.url} answered {status}: {message}{hint}"
