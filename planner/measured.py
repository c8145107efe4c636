"""A replica as it was measured: a table of times, and what lies between its points.

The table is CSV with a header. `#` begins a comment.

    phase,tokens,context,seconds
    prefill,1024,0,0.021        1,024 uncached tokens behind 0 whose KV is there, in one step
    decode,32,4096,0.0122       a token for 32 requests that have 4,096 tokens of KV each

`context` is optional for prefill (0). More columns are ignored. Several rows of one point count as their median.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tandem.common.errors import ConfigError
from tandem.planner.performance import Chunk

MAX_ROWS = 100_000
COLUMNS = ("phase", "tokens", "context", "seconds")


@dataclass(frozen=True, slots=True)
class Point:
    """One measured time."""

    phase: str
    """prefill or decode."""
    tokens: float
    """Uncached tokens of a prompt; requests that decode."""
    context: float
    """Tokens whose KV is there: before the prompt's, or of each request."""
    seconds: float


class Table:
    """One replica, from measured points.

    Between two measured points a time lies on the straight line between them: first along the context, then along the
    tokens. Beyond the last point the line through the last two goes on, and never falls. Below the first point the
    first point's time holds: a step has a constant part, and nobody has measured how large it is.
    """

    __slots__ = ("_decode", "_kv_tokens", "_prefill", "_startup_s", "_transfers")

    def __init__(
        self,
        points: Iterable[Point],
        kv_tokens: float,
        transfers: Mapping[str, tuple[float, float]] | None = None,
        startup_s: float = 60.0,
    ) -> None:
        """
        Args:
            points: at least one of each phase that is asked about.
            kv_tokens: tokens of KV that its memory holds.
            transfers: seconds, and seconds per token, of each link.
        Raises:
            ConfigError: a point makes no sense, or there are none.
        """
        points = list(points)
        self._prefill = _Grid("prefill", points)
        self._decode = _Grid("decode", points)
        if not self._prefill.measured and not self._decode.measured:
            raise ConfigError("measured table: has no row; give prefill or decode rows")
        if not 0 <= kv_tokens < math.inf:
            raise ConfigError(f"measured table: kv_tokens: {kv_tokens} must be finite and not negative")
        self._kv_tokens = kv_tokens
        self._transfers = dict(transfers or {})
        self._startup_s = startup_s

    def step_s(self, chunks: Sequence[Chunk], batch: float, kv_tokens: float) -> float:
        """A step of its own for all chunks, as long as one of their tokens together; beside decoding it adds what it
        takes longer than the shortest prefill, since weights are read once."""
        decode_s = self.decode_step_s(batch, kv_tokens)
        tokens = sum(chunk.tokens for chunk in chunks)
        if tokens <= 0:
            return decode_s
        context = sum(chunk.tokens * chunk.context for chunk in chunks) / tokens
        prefill_s = self.prefill_s(tokens, context)
        return prefill_s if batch <= 0 else decode_s + max(prefill_s - self._prefill.least_s, 0.0)

    def prefill_s(self, uncached_tokens: float, context_tokens: float = 0.0) -> float:
        return self._prefill.at(uncached_tokens, context_tokens) if uncached_tokens > 0 else 0.0

    def decode_step_s(self, batch: float, kv_tokens: float) -> float:
        return self._decode.at(batch, kv_tokens / batch) if batch > 0 else 0.0

    def transfer_s(self, link: str, tokens: float) -> float:
        terms = self._transfers.get(link)
        if terms is None:
            return math.inf
        return terms[0] + terms[1] * tokens if tokens > 0 else 0.0

    @property
    def kv_tokens(self) -> float:
        return self._kv_tokens

    @property
    def startup_s(self) -> float:
        return self._startup_s


def read_points(lines: Iterable[str], where: str = "measured table") -> list[Point]:
    """Points of a table as above.

    Raises:
        ConfigError: names the line and the column at fault.
    """
    rows = csv.reader(line for line in (line if not line.lstrip().startswith("#") else "\n" for line in lines))
    header: list[str] = []
    points: list[Point] = []
    for row in rows:
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if not header:
            header = cells
            missing = [name for name in COLUMNS if name not in header and name != "context"]
            if missing:
                raise ConfigError(f"{where}: line {rows.line_num}: column {missing[0]} is missing")
            continue
        if len(points) == MAX_ROWS:
            raise ConfigError(f"{where}: has more than {MAX_ROWS} rows")
        points.append(_point(dict(zip(header, cells, strict=False)), f"{where}: line {rows.line_num}"))
    if not points:
        raise ConfigError(f"{where}: has no row; it needs a header with {','.join(COLUMNS)} and rows")
    return points


def write_points(points: Iterable[Point]) -> str:
    """The table that `read_points` reads."""
    rows = (f"{p.phase},{p.tokens:g},{p.context:g},{p.seconds:.9g}\n" for p in points)
    return ",".join(COLUMNS) + "\n" + "".join(rows)


def _point(cells: Mapping[str, str], where: str) -> Point:
    phase = cells.get("phase", "")
    if phase not in ("prefill", "decode"):
        raise ConfigError(f"{where}: phase: {phase[:40]!r} must be prefill or decode")
    numbers: dict[str, float] = {}
    for name in COLUMNS[1:]:
        text = cells.get(name, "") or ("0" if name == "context" else "")
        try:
            value = float(text)
        except ValueError:
            raise ConfigError(f"{where}: {name}: {text[:40]!r} is not a number") from None
        if not (value >= 0 if name == "context" else value > 0) or not value < math.inf:
            raise ConfigError(f"{where}: {name}: {text} must be finite and {'0 or ' if name == 'context' else ''}more")
        numbers[name] = value
    return Point(phase, numbers["tokens"], numbers["context"], numbers["seconds"])


class _Grid:
    """Times of one phase, by tokens and, for each number of tokens, by context."""

    def __init__(self, phase: str, points: Sequence[Point]) -> None:
        self._phase = phase
        found: dict[float, dict[float, list[float]]] = {}
        for point in points:
            if point.phase == phase:
                found.setdefault(point.tokens, {}).setdefault(point.context, []).append(point.seconds)
        self._tokens = sorted(found)
        self._lines = [_Line({context: median(s) for context, s in found[n].items()}) for n in self._tokens]
        self._slope = self._context_slope()
        self.least_s = min((line.least_s for line in self._lines), default=0.0)

    @property
    def measured(self) -> bool:
        return bool(self._tokens)

    def at(self, tokens: float, context: float) -> float:
        """Raises ConfigError where the phase was not measured."""
        if not self._tokens:
            raise ConfigError(f"measured table: phase: has no {self._phase} row; measure some")
        place = bisect_right(self._tokens, tokens)
        if place == 0 or len(self._tokens) == 1:
            return self._on(0, tokens, context)
        right = min(place, len(self._tokens) - 1)
        return _along(
            tokens,
            (self._tokens[right - 1], self._on(right - 1, tokens, context)),
            (self._tokens[right], self._on(right, tokens, context)),
        )

    def _on(self, place: int, tokens: float, context: float) -> float:
        line = self._lines[place]
        if line.alone:
            return line.at(context) + self._slope * self._tokens[place] * max(context - line.first, 0.0)
        return line.at(context)

    def _context_slope(self) -> float:
        """Seconds per token and token of context, where some number of tokens was measured at several contexts: those
        that were measured at one only borrow it."""
        slopes = [line.slope / tokens for tokens, line in zip(self._tokens, self._lines, strict=True) if not line.alone]
        return median(slopes) if slopes else 0.0


class _Line:
    """Times by context."""

    def __init__(self, times: Mapping[float, float]) -> None:
        self._at = sorted(times.items())
        self._contexts = [context for context, _ in self._at]
        self.first = self._contexts[0]
        self.alone = len(self._at) == 1
        self.least_s = min(times.values())

    @property
    def slope(self) -> float:
        (first, low), (last, high) = self._at[0], self._at[-1]
        return max(high - low, 0.0) / (last - first)

    def at(self, context: float) -> float:
        place = bisect_right(self._contexts, context)
        if place == 0 or self.alone:
            return self._at[0][1]
        right = min(place, len(self._at) - 1)
        return _along(context, self._at[right - 1], self._at[right])


def _along(x: float, low: tuple[float, float], high: tuple[float, float]) -> float:
    """On the line through two points; beyond the second it does not fall."""
    slope = (high[1] - low[1]) / (high[0] - low[0])
    if x >= high[0]:
        return high[1] + max(slope, 0.0) * (x - high[0])
    return low[1] + slope * (x - low[0])
