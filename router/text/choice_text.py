"""Output tokens of one choice turned into text that may be shown, each token reported with the text it belongs to."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tandem.proto.worker_pb2 import TokenLogprobs
from tandem.router.text.detokenizer import Detokenizer
from tandem.router.text.stop import StopMatcher
from tandem.router.text.tokenizer import ModelText


@dataclass(slots=True)
class Piece:
    """What became visible. `logprobs` is as long as `token_ids`, or empty where they were not asked for."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    token_texts: list[str] = field(default_factory=list)
    """What each token adds to the text: nothing before the last token of a character. Of one that the text leaves out,
    its name."""
    offsets: list[int] = field(default_factory=list)
    """Characters of the whole text before each token."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(slots=True)
class _Token:
    token_id: int
    text: str
    offset: int
    end: int
    """Characters of the text that have to be visible first."""
    logprobs: TokenLogprobs | None


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
        self._waiting: deque[_Token] = deque()
        self._last: _Token | None = None
        """The last token that is part of the text."""
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
            offset, self._decoded = self._decoded, self._decoded + len(text)
            if self._keep_tokens:
                end = self._decoded + self._detokenizer.holding
                hidden = self._detokenizer.hidden_name(token_id)
                token = _Token(token_id, hidden or text, offset, end, logprobs[index] if logprobs else None)
                self._waiting.append(token)
                if not hidden:
                    self._last = token
                elif self._last is not None:
                    self._last.text += text
                    self._last.end = end
            if self._has_stops and self.num_tokens > self._min_tokens:
                text = self._match(text)
            self._show(text)
            if self.matched is not None:
                return

    def count_silent(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """A token that ended the output and is no part of its text."""
        self.num_tokens += 1
        self._flush()
        if self._keep_tokens:
            name = self._detokenizer.token_text(token_id)
            self._waiting.append(_Token(token_id, name, self._decoded, self._decoded, logprobs))

    def finish(self) -> None:
        """The output is complete: what is held back is shown."""
        if self.matched is None:
            self._flush()
        if self.matched is None and self._has_stops:
            self._show(self._matcher.flush())
        self._shown = max(self._shown, self._decoded) + 1

    def take(self) -> Piece:
        """What became visible since the last call."""
        text = "".join(self._text)
        self._text.clear()
        piece = Piece(text)
        while self._waiting and self._waiting[0].end <= self._shown:
            token = self._waiting.popleft()
            piece.token_ids.append(token.token_id)
            piece.token_texts.append(token.text)
            piece.offsets.append(token.offset)
            if token.logprobs is not None:
                piece.logprobs.append(token.logprobs)
        return piece

    def _flush(self) -> None:
        """What is held back of a broken character belongs to the token that came last."""
        text = self._detokenizer.flush()
        self._decoded += len(text)
        if self._last is not None:
            self._last.text += text
        self._show(self._match(text) if self._has_stops else text)

    def _match(self, text: str) -> str:
        result = self._matcher.feed(text)
        self.matched = result.matched
        return result.text + result.matched if result.matched is not None and self._include_stop else result.text

    def _show(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._shown += len(text)


def prompt_piece(text: ModelText, token_ids: Sequence[int], shown: str) -> Piece:
    """A prompt's tokens with their places in the text `shown` of it, which need not have the special ones."""
    detokenizer = Detokenizer(text, ())
    piece = Piece(shown, list(token_ids))
    place = 0
    for token_id in token_ids:
        piece.offsets.append(min(place, len(shown)))
        added = detokenizer.feed((token_id,))
        if text.is_special_id(token_id):
            added = text.token_text(token_id)
            place += len(added) if shown.startswith(added, place) else 0
        else:
            place += len(added)
        piece.token_texts.append(added)
    if piece.token_texts:
        piece.token_texts[-1] += detokenizer.flush()
    return piece


def shifted(piece: Piece, characters: int) -> Piece:
    """The same after so many characters."""
    return replace(piece, offsets=[characters + offset for offset in piece.offsets])


def joined(one: Piece, other: Piece) -> Piece:
    """Two pieces, one after the other, as one."""
    return Piece(
        one.text + other.text,
        one.token_ids + other.token_ids,
        one.token_texts + other.token_texts,
        one.offsets + other.offsets,
        one.logprobs + other.logprobs,
    )
