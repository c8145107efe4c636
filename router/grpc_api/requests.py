"""From messages of the public gRPC API to the same bodies that HTTP makes of JSON: from there on both go one way.

A field that has its HTTP field's name and type is copied. docs/grpc.md lists the others; a test compares it with both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
from google.protobuf.message import Message

from tandem.proto import inference_pb2 as pb
from tandem.router.fields.json_depth import PROBLEM, too_deep
from tandem.router.fields.sampling import invalid
from tandem.router.requests.bodies import ChatBody, CompletionBody, ContextBody, DetokenizeBody, TokenizeBody
from tandem.router.requests.embedding import EmbeddingsBody
from tandem.router.web.errors import from_decode_error, renamed, renaming

B = TypeVar("B")
Fields = dict[str, Any]

_TOOL_MODES = {
    pb.TOOL_MODE_UNSPECIFIED: "auto",
    pb.TOOL_MODE_NONE: "none",
    pb.TOOL_MODE_AUTO: "auto",
    pb.TOOL_MODE_REQUIRED: "required",
}
_POOLINGS = {pb.POOLING_UNSPECIFIED: "last", pb.POOLING_MEAN: "mean", pb.POOLING_LAST: "last"}
_NOT_COPIED = frozenset({"prompt", "prompt_token_ids", "chat", "text", "explain", "timeout_s", "return_token_ids"})
_NAMES = (
    (r"messages(\[\d+\])\.content(?=\[)", r"chat.messages\1.parts"),
    (r"messages(\[\d+\])\.tool_calls(\[\d+\])\.function", r"chat.messages\1.tool_calls\2"),
    ("messages", "chat.messages"),
    (r"tools(\[\d+\])\.function", r"tools\1"),
    (r"tool_choice\.function\.name", "tool_function"),
    ("top_logprobs", "logprobs"),
    (r"response_format(\.json_schema\.schema)?", "structured_outputs.json"),
)
"""Names of fields in errors: HTTP's and ours."""


@contextmanager
def naming(message: Message) -> Iterator[None]:
    """Errors of what is done in it name the fields of `message`, which was made a body."""
    with renaming(_names(message)):
        yield


def our_names(fields: Iterable[str]) -> list[str]:
    """HTTP's names of fields as ours."""
    return [renamed(field, _NAMES) for field in fields]


def _names(message: Message) -> list[tuple[str, str]]:
    names = list(_NAMES)
    match message:
        case pb.GenerateRequest():
            names.append(("tool_choice", message.WhichOneof("tool_choice") or "tool_mode"))
            names += [("prompt", "prompt_token_ids")] if message.WhichOneof("input") == "prompt_token_ids" else []
        case pb.CreateContextRequest():
            names.append(("prompt", message.WhichOneof("input") or "input"))
        case pb.TokenizeRequest():
            names.append(("prompt", message.WhichOneof("input") or "input"))
        case _:
            pass
    return names


def generation_body(request: pb.GenerateRequest) -> CompletionBody | ChatBody:
    """Raises TandemError naming the field."""
    given: Fields = {"return_token_ids": True, **_strict_schema(request.structured_outputs)}
    match request.WhichOneof("input"):
        case "prompt":
            return _body(CompletionBody, request, **given, prompt=request.prompt)
        case "prompt_token_ids":
            return _body(CompletionBody, request, **given, prompt=list(request.prompt_token_ids.ids))
        case "chat":
            given["messages"] = _messages(request.chat)
            if request.HasField("logprobs"):
                given |= {"logprobs": True, "top_logprobs": request.logprobs}
            return _body(ChatBody, request, **given)
        case _:
            raise invalid("input", "is required: prompt, prompt_token_ids or chat")


def embeddings_body(request: pb.EmbedRequest) -> EmbeddingsBody:
    """Raises TandemError naming the field."""
    inputs: list[str | list[int]] = []
    for index, each in enumerate(request.input):
        match each.WhichOneof("input"):
            case "text":
                inputs.append(each.text)
            case "token_ids":
                inputs.append(list(each.token_ids.ids))
            case _:
                raise invalid(f"input[{index}]", "must hold text or token_ids")
    return _body(EmbeddingsBody, request, input=inputs)


def context_body(request: pb.CreateContextRequest) -> ContextBody:
    """Raises TandemError naming the field."""
    match request.WhichOneof("input"):
        case "prompt":
            return _body(ContextBody, request, name=request.name, prompt=request.prompt)
        case "prompt_token_ids":
            return _body(ContextBody, request, name=request.name, prompt=list(request.prompt_token_ids.ids))
        case "chat":
            return _body(ContextBody, request, name=request.name, messages=_messages(request.chat))
        case _:
            raise invalid("input", "is required: prompt, prompt_token_ids or chat")


def tokenize_body(request: pb.TokenizeRequest) -> TokenizeBody:
    """Raises TandemError naming the field."""
    if request.WhichOneof("input") == "chat":
        return _body(TokenizeBody, request, messages=_messages(request.chat))
    return _body(TokenizeBody, request, prompt=request.text)


def detokenize_body(request: pb.DetokenizeRequest) -> DetokenizeBody:
    return _body(DetokenizeBody, request, tokens=list(request.tokens))


def _body(kind: type[B], request: Message, **given: Any) -> B:
    """`given`: what is not copied from fields of the same names."""
    known = {field.encode_name for field in msgspec.structs.fields(kind)}  # type: ignore[arg-type]
    values: Fields = {}
    for field, value in request.ListFields():
        if field.name in _NOT_COPIED:
            continue
        name, convert = _CONVERTED.get(field.name, (field.name, _plain))
        if name not in known:
            goes_with = "chat" if kind is CompletionBody else "prompt or prompt_token_ids"
            raise invalid(field.name, f"goes with {goes_with} only")
        values[name] = convert(value)
    try:
        return msgspec.convert({**values, **given}, kind)
    except msgspec.ValidationError as error:
        raise from_decode_error(error, kind) from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return value if isinstance(value, str | int | float) else list(value)


def _messages(chat: pb.ChatMessages) -> list[Fields]:
    return [_message(message, f"chat.messages[{index}]") for index, message in enumerate(chat.messages)]


def _message(message: pb.ChatMessage, path: str) -> Fields:
    fields: Fields = {"role": message.role, "content": message.content}
    if message.parts:
        if message.content:
            raise invalid(f"{path}.parts", "cannot be combined with content")
        fields["content"] = [{"type": "text", "text": part.text} for part in message.parts]
    if message.name:
        fields["name"] = message.name
    if message.tool_call_id:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}} for call in message.tool_calls
        ]
        fields["content"] = fields["content"] or None
    return fields


def _tools(tools: Sequence[pb.Tool]) -> list[Fields]:
    return [{"function": _function(tool, f"tools[{index}].parameters")} for index, tool in enumerate(tools)]


def _function(tool: pb.Tool, path: str) -> Fields:
    function: Fields = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters:
        function["parameters"] = json_object(tool.parameters, path)
    if tool.strict:
        function["strict"] = True
    return function


def _structured_outputs(given: pb.StructuredOutputs) -> Fields:
    if given.WhichOneof("constraint") is None:
        raise invalid("structured_outputs", "must hold json, regex, choice, grammar or json_object")
    fields = {
        field.name: list(value.texts) if isinstance(value, pb.Texts) else value for field, value in given.ListFields()
    }
    if fields.pop("strict", False):
        fields.pop("json", None)  # it is in response_format
    return fields


def _strict_schema(given: pb.StructuredOutputs) -> Fields:
    """The HTTP field in which a schema can be strict."""
    if not given.strict or given.WhichOneof("constraint") != "json":
        return {}
    schema = {"schema": json_object(given.json, "structured_outputs.json"), "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def json_object(text: str, param: str) -> Fields:
    """Raises TandemError naming `param`."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise invalid(param, f"is not valid JSON: {str(error)[:120]}") from error
    if not isinstance(value, dict):
        raise invalid(param, "must be a JSON object")
    if too_deep(value):
        raise invalid(param, PROBLEM)
    return value


_CONVERTED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "logit_bias": ("logit_bias", lambda bias: {str(token_id): value for token_id, value in bias.items()}),
    "tools": ("tools", _tools),
    "tool_mode": ("tool_choice", _TOOL_MODES.__getitem__),
    "tool_function": ("tool_choice", lambda name: {"function": {"name": name}}),
    "structured_outputs": ("structured_outputs", _structured_outputs),
    "chat_template_kwargs": ("chat_template_kwargs", lambda text: json_object(text, "chat_template_kwargs")),
    "documents": ("documents", lambda texts: [json_object(text, f"documents[{i}]") for i, text in enumerate(texts)]),
    "pooling": ("pooling", _POOLINGS.__getitem__),
}
"""HTTP's name of a field, and what its value becomes, by our name of it."""
