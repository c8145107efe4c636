"""Bytes of any origin are a miss or the right rows; never an exception, a wrong row or a huge allocation."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable

import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandem.kvstore.bundle import HEADER_ALIGN, layer_ranges, parse, transcode
from tandem.kvstore.codecs import CODECS
from tandem.proto import bundle_pb2
from tests.kvstore.bundle.samples import GOLDEN, SPEC

FILES = {codec: (GOLDEN / f"{codec}.bin").read_bytes() for codec in CODECS}


def rows_of(content: bytes) -> list[bytes]:
    bundle = parse(memoryview(content))
    assert bundle is not None
    layers = [bundle.layer(index) for index in range(len(bundle.ranges))]
    assert None not in layers
    return [bytes(layer) for layer in layers if layer is not None]


TRUTH = {codec: rows_of(content) for codec, content in FILES.items()}


def check(content: bytes, codec: str) -> None:
    """Reads everything there is: each layer is right or None, whatever was done to the file."""
    layer_ranges(memoryview(content)[:HEADER_ALIGN])
    transcode(memoryview(content), "raw")
    bundle = parse(memoryview(content))
    if bundle is None:
        return
    assert bundle.matches(SPEC) == "", "the header is checksummed"
    for index, truth in enumerate(TRUTH[codec]):
        layer = bundle.layer(index)
        assert layer is None or bytes(layer) == truth


@settings(max_examples=200, deadline=None)
@given(codec=st.sampled_from(sorted(CODECS)), data=st.data())
def test_flipped_bits(codec: str, data: st.DataObject) -> None:
    content = bytearray(FILES[codec])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    check(bytes(content), codec)


def test_every_flipped_byte_of_preamble_and_header_is_noticed() -> None:
    content = bytearray(FILES["raw"])
    end = 64 + struct.unpack_from("<I", content, 12)[0]
    for index in range(end):
        content[index] ^= 0x10
        assert parse(memoryview(content)) is None, index
        assert layer_ranges(memoryview(content)[:HEADER_ALIGN]) is None, index
        content[index] ^= 0x10


@settings(max_examples=100, deadline=None)
@given(codec=st.sampled_from(sorted(CODECS)), data=st.data())
def test_cut_files(codec: str, data: st.DataObject) -> None:
    content = FILES[codec]
    cut = content[: data.draw(st.integers(0, len(content) - 1))]
    assert parse(memoryview(cut)) is None
    check(cut, codec)
    assert parse(memoryview(content + bytes(data.draw(st.integers(1, 5000))))) is None


@settings(max_examples=100, deadline=None)
@given(first=st.sampled_from(sorted(CODECS)), second=st.sampled_from(sorted(CODECS)), data=st.data())
def test_spliced_files(first: str, second: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(FILES[first])))
    rest = FILES[second]
    content = FILES[first][:at] + rest[data.draw(st.sampled_from([at, 0, len(rest) // 2])) :]
    bundle = parse(memoryview(content))
    if bundle is not None:
        check(content, bundle.header.segments[0].codec)


@given(content=st.binary(max_size=200))
@example(content=b"")
def test_arbitrary_bytes(content: bytes) -> None:
    assert parse(memoryview(content)) is None
    assert layer_ranges(memoryview(content)) is None
    assert layer_ranges(memoryview(content + bytes(HEADER_ALIGN))) is None


def forge(change: Callable[[bundle_pb2.BundleHeader], object], codec: str = "raw") -> bytes:
    """The file with another header, correctly signed: what a hostile or a broken writer could store."""
    content = FILES[codec]
    length = struct.unpack_from("<I", content, 12)[0]
    header = bundle_pb2.BundleHeader.FromString(content[64 : 64 + length])
    change(header)
    return sign(header.SerializeToString(), content)


def sign(encoded: bytes, content: bytes, region: int = HEADER_ALIGN) -> bytes:
    preamble = struct.pack("<8sIIQI28x", b"TNDMBNDL", 1, len(encoded), len(content), region)
    total = preamble + struct.pack("<Q", xxhash.xxh3_64_intdigest(preamble + encoded)) + encoded
    return total.ljust(region, b"\0")[:region] + content[region:]


def test_the_forger_can_forge() -> None:
    bundle = parse(memoryview(forge(lambda header: setattr(header, "owner", "mallory"))))
    assert bundle is not None
    assert bundle.header.owner == "mallory"


def set_segment(field: str, value: int | str) -> Callable[[bundle_pb2.BundleHeader], object]:
    return lambda header: setattr(header.segments[0], field, value)


FORGERIES: dict[str, Callable[[bundle_pb2.BundleHeader], object]] = {
    "no layers": lambda header: header.ClearField("segments"),
    "short key": lambda header: setattr(header, "key", b"x"),
    "no namespace": lambda header: header.ClearField("namespace"),
    "long digest": lambda header: setattr(header, "tokens_digest", bytes(33)),
    "no tokens": lambda header: setattr(header, "num_tokens", 0),
    "more tokens than rows": lambda header: setattr(header, "num_tokens", 34),
    "absurd tokens": lambda header: setattr(header, "num_tokens", 2**32 - 1),
    "absurd rows": lambda header: setattr(header.segments[0].positions[0], "count", 2**32 - 1),
    "empty run": lambda header: header.segments[0].positions.add(start=0, count=0),
    "no rows": lambda header: header.segments[0].ClearField("positions"),
    "absurd heads": set_segment("num_kv_heads", 2**32 - 1),
    "absurd dim": set_segment("head_dim", 2**32 - 1),
    "no heads": set_segment("num_kv_heads", 0),
    "unknown dtype": set_segment("dtype", "float8"),
    "unknown codec": set_segment("codec", "middle-out"),
    "another codec": set_segment("codec", "kivi-int8"),
    "unknown kind": set_segment("kind", 9),
    "no rope state": set_segment("rope_state", 0),
    "first layer": set_segment("first_layer", 1),
    "no fidelity": lambda header: setattr(header, "fidelity", 0),
    "unknown fidelity": lambda header: setattr(header, "fidelity", 77),
    "missing checksum": lambda header: header.segments[0].checksums.pop(),
    "missing length": lambda header: header.segments[0].lengths.pop(),
    "one layer less": lambda header: [
        getattr(header.segments[0], name).pop() for name in ("offsets", "lengths", "checksums")
    ],
    "offset outside": lambda header: header.segments[0].offsets.__setitem__(1, 2**63),
    "layers overlap": lambda header: header.segments[0].offsets.__setitem__(0, 64),
    "layers in reverse": lambda header: header.segments[0].offsets.__setitem__(1, 0),
    "layer not aligned": lambda header: header.segments[0].offsets.__setitem__(0, 1),
    "absurd length": lambda header: header.segments[0].lengths.__setitem__(1, 2**62),
    "zero length": lambda header: header.segments[0].lengths.__setitem__(0, 0),
    "many empty layers": lambda header: [
        getattr(header.segments[0], name).extend([0] * 2000) for name in ("offsets", "lengths", "checksums")
    ],
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_signed_header_that_cannot_be_is_none_and_costs_no_memory(name: str) -> None:
    # A header of its own length: the region may grow, so it is signed for the region it needs.
    content = FILES["raw"]
    header = bundle_pb2.BundleHeader.FromString(content[64 : 64 + struct.unpack_from("<I", content, 12)[0]])
    FORGERIES[name](header)
    encoded = header.SerializeToString()
    region = -(-(64 + len(encoded)) // HEADER_ALIGN) * HEADER_ALIGN
    forged = sign(encoded, content.ljust(region + 1, b"\0"), region)
    tracemalloc.start()
    assert parse(memoryview(forged)) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_layer_off_its_alignment_is_none() -> None:
    """In the lossless file there is room between the layers, so nothing else is wrong."""
    bundle = parse(memoryview(FILES["lossless"]))
    assert bundle is not None
    assert bundle.ranges[0][1] % 64 not in (0, 63)
    assert parse(memoryview(forge(lambda header: header.segments[0].offsets.__setitem__(0, 1), "lossless"))) is None


def add_layers(header: bundle_pb2.BundleHeader, total: int) -> None:
    """Makes the header say `total` layers of one token of one value, one after the other."""
    segment = header.segments[0]
    header.num_tokens = segment.positions[0].count = segment.head_dim = 1
    for name, values in (
        ("offsets", [64 * index for index in range(total)]),
        ("lengths", [4] * total),
        ("checksums", [xxhash.xxh3_64_intdigest(bytes(4))] * total),
    ):
        segment.ClearField(name)  # type: ignore[arg-type]
        getattr(segment, name).extend(values)


@pytest.mark.parametrize(("total", "accepted"), [(1024, True), (1025, False)])
def test_more_layers_than_the_limit_are_none(total: int, accepted: bool) -> None:
    header = bundle_pb2.BundleHeader.FromString(FILES["raw"][64 : 64 + struct.unpack_from("<I", FILES["raw"], 12)[0]])
    add_layers(header, total)
    encoded = header.SerializeToString()
    region = -(-(64 + len(encoded)) // HEADER_ALIGN) * HEADER_ALIGN
    content = bytes(region + 64 * (total - 1) + 4)
    assert (parse(memoryview(sign(encoded, content, region))) is not None) is accepted


def test_a_header_beyond_the_limit_is_none() -> None:
    content = FILES["raw"]
    header = bundle_pb2.BundleHeader.FromString(content[64 : 64 + struct.unpack_from("<I", content, 12)[0]])
    for length, accepted in ((200_000, True), (300_000, False)):
        header.model = "m" * length
        encoded = header.SerializeToString()
        region = -(-(64 + len(encoded)) // HEADER_ALIGN) * HEADER_ALIGN
        forged = sign(encoded, bytes(region) + content[HEADER_ALIGN:], region)
        assert (parse(memoryview(forged)) is not None) is accepted
        assert (layer_ranges(memoryview(forged)[:HEADER_ALIGN]) is not None) is accepted


def test_a_preamble_of_a_bundle_without_layers_is_none() -> None:
    content = bytearray(FILES["raw"])
    for size in (0, HEADER_ALIGN):
        struct.pack_into("<IQI", content, 12, 5000, size, 2 * HEADER_ALIGN)
        assert layer_ranges(memoryview(content)[:HEADER_ALIGN]) is None


def test_a_signed_header_that_is_no_protobuf_is_none() -> None:
    assert parse(memoryview(sign(b"\xff" * 40, FILES["raw"]))) is None
    assert parse(memoryview(sign(b"", FILES["raw"]))) is None


def test_a_signed_zstd_frame_that_claims_terabytes_is_none() -> None:
    """Layer 0 of the lossless file gets a frame whose header claims 2**40 bytes, and a matching checksum."""
    content = bytearray(FILES["lossless"])
    bundle = parse(memoryview(content))
    assert bundle is not None
    offset, length = bundle.ranges[0]
    start = offset + SPEC.layer_shape.raw_bytes // 2
    assert content[start : start + 4] == b"\x28\xb5\x2f\xfd", "zstd's magic"
    content[start + 4 : start + 14] = b"\xc0\x38" + struct.pack("<Q", 2**40)
    checksum = xxhash.xxh3_64_intdigest(content[offset : offset + length])
    FILES["hostile"] = bytes(content)
    try:
        forged = forge(lambda header: header.segments[0].checksums.__setitem__(0, checksum), "hostile")
    finally:
        del FILES["hostile"]
    hostile = parse(memoryview(forged))
    assert hostile is not None
    tracemalloc.start()
    assert hostile.layer(0) is None
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert bytes(hostile.layer(1) or b"") == TRUTH["lossless"][1]
