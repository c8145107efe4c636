"""Objects of other nodes cross slow links in the codec that is fastest there, and arrive as they were."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from tandem.common.errors import ConfigError
from tandem.kvstore import bundle
from tandem.kvstore.codecs import CODECS
from tandem.kvstore.codecs.measure import measure_codecs
from tandem.kvstore.cost import RAW, CodecCost, LinkCosts
from tandem.kvstore.dataplane.peer_reader import SocketPeerReader
from tandem.kvstore.directory import EmbeddedDirectory
from tandem.kvstore.interfaces import EncodedObject, Located, ObjectInfo, ObjectKey, TierName
from tandem.kvstore.node.link_codecs import LinkCodecs
from tandem.kvstore.process.open import OpenNode, open_node
from tandem.kvstore.settings import StoreSettings

TOKENS = 64
SPEC = bundle.ChunkSpec(
    key=bytes([7]) * 32,
    namespace=bytes([8]) * 32,
    tokens=range(TOKENS),
    start_position=0,
    num_layers=3,
    num_kv_heads=2,
    head_dim=64,
    dtype="float32",
)
KEY = ObjectKey(SPEC.key)


def chunk() -> bytes:
    content = bytearray(bundle.bundle_size(SPEC))
    writer = bundle.BundleWriter(SPEC, memoryview(content))
    random = np.random.default_rng(1)
    for layer in range(SPEC.num_layers):
        rows = writer.layer(layer)
        rows[:] = random.standard_normal(len(rows) // 4).astype(np.float32).tobytes()
    writer.finish()
    return bytes(content)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


class Nodes:
    """Two nodes that know each other; `far` holds the chunk."""

    def __init__(self, folder: Path, stack: ExitStack, **near: object) -> None:
        directory = stack.enter_context(closing(EmbeddedDirectory()))
        self.nodes: list[OpenNode] = []
        for name, settings in (("far", {}), ("near", near)):
            node = open_node(
                StoreSettings(kv_host_bytes=8 << 20, **settings),  # type: ignore[arg-type]
                name,
                time.time_ns(),
                unix_path=str(folder / f"{name}.sock"),
                directory=directory,
            )
            self.nodes.append(node)
            stack.callback(node.close)
        self.content = chunk()
        ticket = self.nodes[0].node.begin_put(KEY, ObjectInfo(size=len(self.content), num_tokens=TOKENS))
        ticket.buffer[:] = self.content  # type: ignore[union-attr]
        assert ticket.commit()  # type: ignore[union-attr]

    def fetched(self) -> bytes:
        node = self.nodes[1].node
        deadline = time.monotonic() + 60
        while not (located := node.locate([KEY])):
            assert time.monotonic() < deadline
        assert located[0].tier is TierName.PEER
        with node.fetch(located) as fetch:
            assert fetch.wait(SPEC.num_layers, 60)
            assert fetch.intact() == 1
            return bytes(fetch.buffer(0))

    def sent_encoded(self) -> int:
        stats = self.nodes[0].stats()[1]
        assert stats is not None
        return stats.sent_encoded


@pytest.mark.parametrize("codec", ["lossless", "kivi-int8", "kivi-int4"])
def test_an_object_crosses_in_the_codec_that_is_asked_for(tmp_path: Path, stack: ExitStack, codec: str) -> None:
    nodes = Nodes(tmp_path, stack, kv_link_codec=codec, kv_near=True)
    got = nodes.fetched()
    assert nodes.sent_encoded() == 1
    parsed = bundle.parse(memoryview(got))
    assert parsed is not None
    assert parsed.header.fidelity is CODECS[codec].fidelity
    assert not parsed.matches(SPEC)
    if codec == "lossless":
        assert got == nodes.content
    expected = bundle.transcode(memoryview(bundle.transcode(memoryview(nodes.content), codec) or b""), RAW)
    assert got == expected


def test_auto_reads_a_fast_link_as_it_is(tmp_path: Path, stack: ExitStack) -> None:
    nodes = Nodes(tmp_path, stack)
    assert nodes.fetched() == nodes.content
    assert nodes.sent_encoded() == 0


def test_a_peer_that_cannot_encode_is_read_as_it_is(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_answer(self: SocketPeerReader, node_id: str, key: ObjectKey, codec: str) -> EncodedObject | None:
        return None

    monkeypatch.setattr(SocketPeerReader, "read_encoded", no_answer)
    nodes = Nodes(tmp_path, stack, kv_link_codec="lossless")
    assert nodes.fetched() == nodes.content


def test_an_encoded_object_that_arrives_damaged_is_read_again(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = SocketPeerReader.read_encoded

    def flip(self: SocketPeerReader, node_id: str, key: ObjectKey, codec: str) -> EncodedObject | None:
        answer = read(self, node_id, key, codec)
        assert answer is not None
        answer.content[-100] ^= 1
        return answer

    monkeypatch.setattr(SocketPeerReader, "read_encoded", flip)
    nodes = Nodes(tmp_path, stack, kv_link_codec="lossless")
    assert nodes.fetched() == nodes.content


@pytest.mark.parametrize("field", ["kv_disk_codec", "kv_remote_codec", "kv_link_codec"])
def test_codecs_that_change_answers_need_consent(tmp_path: Path, field: str) -> None:
    settings = StoreSettings(kv_host_bytes=1 << 20, **{field: "kivi-int4"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{field}.*kv_near"):
        open_node(settings, "n", 1)


CODEC_COSTS = {"lossless": CodecCost(0.5e9, 1e9, 1.5, True), "kivi-int8": CodecCost(0.5e9, 1e9, 1.78, False)}


@pytest.mark.parametrize(
    ("bytes_per_s", "near", "codec"),
    [(10e9, True, RAW), (0.05e9, False, "lossless"), (0.05e9, True, "kivi-int8"), (10e9, False, RAW)],
)
def test_auto_follows_the_measured_speed_of_the_link(
    monkeypatch: pytest.MonkeyPatch, bytes_per_s: float, near: bool, codec: str
) -> None:
    monkeypatch.setattr("tandem.kvstore.node.link_codecs.measure_codecs", lambda: CODEC_COSTS)
    codecs = LinkCodecs("auto", near_allowed=near)
    teach(codecs.links, "peer:far", bytes_per_s)
    assert codecs.choose([Located(KEY, TierName.PEER, "peer:far", 1 << 20)], 0.0) == codec
    assert codecs.choose([Located(KEY, TierName.DISK, "disk", 1 << 20)], 0.0) == RAW


def teach(links: LinkCosts, link: str, bytes_per_s: float, sizes: Sequence[int] = (1 << 18, 1 << 20, 1 << 22)) -> None:
    for _ in range(20):
        for size in sizes:
            links.observe(link, size, 1, size / bytes_per_s)


def test_codecs_are_measured() -> None:
    costs = measure_codecs()
    assert costs.keys() == CODECS.keys() - {RAW}
    assert all(cost.encode_bytes_per_s > 1e6 and cost.decode_bytes_per_s > 1e6 for cost in costs.values())
    assert [name for name, cost in costs.items() if cost.exact] == ["lossless"]
    assert 1.7 < costs["kivi-int8"].ratio < 1.8
