"""`tools` and `tool_choice` of a request: what the template is told, what the answer must be, how it is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from tandem.common.sampling import Constraint
from tandem.router.asks.constraints import Asking, CheckedConstraint, check, checked_schema, schema_text
from tandem.router.fields.sampling import invalid, shown
from tandem.router.fields.strict import Fields
from tandem.router.structured.prepare import SchemaOptions
from tandem.router.tools.events import ToolParser
from tandem.router.tools.formats import ToolFormat
from tandem.router.tools.grammar import literal

MAX_TOOLS = 128
"""OpenAI's."""
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


class FunctionSpec(Fields):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    """One of the tools that a request offers."""

    function: FunctionSpec
    type: Literal["function"] = "function"

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates expect it, without `strict`; a function without parameters takes an empty
        object."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        function["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


class NamedFunction(Fields):
    name: str


class NamedTool(Fields):
    function: NamedFunction
    type: Literal["function"] = "function"


ToolChoice = NamedTool | str


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools of one request that the model may call."""

    format: ToolFormat
    tools: tuple[Tool, ...]
    constraint: CheckedConstraint | None

    @property
    def for_template(self) -> list[dict[str, Any]]:
        return [tool.for_template() for tool in self.tools]

    def parser(self) -> ToolParser:
        return self.format.parser(frozenset(tool.function.name for tool in self.tools))


async def tool_use(
    tools: list[Tool] | None,
    choice: ToolChoice | None,
    *,
    parallel: bool,
    format: ToolFormat | None,
    asking: Asking,
    answer: CheckedConstraint | None = None,
) -> ToolUse | None:
    """None where no tool call can come out. `answer`: what the output must be where it is none.

    Raises TandemError `invalid_request`. With `tool_choice: none` the model is not told of the tools at all.
    """
    _check_choice(tools, choice)
    if not tools or choice == "none":
        return None
    _check_tools(tools)
    if format is None:
        problem = "its chat template has no known form of calls, and the router's --tool-format names none"
        raise invalid("tools", f"are not supported by this model: {problem}")
    if isinstance(choice, NamedTool):
        forced = [tool for tool in tools if tool.function.name == choice.function.name]
        if not forced:
            raise invalid("tool_choice", f"names {shown(choice.function.name)}, which is not among the tools")
        parallel = False
    else:
        forced = tools
    must_call = choice not in (None, "auto")
    constraint = None
    if must_call or answer is not None:
        constraint = await _constraint(forced, parallel, format, asking, None if must_call else answer)
    return ToolUse(format, tuple(tools), constraint)


def _check_choice(tools: list[Tool] | None, choice: ToolChoice | None) -> None:
    if isinstance(choice, str) and choice not in ("none", "auto", "required"):
        raise invalid("tool_choice", f"must be none, auto, required or a function, got {shown(choice)}")
    if not tools and choice not in (None, "none", "auto"):
        raise invalid("tool_choice", "needs tools")


def _check_tools(tools: list[Tool]) -> None:
    if len(tools) > MAX_TOOLS:
        raise invalid("tools", f"may hold at most {MAX_TOOLS} tools, got {len(tools)}")
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        name = tool.function.name
        if not _NAME.fullmatch(name):
            raise invalid(f"tools[{index}].function.name", "must be 1 to 64 letters, digits, dots, dashes, underscores")
        if name in seen:
            raise invalid(f"tools[{index}].function.name", f"{shown(name)} is taken by an earlier tool")
        seen.add(name)
        if (tool.function.parameters or {}).get("type", "object") != "object":
            raise invalid(f"tools[{index}].function.parameters.type", "must be object")


async def _constraint(
    tools: list[Tool], parallel: bool, format: ToolFormat, asking: Asking, answer: CheckedConstraint | None
) -> CheckedConstraint:
    def mark(token: str) -> str:
        found = asking.text.token_id(token)
        return literal(token) if found is None else f"<[{found}]>"

    lines: list[str] = []
    ignored: list[str] = []
    calls: list[tuple[str, str]] = []
    for index, tool in enumerate(tools):
        name, param = f"arguments_{index}", f"tools[{index}].function.parameters"
        options = SchemaOptions(lenient=not tool.function.strict)
        arguments = await checked_schema(_arguments_schema(tool, param), options, param, asking, prefix=f"{name}_")
        lines += [f"{name}: {arguments.expression}", *arguments.rules]
        ignored += arguments.ignored
        calls.append((tool.function.name, name))
    start = "start: calls"
    if answer is not None:
        if not answer.expression:
            raise invalid("tools", "with tool_choice auto can be combined with a JSON schema for the answer only")
        start += f" | {answer.expression}"
        lines += answer.rules
        ignored += answer.ignored
    constraint = Constraint("lark", "\n".join([start, *format.rules(calls, parallel, mark), *lines]))
    await check(constraint, "tools", asking)
    return CheckedConstraint(constraint, tuple(ignored))


def _arguments_schema(tool: Tool, param: str) -> str:
    schema = tool.function.parameters
    if schema is None:
        schema = {"properties": {}}
    return schema_text({"type": "object", **schema}, param)
