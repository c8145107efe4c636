"""The control service of a store node, in this process."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
from prometheus_client import CollectorRegistry

from tandem.common.credentials import SERVER_OPTIONS
from tandem.kvstore.contexts.contexts import open_shelf
from tandem.kvstore.directory import EmbeddedDirectory
from tandem.kvstore.interfaces import ObjectKey
from tandem.kvstore.node import KvNode
from tandem.kvstore.process.open import open_node
from tandem.kvstore.process.service import KvNodeService
from tandem.kvstore.settings import StoreSettings
from tandem.proto import kvnode_pb2_grpc
from tests.kvstore.node.fakes import put, spec_of

CHUNK = 16


def arrive(node: KvNode, keys: Iterable[ObjectKey]) -> None:
    """As if a worker had saved them."""
    for key in keys:
        assert node.lookups.contains(key) or put(node, replace(spec_of(0), key=key))


def hard_pins(node: KvNode) -> int:
    return sum(tier.hard_pins for tier in node.stats().tiers)


class StoreNode:
    """`with StoreNode(folder) as store:`; `stop` and `start` as a process would, with the same address and folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.address = f"unix:{folder}/node.sock"

    def start(self) -> None:
        directory = EmbeddedDirectory()
        settings = StoreSettings(kv_host_bytes=1 << 20, kv_chunk_tokens=CHUNK)
        self._store = open_node(settings, "n", 1, unix_path=f"{self._folder}/kv.sock", directory=directory)
        self.node = self._store.node
        self._shelf = open_shelf(self.node, str(self._folder), CHUNK, b"")
        self._shelf.start()
        self._threads = ThreadPoolExecutor(2)
        self._server = grpc.server(self._threads, options=SERVER_OPTIONS)
        service = KvNodeService(self._store, directory, self._shelf, CollectorRegistry())
        kvnode_pb2_grpc.add_KvNodeServicer_to_server(service, self._server)
        self._server.add_insecure_port(self.address)
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()
        self._threads.shutdown()
        self._shelf.close()
        self._store.close()

    def __enter__(self) -> StoreNode:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
