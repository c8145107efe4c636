"""No object of ours is asked for its truth where `None` is meant: one with a length is false while it is empty.

`buckets or LocalBuckets()` once replaced shared rate limits, which begin empty, by limits of one process.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = (
    "common",
    "decode",
    "engine",
    "handover",
    "kvstore",
    "operator",
    "planner",
    "prefill",
    "router",
    "runtime",
    "wire",
    "worker",
)
_TRUTH = {"__len__", "__bool__"}


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def _sized(modules: list[tuple[str, ast.Module]]) -> frozenset[str]:
    """Names of the classes whose objects may be false: they, or a relative, have a length; and all protocols, as nobody
    knows who implements them."""
    classes = [node for _, module in modules for node in ast.walk(module) if isinstance(node, ast.ClassDef)]
    bases = {node.name: {_name(base) for base in node.bases} for node in classes}
    found = {
        node.name
        for node in classes
        if "Protocol" in bases[node.name]
        or any(isinstance(each, ast.FunctionDef) and each.name in _TRUTH for each in node.body)
    }
    before = -1
    while len(found) != before:
        before = len(found)
        found |= {name for name, of in bases.items() if of & found}
        found |= {base for name in found for base in bases.get(name, ()) if base in bases}
    return frozenset(found)


def _name(node: ast.expr | None) -> str:
    """The last part of a dotted name; empty for anything else."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    return node.id if isinstance(node, ast.Name) else ""


def _optional(annotation: ast.expr | None, classes: frozenset[str]) -> bool:
    """It is `X | None` with one of the classes."""
    if not isinstance(annotation, ast.BinOp) or not isinstance(annotation.op, ast.BitOr):
        return False
    sides = (annotation.left, annotation.right)
    has_none = any(isinstance(side, ast.Constant) and side.value is None for side in sides)
    return has_none and any(_name(side) in classes for side in sides)


def _asked(scope: ast.AST) -> Iterator[ast.expr]:
    """Expressions that are asked for their truth."""
    for node in ast.walk(scope):
        match node:
            case ast.BoolOp(values=values):
                yield from values[:-1]
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield operand
            case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) | ast.Assert(test=test):
                yield test
                if isinstance(test, ast.BoolOp):
                    yield from test.values
            case ast.comprehension(ifs=tests):
                yield from tests


def doubtful(module: ast.Module, classes: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Line and expression of each test of an optional object for its truth."""
    for node in ast.walk(module):
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
            last = node.values[-1]
            if isinstance(last, ast.Call) and _name(last.func) in classes:
                yield node.lineno, ast.unparse(node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            names = {each.arg for each in arguments if _optional(each.annotation, classes)}
            for each in ast.walk(node):
                if isinstance(each, ast.AnnAssign) and _optional(each.annotation, classes):
                    names.add(_name(each.target) if isinstance(each.target, ast.Name) else "")
            for test in _asked(node):
                if isinstance(test, ast.Name) and test.id in names:
                    yield test.lineno, test.id
        if isinstance(node, ast.ClassDef):
            fields = {
                _name(each.target)
                for each in ast.walk(node)
                if isinstance(each, ast.AnnAssign) and _optional(each.annotation, classes)
            }
            for test in _asked(node):
                if isinstance(test, ast.Attribute) and _name(test.value) == "self" and test.attr in fields:
                    yield test.lineno, ast.unparse(test)


def test_optional_objects_are_compared_with_none() -> None:
    modules = list(_modules())
    classes = _sized(modules)
    found = [f"{path}:{line}: {text}" for path, module in modules for line, text in doubtful(module, classes)]
    assert not found, "compare with None instead:\n" + "\n".join(sorted(set(found)))


def test_the_check_sees_what_it_is_for() -> None:
    source = """
class Sized:
    def __len__(self): ...
class User:
    held: Sized | None
    def __init__(self, given: Sized | None = None, plain: User | None = None):
        self.mine: Sized | None = given
        one = given or plain or 3
        two = unknown() or Sized()
        if not self.held or self.mine: ...
        if given is None and one: ...
"""
    module = ast.parse(source)
    found = {text for _, text in doubtful(module, _sized([("", module)]))}
    assert found == {"given", "unknown() or Sized()", "self.held", "self.mine"}
