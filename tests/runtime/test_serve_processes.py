"""What `tandem serve` starts follows from its settings alone."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.common.errors import ConfigError
from tandem.common.settings import parse_settings, plain
from tandem.decode.settings import DecodeConfig
from tandem.kvstore.process.process import KvStoreConfig
from tandem.prefill.settings import PrefillConfig
from tandem.router.place import bind
from tandem.router.settings import RouterConfig
from tandem.runtime.processes import processes_of, ready_text
from tandem.runtime.settings import ServeConfig

RUN = Path("/run/t")
CLASSES = {"kvstore": KvStoreConfig, "prefill": PrefillConfig, "decode": DecodeConfig, "router": RouterConfig}


def test_the_store_comes_first_then_workers_then_the_router_which_knows_all_of_them() -> None:
    specs = processes_of(ServeConfig(model="m", prefill=2, decode=1), RUN, 81)
    assert [spec.name for spec in specs] == ["kvstore", "prefill-0", "prefill-1", "decode-0", "router"]
    router = specs[-1].settings
    assert router["prefill_workers"] == ["unix:/run/t/prefill-0.sock", "unix:/run/t/prefill-1.sock"]
    assert router["decode_workers"] == [specs[3].settings["listen"]]
    assert router["port"] == 81
    assert router["kv_store_address"] == specs[0].settings["listen"]


def test_workers_share_one_store_node() -> None:
    specs = processes_of(ServeConfig(model="m", kv_disk="/var/kv", kv_chunk_tokens=64), RUN, 81)
    store, *workers = [spec.settings for spec in specs[:-1]]
    assert (store["kv_disk"], store["kv_host_bytes"]) == ("/var/kv", 512 << 20)
    for worker in workers:
        assert (worker["kv_store_socket"], worker["kv_chunk_tokens"]) == (store["kv_store_socket"], 64)
        assert "kv_disk" not in worker


def test_workers_that_share_kv_compute_it_alike() -> None:
    specs = processes_of(ServeConfig(model="m", batch_invariant=True), RUN, 81)
    assert [spec.settings["batch_invariant"] for spec in specs if spec.command in ("prefill", "decode")] == [True, True]


@pytest.mark.parametrize(("config", "node"), [({"kv_host_bytes": 0}, ""), ({"kv_store_socket": "/run/kv"}, "/run/kv")])
def test_a_store_can_be_left_out_or_be_there_already(config: dict[str, Any], node: str) -> None:
    specs = processes_of(ServeConfig(model="m", **config), RUN, 81)
    assert [spec.name for spec in specs] == ["prefill-0", "decode-0", "router"]
    assert {spec.settings["kv_store_socket"] for spec in specs[:-1]} == {node}
    assert "kv_store_address" not in specs[-1].settings


def test_there_need_be_no_prefill_workers() -> None:
    specs = processes_of(ServeConfig(model="m", prefill=0), RUN, 81)
    assert [spec.name for spec in specs] == ["kvstore", "decode-0", "router"]


def test_every_process_can_read_the_file_it_gets(tmp_path: Path) -> None:
    config = ServeConfig(model="some/dir", dtype="float32", kv_cache_bytes=10**9, disaggregate="always")
    for spec in processes_of(config, RUN, 81):
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump({name: plain(value) for name, value in spec.settings.items()}))
        parsed = parse_settings(
            CLASSES[spec.command], ["--config", str(path)], command="t", description="d", examples=()
        )
        assert {name: getattr(parsed, name) for name in spec.settings} == spec.settings


def test_the_router_gets_what_serve_says_about_it(tmp_path: Path) -> None:
    config = ServeConfig(
        model="m", grpc_port=9001, api_keys_file=Path("keys"), disaggregate="never", tool_format="hermes"
    )
    router = processes_of(config, RUN, 81)[-1].settings
    assert (router["grpc_port"], router["disaggregate"], router["tool_format"]) == (9001, "never", "hermes")
    assert router["api_keys_file"] == Path("keys")


def test_engine_settings_reach_the_workers() -> None:
    config = ServeConfig(model="m", num_threads=3, max_num_seqs=7, enable_prefix_caching=False)
    for spec in processes_of(config, RUN, 81)[1:-1]:
        assert spec.settings["num_threads"] == 3
        assert spec.settings["max_num_seqs"] == 7
        assert spec.settings["enable_prefix_caching"] is False


@pytest.mark.parametrize(("model", "name"), [("/models/Tiny-1B", "Tiny-1B"), ("owner/Tiny-1B", "Tiny-1B")])
def test_the_model_is_named_like_its_folder(model: str, name: str) -> None:
    assert processes_of(ServeConfig(model=model), RUN, 81)[-1].settings["served_model_name"] == name


def test_the_ready_text_shows_commands_to_copy() -> None:
    config = ServeConfig(model="/models/Tiny-1B")
    text = ready_text(config, "http://127.0.0.1:81", 1.25)
    assert "http://127.0.0.1:81/v1/chat/completions" in text
    assert 'model="Tiny-1B"' in text
    assert "Authorization" not in text
    assert "Authorization: Bearer" in ready_text(
        replace(config, api_keys_file=Path("keys")), "http://127.0.0.1:81", 1.25
    )


def test_routers_are_children_of_the_supervisor() -> None:
    specs = processes_of(ServeConfig(model="m", routers=3), RUN, 81)[-3:]
    assert [(spec.name, spec.command, spec.place) for spec in specs] == [
        ("router-0", "router", 0),
        ("router-1", "router", 1),
        ("router-2", "router", 2),
    ]


def test_a_free_port_is_found_and_a_taken_one_refused() -> None:
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):  # until a router is there
            socket.create_connection(("127.0.0.1", port))
        free.listen()
        with pytest.raises(ConfigError, match=f"--port {port}: in use"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match="--host"):
        bind("203.0.113.7", 0)


def test_tenants_bring_their_quotas_to_the_store_node(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    tenants = [{"name": name, "keys": [digit * 64]} for name, digit in (("acme", "a"), ("zeta", "b"))]
    file.write_text(yaml.safe_dump({"tenants": [tenants[0] | {"kv_quota": 0.25}, tenants[1]]}))
    config = ServeConfig(model="m", tenants_file=file, kv_quotas={"acme": 0.5, "other": 0.1})
    specs = {child.name: child.settings for child in processes_of(config, tmp_path, 1)}
    assert specs["kvstore"]["kv_quotas"] == {"acme": 0.25, "other": 0.1}
    assert specs["router"]["tenants_file"] == file
