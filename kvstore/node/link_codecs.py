"""In which codec objects of other nodes cross a link: as they are, or encoded there and decoded here, which pays where
the link is slower than the codec."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.kvstore.codecs.measure import measure_codecs
from tandem.kvstore.cost import RAW, CodecCost, LinkCosts, choose_codec
from tandem.kvstore.interfaces import Located, TierName

AUTO = "auto"


class LinkCodecs:
    """Safe from any thread. The other node's processor is taken to be as fast as this one."""

    def __init__(self, wanted: str, *, near_allowed: bool) -> None:
        """`wanted` is a codec's name, for every transfer between nodes, or `auto`. Only with `near_allowed` may auto
        choose a codec that is not exact."""
        self._wanted = wanted
        self._near_allowed = near_allowed
        self._codecs: dict[str, CodecCost] = measure_codecs() if wanted == AUTO else {}
        self.links = LinkCosts()
        """Measured costs per byte on the wire, whatever the bytes stand for."""

    def choose(self, sources: Sequence[Located], overlap_s: float) -> str:
        """The codec for objects of one link that are fetched together."""
        source = sources[0]
        if source.tier is not TierName.PEER:
            return RAW
        if self._wanted != AUTO:
            return self._wanted
        size = sum(each.size for each in sources)
        return choose_codec(
            size,
            source.link,
            self._codecs,
            self._near_allowed,
            self.links,
            num_objects=len(sources),
            overlap_s=overlap_s,
        )
