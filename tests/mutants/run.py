"""Mutants of the policy files: one small change at a time, and whether the file's own tests notice it.

    make mutants                                                   all files of policies.toml
    make mutants ARGS="planner/perf_model.py --per-file 100"       one file, more of its places
    make mutants ARGS="common/fairness.py --seed 12"               other places

cosmic-ray knows the changes. They are made in a copy of the tree. Each mutant is tested in a fork of this process,
where the slow imports are done already. It is killed where a test fails, where it runs for far longer than the
unchanged code, and where it takes far more memory. Mutants that survive are printed as diffs; each is a missing
assertion, or means the same as the code, or moves a constant that only scales.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import numpy  # noqa: F401  (it and torch are imported for the forks)
import pytest
import torch  # noqa: F401
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from hypothesis import Phase, settings

HERE = Path(__file__).parent
TREE = HERE.parent.parent
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
settings.register_profile("mutants", derandomize=True, deadline=None, phases=(Phase.explicit, Phase.generate))
"""The usual examples, but one that fails need not become simple."""
MEMORY_BYTES = 4 << 30
"""A mutant may take so much more than this process has: some loop and never stop adding to a list."""
UNTOLD = ("_Is_Eq", "_IsNot_NotEq", "_Eq_Is", "_NotEq_IsNot")
"""Operators whose mutants say nothing about a policy: `is` and `==` mean the same for what is compared here."""


@dataclass(frozen=True, slots=True)
class Mutant:
    line: int
    code: str


@dataclass(frozen=True, slots=True)
class Limit:
    """How long a mutant's tests may run: seconds of CPU time, and of the clock for those that wait for ever."""

    cpu_s: float
    clock_s: float


def main() -> None:
    known = tomllib.loads((HERE / "policies.toml").read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="as in policies.toml; all of them if none is named")
    parser.add_argument("--per-file", type=int, default=known["per_file"], help="mutants of a file at most")
    parser.add_argument("--seed", type=int, default=known["seed"], help="draws the places and the changes")
    options = parser.parse_args()
    tests: dict[str, list[str]] = known["tests"]
    if unknown := set(options.files) - tests.keys():
        parser.error(f"{', '.join(sorted(unknown))}: not in {HERE / 'policies.toml'}")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(TREE, tree, symlinks=True, ignore=NOT_COPIED)
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree / "src")
        sys.path.insert(0, str(tree / "src"))
        for plugin in entry_points(group="pytest11"):
            plugin.load()
        for file in options.files or tests:
            try_file(tree / file, file, tests[file], random.Random(f"{options.seed} {file}"), options.per_file)


def try_file(path: Path, name: str, tests: list[str], rng: random.Random, at_most: int) -> None:
    """Prints how many mutants of the file at `path` were killed, and those that survived."""
    code = path.read_text()
    limit = limit_of(tests)
    mutants = drawn(code, rng, at_most)
    survivors = []
    try:
        for mutant in mutants:
            path.write_text(mutant.code)
            if passes(tests, limit):
                survivors.append(mutant)
    finally:
        path.write_text(code)
    print(f"{name}: {len(mutants) - len(survivors)} of {len(mutants)} killed", flush=True)
    for mutant in survivors:
        lines = difflib.unified_diff(code.splitlines(), mutant.code.splitlines(), name, name, n=1, lineterm="")
        print("\n".join(f"    {line}" for line in lines), flush=True)


def limit_of(tests: list[str]) -> Limit:
    """Runs the tests on the unchanged code. Exits where they fail: they would kill every mutant."""
    sys.dont_write_bytecode = False
    began, cpu_before = time.monotonic(), children_cpu_s()
    if not passes(tests, Limit(3600.0, 3600.0)):
        sys.exit(f"the unchanged code fails: {' '.join(tests)}")
    sys.dont_write_bytecode = True  # two mutants in one second would share a file
    return Limit(5.0 + 4 * (children_cpu_s() - cpu_before), 60.0 + 10 * (time.monotonic() - began))


def children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def drawn(code: str, rng: random.Random, at_most: int) -> list[Mutant]:
    """One mutant for each place, in the order of the places; of `at_most` places."""
    places = list(changes_by_place(code).items())
    rng.shuffle(places)
    mutants: list[Mutant] = []
    for (line, _), changes in places:
        if len(mutants) == at_most:
            break
        operator, occurrence = rng.choice(changes)
        mutated = mutate_code(code, get_operator(operator)(), occurrence)
        if mutated is not None and meaning(mutated) != meaning(code):
            mutants.append(Mutant(line, mutated))
    return sorted(mutants, key=lambda mutant: mutant.line)


def changes_by_place(code: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """The changes that cosmic-ray knows, as operator and occurrence, by line and column."""
    nodes = list(ast_nodes(get_ast(code)))
    places: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if operator.arguments() or name.endswith(UNTOLD):
            continue
        positions = (start for node in nodes for start, _ in operator().mutation_positions(node))
        for occurrence, start in enumerate(positions):
            places.setdefault(start, []).append((name, occurrence))
    return places


class Declarations(ast.NodeTransformer):
    """Takes away annotations, which are never evaluated, and decorators: `int | None`, `dataclass(slots=True)`."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns, node.decorator_list = None, []
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.decorator_list = []
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


def meaning(code: str) -> str:
    """The code without declarations; nothing where it is not Python."""
    try:
        return ast.dump(Declarations().visit(ast.parse(code)))
    except SyntaxError:
        return ""


def passes(tests: list[str], limit: Limit) -> bool:
    child = os.fork()
    if child == 0:
        run_tests(tests, limit)
    deadline = time.monotonic() + limit.clock_s
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def run_tests(tests: list[str], limit: Limit) -> None:
    """Does not return: the process ends with 0 where all tests pass. A session of its own ends with its children."""
    os.setsid()
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    cpu_s = int(limit.cpu_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    with open("/proc/self/statm") as statm:
        address_space = int(statm.read().split()[0]) * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    arguments = ["-x", "--assert=plain", "-p", "no:cacheprovider", "--hypothesis-profile", "mutants"]
    try:
        os._exit(pytest.main([*arguments, "-m", "not slow and not processes", *tests]))
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
