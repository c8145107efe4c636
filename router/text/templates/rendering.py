"""From messages to the text that a chat template makes of them, whoever runs the template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.nodes

from tandem.common.errors import ConfigError, TandemError
from tandem.router.text.content_form import ContentForm, content_form

MAX_SOURCE = 1 << 17
"""Characters of a template, which then compiles within a few seconds. The largest that are known have a quarter."""
_MARK = "\u2063the final message ends here\u2063 "
"""Where a message is to be continued. The blank shows whether the template trims messages."""

Run = Callable[[Mapping[str, Any]], str]
"""Renders a template with the variables that it gets."""
Compile = Callable[[str], tuple[Run, jinja2.nodes.Template]]
"""Also returns the syntax tree. Raises what Jinja and Python do."""


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """What a model folder says."""

    text: str
    special_tokens: Mapping[str, str]
    for_tools: str | None = None
    """Another template of the model, for requests with tools. None: there is one for all."""


class ChatRendering:
    """A model's chat templates, compiled: one for requests with tools, one for all others."""

    def __init__(self, source: TemplateSource, compile: Compile) -> None:
        """Raises ConfigError where a template does not compile."""
        self._template = _Compiled(source.text, compile)
        self._tools_template = self._template if source.for_tools is None else _Compiled(source.for_tools, compile)
        self._special_tokens = source.special_tokens

    def text(
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
            return _up_to_mark(self.text(marked, add_generation_prompt=add_generation_prompt, **variables))
        context = {"tools": None, "documents": None, **self._special_tokens, **variables}
        try:
            template = self._tools_template if context["tools"] else self._template
            return template.render(messages, {**context, "add_generation_prompt": add_generation_prompt})
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise not_rendered(str(error)[:200]) from error


class _Compiled:
    """One template, and the form of message content that it expects."""

    def __init__(self, source: str, compile: Compile) -> None:
        if len(source) > MAX_SOURCE:
            raise ConfigError(f"the model's chat template has more than {MAX_SOURCE} characters")
        try:
            self._run, tree = compile(source)
            self._form: ContentForm = content_form(tree)
        except Exception as error:  # Jinja, and Python's own compiler behind it, have many words for it
            problem = f"{type(error).__name__}: {str(error)[:200]}".replace("\n", " ")
            raise ConfigError(f"the model's chat template does not compile: {problem}") from error

    def render(self, messages: Sequence[dict[str, Any]], context: Mapping[str, Any]) -> str:
        shaped = [{**message, "content": self._shaped(message["content"])} for message in messages]
        return self._run({**context, "messages": shaped})

    def _shaped(self, content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if self._form == "parts" else content
        return "\n".join(part["text"] for part in content) if self._form == "text" else content


def not_rendered(problem: str) -> TandemError:
    message = f"the model's chat template cannot render these messages: {problem}"
    return TandemError("invalid_request", message, param="messages")


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
