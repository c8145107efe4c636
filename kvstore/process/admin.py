"""`tandem kv`: looks into a store node and orders it about, over gRPC."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import grpc
from google.protobuf.message import Message

from tandem.common.credentials import open_channel, remedy
from tandem.common.errors import ConfigError
from tandem.common.secret import VARIABLE, read_secret
from tandem.proto import kvnode_pb2, kvnode_pb2_grpc

DEFAULT_NODE = "127.0.0.1:9300"
_KEY_BYTES = 32
_LOOKUP_BATCH = 1024

EXAMPLES = """\
examples:
  # what is where, and who hits what
  tandem kv stats

  # where an object lies, on this node and elsewhere
  tandem kv lookup 3f...64 hex digits... --json

  # a node elsewhere
  tandem kv stats --node 10.0.0.5:9300

  # keep an object for an hour, whatever comes
  tandem kv pin 3f... --owner docs-team --ttl-s 3600 --hard

  # forget one tenant
  tandem kv clear --owner acme

  # named contexts: all, one with where its KV is, and forget one
  tandem kv contexts
  tandem kv context manual --owner acme
  tandem kv drop-context manual --owner acme

  # before a machine is taken down: wait until the disk has everything
  tandem kv drain

  # balance the books and verify the checksums of 1000 objects
  tandem kv check --max-objects 1000
"""
_Run = Callable[[kvnode_pb2_grpc.KvNodeStub, argparse.Namespace], tuple[Message, list[str], bool]]
"""Asks the node: the answer, its lines for people, and whether all is well."""


def main(argv: Sequence[str], find_node: Callable[[str | None], tuple[str, str] | None] = lambda named: None) -> int:
    """Exit status: 0, or 1 when the node says no or cannot be reached. Raises ConfigError for a wrong command line.

    `find_node` is asked for the node that is named, or None; it returns address and secret file, or None.
    """
    options = _parser().parse_args(list(argv))
    node, secret_file = find_node(options.node) or (options.node or DEFAULT_NODE, "")
    options.node = node
    secret = read_secret(options.secret_file or secret_file)
    with open_channel(options.node, secret) as channel:
        try:
            answer, lines, well = options.run(kvnode_pb2_grpc.KvNodeStub(channel), options)
        except grpc.RpcError as error:
            details = (error.details() if isinstance(error, grpc.Call) else "") or str(error)
            print(f"tandem kv: the node at {options.node}: {details}{remedy(details, secret)}", file=sys.stderr)
            return 1
    if options.json:
        print(json.dumps(_plain(answer), indent=2))
    else:
        print("\n".join(lines))
    return 0 if well else 1


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{message}. See `{self.prog} --help`.")


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument(
        "--node",
        help=f"gRPC address of the node (default: that of the `tandem serve` that runs here, or {DEFAULT_NODE})",
    )
    common.add_argument(
        "--secret-file",
        default="",
        help=f"the deployment's secret (default: {VARIABLE}, or that of the `tandem serve` that runs here)",
    )
    common.add_argument("--json", action="store_true", help="print the whole answer as JSON")
    common.add_argument("--timeout-s", type=float, default=30.0, help="give up after this long (default 30)")
    parser = _Parser(
        prog="tandem kv",
        description="Looks into a node of the KV store and orders it about.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: _Run, text: str) -> _Parser:
        added = commands.add_parser(name, help=text, description=text, parents=[common])
        added.set_defaults(run=run)
        return added

    command("stats", _stats, "what the tiers hold and how often they were hit")
    lookup = command("lookup", _lookup, "where objects are")
    lookup.add_argument("keys", nargs="+", type=_key, metavar="KEY", help="64 hex digits")
    pin = command("pin", _pin, "keep an object in the highest tier that has it")
    unpin = command("unpin", _unpin, "end a pin")
    move = command("move", _move, "put an object into a tier")
    for parser_of_key in (pin, unpin, move):
        parser_of_key.add_argument("key", type=_key, metavar="KEY", help="64 hex digits")
    for parser_of_owner in (pin, unpin):
        parser_of_owner.add_argument("--owner", default="operator", help="whose pin it is (default operator)")
    pin.add_argument("--ttl-s", type=float, default=3600.0, help="seconds until the pin ends (default 3600)")
    pin.add_argument("--hard", action="store_true", help="it never leaves; otherwise it leaves last")
    move.add_argument("tier", choices=["host", "disk", "remote"])
    clear = command("clear", _clear, "forget objects of a tenant, of a model, or all")
    clear.add_argument("--owner", help="the tenant's")
    clear.add_argument("--model", help="of this served model name")
    clear.add_argument("--all", action="store_true", help="every object")
    contexts = command("contexts", _contexts, "named contexts, and how much of their KV is here")
    contexts.add_argument("--owner", help="the tenant's; without it, those of all")
    context = command("context", _context, "one named context, and where its KV is")
    context.add_argument("--with-tokens", action="store_true", help="with its token ids")
    drop = command("drop-context", _drop_context, "forget a named context; its KV may leave again")
    for parser_of_name in (context, drop):
        parser_of_name.add_argument("name", metavar="NAME")
        parser_of_name.add_argument("--owner", default="default", help="the tenant's (default: default)")
    drain = command("drain", _drain, "wait until everything is on the lower tiers, before the node is stopped")
    drain.add_argument("--grace-s", type=float, default=20.0, help="for how long at most (default 20)")
    check = command("check", _check, "balance the books, and verify the checksums of some objects")
    check.add_argument("--max-objects", type=int, default=100, help="how many to verify (default 100)")
    return parser


def command_names() -> tuple[str, ...]:
    """What may stand behind `tandem kv`."""
    (commands,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    return tuple(commands.choices)


def _key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a key: give 64 hex digits")
    return key


def _stats(
    node: kvnode_pb2_grpc.KvNodeStub, options: argparse.Namespace
) -> tuple[kvnode_pb2.StatsResponse, list[str], bool]:
    answer = node.Stats(kvnode_pb2.StatsRequest(), timeout=options.timeout_s)
    lines = [f"node {answer.node_id}, epoch {answer.epoch}, version {answer.version}", ""]
    lines.append(f"{'tier':<8}{'objects':>9}{'used':>11}{'of':>11}{'hits':>9}{'hit':>11}{'evicted':>9}{'dropped':>9}")
    for tier in answer.tiers:
        lines.append(
            f"{_tier_name(tier.tier):<8}{tier.objects:>9}{_size(tier.used_bytes):>11}{_size(tier.capacity_bytes):>11}"
            f"{tier.hits:>9}{_size(tier.hit_bytes):>11}{tier.evictions:>9}{tier.writes_dropped:>9}"
        )
    lines.append("")
    for name, value in sorted(answer.values.items()):
        if value:
            lines.append(f"{name.replace('_', ' ')}: {value:g}")
    for reason, count in sorted(answer.refused_puts.items()):
        lines.append(f"puts refused ({reason}): {count}")
    lines.append(f"nodes: {', '.join(answer.known_nodes) or 'only this one'}")
    return answer, lines, True


def _lookup(
    node: kvnode_pb2_grpc.KvNodeStub, options: argparse.Namespace
) -> tuple[kvnode_pb2.LookupResponse, list[str], bool]:
    answer = kvnode_pb2.LookupResponse()
    for start in range(0, len(options.keys), _LOOKUP_BATCH):
        request = kvnode_pb2.LookupRequest(keys=options.keys[start : start + _LOOKUP_BATCH])
        answer.MergeFrom(node.Lookup(request, timeout=options.timeout_s))
    lines = []
    for found in answer.objects:
        places = [_tier_name(tier) for tier in found.tiers]
        places += [f"{place.tier} of {place.node_id}" for place in found.elsewhere]
        detail = f"  {_size(found.size)}, {found.num_tokens} tokens, {found.owner} {found.model}" if found.size else ""
        lines.append(f"{found.key.hex()}  {', '.join(places) or 'nowhere'}{detail}")
    return answer, lines, True


def _pin(
    node: kvnode_pb2_grpc.KvNodeStub, options: argparse.Namespace
) -> tuple[kvnode_pb2.PinResponse, list[str], bool]:
    request = kvnode_pb2.PinRequest(key=options.key, owner=options.owner, ttl_s=options.ttl_s, hard=options.hard)
    answer = node.Pin(request, timeout=options.timeout_s)
    refused = "not pinned: it is not on this node, or half of the tier is pinned already"
    return answer, ["pinned" if answer.pinned else refused], answer.pinned


def _unpin(
    node: kvnode_pb2_grpc.KvNodeStub, options: argparse.Namespace
) -> tuple[kvnode_pb2.UnpinResponse, list[str], bool]:
    request = kvnode_pb2.UnpinRequest(key=options.key, owner=options.owner)
    answer = node.Unpin(request, timeout=options.timeout_s)
    return answer, ["unpinned" if answer.unpinned else f"{options.owner} had no pin on it"], answer.unpinned


def _clear(
    node: kvnode_pb2_grpc.KvNodeStub, options: argparse.Namespace
) -> tuple[kvnode_pb2.ClearResponse, list[str], bool]:
    if options.all == (options.owner is not None or options.model is not None):
        raise ConfigError("clear needs --owner, --model or both, or else --all")
    request = kvnode_pb2.ClearRequest(owner=options.owner, model=options.model)
    answer = node.Clear(request, timeout=options.timeout_s)
    return answer, [f"{answer.objects} objects dropped"], True


def _move(
    node: kvnode_pb2_grpc.KvNodeStub, options: argparse.Namespace
) -> tuple[kvnode_pb2.MoveResponse, list[str], bool]:
    tier = kvnode_pb2.Tier.Value(f"TIER_{options.tier.upper()}")
    answer = node.Move(kvnode_pb2.MoveRequest(key=options.key, tier=tier), timeout=options.timeout_s)
    refused = "not moved: it is not here, or the node has no such tier or no room in it"
    return answer, [f"now in {options.tier}" if answer.moved else refused], answer.moved


def _contexts(
    node: kvnode_pb2_grpc.KvNodeStub, options: argparse.Namespace
) -> tuple[kvnode_pb2.ListContextsResponse, list[str], bool]:
    answer = node.ListContexts(kvnode_pb2.ListContextsRequest(owner=options.owner), timeout=options.timeout_s)
    lines = [f"{'owner':<20}{'name':<24}{'version':>8}{'tokens':>10}{'resident':>10}{'expires in':>12}"]
    for each in answer.contexts:
        lines.append(
            f"{each.owner:<20}{each.name:<24}{each.version:>8}{each.num_tokens:>10}{each.resident_tokens:>10}"
            f"{_time_left(each):>12}"
        )
    return answer, lines if answer.contexts else ["no contexts"], True


def _context(
    node: kvnode_pb2_grpc.KvNodeStub, options: argparse.Namespace
) -> tuple[kvnode_pb2.GetContextResponse, list[str], bool]:
    request = kvnode_pb2.GetContextRequest(owner=options.owner, name=options.name, with_tokens=options.with_tokens)
    answer = node.GetContext(request, timeout=options.timeout_s)
    found = answer.context
    chunks = found.num_tokens // found.chunk_tokens
    lines = [
        f"{found.name} of {found.owner}, version {found.version}, expires in {_time_left(found)}",
        f"{found.num_tokens} tokens, the first {found.resident_tokens} resident",
        *(f"{_tier_name(each.tier)}: {each.chunks} of {chunks} chunks" for each in found.tiers),
    ]
    if options.with_tokens:
        lines.append(f"tokens: {list(found.token_ids)}")
    return answer, lines, True


def _drop_context(
    node: kvnode_pb2_grpc.KvNodeStub, options: argparse.Namespace
) -> tuple[kvnode_pb2.DropContextResponse, list[str], bool]:
    request = kvnode_pb2.DropContextRequest(owner=options.owner, name=options.name)
    answer = node.DropContext(request, timeout=options.timeout_s)
    return answer, ["dropped" if answer.dropped else f"{options.owner} has no such context"], answer.dropped


def _time_left(context: kvnode_pb2.Context) -> str:
    return f"{max(context.expires_at - time.time(), 0.0):.0f} s"


def _drain(
    node: kvnode_pb2_grpc.KvNodeStub, options: argparse.Namespace
) -> tuple[kvnode_pb2.DrainResponse, list[str], bool]:
    request = kvnode_pb2.DrainRequest(grace_s=options.grace_s)
    answer = node.Drain(request, timeout=options.timeout_s + options.grace_s)
    late = f"not everything was written within {options.grace_s:g} s"
    return answer, ["everything is on the lower tiers" if answer.flushed else late], answer.flushed


def _check(
    node: kvnode_pb2_grpc.KvNodeStub, options: argparse.Namespace
) -> tuple[kvnode_pb2.CheckResponse, list[str], bool]:
    answer = node.Check(kvnode_pb2.CheckRequest(max_objects=options.max_objects), timeout=options.timeout_s)
    lines = [f"books: {answer.integrity_error or 'balance'}"]
    lines.append(f"checksums: {answer.checked} objects ({_size(answer.checked_bytes)}), {len(answer.bad_keys)} bad")
    lines += [f"  {key.hex()}: quarantined" for key in answer.bad_keys]
    if answer.unread:
        lines.append(f"{answer.unread} objects could not be read")
    return answer, lines, not (answer.integrity_error or answer.bad_keys)


def _tier_name(number: int) -> str:
    return kvnode_pb2.Tier.Name(kvnode_pb2.Tier.ValueType(number)).removeprefix("TIER_").lower()


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _plain(message: Message) -> dict[str, object]:
    """Fields for JSON: keys in hex, numbers as numbers, tiers by name."""
    fields = message.DESCRIPTOR.fields
    return {field.name: _plain_value(getattr(message, field.name), field.enum_type is not None) for field in fields}


def _plain_value(value: object, is_tier: bool) -> object:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Message):
        return _plain(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain_value(item, is_tier) for item in value]
    return _tier_name(int(str(value))) if is_tier else value
