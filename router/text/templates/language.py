"""What chat templates may use beyond Jinja, as in `transformers`, and Jinja itself in a sandbox."""

from __future__ import annotations

import datetime
import json
import re
import secrets
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from tandem.router.text.templates.meter import MeteredEnvironment
from tandem.router.tools.arguments import CutArguments

MAX_FORMAT = 1000
"""Characters of a format for the time."""
_PADDED = re.compile(r"%[^a-zA-Z%]*[0-9]")


def metered_environment() -> MeteredEnvironment:
    """The environment for rendering on the event loop."""
    return MeteredEnvironment({"tojson": _tojson}, _FUNCTIONS, **_options())


def plain_environment() -> jinja2.Environment:
    """The environment for rendering whatever it takes. Nothing is computed while a template is compiled."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(optimized=False, finalize=_as_it_is, **_options())
    environment.filters["tojson"] = _tojson
    environment.globals.update(_FUNCTIONS)
    return environment


def syntax_tree(environment: jinja2.Environment, source: str) -> jinja2.nodes.Template:
    """Raises TemplateError, also on an `autoescape` whose argument would be computed while it is compiled."""
    tree = environment.parse(source)
    for node in tree.find_all(jinja2.nodes.EvalContextModifier):
        if not all(isinstance(option.value, jinja2.nodes.Const) for option in node.options):
            raise jinja2.TemplateSyntaxError("autoescape takes true or false", node.lineno)
    return tree


@jinja2.pass_context
def _as_it_is(context: Any, value: Any) -> Any:
    """What takes the context is not called while a template is compiled."""
    return value


def _options() -> dict[str, Any]:
    return {"trim_blocks": True, "lstrip_blocks": True, "extensions": [_GenerationBlock, jinja2.ext.loopcontrols]}


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
        """A random text that stands for arguments that are cut, until the JSON is written. Raises TypeError for other
        values."""
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


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    """The time now, without widths, which can make any length."""
    if len(format) > MAX_FORMAT or _PADDED.search(format):
        raise jinja2.TemplateError("strftime_now: the format is too long")
    return datetime.datetime.now().strftime(format)


_FUNCTIONS = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; for serving its body is plain output."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
