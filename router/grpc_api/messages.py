"""Reads a message of the public gRPC API: what cannot be read, or holds what no field may hold, is an error that names
the field; what this version does not know is told."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from tandem.common.errors import TandemError
from tandem.proto import inference_pb2
from tandem.router.fields.sampling import invalid, shown

M = TypeVar("M", bound=Message)

_FLOATS = frozenset({FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT})


def read_message(kind: type[M], raw: bytes) -> tuple[M, list[str]]:
    """The message, and the fields in it that are not known here, such as `chat.field 9`.

    Raises TandemError `invalid_request` naming the field.
    """
    try:
        message = kind.FromString(raw)
    except DecodeError as error:
        raise _unreadable(kind, raw) from error
    unknown: list[str] = []
    _check(message, "", unknown)
    return message, unknown


def _check(message: Message, path: str, unknown: list[str]) -> None:
    others = UnknownFieldSet(message)
    numbers = {others[position].field_number for position in range(len(others))}
    unknown += [f"{path}field {number}" for number in sorted(numbers)]
    for field, value in message.ListFields():
        name = f"{path}{field.name}"
        if isinstance(value, Mapping):
            for key in value:
                _check_value(_value_field(field), value[key], f"{name}[{key}]", unknown)
        elif field.is_repeated:
            if not _is_plain(field):
                for index, item in enumerate(value):
                    _check_value(field, item, f"{name}[{index}]", unknown)
        else:
            _check_value(field, value, name, unknown)


def _check_value(field: FieldDescriptor, value: Any, name: str, unknown: list[str]) -> None:
    if field.message_type is not None:
        _check(value, f"{name}.", unknown)
    elif field.enum_type is not None and value not in field.enum_type.values_by_number:
        raise invalid(name, f"must be a value of {field.enum_type.name}, got {shown(value)}")
    elif field.type in _FLOATS and not math.isfinite(value):
        raise invalid(name, f"must be a finite number, got {shown(value)}")


def _is_plain(field: FieldDescriptor) -> bool:
    """Whether every value that could be read is fine: lists of ids are long."""
    return field.message_type is None and field.enum_type is None and field.type not in _FLOATS


def _value_field(field: FieldDescriptor) -> FieldDescriptor:
    assert field.message_type is not None
    return field.message_type.fields_by_name["value"]


def _unreadable(kind: type[Message], raw: bytes) -> TandemError:
    """Text that is not UTF-8 is found in a copy of the message whose texts are bytes."""
    try:
        lenient = _lenient(kind.DESCRIPTOR.full_name).FromString(raw)
    except DecodeError:
        name = kind.DESCRIPTOR.name
        return TandemError("invalid_request", f"the message is not a {name}: its bytes are cut off or damaged")
    name = next(_bad_texts(kind.DESCRIPTOR.fields_by_name, lenient, ""), "")
    return invalid(name, "is not UTF-8") if name else TandemError("invalid_request", "the message is not valid")


def _bad_texts(fields: Mapping[str, Any], lenient: Message, path: str) -> Iterator[str]:
    for field, value in lenient.ListFields():
        original = fields[field.name]
        if isinstance(value, Mapping):
            continue
        for index, item in enumerate(value if field.is_repeated else [value]):
            name = f"{path}{field.name}[{index}]" if field.is_repeated else f"{path}{field.name}"
            if original.message_type is not None:
                yield from _bad_texts(original.message_type.fields_by_name, item, f"{name}.")
            elif original.type == FieldDescriptor.TYPE_STRING and not _is_utf8(item):
                yield name


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


@functools.cache
def _lenient(full_name: str) -> type[Message]:
    """The message of this name, with bytes in place of texts."""
    file = descriptor_pb2.FileDescriptorProto()
    inference_pb2.DESCRIPTOR.CopyToProto(file)
    for message in file.message_type:
        for field in message.field:
            if field.type == field.TYPE_STRING:
                field.type = field.TYPE_BYTES
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found: type[Message] = message_factory.GetMessageClass(pool.FindMessageTypeByName(full_name))
    return found
