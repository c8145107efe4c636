"""Messages of a chat, in OpenAI's shape, and what a chat template is given of them."""

from __future__ import annotations

from typing import Any, Literal

from tandem.router.fields.sampling import invalid
from tandem.router.fields.strict import Fields
from tandem.router.tools.arguments import arguments_of


class ContentPart(Fields):
    type: str
    text: str | None = None


class CalledFunction(Fields):
    name: str
    arguments: str
    """JSON."""


class ToolCall(Fields):
    function: CalledFunction
    id: str = ""
    type: Literal["function"] = "function"


class Message(Fields):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    """Id of the tool call that a message with role tool answers."""


def template_variables(given: dict[str, Any] | None) -> dict[str, Any]:
    """A request's own variables for the template. Raises TandemError where it sets one of ours."""
    for name in ("messages", "add_generation_prompt", "continue_final_message", "self", "tools"):
        if given and name in given:
            raise invalid("chat_template_kwargs", f"must not set {name}")
    return given or {}


def template_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """What `ChatTemplate.render` takes; arguments become objects."""
    result: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        if message.tool_calls and message.role != "assistant":
            raise invalid(f"messages[{index}].tool_calls", f"cannot belong to role {message.role}")
        if message.content is None and not message.tool_calls:
            raise invalid(f"messages[{index}].content", "is required")
        role = "system" if message.role == "developer" else message.role
        entry: dict[str, Any] = {"role": role, "content": _content_of(message.content or "", index)}
        if message.name is not None:
            entry["name"] = message.name
        if message.tool_call_id is not None:
            entry["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            entry["tool_calls"] = [_template_call(call) for call in message.tool_calls]
        result.append(entry)
    return result


def _template_call(call: ToolCall) -> dict[str, Any]:
    arguments = arguments_of(call.function.arguments)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _content_of(content: str | list[ContentPart], index: int) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    for position, part in enumerate(content):
        param = f"messages[{index}].content[{position}]"
        if part.type != "text":
            raise invalid(f"{param}.type", f"must be text; {part.type[:64]!r} is not supported")
        if part.text is None:
            raise invalid(f"{param}.text", "is required")
    return [{"type": "text", "text": part.text or ""} for part in content]
