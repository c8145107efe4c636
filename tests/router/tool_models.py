"""Models that call functions, each in its own form: chat templates and special tokens, without weights."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from tandem.common.sampling import Constraint
from tandem.proto import worker_pb2
from tandem.router.app import Router
from tandem.router.settings import RouterConfig
from tandem.router.text.tokenizer import ModelText
from tests.router.conftest import write_model

_TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}CALL<|im_end|>\n{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _template(call: str, tools: str = "{% if tools %}{{ tools | tojson }}\n{% endif %}") -> str:
    return tools + _TURNS.replace("CALL<|im_end|>", call)


_JSON = '{"name": "{{ call.function.name }}", "KEY": {{ call.function.arguments | tojson }}}'
TEMPLATES = {
    "hermes": _template("<tool_call>\n" + _JSON.replace("KEY", "arguments") + "\n</tool_call>"),
    "llama3_json": _template("<|start_header_id|>" + _JSON.replace("KEY", "parameters")),
    "mistral": _template("[TOOL_CALLS] [" + _JSON.replace("KEY", "arguments") + "]"),
    "mistral_named": _template("[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}"),
}
MARKS = {
    "hermes": [("<tool_call>", False), ("</tool_call>", False)],
    "llama3_json": [("<|python_tag|>", True), ("<|start_header_id|>", True)],
    "mistral": [("[TOOL_CALLS]", True)],
    "mistral_named": [("[TOOL_CALLS]", True), ("[ARGS]", True)],
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def calls_text(form: str, *calls: tuple[str, str]) -> str:
    """What a model of this form writes to call functions. `calls`: name, and arguments as JSON."""
    match form:
        case "hermes":
            return "\n".join(
                f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
                for name, arguments in calls
            )
        case "llama3_json":
            return "; ".join(f'{{"name": "{name}", "parameters": {arguments}}}' for name, arguments in calls)
        case "mistral":
            inner = ", ".join(f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in calls)
            return f"[TOOL_CALLS] [{inner}]"
        case _:
            return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)


def write_tool_model(folder: Path, form: str) -> Path:
    write_model(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark, special in MARKS[form] if special])
    tokenizer.add_tokens([AddedToken(m, special=False, normalized=False) for m, special in MARKS[form] if not special])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "chat_template": TEMPLATES[form]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def encode(folder: Path, text: str) -> list[int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids


@asynccontextmanager
async def bare_router(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a router without servers and workers: enough for what is refused early."""
    router = Router(RouterConfig(model=str(folder), decode_workers=["unix:/nowhere.sock"]))
    transport = httpx.ASGITransport(router.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        yield client
    router.model.text.close()


def saying(folder: Path, text: str) -> Callable[[worker_pb2.Submit], list[int]]:
    """For a fake worker: it writes this text, then the end of its turn (token 2)."""
    ids = [*encode(folder, text), 2]
    return lambda _: ids


def prompt_of(folder: Path, submit: worker_pb2.Submit) -> str:
    return ModelText(folder).decode(list(submit.prompt_token_ids), skip_special_tokens=False)


def accepts(folder: Path, constraint: Constraint, text: str) -> bool:
    """Whether a worker that enforces the constraint could write exactly this text."""
    content = (folder / "tokenizer.json").read_text()
    tokenizer = LLTokenizer(content, n_vocab=512, eos_token=2)
    grammar = {
        "json_schema": LLMatcher.grammar_from_json_schema,
        "regex": LLMatcher.grammar_from_regex,
        "lark": LLMatcher.grammar_from_lark,
    }[constraint.kind](constraint.text)
    matcher = LLMatcher(tokenizer, grammar)
    assert not matcher.is_error(), matcher.get_error()
    ids = encode(folder, text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
