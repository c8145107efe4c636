"""Bodies of /v1/messages and /v1/messages/count_tokens, and the chat that they stand for: text and tools."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from tandem.router.asks.constraints import JsonSchemaFormat, ResponseFormat
from tandem.router.asks.tool_choice import FunctionSpec, NamedFunction, NamedTool, Tool, ToolChoice
from tandem.router.fields.sampling import in_range, invalid, shown
from tandem.router.fields.strict import Fields
from tandem.router.requests.bodies import ChatBody
from tandem.router.text.messages import CalledFunction, Message, ToolCall

CHAT_NAMES = [
    ("stop", "stop_sequences"),
    (r"response_format\.json_schema\.schema", "output_config.format.schema"),
    ("response_format", "output_config.format"),
    (r"(tools\[\d+\])\.function\.parameters", r"\1.input_schema"),
    (r"(tools\[\d+\])\.function", r"\1"),
]
"""Fields of a chat request, as patterns, and what they are called here."""


class Block(Fields):
    """Part of a message's content."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | str | None = None
    """Text: as much of the JSON as was written before the answer was cut off."""
    tool_use_id: str | None = None
    content: str | list[Block] | None = None


class Turn(Fields):
    role: Literal["user", "assistant"]
    content: str | list[Block]


class AnthropicTool(Fields):
    """A tool as Anthropic's API has it; `input_schema` is the JSON schema of its arguments."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    type: Literal["custom"] | None = None


class AnthropicChoice(Fields):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class JsonOutput(Fields):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Fields):
    format: JsonOutput | None = None


class CountBody(Fields, kw_only=True):
    """What the model reads."""

    chat_names: ClassVar[list[tuple[str, str]]] = CHAT_NAMES
    messages: list[Turn]
    model: str | None = None
    system: str | list[Block] | None = None
    output_config: OutputConfig | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicChoice | None = None

    def ignored(self) -> list[str]:
        """What has no effect, beside whole fields."""
        blocks = (block for turn in self.messages if isinstance(turn.content, list) for block in turn.content)
        kinds = {block.type for block in blocks} & {"thinking", "redacted_thinking"}
        return [f"messages[].content[] of type {kind}" for kind in sorted(kinds)]

    def chat(self) -> ChatBody:
        """The chat request that it stands for. Raises TandemError on what is not supported."""
        messages = [] if self.system is None else [Message("system", _text(self.system, "system"))]
        for index, turn in enumerate(self.messages):
            messages += _turn(turn, f"messages[{index}].content")
        wanted = self.output_config and self.output_config.format
        return ChatBody(
            messages=_in_turns(messages),
            model=self.model,
            response_format=ResponseFormat("json_schema", JsonSchemaFormat(schema=wanted.schema)) if wanted else None,
            tools=[
                Tool(FunctionSpec(tool.name, tool.description, tool.input_schema, tool.strict))
                for tool in self.tools or []
            ],
            tool_choice=_choice(self.tool_choice),
            parallel_tool_calls=not (self.tool_choice and self.tool_choice.disable_parallel_tool_use),
        )


class MessagesBody(CountBody, kw_only=True):
    """Body of POST /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    @property
    def request_id(self) -> None:
        """Anthropic's API has none in its body."""

    def chat(self) -> ChatBody:
        """The chat request that it stands for. Raises TandemError on what is not supported."""
        in_range("temperature", self.temperature, 0, 1)
        body = CountBody.chat(self)
        if self.messages and self.messages[-1].role == "assistant":
            raise invalid("messages", "must not end with a turn of the assistant: prefill is not supported")
        body.max_tokens, body.stop, body.stream = self.max_tokens, self.stop_sequences, self.stream
        body.temperature, body.top_p, body.top_k = self.temperature, self.top_p, self.top_k
        return body


def _choice(given: AnthropicChoice | None) -> ToolChoice | None:
    if given is None:
        return None
    if given.type == "tool":
        if given.name is None:
            raise invalid("tool_choice.name", "is required with type tool")
        return NamedTool(NamedFunction(given.name))
    return {"auto": "auto", "any": "required", "none": "none"}[given.type]


def _turn(turn: Turn, param: str) -> list[Message]:
    """Results of tools are messages of their own in a chat, before what the user says."""
    if isinstance(turn.content, str):
        return [Message(turn.role, turn.content)]
    texts: list[Block] = []
    calls: list[ToolCall] = []
    results: list[Message] = []
    for position, block in enumerate(turn.content):
        place = f"{param}[{position}]"
        match block.type, turn.role:
            case "text", _:
                texts.append(block)
            case "tool_use", "assistant":
                if block.name is None or block.id is None:
                    raise invalid(place, "needs a name and an id")
                given = block.input or {}
                arguments = given if isinstance(given, str) else msgspec.json.encode(given).decode()
                calls.append(ToolCall(CalledFunction(block.name, arguments), block.id))
            case "tool_result", "user":
                results.append(Message("tool", _text(block.content or "", place), tool_call_id=block.tool_use_id))
            case (("thinking" | "redacted_thinking"), "assistant"):
                continue
            case _:
                raise invalid(f"{place}.type", f"{shown(block.type)} is not supported here")
    if texts or calls or not results:
        results.append(Message(turn.role, _text(texts, param), tool_calls=calls or None))
    return results


def _in_turns(messages: list[Message]) -> list[Message]:
    """Turns of the same side that follow each other are one, as Anthropic has it; many templates take no others."""
    turns: list[list[Message]] = []
    for message in messages:
        if turns and message.role == turns[-1][0].role and message.role in ("user", "assistant"):
            turns[-1].append(message)
        else:
            turns.append([message])
    return list(map(_one, turns))


def _one(turn: list[Message]) -> Message:
    if len(turn) == 1:
        return turn[0]
    text = "\n".join(str(message.content) for message in turn if message.content)
    calls = [call for message in turn for call in message.tool_calls or []]
    return Message(turn[0].role, text, tool_calls=calls or None)


def _text(content: str | list[Block], param: str) -> str:
    if isinstance(content, str):
        return content
    for position, block in enumerate(content):
        if block.type != "text" or block.text is None:
            raise invalid(f"{param}[{position}]", f"must be text, got {shown(block.type)}")
    return "\n".join(block.text or "" for block in content)
