"""All that the node knows of the inside of an object: where its layers end, and what its header says of it."""

from __future__ import annotations

from tandem.kvstore import bundle
from tandem.kvstore.interfaces import ObjectInfo

HEAD_BYTES = bundle.HEADER_ALIGN
"""Leading bytes of an object that are read first: they hold the header of all but very deep models."""


def layer_ends(head: memoryview, size: int) -> tuple[int, ...] | int | None:
    """Where each layer ends, in bytes from the start of the object, growing. An int: this many leading bytes are
    needed to tell. None: this is no object of `size` bytes."""
    layout = bundle.layer_ranges(head)
    if layout is None or layout.size != size:
        return None
    if layout.header is None:
        return layout.header_bytes
    return tuple(offset + length for offset, length in layout.ranges)


def describe(content: memoryview) -> ObjectInfo | None:
    """What a complete object says of itself; None if it is not one. Looks at its header only."""
    parsed = bundle.parse(content)
    if parsed is None:
        return None
    header = parsed.header
    return ObjectInfo(
        size=len(content),
        num_tokens=header.num_tokens,
        owner=header.owner,
        model=header.model,
        start_position=header.segments[0].positions[0].start,
    )


def is_sound(content: memoryview) -> bool:
    """Checks every layer's checksum."""
    parsed = bundle.parse(content)
    return parsed is not None and all(parsed.stored(index) is not None for index in range(len(parsed.ranges)))


def encoded(content: memoryview, codec: str) -> memoryview | None:
    """The object in another codec; None if it cannot be had in it."""
    if codec == "raw":
        return content
    other = bundle.transcode(content, codec)
    return None if other is None else memoryview(other)


def decoded(content: memoryview) -> memoryview | None:
    """The object with raw rows, as it was before it was encoded; None if it is not one."""
    raw = bundle.transcode(content, "raw")
    return None if raw is None else memoryview(raw)
