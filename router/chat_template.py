"""Renders chat messages with the model's own Jinja template, in a sandbox, as `transformers` does."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from tandem.common.errors import ConfigError, TandemError
from tandem.router.tokenizer import read_json
from tandem.router.tools.formats import ToolFormat, detect

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULT_NAME = "default"
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
        try:
            self._template = environment.from_string(source)
            self._tools_template = self._template if tools_source is None else environment.from_string(tools_source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the model's chat template does not compile: {error}") from error
        self._special_tokens = special_tokens
        self.tool_format: ToolFormat | None = detect(tools_source or source)
        """How the model writes calls of functions; None: it makes none, or in a form that is not known."""

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """`chat_template.jinja`, else `tokenizer_config.json`'s. None where the model has no template."""
        config = read_json(folder / "tokenizer_config.json")
        source, tools_source = _template_sources(folder, config)
        return None if source is None else cls(source, _special_tokens(config), tools_source)

    def render(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Raises TandemError `invalid_request` where the template rejects the messages."""
        context = {"tools": None, "documents": None, **self._special_tokens, **variables}
        try:
            template = self._tools_template if context["tools"] else self._template
            return template.render(**context, messages=list(messages), add_generation_prompt=add_generation_prompt)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise TandemError(
                "invalid_request",
                f"the model's chat template cannot render these messages: {str(error)[:200]}",
                param="messages",
            ) from error


def _template_sources(folder: Path, config: dict[str, Any]) -> tuple[str | None, str | None]:
    """The template, and that for requests with tools where there is one of its own."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8"), None
    source = config.get("chat_template")
    if isinstance(source, list):  # several named templates
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        return named.get(DEFAULT_NAME), named.get(TOOLS_NAME)
    if source is None or isinstance(source, str):
        return source, None
    raise ConfigError(f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list of templates")


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


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
