"""The bytes on disk stay what they are: files written by an earlier version can be read, and are written the same."""

from __future__ import annotations

import pytest

from tandem.kvstore.bundle import FORMAT_VERSION, parse, transcode
from tandem.kvstore.codecs import CODECS, Fidelity
from tests.kvstore.bundle.samples import GOLDEN, SPEC, build, sample_rows

EXACT = ["raw", "lossless"]


def test_there_is_a_golden_file_per_codec() -> None:
    assert FORMAT_VERSION == 1, "write golden files for the new version, keep the old ones"
    assert sorted(path.stem for path in GOLDEN.glob("*.bin")) == sorted(CODECS)


@pytest.mark.parametrize("codec", CODECS)
def test_golden_files_can_be_read(codec: str) -> None:
    bundle = parse(memoryview((GOLDEN / f"{codec}.bin").read_bytes()))
    assert bundle is not None
    assert bundle.matches(SPEC) == ""
    assert (bundle.header.owner, bundle.header.model) == ("tenant-ä", "small")
    for index in range(2):
        layer = bundle.layer(index)
        assert layer is not None
        assert (layer == sample_rows(SPEC, index)) == (codec in EXACT)


@pytest.mark.parametrize("codec", [name for name in CODECS if name != "lossless"])
def test_golden_files_are_written_the_same(codec: str) -> None:
    # Not `lossless`: another release of zstd may choose other bytes for the same content.
    assert transcode(memoryview(build()), codec) == (GOLDEN / f"{codec}.bin").read_bytes()


def test_fidelity_only_gets_worse() -> None:
    raw = memoryview(build())
    expected = {"raw": 1, "lossless": 1, "kivi-int8": 2, "kivi-int4": 3, "kivi-int2": 3}
    for codec, fidelity in expected.items():
        encoded = transcode(raw, codec)
        assert encoded is not None
        back = transcode(memoryview(encoded), "raw")
        assert back is not None
        for content in (encoded, back):
            bundle = parse(memoryview(content))
            assert bundle is not None
            assert bundle.header.fidelity == Fidelity(fidelity)


def test_transcoding_to_the_same_codec_changes_nothing() -> None:
    for path in GOLDEN.glob("*.bin"):
        assert transcode(memoryview(path.read_bytes()), path.stem) == path.read_bytes()


def test_wrong_bytes_are_not_transcoded() -> None:
    content = build()
    content[-1] ^= 1
    assert transcode(memoryview(content), "kivi-int8") is None
    assert transcode(memoryview(content), "raw") is None
    assert transcode(memoryview(b"nothing"), "raw") is None


def test_an_unknown_codec_is_named() -> None:
    with pytest.raises(ValueError, match="'gzip'; use one of raw, lossless"):
        transcode(memoryview(build()), "gzip")
