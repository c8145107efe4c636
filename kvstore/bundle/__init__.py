"""Bundles: the bytes of a stored KV object (DESIGN 6).

Written by workers (`BundleWriter`), read layer by layer by store nodes (`layer_ranges`), checked and decoded by the
worker that uses them (`parse`, `Bundle.layer`).
"""

from __future__ import annotations

from tandem.kvstore.bundle.format import FORMAT_VERSION, HEADER_ALIGN, LAYER_ALIGN
from tandem.kvstore.bundle.header import BundleHeader, ChunkSpec, PositionRun, RopeState, Segment
from tandem.kvstore.bundle.reader import Bundle, BundleLayout, layer_ranges, parse
from tandem.kvstore.bundle.writer import BundleWriter, bundle_size, transcode

__all__ = [
    "FORMAT_VERSION",
    "HEADER_ALIGN",
    "LAYER_ALIGN",
    "Bundle",
    "BundleHeader",
    "BundleLayout",
    "BundleWriter",
    "ChunkSpec",
    "PositionRun",
    "RopeState",
    "Segment",
    "bundle_size",
    "layer_ranges",
    "parse",
    "transcode",
]
