"""Puts filters of ours around what compiled templates do without asking their environment (`template_meter.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import jinja2.nodes
import jinja2.visitor

EACH = "tandem_each"
"""Filter around what a loop goes through."""
WRITABLE = "tandem_writable"
"""Filter around what is written, compared or is a key."""
SCALAR = "tandem_scalar"
"""Filter around what is looked for among others: comparing it with each must be short."""
SUM = "tandem_sum"
"""Filter in place of `a + b + c`."""
TEXT_FILTERS = ("capitalize", "lower", "title", "trim", "upper")


class Metered(jinja2.visitor.NodeTransformer):
    """Changes a template's syntax tree in place; the filters that it adds are those of `MeteredEnvironment`."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        """A loop: what it goes through is counted."""
        self.generic_visit(node)
        assert isinstance(node.iter, jinja2.nodes.Expr)
        node.iter = _filtered(node.iter, EACH)
        return node

    def visit_Output(self, node: jinja2.nodes.Output) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.nodes = [each if _writes_text(each) else _filtered(each, WRITABLE) for each in node.nodes]
        return node

    def visit_Add(self, node: jinja2.nodes.Add) -> jinja2.nodes.Node:
        """One call for `a + b + c`."""
        parts: list[jinja2.nodes.Expr] = []
        first: jinja2.nodes.Expr = node
        while isinstance(first, jinja2.nodes.Add):
            parts.append(self.visit(first.right))
            first = first.left
        return _filtered(self.visit(first), SUM, parts[::-1])

    def visit_Compare(self, node: jinja2.nodes.Compare) -> jinja2.nodes.Node:
        """A comparison of two values that are not literals: each must be short to compare."""
        self.generic_visit(node)
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        if sum(not _is_literal(side) for side in sides) > 1:
            looked_for = any(operand.op in ("in", "notin") for operand in node.ops)
            node.expr = _filtered(node.expr, SCALAR if looked_for else WRITABLE)
            for operand in node.ops:
                if operand.op not in ("in", "notin"):
                    operand.expr = _filtered(operand.expr, SCALAR if looked_for else WRITABLE)
        return node

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> jinja2.nodes.Node:
        """A look-up by a computed key: the key must be short."""
        self.generic_visit(node)
        if not (_is_literal(node.arg) or isinstance(node.arg, jinja2.nodes.Slice)):
            assert isinstance(node.arg, jinja2.nodes.Expr)
            node.arg = _filtered(node.arg, WRITABLE)
        return node

    def visit_Dict(self, node: jinja2.nodes.Dict) -> jinja2.nodes.Node:
        """A dict with computed keys: each must be short."""
        self.generic_visit(node)
        for pair in node.items:
            if not isinstance(pair.key, jinja2.nodes.Const):
                pair.key = _filtered(pair.key, WRITABLE)
        return node


def _filtered(node: jinja2.nodes.Expr, name: str, args: Sequence[jinja2.nodes.Expr] = ()) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _writes_text(node: jinja2.nodes.Expr) -> bool:
    """What is certain to be no list or object."""
    if isinstance(node, jinja2.nodes.Filter):
        return node.name in TEXT_FILTERS or node.name == "tojson"
    return isinstance(node, jinja2.nodes.TemplateData | jinja2.nodes.Const | jinja2.nodes.Concat)


def _is_literal(node: jinja2.nodes.Node) -> bool:
    """A constant, or a list of some."""
    if isinstance(node, jinja2.nodes.List | jinja2.nodes.Tuple):
        return all(isinstance(item, jinja2.nodes.Const) for item in node.items)
    if isinstance(node, jinja2.nodes.Neg):
        node = node.node
    return isinstance(node, jinja2.nodes.Const)
