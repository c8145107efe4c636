"""POST /v1/messages: Anthropic's API over the same chat: text and tools."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from tandem.common.errors import TandemError
from tandem.router.chat_request import plan_chat
from tandem.router.http_answers import answer
from tandem.router.http_errors import renamed
from tandem.router.http_exchange import Exchange
from tandem.router.http_types import CalledFunction, ChatBody, Message, ToolCall
from tandem.router.message_shapes import MessageShapes
from tandem.router.sampling_fields import in_range, invalid, shown
from tandem.router.service import Service
from tandem.router.tools.choice import FunctionSpec, NamedFunction, NamedTool, Tool, ToolChoice

_NAMES = [
    ("stop", "stop_sequences"),
    (r"(tools\[\d+\])\.function\.parameters", r"\1.input_schema"),
    (r"(tools\[\d+\])\.function", r"\1"),
]
"""Fields of a chat request, and what they are called here."""


class Block(msgspec.Struct):
    """Of a message's content."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None


class Turn(msgspec.Struct):
    role: Literal["user", "assistant"]
    content: str | list[Block]


class AnthropicTool(msgspec.Struct):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None


class AnthropicChoice(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class MessagesBody(msgspec.Struct, kw_only=True):
    messages: list[Turn]
    max_tokens: int
    model: str | None = None
    system: str | list[Block] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicChoice | None = None

    def chat(self) -> ChatBody:
        """The chat request that it stands for. Raises TandemError on what is not supported."""
        in_range("temperature", self.temperature, 0, 1)
        messages = [] if self.system is None else [Message("system", _text(self.system, "system"))]
        for index, turn in enumerate(self.messages):
            messages += _turn(turn, f"messages[{index}].content")
        return ChatBody(
            messages=messages,
            model=self.model,
            max_tokens=self.max_tokens,
            stop=self.stop_sequences,
            stream=self.stream,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            tools=[Tool(FunctionSpec(tool.name, tool.description, tool.input_schema)) for tool in self.tools or []],
            tool_choice=_choice(self.tool_choice),
            parallel_tool_calls=not (self.tool_choice and self.tool_choice.disable_parallel_tool_use),
        )


_DECODER = msgspec.json.Decoder(MessagesBody)


async def messages(exchange: Exchange, service: Service) -> None:
    body = await exchange.decode(_DECODER)
    try:
        plan = await plan_chat(body.chat(), service, exchange.caller)
    except TandemError as error:
        raise renamed(error, _NAMES) from error
    with service.call(
        exchange.request_id,
        [plan.spec],
        arrived=exchange.arrived,
        traceparent=exchange.traceparent,
        streaming=bool(body.stream),
    ) as call:
        await answer(exchange, call, MessageShapes(exchange.request_id, service, plan, call))


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
                arguments = msgspec.json.encode(block.input or {}).decode()
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


def _text(content: str | list[Block], param: str) -> str:
    if isinstance(content, str):
        return content
    for position, block in enumerate(content):
        if block.type != "text" or block.text is None:
            raise invalid(f"{param}[{position}]", f"must be text, got {shown(block.type)}")
    return "\n".join(block.text or "" for block in content)
