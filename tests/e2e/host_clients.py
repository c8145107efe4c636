"""Clients of a platform on several hosts that stream without a pause and compare every token."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from tests.e2e.hosts import MODEL, Hosts
from tests.e2e.serving import Askers, data_lines

Question = Mapping[str, Any]


class HostClients(Askers):
    """`with HostClients(hosts, questions, count) as clients`: each asks one question after the other, as streams, and
    the tokens are those of its first answer. The block fails if a request did or a token was another one; where
    `strict` is False both are counted."""

    def __init__(self, hosts: Hosts, questions: Sequence[Question], count: int, *, strict: bool = True) -> None:
        super().__init__(count)
        self.failed: list[str] = []
        self.different: list[str] = []
        self.longest_gap_s = 0.0
        """Between two tokens of an answer, or from the question to the first; since `forget_gaps`."""
        self.last_failure_at = 0.0
        """time.monotonic()"""
        self._hosts, self._questions, self._strict = hosts, questions, strict
        with hosts.inside() as http:
            self._right = [self._ask(http, question) for question in questions]
        self.longest_gap_s = 0.0

    def forget_gaps(self) -> None:
        with self._lock:
            self.longest_gap_s = 0.0

    def _run(self, number: int) -> None:
        turn = number
        while not self._stopping.is_set():
            with self._hosts.inside() as http:
                turn += 1
                index = turn % len(self._questions)
                try:
                    tokens = self._ask(http, self._questions[index])
                except (AssertionError, httpx.HTTPError) as error:
                    self._note(self.failed, repr(error))
                    time.sleep(0.1)
                    continue
                if tokens != self._right[index]:
                    self._note(self.different, f"{self._questions[index]}: {tokens} instead of {self._right[index]}")
                with self._lock:
                    self.answered += 1

    def _note(self, faults: list[str], text: str) -> None:
        with self._lock:
            faults.append(text)
            self.last_failure_at = time.monotonic()
            if self._strict:
                self.wrong.append(text)

    def _ask(self, http: httpx.Client, question: Question) -> list[int]:
        """The tokens of one stream. Raises AssertionError for one that is not whole, httpx.HTTPError."""
        body = {"model": MODEL, "temperature": 0, "ignore_eos": True, "return_token_ids": True, "stream": True}
        tokens: list[int] = []
        before, line = time.monotonic(), ""
        with http.stream("POST", "/v1/completions", json=body | dict(question)) as answer:
            assert answer.status_code == 200, answer.read()
            for line in data_lines(answer):
                if line == "[DONE]":
                    break
                event = json.loads(line)
                new = [token for choice in event.get("choices", ()) for token in choice.get("token_ids") or ()]
                if new:
                    now = time.monotonic()
                    with self._lock:
                        self.longest_gap_s = max(self.longest_gap_s, now - before)
                    before = now
                    tokens += new
        assert line == "[DONE]", f"the stream ended with {line[:300]}"
        assert len(tokens) == question["max_tokens"], tokens
        return tokens
