"""What a bundle is of: `ChunkSpec` is said by the writer, `BundleHeader` is found by the reader."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.kvstore.codecs import DTYPE_BYTES, Fidelity, LayerShape
from tandem.kvstore.identity import tokens_digest

MAX_LAYERS = 1024
MAX_ROWS = 1 << 20
MAX_LAYER_BYTES = 1 << 30
"""Most bytes of one layer, decoded."""


class RopeState(enum.IntEnum):
    """Whether K already has the rotary position embedding applied."""

    PRE = 1
    """K is not rotated yet, so it can be placed anywhere: passages."""
    POST = 2
    """K as the engine holds it, rotated to its positions: prefix chunks, bit-exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSpec:
    """Everything about an object but its rows. Raises ValueError naming the field at fault."""

    key: bytes
    """32 bytes, of `prefix_chain` or `passage_hash`."""
    namespace: bytes
    """32 bytes: `request_namespace`."""
    tokens: Sequence[int]
    """Token ids of this chunk or passage alone."""
    start_position: int
    """Position of the first token, where K was computed."""
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    """bfloat16, float16 or float32."""
    rope_state: RopeState = RopeState.POST
    owner: str = "default"
    model: str = ""
    provenance: str = ""
    """Id of the worker that computed it."""

    def __post_init__(self) -> None:
        for name in ("key", "namespace"):
            if len(getattr(self, name)) != 32:
                raise ValueError(f"{name} has {len(getattr(self, name))} bytes; use a digest of 32")
        if not 0 < len(self.tokens) <= MAX_ROWS:
            raise ValueError(f"tokens has {len(self.tokens)} ids; use 1 to {MAX_ROWS}")
        for name in ("num_layers", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers is {self.num_layers}; use {MAX_LAYERS} at most")
        if self.start_position < 0:
            raise ValueError(f"start_position is {self.start_position}; use 0 or more")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype is {self.dtype!r}; use one of {', '.join(DTYPE_BYTES)}")
        if self.layer_shape.raw_bytes > MAX_LAYER_BYTES:
            raise ValueError(
                f"a layer takes {self.layer_shape.raw_bytes} bytes; use fewer tokens: {MAX_LAYER_BYTES} fit"
            )

    @property
    def layer_shape(self) -> LayerShape:
        return LayerShape(len(self.tokens), self.num_kv_heads, self.head_dim, self.dtype)


@dataclass(frozen=True, slots=True)
class PositionRun:
    """Positions start, start + 1, ... start + count - 1."""

    start: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive layers of one shape and codec."""

    first_layer: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    positions: tuple[PositionRun, ...]
    """Positions of the rows, in order. They are never implied by the row number: rows can be dropped or moved."""
    rope_state: RopeState
    codec: str

    @property
    def num_rows(self) -> int:
        return sum(run.count for run in self.positions)

    @property
    def shape(self) -> LayerShape:
        return LayerShape(self.num_rows, self.num_kv_heads, self.head_dim, self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleHeader:
    """The header as it is stored; proto/bundle.proto says what each field is."""

    key: bytes
    namespace: bytes
    tokens_digest: bytes
    num_tokens: int
    segments: tuple[Segment, ...]
    fidelity: Fidelity
    query_dependent: bool = False
    token_preserving: bool = True
    owner: str = "default"
    model: str = ""
    provenance: str = ""

    @property
    def num_layers(self) -> int:
        return sum(segment.num_layers for segment in self.segments)


def header_of(spec: ChunkSpec) -> BundleHeader:
    """The header of raw rows of `spec`."""
    segment = Segment(
        first_layer=0,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
        positions=(PositionRun(spec.start_position, len(spec.tokens)),),
        rope_state=spec.rope_state,
        codec="raw",
    )
    return BundleHeader(
        key=bytes(spec.key),
        namespace=bytes(spec.namespace),
        tokens_digest=tokens_digest(spec.tokens),
        num_tokens=len(spec.tokens),
        segments=(segment,),
        fidelity=Fidelity.EXACT,
        owner=spec.owner,
        model=spec.model,
        provenance=spec.provenance,
    )


def difference(header: BundleHeader, spec: ChunkSpec) -> str:
    """What keeps a bundle from standing in for `spec`, in words; "" for nothing. Codec and fidelity are the reader's
    to judge; owner, model and provenance do not shape the rows."""
    wanted = header_of(spec)
    for name in ("key", "namespace", "num_tokens", "tokens_digest", "query_dependent", "token_preserving"):
        if getattr(header, name) != getattr(wanted, name):
            return f"{name} is {_short(getattr(header, name))}, not {_short(getattr(wanted, name))}"
    if header.num_layers != spec.num_layers:
        return f"num_layers is {header.num_layers}, not {spec.num_layers}"
    for segment in header.segments:
        for name in ("num_kv_heads", "head_dim", "dtype", "rope_state", "positions"):
            if getattr(segment, name) != getattr(wanted.segments[0], name):
                return f"{name} is {getattr(segment, name)}, not {getattr(wanted.segments[0], name)}"
    return ""


def _short(value: object) -> str:
    return value[:8].hex() if isinstance(value, bytes) else str(value)
