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
    node = _behind_filters(node)
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"


def _behind_filters(node: nodes.Node) -> nodes.Node:
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    return node


def _names_of_content(template: nodes.Template) -> set[str]:
    """Follows names from those that are content at once to those that these are given to."""
    given_to: dict[str, list[str]] = {}
    todo = [arg.name for macro in template.find_all(nodes.Macro) for arg in macro.args if arg.name == "content"]
    for node in template.find_all(nodes.Assign):
        if isinstance(node.target, nodes.Name):
            source = _behind_filters(node.node)
            if isinstance(source, nodes.Name):
                given_to.setdefault(source.name, []).append(node.target.name)
            elif _is_content(source, set()):
                todo.append(node.target.name)
    found: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += given_to.get(name, [])
    return found
