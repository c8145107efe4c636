"""docs/grpc.md lists where gRPC and HTTP differ: neither side has a field or a call that the other lacks unsaid."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from google.protobuf.descriptor import Descriptor
from msgspec.inspect import ListType, StructType, Type, UnionType

from tandem.proto import inference_pb2 as pb
from tandem.router.grpc_api.service import METHODS
from tandem.router.http import app as http_app
from tandem.router.requests.bodies import ChatBody, CompletionBody, ContextBody, DetokenizeBody, TokenizeBody
from tandem.router.requests.embedding import EmbeddingsBody

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "grpc.md").read_text()
SAME: list[tuple[str, list[type]]] = [
    ("GenerateRequest", [CompletionBody, ChatBody]),
    ("EmbedRequest", [EmbeddingsBody]),
    ("CreateContextRequest", [ContextBody]),
    ("TokenizeRequest", [TokenizeBody]),
    ("DetokenizeRequest", [DetokenizeBody]),
]
BY_ID = ["/v1/requests/{id}"]
"""Paths that end with an id and are in no table of routes."""


@dataclass(frozen=True)
class Row:
    http: str
    """Path of a field; empty: there is none."""
    grpc: str
    why: str


def table(title: str) -> list[tuple[str, str, str]]:
    """The cells of the table under a heading, `-` as nothing."""
    section = re.split(r"^#+ ", TEXT.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert rows[0] == ["HTTP", "gRPC", "why"]
    return [(http.strip("`-"), grpc.strip("-"), why) for http, grpc, why in rows[2:]]


def fields_of_body(body: type) -> Iterator[str]:
    info = msgspec.inspect.type_info(body)
    assert isinstance(info, StructType)
    for field in info.fields:
        yield field.encode_name
        yield from _inside(field.type, field.encode_name)


def _inside(kind: Type, path: str) -> Iterator[str]:
    for option in kind.types if isinstance(kind, UnionType) else (kind,):
        if isinstance(option, StructType):
            for name in fields_of_body(option.cls):
                yield f"{path}.{name}"
        elif isinstance(option, ListType):
            yield from _inside(option.item_type, f"{path}[]")


def fields_of_message(message: Descriptor) -> Iterator[str]:
    for field in message.fields:
        yield field.name
        inner = field.message_type
        if inner is not None and not inner.GetOptions().map_entry and inner.name not in ("TokenIds", "EmbedInput"):
            for name in fields_of_message(inner):
                yield f"{field.name}{'[]' if field.is_repeated else ''}.{name}"


def is_in(path: str, tree: str) -> bool:
    return path == tree or (path.startswith(tree) and path[len(tree)] in ".[")


def differences(http: set[str], grpc: set[str], rows: Sequence[Row]) -> list[str]:
    """What one side has, the other has not, and no row tells of; and rows that tell nothing."""

    def has_counterpart(path: str) -> bool:
        if path in grpc:
            return True
        found = [row for row in rows if row.http and is_in(path, row.http)]
        longest = max((len(row.http) for row in found), default=0)
        return any(
            row.why or (row.grpc + path[longest:]).removesuffix("[]") in grpc
            for row in found
            if len(row.http) == longest
        )

    targets = [row for row in rows if row.grpc]

    def is_counterpart(path: str) -> bool:
        if path in http:
            return True
        found = [row for row in targets if is_in(path, row.grpc)]
        longest = max((len(row.grpc) for row in found), default=0)
        return any(
            path == row.grpc or row.why or row.http + path[longest:] in http
            for row in found
            if len(row.grpc) == longest
        )

    problems = [f"HTTP only: {path}" for path in sorted(http) if not has_counterpart(path)]
    problems += [f"gRPC only: {path}" for path in sorted(grpc) if not is_counterpart(path)]
    for row in rows:
        if row.http and not any(is_in(path, row.http) for path in http):
            problems.append(f"no such field over HTTP: {row.http}")
        if row.grpc and not any(is_in(path, row.grpc) for path in grpc):
            problems.append(f"no such field over gRPC: {row.grpc}")
        if row.http == row.grpc and not row.why:
            problems.append(f"the same on both sides: {row.http}")
    return problems


@pytest.mark.parametrize(("message", "bodies"), SAME)
def test_fields(message: str, bodies: list[type]) -> None:
    rows = [Row(http, grpc.strip("`"), why) for http, grpc, why in table(message)]
    http = {name for body in bodies for name in fields_of_body(body)}
    grpc = set(fields_of_message(pb.DESCRIPTOR.message_types_by_name[message]))
    assert differences(http, grpc, rows) == []


def test_what_is_added_on_one_side_is_noticed() -> None:
    rows = [Row("a", "b", ""), Row("", "explain", "a header")]
    assert differences({"a", "a.c", "same"}, {"b", "b.c", "same", "explain"}, rows) == []
    assert differences({"a", "a.c", "new"}, {"b", "b.c", "explain"}, rows) == ["HTTP only: new"]
    assert differences({"a", "a.c", "a.d"}, {"b", "b.c", "explain"}, rows) == ["HTTP only: a.d"]
    assert differences({"a", "a.c"}, {"b", "b.c", "b.d", "explain"}, rows) == ["gRPC only: b.d"]
    assert differences({"a"}, {"b"}, rows) == ["no such field over gRPC: explain"]


def test_calls() -> None:
    rows = {http: re.findall(r"`(\w+)`", grpc) for http, grpc, _ in table("Calls")}
    assert set(rows) == {*http_app.ROUTES, *BY_ID}
    service: Any = pb.DESCRIPTOR.services_by_name["Inference"]
    assert {method for methods in rows.values() for method in methods} == set(service.methods_by_name) == set(METHODS)
    for name, method in METHODS.items():
        assert service.methods_by_name[name].input_type is method.request.DESCRIPTOR
    for http, grpc, why in table("Calls"):
        assert grpc or why, http
