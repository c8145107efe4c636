"""No function, method or class of these rooms is there for tests alone, or for nobody.

By name, so one that shares its name with something that is used is not found; what is found is right.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"bench", "examples", "proto", "tests"}
ROOMS = ("kvstore",)
"""Whose definitions are looked at; callers may be anywhere in the product."""
KEPT = {"passage_hash": "keys of passages are a format that is agreed on"}


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.glob("*/**/*.py")):
        relative = path.relative_to(ROOT)
        if relative.parts[0] not in ELSEWHERE and relative.parts[0].isidentifier() and relative.parts[0] != "src":
            yield str(relative), ast.parse(path.read_text())


def _said(module: ast.Module) -> Iterator[str]:
    """Names that are used; as strings, too, as for `getattr`."""
    for node in ast.walk(module):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_everything_has_a_caller() -> None:
    modules = list(_modules())
    said = {name for _, module in modules for name in _said(module)}
    idle = {
        node.name: f"{path}:{node.lineno}"
        for path, module in modules
        if path.startswith(ROOMS)
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if node.name not in said and not node.name.startswith("__")
    }
    assert len(modules) > 300
    assert {name: place for name, place in idle.items() if name not in KEPT} == {}
    assert KEPT.keys() - idle.keys() == set(), "listed without need"
