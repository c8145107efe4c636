"""Runs every client that is installed against a server and prints a table: `python tests/clients/run.py --url URL`.

`--python` names interpreters that have clients (each script runs with the first that can import its client), `--node` a
folder with node_modules. `--json FILE` keeps the rows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
MODULES = {
    "openai_python.py": "openai",
    "anthropic_python.py": "anthropic",
    "langchain_python.py": "langchain_openai",
    "llamaindex_python.py": "llama_index.llms.openai_like",
    "litellm_python.py": "litellm",
    "instructor_python.py": "instructor",
    "pydantic_ai_python.py": "pydantic_ai.models.openai",
    "openai_agents_python.py": "agents",
}
NODE_SCRIPTS = {"openai.mjs": "openai", "ai.mjs": "ai"}
TIMEOUT_S = 600


def rows_of(command: list[str], folder: Path = HERE) -> list[dict[str, str]]:
    """What a script prints. One that ends without a row has failed as a whole."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)
    rows: list[dict[str, str]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    sys.stderr.write(done.stderr)
    if done.returncode or not rows:
        last = (done.stderr.strip().splitlines() or ["nothing printed"])[-1]
        rows.append({"client": Path(command[1]).name, "feature": "start", "result": last[:300]})
    return rows


def can_import(python: str, module: str) -> bool:
    program = f"import importlib.util as u; raise SystemExit(u.find_spec({module.split('.')[0]!r}) is None)"
    return subprocess.run([python, "-c", program], capture_output=True).returncode == 0


def installed(pythons: list[str], node: Path | None) -> Iterator[tuple[str, list[str], Path]]:
    """Name, command and folder of each script whose client there is."""
    for script, module in MODULES.items():
        python = next((each for each in pythons if can_import(each, module)), None)
        if python is not None:
            yield script, [python, str(HERE / script)], HERE
    program = shutil.which("node")
    if node is not None and program is not None:
        for script, package in NODE_SCRIPTS.items():
            if (node / "node_modules" / package).is_dir():
                for name in ("features.mjs", script):  # modules are looked for beside the script
                    shutil.copy(HERE / "node" / name, node / name)
                yield script, [program, str(node / script)], node


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True, help="http://HOST:PORT/v1")
    parser.add_argument("--python", nargs="*", default=[sys.executable])
    parser.add_argument("--node", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help="scripts whose names contain this")
    given = parser.parse_args()
    with urllib.request.urlopen(f"{given.url}/models", timeout=30) as answer:
        model = json.load(answer)["data"][0]["id"]
    rows = []
    for name, command, folder in installed(given.python, given.node):
        if given.only is None or given.only in name:
            rows += rows_of([*command, "--url", given.url, "--model", model], folder)
    print("| client | feature | result |\n|---|---|---|")
    for row in rows:
        print(f"| {row['client']} | {row['feature']} | {row['result'].splitlines()[0]} |")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(row["result"] != "ok" for row in rows))


if __name__ == "__main__":
    main()
