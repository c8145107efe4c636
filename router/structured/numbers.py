"""Grammars for schemas with numbers that the library, which keeps them as 64-bit floats, cannot tell apart.

Integers beyond 2**53 are common: identifiers of database rows, limits of int64. A schema that has one becomes rules in
Lark along the way to it; everything beside the way stays JSON schema. White space is compact there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from itertools import count
from typing import Any

from tandem.router.structured.integers import integers, numbers
from tandem.router.structured.keywords import ANNOTATIONS, IN_PLACE, SchemaError, items_of, subschemas, types_of
from tandem.router.structured.references import References
from tandem.router.tools.grammar import literal

EXACT = 2**53
"""Number up to which a 64-bit float holds every integer."""
MAX_EXPONENT = 308
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_DEFINITIONS = frozenset({"$defs", "definitions"})


def parse(text: str) -> Any:
    """JSON whose numbers are exact. Raises SchemaError where one cannot be kept, ValueError where it is no JSON."""
    return json.loads(text, parse_float=_number, parse_int=_integer, parse_constant=_constant)


def _constant(text: str) -> Any:
    raise SchemaError(f"{text} is no number of JSON")


def _integer(text: str) -> int:
    if len(text) > MAX_EXPONENT + 1:
        raise SchemaError(f"the number {text[:20]}... has too many digits")
    return int(text)


def _number(text: str) -> int | float:
    try:
        exact = Decimal(text)
    except InvalidOperation as error:
        raise SchemaError(f"the number {text[:40]} is too large") from error
    if abs(exact) <= EXACT:
        return float(text)
    if exact.adjusted() > MAX_EXPONENT:
        raise SchemaError(f"the number {text[:40]} is too large")
    if exact != exact.to_integral_value():
        raise SchemaError(f"the number {text[:40]} has more digits than can be kept")
    return int(exact)


class ExactRules:
    """Rules in Lark for one schema. `rules` grows as expressions are asked for."""

    def __init__(self, root: dict[str, Any], options: dict[str, Any], prefix: str) -> None:
        """`options`: the library's, for what stays JSON schema. `prefix`: of the names of rules."""
        self.rules: list[str] = []
        self._root = root
        self._options = options
        self._prefix = prefix
        self._references = References(root)
        self._named: dict[str, str] = {}
        self._wide: dict[int, bool] = {}
        """Answers of `wide`, by the id of a subschema of the root."""
        self._names = count()

    def wide(self, schema: Any) -> bool:
        """Whether it, or what it refers to, has a number beyond those that a float holds."""
        if id(schema) not in self._wide:
            self._wide[id(schema)] = any(map(_has_wide, self._reached(schema)))
        return self._wide[id(schema)]

    def _reached(self, schema: Any) -> Iterator[dict[str, Any]]:
        """It, and the subschemas that a value of it may have to match."""
        seen: set[str] = set()
        todo = [schema]
        while todo:
            one = todo.pop()
            if not isinstance(one, dict):
                continue
            yield one
            todo += subschemas({key: value for key, value in one.items() if key not in _DEFINITIONS})
            if isinstance(reference := one.get("$ref"), str) and reference not in seen:
                seen.add(reference)
                todo.append(self._references.target(reference))

    def expression(self, schema: Any, place: str = "") -> str:
        """An expression of the values that match. Empty where there are none. Raises SchemaError."""
        if not self.wide(schema):
            return "" if schema is False else self._json(schema)
        for key in _BOUNDS:
            if not isinstance(schema.get(key, 0), int | float):
                raise SchemaError(f"{key} must be a number{_at(place)}")
        said = schema.keys() - ANNOTATIONS - _DEFINITIONS
        if said == {"$ref"}:
            return self._referred(schema["$ref"])
        if "const" in said or "enum" in said:
            return self._listed(schema, place)
        combined = [key for key in (*IN_PLACE, "$ref") if key in said]
        if combined:
            (key, *more) = combined
            if more or len(said) > 1 or (key == "allOf" and len(schema[key]) > 1):
                raise SchemaError(
                    f"numbers beyond 2**53 cannot be used where {key} has other keywords beside it{_at(place)}"
                )
            return self._any([self.expression(sub, f"{place}.{key}") for sub in schema[key]])
        return self._any([self._of_type(kind, schema, place) for kind in types_of(schema)])

    def _referred(self, reference: str) -> str:
        if reference not in self._named:
            name = self._named[reference] = self._new_name()
            self._define(name, self.expression(self._references.target(reference), reference))
        return self._named[reference]

    def _listed(self, schema: dict[str, Any], place: str) -> str:
        known = {"type", "const", "enum", "format", *_BOUNDS}
        if others := schema.keys() - ANNOTATIONS - _DEFINITIONS - known:
            raise SchemaError(f"numbers beyond 2**53 cannot be used in an enum beside {min(others)}{_at(place)}")
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if "const" in schema and "enum" in schema:
            values = [value for value in values if value in schema["enum"]]
        if not isinstance(values, list):
            raise SchemaError(f"enum must be a list{_at(place)}")
        texts = [_compact(value) for value in values if _fits(value, schema)]
        return self._any([literal(text) for text in dict.fromkeys(texts)])

    def _of_type(self, kind: str, schema: dict[str, Any], place: str) -> str:
        match kind:
            case "integer" | "number":
                return self._numbers(kind, schema, place)
            case "object":
                return self._object(schema, place)
            case "array":
                return self._array(schema, place)
        return self._json({key: value for key, value in schema.items() if key not in _BOUNDS} | {"type": kind})

    def _numbers(self, kind: str, schema: dict[str, Any], place: str) -> str:
        """With limits that are no integers the next one inwards is the limit."""
        if "multipleOf" in schema:
            raise SchemaError(f"multipleOf cannot be combined with numbers beyond 2**53{_at(place)}")
        pattern = (integers if kind == "integer" else numbers)(*_limits(schema))
        return f"/{pattern}/" if pattern else ""

    def _object(self, schema: dict[str, Any], place: str) -> str:
        for key in ("patternProperties", "minProperties", "maxProperties"):
            if key in schema:
                raise SchemaError(f"numbers beyond 2**53 cannot be used beside {key}{_at(place)}")
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        required = schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise SchemaError(f"properties must be an object and required a list{_at(place)}")
        members: list[tuple[str, bool]] = []
        for name in dict.fromkeys([*properties, *required]):
            value = self.expression(properties.get(name, rest), f"{place}.{name}" if place else name)
            if value:
                members.append((f"{literal(_compact(name) + ':')} {value}", name in required))
            elif name in required:
                return ""
        more = self.expression(rest, f"{place}.additionalProperties")
        if more:
            pair = self._rule(f'{self._other_keys(list(properties))} ":" {more}')
            members.append((f'{pair} ("," {pair})*', False))
        return f'"{{" {self._members(members)} "}}"'

    def _members(self, members: list[tuple[str, bool]]) -> str:
        """The members in this order; those that are not required may be left out."""
        first = after = ""
        for item, required in reversed(members):
            follows = self._rule(f'"," {item} {after}' if required else f'("," {item})? {after}')
            first = self._rule(f"{item} {after}" if required or not first else f"{item} {after} | {first}")
            if not required:
                first = self._rule(f'{first} | ""')
            after = follows
        return first

    def _other_keys(self, names: list[str]) -> str:
        text = self._new_name().upper()
        self.rules.append(f'{text}_ANY: /"([^"\\\\\\x00-\\x1f\\x7f]|\\\\(["\\\\bfnrt]|u[0-9a-fA-F]{{4}}))*"/')
        taken = " | ".join(literal(_compact(name)) for name in names)
        self.rules.append(f"{text}: {text}_ANY" + (f" & ~({taken})" if taken else ""))
        return text

    def _array(self, schema: dict[str, Any], place: str) -> str:
        first, rest = items_of(schema)
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        listed = [self.expression(sub, f"{place}[{index}]") for index, sub in enumerate(first)]
        if "" in listed:
            most = min(listed.index(""), most if isinstance(most, int) else len(listed))
        if not isinstance(least, int) or not (most is None or isinstance(most, int)):
            raise SchemaError(f"minItems and maxItems must be integers{_at(place)}")
        listed = listed[: len(listed) if most is None else most]
        more = self.expression(rest, f"{place}.items") if most is None or most > len(listed) else ""
        if least > (len(listed) if not more else math.inf if most is None else most):
            return ""
        end = ""
        if more:
            low = max(0, least - len(listed))
            high = "" if most is None else most - len(listed)
            end = f'("," {more}){{{low},{high}}}'
            if not listed:
                ones = f'{more} ("," {more}){{{max(0, low - 1)},{"" if most is None else most - 1}}}'
                end = ones if low else f"({ones})?"
        for index in reversed(range(len(listed))):
            item = f'"," {listed[index]} {end}' if index else f"{listed[index]} {end}"
            end = self._rule(item if index < least else f'{item} | ""')
        return f'"[" {end} "]"'

    def _json(self, schema: Any) -> str:
        if not isinstance(schema, dict):
            schema = {} if schema else {"enum": []}
        needed = self._definitions(schema)
        body = {key: value for key, value in schema.items() if key not in _DEFINITIONS}
        return f"%json {_compact({**body, **needed, 'x-guidance': self._options})}"

    def _definitions(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Those that it refers to. Raises SchemaError for references to other places."""
        found: dict[str, dict[str, Any]] = {}
        todo: list[Any] = [schema]
        while todo:
            one = todo.pop()
            if not isinstance(one, dict):
                continue
            todo += subschemas({key: value for key, value in one.items() if key not in _DEFINITIONS})
            if not isinstance(reference := one.get("$ref"), str):
                continue
            keyword, _, name = reference.removeprefix("#/").partition("/")
            if keyword not in _DEFINITIONS or "/" in name or name not in self._root.get(keyword, {}):
                raise SchemaError(f"numbers beyond 2**53 cannot be used beside the reference {reference[:80]}")
            if name not in found.setdefault(keyword, {}):
                found[keyword][name] = self._root[keyword][name]
                todo.append(found[keyword][name])
        return found

    def _any(self, expressions: list[str]) -> str:
        possible = [expression for expression in expressions if expression]
        return self._rule(" | ".join(possible)) if len(possible) > 1 else "".join(possible)

    def _rule(self, body: str) -> str:
        name = self._new_name()
        self._define(name, body)
        return name

    def _define(self, name: str, body: str) -> None:
        self.rules.append(f"{name}: {body}" if body else f"{name}: /[^\\s\\S]/")

    def _new_name(self) -> str:
        return f"{self._prefix}{next(self._names)}"


def _is_wide(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) > EXACT


def _has_wide(schema: dict[str, Any]) -> bool:
    limits = [schema.get(key) for key in (*_BOUNDS, "multipleOf")]
    return any(map(_is_wide, _numbers([*limits, schema.get("const"), schema.get("enum")])))


def _numbers(value: Any) -> Iterator[Any]:
    """All that is in a JSON value."""
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, list):
            todo += one
        elif isinstance(one, dict):
            todo += one.values()
        else:
            yield one


def _limits(schema: dict[str, Any]) -> tuple[int | None, int | None]:
    """The least and the greatest integer, where there are any."""
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if isinstance(above, bool) or isinstance(below, bool):  # draft 4
        above, below = (low if above is True else None), (high if below is True else None)
    lows = [*([] if low is None else [math.ceil(low)]), *([] if above is None else [math.floor(above) + 1])]
    highs = [*([] if high is None else [math.floor(high)]), *([] if below is None else [math.ceil(below) - 1])]
    return max(lows, default=None), min(highs, default=None)


def _fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether one of an enum also has the type, and lies within the limits, that stand beside it."""
    kind = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    name = kind.get(type(value), "null")
    if isinstance(value, float) and value.is_integer():
        name = "integer"
    allowed = types_of(schema)
    if name not in allowed and not (name == "integer" and "number" in allowed):
        return False
    if name not in ("integer", "number"):
        return True
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
    if isinstance(above, bool) or isinstance(below, bool):
        above, below = (low if above is True else -math.inf), (high if below is True else math.inf)
    return bool(low <= value <= high and above < value < below)


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _at(place: str) -> str:
    return f" (in {place})" if place else ""
