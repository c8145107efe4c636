"""The chat template of a model folder, and how it is run: on the event loop for a moment, else in another process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2.meta
import jinja2.nodes

from tandem.common.checkpoint import read_json, read_text, special_tokens
from tandem.common.errors import ConfigError
from tandem.router.text.literal_text import NOTHING_SPECIAL, RenderedChat
from tandem.router.text.templates.costs import Elsewhere
from tandem.router.text.templates.language import metered_environment, syntax_tree
from tandem.router.text.templates.meter import INLINE_S
from tandem.router.text.templates.process import Task, rendered_with
from tandem.router.text.templates.processes import TemplateProcesses
from tandem.router.text.templates.rendering import MAX_SOURCE, ChatRendering, Run, TemplateSource
from tandem.router.tools.formats import ToolFormat, detect

DEFAULT_NAME = "default"
TOOLS_NAME = "tool_use"
"""Name of the template that some models have for requests with tools."""


class ChatTemplate:
    """The template of one model; `load` finds it in the model folder."""

    def __init__(self, source: str, special_tokens: dict[str, str], tools_source: str | None = None) -> None:
        """`tools_source`: for requests with tools, where the model has another template for them. Raises
        ConfigError."""
        self._environment = metered_environment()
        self.variables: frozenset[str] = frozenset()
        """Variables that the template reads."""
        given = TemplateSource(source, special_tokens, tools_source)
        self._rendering = ChatRendering(given, self._compiled)
        self._processes = TemplateProcesses(given)
        self.tool_format: ToolFormat | None = detect(tools_source or source)
        """How the model writes tool calls; None: it makes none, or in a form that is not known."""

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """Files `chat_template.jinja` and `additional_chat_templates/`, else what `tokenizer_config.json` says. None
        where the model has no template. Raises ConfigError naming the folder."""
        source, tools_source = _template_sources(folder)
        try:
            return None if source is None else cls(source, special_tokens(folder), tools_source)
        except ConfigError as error:
            file = folder / "chat_template.jinja"
            raise ConfigError(f"{file if file.is_file() else folder / 'tokenizer_config.json'}: {error}") from error

    def render(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """See `ChatRendering.text` for the options. For any place that may wait. Raises TandemError `invalid_request`
        where the template rejects the messages, or takes too long or too much memory for them."""
        task = Task(list(messages), options, NOTHING_SPECIAL)
        try:
            return self.render_here(task).text
        except Elsewhere:
            return self.render_elsewhere(task).text

    def render_here(self, task: Task) -> RenderedChat:
        """Renders on the event loop, in a few milliseconds at most. Raises Elsewhere where it would take more, and
        TandemError."""
        return rendered_with(self._rendering, task)

    def render_elsewhere(self, task: Task) -> RenderedChat:
        """Renders in another process; this thread waits. Raises TandemError."""
        return self._processes.render(task)

    def close(self) -> None:
        self._processes.close()

    def _compiled(self, source: str) -> tuple[Run, jinja2.nodes.Template]:
        environment = self._environment
        self.variables |= jinja2.meta.find_undeclared_variables(syntax_tree(environment, source))
        template = environment.compiled(syntax_tree(environment, source))

        def run(context: Mapping[str, Any]) -> str:
            return environment.rendered(template, context, INLINE_S)

        return run, syntax_tree(environment, source)


def _template_sources(folder: Path) -> tuple[str | None, str | None]:
    """The template, and that for requests with tools where there is one of its own. Files win."""
    named = _configured_templates(folder / "tokenizer_config.json")
    default = folder / "chat_template.jinja"
    if default.is_file():
        named = {DEFAULT_NAME: _template(default)}
    for name in (DEFAULT_NAME, TOOLS_NAME):
        path = folder / "additional_chat_templates" / f"{name}.jinja"
        if path.is_file():
            named[name] = _template(path)
    return named.get(DEFAULT_NAME), named.get(TOOLS_NAME)


def _configured_templates(path: Path) -> dict[str, str]:
    source = read_json(path).get("chat_template")
    if source is None:
        return {}
    if isinstance(source, str):
        return {DEFAULT_NAME: source}
    named: dict[str, str] = {}
    for item in source if isinstance(source, list) else [None]:
        name, template = (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
        if not (isinstance(name, str) and isinstance(template, str)):
            raise ConfigError(f"{path}: chat_template must be a string or a list of templates with names")
        named[name] = template
    return named


def _template(path: Path) -> str:
    return read_text(path, 4 * MAX_SOURCE)
