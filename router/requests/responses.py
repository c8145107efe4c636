"""Body of /v1/responses and /v1/responses/input_tokens, and the chat that it stands for, without state."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from tandem.router.asks.constraints import JsonSchemaFormat, ResponseFormat
from tandem.router.asks.tool_choice import FunctionSpec, NamedFunction, NamedTool, Tool
from tandem.router.fields.sampling import DrawingFields, invalid, shown
from tandem.router.fields.strict import Fields
from tandem.router.requests.bodies import ChatBody
from tandem.router.text.messages import CalledFunction, ContentPart, Message, ToolCall

CHAT_NAMES = [
    ("messages", "input"),
    ("max_completion_tokens", "max_output_tokens"),
    (r"response_format\.json_schema\.schema", "text.format.schema"),
    ("response_format", "text.format"),
    (r"(tools\[\d+\])\.function", r"\1"),
]
"""Fields of a chat request, as patterns, and what they are called here."""
_LOGPROBS = "message.output_text.logprobs"


class InputItem(Fields):
    """One item of `input`: a message, a function call or its output."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None


class FunctionTool(FunctionSpec, kw_only=True):
    type: Literal["function"]


class NamedChoice(Fields):
    type: Literal["function"]
    name: str


class TextFormat(JsonSchemaFormat, kw_only=True):
    type: Literal["text", "json_object", "json_schema"] = "text"


class TextConfig(Fields):
    format: TextFormat | None = None


class ResponsesBody(DrawingFields, kw_only=True):
    """Body of POST /v1/responses."""

    chat_names: ClassVar[list[tuple[str, str]]] = CHAT_NAMES
    input: str | list[InputItem]
    instructions: str | None = None
    model: str | None = None
    max_output_tokens: int | None = None
    request_id: str | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    stream: bool | None = None
    text: TextConfig | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: NamedChoice | str | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None

    def chat(self) -> ChatBody:
        """The chat request that it stands for. Raises TandemError on what is not supported."""
        wanted = self.text.format if self.text and self.text.format else None
        schema = JsonSchemaFormat(schema=wanted.schema, strict=wanted.strict) if wanted else None
        choice = self.tool_choice
        logprobs = bool(self.include and _LOGPROBS in self.include)
        return ChatBody(
            **{name: getattr(self, name) for name in DrawingFields.__struct_fields__},
            messages=_messages(self),
            model=self.model,
            max_completion_tokens=self.max_output_tokens,
            stream=self.stream,
            logprobs=logprobs,
            top_logprobs=self.top_logprobs if logprobs else None,
            response_format=ResponseFormat(wanted.type, schema) if wanted else None,
            tools=[
                Tool(FunctionSpec(tool.name, tool.description, tool.parameters, tool.strict))
                for tool in self.tools or []
            ],
            tool_choice=NamedTool(NamedFunction(choice.name)) if isinstance(choice, NamedChoice) else choice,
            parallel_tool_calls=self.parallel_tool_calls,
        )

    def ignored(self) -> list[str]:
        """What has no effect, beside whole fields."""
        names = [f"include: {name}" for name in self.include or [] if name != _LOGPROBS]
        if self.top_logprobs and _LOGPROBS not in (self.include or []):
            names.append("top_logprobs")
        if isinstance(self.input, list) and any(item.type == "reasoning" for item in self.input):
            names.append("input[] of type reasoning")
        return names

    def repeated(self) -> dict[str, Any]:
        """Fields that the answer repeats."""
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "text": {"format": self.text.format if self.text and self.text.format else {"type": "text"}},
            "tool_choice": self.tool_choice or "auto",
            "tools": self.tools or [],
            "top_logprobs": self.top_logprobs or 0,
            "user": self.user,
        }


def _messages(body: ResponsesBody) -> list[Message]:
    messages = [] if body.instructions is None else [Message("system", body.instructions)]
    if isinstance(body.input, str):
        return [*messages, Message("user", body.input)]
    for index, item in enumerate(body.input):
        match item.type:
            case "message":
                if item.role is None:
                    raise invalid(f"input[{index}].role", "is required")
                messages.append(Message(item.role, _text(item.content, f"input[{index}].content")))
            case "function_call":
                if item.name is None or item.call_id is None:
                    raise invalid(f"input[{index}]", "needs a name and a call_id")
                if not messages or messages[-1].role != "assistant":
                    messages.append(Message("assistant"))
                calls = messages[-1].tool_calls = messages[-1].tool_calls or []
                calls.append(ToolCall(CalledFunction(item.name, item.arguments or "{}"), item.call_id))
            case "function_call_output":
                output = _text(item.output, f"input[{index}].output")
                messages.append(Message("tool", output, tool_call_id=item.call_id))
            case "reasoning":
                continue
            case _:
                raise invalid(f"input[{index}].type", f"{shown(item.type)} is not supported")
    return messages


def _text(content: str | list[ContentPart] | None, param: str) -> str:
    if content is None:
        raise invalid(param, "is required")
    if isinstance(content, str):
        return content
    for position, part in enumerate(content):
        if part.type not in ("input_text", "output_text", "text") or part.text is None:
            raise invalid(f"{param}[{position}]", f"must be text, got {shown(part.type)}")
    return "\n".join(part.text or "" for part in content)
