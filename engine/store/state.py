"""What the store's part of the engine keeps of one sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tandem.kvstore.interfaces import ObjectKey

if TYPE_CHECKING:
    from tandem.engine.store.loading import Loading
    from tandem.engine.store.lookup import LookUp


@dataclass(slots=True)
class StoreState:
    """Engine thread only."""

    keys: list[ObjectKey] = field(default_factory=list)
    """Keys of the leading full chunks, as far as they were needed; grows with the output."""
    offered: int = 0
    """Leading chunks that were offered to the saver, or need not be."""
    lookup: LookUp | None = None
    """A look-up that is in progress, or whose answer waits for blocks."""
    loading: Loading | None = None
    """The `Loading` that is in progress."""
    loading_began: float = 0.0
    """time.monotonic() since when it waits in LOADING."""
    given_up_at: float = 0.0
    """time.monotonic() at which the look-up or loading in progress is done without."""
