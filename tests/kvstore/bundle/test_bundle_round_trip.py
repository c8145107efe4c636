"""What was written is what is read, and nothing else of the memory it was written to."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.kvstore.bundle import (
    HEADER_ALIGN,
    LAYER_ALIGN,
    BundleWriter,
    ChunkSpec,
    PositionRun,
    RopeState,
    bundle_size,
    layer_ranges,
    parse,
)
from tandem.kvstore.codecs import Fidelity
from tests.kvstore.bundle.samples import SPEC, build, sample_rows

SPECS = st.builds(
    ChunkSpec,
    key=st.binary(min_size=32, max_size=32),
    namespace=st.binary(min_size=32, max_size=32),
    tokens=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=70),
    start_position=st.integers(0, 2**40),
    num_layers=st.integers(1, 6),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 40),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    rope_state=st.sampled_from(RopeState),
    owner=st.text(max_size=20),
    model=st.text(max_size=20),
    provenance=st.text(max_size=20),
)


@settings(max_examples=60, deadline=None)
@given(spec=SPECS)
def test_every_chunk_comes_back_as_it_was_written(spec: ChunkSpec) -> None:
    content = memoryview(build(spec))
    bundle = parse(content)
    assert bundle is not None
    assert bundle.matches(spec) == ""
    for index in range(spec.num_layers):
        assert bundle.layer(index) == sample_rows(spec, index)
    header = bundle.header
    assert (header.key, header.namespace, header.num_tokens) == (spec.key, spec.namespace, len(spec.tokens))
    assert (header.owner, header.model, header.provenance) == (
        spec.owner,
        spec.model,
        spec.provenance,
    )
    assert header.fidelity is Fidelity.EXACT
    (segment,) = header.segments
    assert segment.positions == (PositionRun(spec.start_position, len(spec.tokens)),)
    assert (segment.rope_state, segment.dtype, segment.codec) == (spec.rope_state, spec.dtype, "raw")


def test_layers_are_aligned_and_raw_layers_are_not_copied() -> None:
    content = memoryview(build())
    bundle = parse(content)
    assert bundle is not None
    for index, (offset, length) in enumerate(bundle.ranges):
        assert offset % LAYER_ALIGN == 0
        layer = bundle.layer(index)
        assert layer is not None
        content[offset] ^= 1
        assert layer[0] == content[offset], "a view sees the change"
        content[offset] ^= 1
        assert length == SPEC.layer_shape.raw_bytes
    assert bundle.ranges[0][0] == HEADER_ALIGN
    assert sum(bundle.ranges[-1]) == len(content)


def test_memory_that_held_something_else_leaves_no_trace() -> None:
    odd = replace(SPEC, head_dim=31)
    used = bytearray(os.urandom(bundle_size(odd)))
    assert build(odd, used) == build(odd)


def test_an_unfinished_bundle_is_none_even_where_a_finished_one_was() -> None:
    memory = build()
    assert parse(memoryview(memory)) is not None
    writer = BundleWriter(SPEC, memoryview(memory))
    assert parse(memoryview(memory)) is None
    assert layer_ranges(memoryview(memory)[:HEADER_ALIGN]) is None
    writer.finish()
    assert parse(memoryview(memory)) is not None


def test_the_first_page_says_where_the_layers_are() -> None:
    content = memoryview(build())
    bundle, layout = parse(content), layer_ranges(content[:HEADER_ALIGN])
    assert bundle is not None
    assert layout is not None
    assert (layout.size, layout.header_bytes) == (len(content), HEADER_ALIGN)
    assert (layout.ranges, layout.header) == (bundle.ranges, bundle.header)
    assert layer_ranges(content[: HEADER_ALIGN - 1]) is None


def test_a_header_longer_than_a_page_says_so() -> None:
    spec = replace(SPEC, model="m" * 5000)
    content = memoryview(build(spec))
    first = layer_ranges(content[:HEADER_ALIGN])
    assert first is not None
    assert (first.size, first.header_bytes, first.header, first.ranges) == (len(content), 2 * HEADER_ALIGN, None, ())
    whole = layer_ranges(content[: first.header_bytes])
    bundle = parse(content)
    assert whole is not None
    assert bundle is not None
    assert whole.ranges == bundle.ranges
    assert bundle.ranges[0][0] == 2 * HEADER_ALIGN


def test_layers_can_be_read_before_all_of_them_are_there() -> None:
    complete = build()
    arriving = bytearray(len(complete))
    arriving[:HEADER_ALIGN] = complete[:HEADER_ALIGN]
    bundle = parse(memoryview(arriving))
    assert bundle is not None
    (start, length), _ = bundle.ranges
    assert bundle.layer(0) is None
    arriving[start : start + length] = complete[start : start + length]
    assert bundle.layer(0) == sample_rows(SPEC, 0)
    assert bundle.layer(1) is None


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("key", bytes(32), "key"),
        ("namespace", bytes(32), "namespace"),
        ("tokens", [*SPEC.tokens[:-1], 5], "tokens_digest"),
        ("tokens", SPEC.tokens[:-1], "num_tokens"),
        ("start_position", 0, "positions"),
        ("num_layers", 3, "num_layers"),
        ("num_kv_heads", 2, "num_kv_heads"),
        ("head_dim", 64, "head_dim"),
        ("dtype", "float16", "dtype"),
        ("rope_state", RopeState.PRE, "rope_state"),
    ],
)
def test_what_differs_is_named(field: str, value: object, named: str) -> None:
    bundle = parse(memoryview(build()))
    assert bundle is not None
    assert bundle.matches(replace(SPEC, **{field: value})).startswith(f"{named} is ")  # type: ignore[arg-type]


def test_who_wrote_it_does_not_keep_a_bundle_from_matching() -> None:
    bundle = parse(memoryview(build()))
    assert bundle is not None
    assert bundle.matches(replace(SPEC, owner="other", model="alias", provenance="decode-3")) == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("key", b"short"),
        ("namespace", b""),
        ("tokens", []),
        ("tokens", range(2**20 + 1)),
        ("num_layers", 0),
        ("num_layers", 1025),
        ("num_kv_heads", -1),
        ("head_dim", 0),
        ("start_position", -1),
        ("dtype", "float8"),
    ],
)
def test_a_bad_spec_names_its_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        replace(SPEC, **{field: value})  # type: ignore[arg-type]


def test_a_layer_beyond_the_limit_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="use fewer tokens"):
        replace(SPEC, head_dim=2**23)


def test_a_header_beyond_the_limit_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="shorten owner or model"):
        bundle_size(replace(SPEC, model="m" * 300_000))


def test_as_many_layers_as_are_allowed_can_be_read_again() -> None:
    spec = replace(SPEC, tokens=[1], num_layers=1024, head_dim=1)
    bundle = parse(memoryview(build(spec)))
    assert bundle is not None
    assert bundle.layer(1023) == sample_rows(spec, 1023)


def test_the_writer_wants_exactly_the_size() -> None:
    for size in (0, bundle_size(SPEC) - 1, bundle_size(SPEC) + 1):
        with pytest.raises(ValueError, match="bundle_size"):
            BundleWriter(SPEC, memoryview(bytearray(size)))
