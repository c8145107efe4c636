"""Which form of message content a chat template expects: text, or a list of parts as in OpenAI's API.

Like vLLM, this looks for a loop over the content of a message in the template's syntax tree; names that `set` or a
macro gives to it are followed.
"""

from __future__ import annotations

from typing import Literal

from jinja2 import nodes

ContentForm = Literal["text", "parts", "both"]


def content_form(template: nodes.Template) -> ContentForm:
    """both: the template loops over parts where the content is not a string, and says so."""
    names = _names_of_content(template)
    if not any(_is_content(loop.iter, names) for loop in template.find_all(nodes.For)):
        return "text"
    tests = (test for test in template.find_all(nodes.Test) if test.name in ("string", "iterable", "sequence"))
    return "both" if any(_is_content(test.node, names) for test in tests) else "parts"


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    """`message.content`, `message['content']`, a name of it, or that behind filters."""
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"


def _names_of_content(template: nodes.Template) -> set[str]:
    """Grows until nothing new is found: a name may be given to what has one."""
    assigns = [
        (node.target.name, node.node) for node in template.find_all(nodes.Assign) if isinstance(node.target, nodes.Name)
    ]
    found = {arg.name for macro in template.find_all(nodes.Macro) for arg in macro.args if arg.name == "content"}
    while True:
        more = {name for name, value in assigns if name not in found and _is_content(value, found)}
        if not more:
            return found
        found |= more
