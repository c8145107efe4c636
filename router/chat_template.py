"""Renders chat messages with the model's own Jinja template, in a sandbox, as `transformers` does."""

from __future__ import annotations

import datetime
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from tandem.common.checkpoint import read_json, special_tokens
from tandem.common.errors import ConfigError, TandemError
from tandem.router.content_form import content_form
from tandem.router.tools.arguments import CutArguments
from tandem.router.tools.formats import ToolFormat, detect

DEFAULT_NAME = "default"
_MARK = "\u2063the final message ends here\u2063 "
"""Where a message is to be continued. The blank shows whether the template trims messages."""
TOOLS_NAME = "tool_use"
"""Of the template that some models have for requests with tools."""


class ChatTemplate:
    """The template of one model; `load` finds it in the model folder."""

    def __init__(self, source: str, special_tokens: dict[str, str], tools_source: str | None = None) -> None:
        """`tools_source`: for requests with tools, where the model has another template for them."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = _Compiled(environment, source)
        self._tools_template = self._template if tools_source is None else _Compiled(environment, tools_source)
        self._special_tokens = special_tokens
        self.variables = _variables(environment, source) | _variables(environment, tools_source or "")
        """That the template reads."""
        self.tool_format: ToolFormat | None = detect(tools_source or source)
        """How the model writes calls of functions; None: it makes none, or in a form that is not known."""

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """Files `chat_template.jinja` and `additional_chat_templates/`, else what `tokenizer_config.json` says. None
        where the model has no template."""
        source, tools_source = _template_sources(folder)
        return None if source is None else cls(source, special_tokens(folder), tools_source)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """`content` of a message is text or a list of text parts; the template gets the form that it expects, parts
        joined by line breaks where that is text. `continue_final_message`: the text ends where the last message does.

        Raises TandemError `invalid_request` where the template rejects the messages.
        """
        if continue_final_message:
            marked = [*messages[:-1], _with_mark(messages[-1])]
            return _up_to_mark(self.render(marked, add_generation_prompt=add_generation_prompt, **variables))
        context = {"tools": None, "documents": None, **self._special_tokens, **variables}
        try:
            template = self._tools_template if context["tools"] else self._template
            return template.render(messages, **context, add_generation_prompt=add_generation_prompt)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise TandemError(
                "invalid_request",
                f"the model's chat template cannot render these messages: {str(error)[:200]}",
                param="messages",
            ) from error


class _Compiled:
    """One template, and the form of message content that it expects."""

    def __init__(self, environment: jinja2.Environment, source: str) -> None:
        try:
            self._template = environment.from_string(source)
            self._form = content_form(environment.parse(source))
        except jinja2.TemplateError as error:
            raise ConfigError(f"the model's chat template does not compile: {error}") from error

    def render(self, messages: Sequence[dict[str, Any]], **context: Any) -> str:
        shaped = [{**message, "content": self._shaped(message["content"])} for message in messages]
        return self._template.render(**context, messages=shaped)

    def _shaped(self, content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if self._form == "parts" else content
        return "\n".join(part["text"] for part in content) if self._form == "text" else content


def _template_sources(folder: Path) -> tuple[str | None, str | None]:
    """The template, and that for requests with tools where there is one of its own. Files win."""
    named = _configured_templates(folder / "tokenizer_config.json")
    default = folder / "chat_template.jinja"
    if default.is_file():
        named = {DEFAULT_NAME: _read_text(default)}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        named[path.stem] = _read_text(path)
    return named.get(DEFAULT_NAME), named.get(TOOLS_NAME)


def _configured_templates(path: Path) -> dict[str, str]:
    source = read_json(path).get("chat_template")
    if source is None:
        return {}
    if isinstance(source, str):
        return {DEFAULT_NAME: source}
    named: dict[str, str] = {}
    for item in source if isinstance(source, list) else [None]:
        if not (isinstance(item, dict) and isinstance(item.get("template"), str)):
            raise ConfigError(f"{path}: chat_template must be a string or a list of templates with names")
        named[str(item.get("name"))] = item["template"]
    return named


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start})") from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    cut: dict[str, str] = {}

    def name_of(value: Any) -> str:
        if not isinstance(value, CutArguments):
            raise TypeError(f"{type(value).__name__} is not JSON")
        name = secrets.token_hex(16)
        cut[f'"{name}"'] = value.text
        return name

    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=name_of
    )
    for name, content in cut.items():
        text = text.replace(name, content)
    return text


def _variables(environment: jinja2.Environment, source: str) -> frozenset[str]:
    return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))


def _with_mark(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the mark at the end of its text."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + _MARK}
    return {**message, "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + _MARK}]}


def _up_to_mark(text: str) -> str:
    """What the template makes of the final message and what is before it. Where it trims messages, so is this one."""
    end = text.rfind(_MARK.rstrip())
    if end < 0:
        raise TandemError(
            "invalid_request",
            "continue_final_message: the model's chat template leaves the final message out",
            param="continue_final_message",
        )
    return text[:end] if text.startswith(_MARK, end) else text[:end].rstrip()


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; for serving its body is plain output."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
