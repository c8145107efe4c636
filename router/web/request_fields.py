"""Reads the JSON body of a request so that no field is ignored in silence.

A field that its struct has is implemented. Of the others `field_table.py` says which are refused by name and which are
tolerated. One that is in neither is refused where it looks like a field that is known (a typing error), and tolerated
otherwise, as new clients send new fields. What is tolerated is told in the answer's header, and once in the log.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec
from msgspec.inspect import ListType, StructType, Type, UnionType, type_info

from tandem.router.fields.json_depth import check_depth, deep_body, may_be_deep
from tandem.router.fields.json_size import check_size
from tandem.router.fields.sampling import invalid
from tandem.router.web.errors import from_decode_error
from tandem.router.web.field_table import OTHERS, Other, Refused

log = logging.getLogger(__name__)

SMALL_BODY_BYTES = 32 * 1024
"""Reading so much takes a few milliseconds at the worst, on the event loop; more is read in a thread."""
MAX_IGNORED = 50
"""Fields of one body: each is compared with all that are known."""
MAX_LOGGED = 1000
"""Names that the log has told of; clients can invent others without end."""
ALIKE = 0.84
"""Ratio of difflib above which a name is taken for a typing error: `temprature`, and not `user_id` for `user`."""

_SANE_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_logged: set[str] = set()

T = TypeVar("T")


class BodyReader(Generic[T]):
    """Decodes one kind of body."""

    def __init__(self, body: type[T]) -> None:
        self._type = body
        self._known = known_fields(body)
        self._decoder = msgspec.json.Decoder(body)

    def read(self, raw: bytes) -> tuple[T, list[str]]:
        """The body, and the names of its fields that have no effect. For any thread. Raises TandemError
        `invalid_request` naming the field, `request_too_large`."""
        if len(raw) > SMALL_BODY_BYTES:
            check_size(raw)
        if not may_be_deep(raw):
            with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
                return self._decoder.decode(raw), []
        return self._read_closely(raw)

    def _read_closely(self, raw: bytes) -> tuple[T, list[str]]:
        """Where it has fields that are not implemented, or a mistake: looks at each object by itself."""
        try:
            content = msgspec.json.decode(raw)
            check_depth(content, raw)
            ignored: dict[str, None] = {}
            if isinstance(content, dict):
                self._known.look(content, "", "", ignored)
            return msgspec.convert(content, self._type), list(ignored)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise from_decode_error(self._better(raw, error), self._type) from error
        except RecursionError as error:
            raise deep_body() from error

    def _better(self, raw: bytes, error: Exception) -> Exception:
        """The error that says where: of a number that no float holds only the decoder that knows the types does."""
        try:
            msgspec.json.decode(raw, type=self._type)
        except (msgspec.MsgspecError, UnicodeDecodeError) as better:
            return better
        except RecursionError:
            return error
        return error


@dataclass(slots=True, eq=False)
class KnownFields:
    """What is known of the fields of one struct."""

    fields: dict[str, Inside | None] = field(default_factory=dict)
    """Implemented ones; those that hold objects with what is known of them."""
    nested: dict[str, Inside] = field(default_factory=dict)
    """Those of these that hold objects."""
    others: Mapping[str, Other] = field(default_factory=dict)

    def look(self, value: dict[str, Any], place: str, kind: str, ignored: dict[str, None]) -> None:
        """`place` tells where `value` is, with indices; `kind` tells it without. Adds to `ignored`, and takes out of
        `value` what is not implemented."""
        if not value.keys() <= self.fields.keys():
            for name in [name for name in value if name not in self.fields]:
                content = value.pop(name)
                if content is not None:
                    self._other(name, content, place + name[:64], kind, ignored)
        for name, inside in self.nested.items():
            content = value.get(name)
            if isinstance(content, dict | list):
                inside.look(content, place + name, kind + name, ignored)

    def _other(self, name: str, content: Any, path: str, kind: str, ignored: dict[str, None]) -> None:
        known = self.others.get(name)
        told = kind + (name if _SANE_NAME.fullmatch(name) else "?")
        if known is None:
            if told in ignored:
                return
            if len(ignored) >= MAX_IGNORED:
                raise invalid(path, f"is one of more than {MAX_IGNORED} fields that have no effect here")
            meant = typing_error(name, [*self.fields, *self.others])
            if meant is not None:
                raise invalid(path, f"is not known; did you mean {meant}?")
        elif content in known.fine or content in ("", [], {}, False):
            return
        elif isinstance(known, Refused):
            raise invalid(path, f"is not supported: {known.why}")
        ignored[told] = None


@dataclass(slots=True, eq=False)
class Inside:
    """What is known of objects inside a field: itself one, or a list of them."""

    one: KnownFields | None
    each: Inside | None

    def look(self, value: Any, place: str, kind: str, ignored: dict[str, None]) -> None:
        """Looks at all objects in `value`, see `KnownFields.look`."""
        if isinstance(value, dict):
            if self.one is not None:
                self.one.look(value, f"{place}.", f"{kind}.", ignored)
        elif isinstance(value, list) and self.each is not None:
            for index, item in enumerate(value):
                self.each.look(item, f"{place}[{index}]", f"{kind}[]", ignored)


def typing_error(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that was most probably meant: written another way (`maxTokens`), with letters swapped, or
    with one wrong. None: it looks like none of them."""
    squeezed = {_squeezed(each): each for each in known}
    given = _squeezed(name[:64])
    if given in squeezed:
        return squeezed[given]
    for each, meant in squeezed.items():
        if len(each) > 2 and sorted(each) == sorted(given):
            return meant
    close = difflib.get_close_matches(given, squeezed, 1, ALIKE)
    return squeezed[close[0]] if close else None


def log_ignored(names: Iterable[str], path: str) -> None:
    """Once for each field of each endpoint."""
    new = {f"{path} {name}": name for name in names if f"{path} {name}" not in _logged}
    if new and len(_logged) < MAX_LOGGED:
        _logged.update(new)
        listed = ", ".join(map(ascii, new.values()))
        log.warning("requests to %s have fields without effect here: %.300s (said once)", path, listed)


_known: dict[type, KnownFields] = {}


def known_fields(struct: type) -> KnownFields:
    """What is known of a struct; made once."""
    found = _known.get(struct)
    if found is None:
        found = _known[struct] = KnownFields()
        info = type_info(struct)
        assert isinstance(info, StructType)
        found.fields.update({each.encode_name: _inside(each.type) for each in info.fields})
        found.nested = {name: inside for name, inside in found.fields.items() if inside is not None}
        found.others = _others_of(struct)
    return found


def _others_of(struct: type) -> dict[str, Other]:
    """Rows of the table for it and for what it derives from."""
    rows: dict[str, Other] = {}
    for base in reversed(struct.__mro__):
        rows.update(OTHERS.get(base.__name__, {}))
    return rows


def _inside(kind: Type) -> Inside | None:
    one: KnownFields | None = None
    each: Inside | None = None
    for option in kind.types if isinstance(kind, UnionType) else (kind,):
        if isinstance(option, StructType):
            one = known_fields(option.cls)
        elif isinstance(option, ListType):
            each = _inside(option.item_type)
    return None if one is None and each is None else Inside(one, each)


def _squeezed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
