"""No function, method or class of the product is there for tests alone, or for nobody.

By name, so one that shares its name with something that is used is not found; what is found is right.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"bench", "examples", "proto", "tests"}
CALLED_BY_LIBRARIES = {
    "data_received": "asyncio",
    "eof_received": "asyncio",
    "visit_Add": "jinja2",
    "visit_Compare": "jinja2",
    "visit_Dict": "jinja2",
    "visit_For": "jinja2",
    "visit_Getitem": "jinja2",
    "visit_Output": "jinja2",
}
KEPT = {
    "covers": "the meaning of `Ranges`, which tests compare with sets",
    "held_bytes": "tests see to it that nothing is held at the end",
    "passage_hash": "keys of passages are a format that is agreed on",
}


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
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if node.name not in said and not node.decorator_list and not node.name.startswith("__")
    }
    assert len(modules) > 300
    assert {name: place for name, place in idle.items() if name not in CALLED_BY_LIBRARIES | KEPT} == {}
    assert (CALLED_BY_LIBRARIES.keys() | KEPT.keys()) - idle.keys() == set(), "listed without need"
