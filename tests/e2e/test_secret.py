"""The secret of a real `tandem serve`: made, hidden from others, and kept where KV is kept."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from tandem.common.credentials import open_channel
from tandem.common.secret import VARIABLE, read_secret
from tandem.proto import kvnode_pb2, kvnode_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.e2e.serving import Serve, eventually

MakePrompt = Callable[[int], list[int]]

CHUNK = 64


def flags(disk: Path) -> tuple[object, ...]:
    return ("--dtype", "float32", "--disaggregate", "always", "--kv-chunk-tokens", CHUNK, "--kv-disk", disk)


def by_tier(body: dict[str, Any]) -> dict[str, int]:
    tiers: dict[str, int] = body["usage"]["prompt_tokens_details"].get("cached_tokens_by_tier", {})
    return tiers


def objects(serve: Serve, tier: str) -> int:
    return sum(int(row.get("objects", 0)) for row in serve.store_stats()["tiers"] if row["tier"] == tier)


def fill(serve: Serve, tokens: list[int]) -> list[int]:
    """Computes, and waits until it is on disk."""
    computed = serve.tokens(tokens)
    eventually(lambda: objects(serve, "disk") >= objects(serve, "host") > 0, what="everything written back")
    return computed


def test_the_next_run_finds_what_the_last_one_left_on_disk(tiny: Path, prompt: MakePrompt, tmp_path: Path) -> None:
    tokens, disk = prompt(300), tmp_path / "kv"
    with Serve(tiny, *flags(disk)) as serve:
        computed = fill(serve, tokens)
    assert stat.S_IMODE((disk / "secret").stat().st_mode) == 0o600
    with Serve(tiny, *flags(disk)) as serve:
        again = serve.complete(tokens)
    assert by_tier(again) == {"disk": 256}
    assert again["choices"][0]["token_ids"] == computed
    given = "a secret that was given, of enough bytes"
    with Serve(tiny, *flags(disk), **{VARIABLE: given}) as serve:
        assert by_tier(serve.complete(tokens)) == {}, "other salts: nothing of it can be found"


def test_only_this_user_gets_to_the_parts_and_no_process_shows_the_secret(tiny: Path) -> None:
    with Serve(tiny) as serve:
        folder = Path(serve.node().removeprefix("unix:")).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "secret").stat().st_mode) == 0o600
        secret = read_secret(str(folder / "secret"))
        shown = [child.cmdline() + list(child.environ().values()) for child in serve.children().values()]
        assert not any(secret.decode() in word for words in shown for word in words)
        with open_channel(serve.node(), b"") as stranger, pytest.raises(grpc.RpcError):
            kvnode_pb2_grpc.KvNodeStub(stranger).Clear(kvnode_pb2.ClearRequest(), timeout=30)
        with open_channel(f"unix:{folder}/decode-0.sock", b"") as stranger, pytest.raises(grpc.RpcError):
            worker_pb2_grpc.WorkerStub(stranger).Drain(worker_pb2.DrainRequest(grace_s=0), timeout=30)
        with open_channel(f"unix:{folder}/decode-0.sock", secret) as owner:
            info = worker_pb2_grpc.WorkerStub(owner).GetInfo(worker_pb2.GetInfoRequest(), timeout=30)
        assert info.worker_id == "decode-0"
        assert len(serve.tokens([1, 2, 3], 4)) == 4
