"""Figures of the house: arrows between rooms, lines by room, long files, and the code that one prompt runs through.

    python bench/house.py                          # of this tree, without the prompt
    python bench/house.py --prompt                 # starts `tandem serve` with a profiler in every process (1 minute)
    python bench/house.py --tree ../before --out before.json

An arrow stands for imports at run time from one room into another. A room is a folder of `router/`, `engine/` or
`kvstore/`, or a file beside those folders; elsewhere it is the top-level folder. `lint-imports` checks their order.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOP = ("common", "decode", "engine", "handover", "kvstore", "operator", "planner")
TOP += ("prefill", "router", "runtime", "wire", "worker")
DIVIDED = ("router", "engine", "kvstore")
SERVER = "http://127.0.0.1:18471"
LONG = 400
"""Lines beyond which a file is said to be long."""

PROFILER = """
import atexit, json, os, sys, threading
root, out, flag = os.environ["HOUSE_TREE"] + os.sep, os.environ["HOUSE_OUT"], os.environ["HOUSE_FLAG"]
seen = set()
def note(frame, event, argument):
    if event == "call":
        seen.add(frame.f_code)
def watch():
    import time
    while not os.path.exists(flag): time.sleep(0.02)
    seen.clear()
    while os.path.exists(flag): time.sleep(0.02)
    seen_once = list(seen)
    last = lambda code: max([line for *_, line in code.co_lines() if line] or [0])
    rows = [(os.path.realpath(code.co_filename), code.co_firstlineno, last(code)) for code in seen_once]
    rows = [row for row in rows if row[0].startswith(root)]
    with open(os.path.join(out, f"{os.getpid()}.json"), "w") as file: json.dump(rows, file)
if "tandem.runtime.cli" in " ".join(sys.orig_argv):
    threading.Thread(target=watch, daemon=True).start()
    threading.setprofile(note); sys.setprofile(note)
"""


def modules(tree: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name, without `tandem.`, and file of every module of the product; generated ones are left out."""
    for room in TOP:
        for path in sorted((tree / room).rglob("*.py")):
            yield ".".join(path.relative_to(tree).with_suffix("").parts).removesuffix(".__init__"), path


def room_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] in DIVIDED else parts[0]


def imports(path: Path, known: set[str]) -> Iterator[str]:
    """Modules of the product that a file imports at run time."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tandem."):
            base = node.module.removeprefix("tandem.")
            yield from (inner if (inner := f"{base}.{name.name}") in known else base for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name.removeprefix("tandem.") for name in node.names if name.name.startswith("tandem."))
        waiting += ast.iter_child_nodes(node)


def graph(tree: Path) -> dict[str, object]:
    files = dict(modules(tree))
    arrows: Counter[tuple[str, str]] = Counter()
    between_files = 0
    for module, path in files.items():
        for other in set(imports(path, set(files))):
            if other in files:
                between_files += 1
                if room_of(module) != room_of(other):
                    arrows[room_of(module), room_of(other)] += 1
    lines = {module: path.read_text(encoding="utf-8").count("\n") for module, path in files.items()}
    by_room: Counter[str] = Counter()
    for module, count in lines.items():
        by_room[room_of(module)] += count
    inside = {top: sum(a.startswith(top + ".") and b.startswith(top + ".") for a, b in arrows) for top in DIVIDED}
    return {
        "files": len(files),
        "lines": sum(lines.values()),
        "imports_between_files": between_files,
        "rooms": len(by_room),
        "arrows_between_rooms": len(arrows),
        "arrows_inside": inside,
        "rooms_on_a_circle": sorted(on_circle(set(arrows))),
        "long_files": {module: count for module, count in lines.items() if count > LONG},
        "lines_by_room": dict(sorted(by_room.items())),
        "arrows": [f"{a} -> {b}" for a, b in sorted(arrows)],
    }


def on_circle(arrows: set[tuple[str, str]]) -> set[str]:
    """What is left when rooms without arrows to or from what is left are taken away, again and again."""
    left = {room for arrow in arrows for room in arrow}
    while True:
        inner = {arrow for arrow in arrows if set(arrow) <= left}
        kept = {a for a, _ in inner} & {b for _, b in inner}
        if kept == left:
            return left
        left = kept


def path_of_a_prompt(tree: Path) -> dict[str, object]:
    """Files and functions that run in all processes while one streamed chat request of a warm server is answered."""
    with tempfile.TemporaryDirectory(prefix="tandem-house-") as folder:
        home = Path(folder)
        (home / "sitecustomize.py").write_text(PROFILER)
        flag, out = home / "flag", home / "out"
        out.mkdir()
        env = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}
        env |= {"PYTHONPATH": f"{home}:{tree / 'src'}", "HOUSE_TREE": str(tree.resolve())}
        env |= {"HOUSE_OUT": str(out), "HOUSE_FLAG": str(flag)}
        command = [
            sys.executable,
            "-m",
            "tandem.runtime.cli",
            "serve",
            "--port",
            SERVER.rpartition(":")[2],
            "--log-level",
            "warning",
        ]
        with subprocess.Popen(command, env=env, cwd=home, stdout=subprocess.DEVNULL) as server:
            try:
                for _ in range(3):
                    ask(deadline=time.monotonic() + 180)
                flag.touch()
                time.sleep(0.5)
                ask(deadline=time.monotonic() + 60)
                flag.unlink()
                time.sleep(2)
            finally:
                server.terminate()
        rows = {tuple(row) for file in out.iterdir() for row in json.loads(file.read_text())}
    own = [row for row in rows if Path(row[0]).relative_to(tree.resolve()).parts[0] in TOP]
    files = {path for path, _, _ in own}
    return {
        "files": len(files),
        "lines_of_files": sum(Path(path).read_text(encoding="utf-8").count("\n") for path in files),
        "functions": len(own),
        "lines_of_functions": sum(last - first + 1 for _, first, last in own),
        "by_room": dict(Counter(str(Path(path).relative_to(tree.resolve()).parent) for path in sorted(files))),
    }


def ask(deadline: float) -> None:
    """One streamed chat request to the server, which may be starting. Raises TimeoutError."""
    body = {"messages": [{"role": "user", "content": "Once upon a time " * 20}], "max_tokens": 8, "stream": True}
    while True:
        try:
            with urllib.request.urlopen(f"{SERVER}/v1/models", timeout=60) as models:
                body["model"] = json.load(models)["data"][0]["id"]
            request = urllib.request.Request(f"{SERVER}/v1/chat/completions", json.dumps(body).encode())
            request.add_header("content-type", "application/json")
            with urllib.request.urlopen(request, timeout=60) as answer:
                answer.read()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError("the server did not answer") from error
            time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to look at")
    parser.add_argument("--prompt", action="store_true", help="also trace one prompt through `tandem serve`")
    parser.add_argument("--out", type=Path, help="where to write the JSON; it is printed without the arrows")
    options = parser.parse_args()
    result = graph(options.tree)
    if options.prompt:
        result["prompt"] = path_of_a_prompt(options.tree)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    del result["arrows"]
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
