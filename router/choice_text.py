"""Output tokens of one choice turned into text that may be shown, each token reported with the text it belongs to."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tandem.proto.worker_pb2 import TokenLogprobs
from tandem.router.detokenizer import Detokenizer
from tandem.router.stop import StopMatcher


@dataclass(slots=True)
class Piece:
    """What became visible. `logprobs` is as long as `token_ids`, or empty where they were not asked for."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class ChoiceText:
    """Detokenizes, finds stop strings, holds back what is not certain.

    Every generated token is reported exactly once, no earlier than its text. The text ends before the stop string; the
    tokens that make it up are reported, as vLLM does, so that token ids and usage agree.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        keep_tokens: bool = False,
        include_stop: bool = False,
    ) -> None:
        """`keep_tokens`: whether token ids and logprobs will be asked for. `min_tokens`: earlier no stop string
        counts. `include_stop`: leave the stop string in the text."""
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops)
        self._has_stops = bool(stops)
        self._min_tokens = min_tokens
        self._keep_tokens = keep_tokens
        self._include_stop = include_stop
        self._decoded = 0
        self._shown = 0
        self._text: list[str] = []
        self._waiting: deque[tuple[int, int, TokenLogprobs | None]] = deque()
        self.num_tokens = 0
        self.matched: str | None = None
        """The stop string that was found. Nothing may be fed after it."""

    @property
    def has_text(self) -> bool:
        return bool(self._text)

    @property
    def buffered(self) -> int:
        """Pieces of text and tokens kept for the reader."""
        return len(self._waiting) + len(self._text)

    def feed(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()) -> None:
        """Stops at the token that completes a stop string; later ones of `token_ids` do not count."""
        if not self._has_stops and not self._keep_tokens:
            self.num_tokens += len(token_ids)
            self._show(self._detokenizer.feed(token_ids))
            return
        for index, token_id in enumerate(token_ids):
            self.num_tokens += 1
            text = self._detokenizer.feed((token_id,))
            self._decoded += len(text)
            if self._keep_tokens:
                end = self._decoded + self._detokenizer.holding
                self._waiting.append((end, token_id, logprobs[index] if logprobs else None))
            if self._has_stops and self.num_tokens > self._min_tokens:
                text = self._match(text)
            self._show(text)
            if self.matched is not None:
                return

    def count_silent(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """A token that ended the output and is no part of its text."""
        self.num_tokens += 1
        if self._keep_tokens:
            self._waiting.append((self._decoded, token_id, logprobs))

    def finish(self) -> None:
        """The output is complete: what is held back is shown."""
        if self.matched is None:
            text = self._detokenizer.flush()
            if self._has_stops:
                text = self._match(text)
                if self.matched is None:
                    text += self._matcher.flush()
            self._show(text)
        self._shown = max(self._shown, self._decoded) + 1

    def take(self) -> Piece:
        """What became visible since the last call."""
        text = "".join(self._text)
        self._text.clear()
        piece = Piece(text)
        while self._waiting and self._waiting[0][0] <= self._shown:
            _, token_id, logprobs = self._waiting.popleft()
            piece.token_ids.append(token_id)
            if logprobs is not None:
                piece.logprobs.append(logprobs)
        return piece

    def _match(self, text: str) -> str:
        result = self._matcher.feed(text)
        self.matched = result.matched
        return result.text + result.matched if result.matched is not None and self._include_stop else result.text

    def _show(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._shown += len(text)
