"""The process that renders what is not certain to be short: a template can harm nobody here.

`template_processes.py` starts it and reads its answers. It is ended where one rendering takes too long or too much
memory, and started again.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import jinja2
import jinja2.nodes

from tandem.common.errors import ConfigError, TandemError
from tandem.common.memory import limit_address_space
from tandem.router.text.literal_text import Hidden, RenderedChat, SpecialNames
from tandem.router.text.templates.language import plain_environment, syntax_tree
from tandem.router.text.templates.rendering import ChatRendering, Run, TemplateSource, not_rendered

CPU_S = 2.0
"""Processor time of one rendering; then SIGPROF ends the process. The longest honest conversations take a fifth."""
COMPILE_S = 20.0
"""Processor time of compiling the template, before the first."""
MEMORY_BYTES = 1 << 30
"""Address space."""
NICENESS = 5
"""Steps of requests that run go before chats that are rendered here."""
MAX_OUTPUT = 1 << 24
"""Characters that a template may make: twice as many as a request may have."""
SIZE = struct.Struct("<Q")
"""Length of what follows, in bytes."""


@dataclass(frozen=True, slots=True)
class Task:
    """One rendering: messages and variables for the template."""

    messages: list[dict[str, Any]]
    variables: Mapping[str, Any]
    special: SpecialNames
    """Special tokens that are text where clients write them."""


def rendered_with(rendering: ChatRendering, task: Task) -> RenderedChat:
    """Raises TandemError, and what `rendering` does."""
    hidden = Hidden(task.special)
    messages, variables = hidden.hide(task.messages), hidden.hide(task.variables)
    return hidden.shown(rendering.text(messages, **variables))


def compiled(source: str) -> tuple[Run, jinja2.nodes.Template]:
    """A function that renders the template within the process's bounds, and the syntax tree. Raises
    jinja2.TemplateSyntaxError."""
    environment = plain_environment()
    tree = syntax_tree(environment, source)
    template = jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))

    def run(context: Mapping[str, Any]) -> str:
        return "".join(_bounded(template.root_render_func(template.new_context(dict(context)))))

    return run, syntax_tree(environment, source)


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    left = MAX_OUTPUT
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            raise not_rendered(f"it makes more than {MAX_OUTPUT} characters of them")
        yield piece


def _answer(rendering: ChatRendering, task: Task) -> tuple[dict[str, Any], list[str]]:
    try:
        chat = rendered_with(rendering, task)
    except TandemError as error:
        return {"problem": error.message, "param": error.param}, []
    except RecursionError:
        return {"problem": not_rendered("it calls itself too often").message, "param": "messages"}, []
    return {}, [chat.text] if chat.renamed is None else [chat.text, chat.renamed]


def answer(questions: BinaryIO, answers: BinaryIO, seconds: float) -> None:
    """The source of the template first, then one answer for each task until there are no more. `seconds`: processor
    time of each."""
    rendering: ChatRendering | None = None
    while size := questions.read(SIZE.size):
        # It comes from the process that started this one.
        question: TemplateSource | Task = pickle.loads(questions.read(*SIZE.unpack(size)))
        if isinstance(question, TemplateSource):
            signal.setitimer(signal.ITIMER_PROF, COMPILE_S)
            rendering = ChatRendering(question, compiled)
        else:
            assert rendering is not None
            signal.setitimer(signal.ITIMER_PROF, seconds)
            head, texts = _answer(rendering, question)
            parts = [text.encode("utf-8", "surrogatepass") for text in texts]
            for part in (json.dumps(head).encode(), *parts):
                answers.write(SIZE.pack(len(part)) + part)
            answers.write(SIZE.pack(0))
            answers.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> int:
    """Exit status 1: out of memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_address_space(MEMORY_BYTES)
    try:
        answer(sys.stdin.buffer, sys.stdout.buffer, float(sys.argv[1]))
    except (MemoryError, ConfigError):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
