"""Write `serve.txt` and `dev.txt`: every package that make installs, with its version and the hashes of its wheels.

    make lock                                what pyproject.toml asks for now, at the pinned versions
    make lock ARGS="--upgrade grpcio redis"  these at their newest
    make lock ARGS=--upgrade-all

pip does the resolving and names the hashes. torch is not in the files: each index has another build of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
MACHINES = ("x86_64", "aarch64")
ANY_GLIBC = range(5, 41)
OLD_TAGS = ("manylinux2014", "manylinux2010", "manylinux1")
"""Wheels may bear these alone; without them pip would take a slow one in plain Python."""
BUILD = "setuptools>=77"
NOT_LOCKED = ("torch", "nvidia-", "cuda-", "tandem-llm")
HEAD = "# Written by requirements/lock.py. What is installed from here must have one of these hashes.\n"
Pins = dict[str, str]  # name -> version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--upgrade-all", action="store_true")
    options = parser.parse_args()
    kept = {} if options.upgrade_all else without(pinned(), options.upgrade)
    everything = resolve(f"{HERE.parent}[dev]", kept)
    serve = resolve(str(HERE.parent), everything)
    hashes = hashes_of_wheels(everything)
    (HERE / "serve.txt").write_text(HEAD + "".join(lines(serve, hashes)))
    (HERE / "dev.txt").write_text(HEAD + "-r serve.txt\n" + "".join(lines(without(everything, serve), hashes)))


def pinned() -> Pins:
    """The names and versions that the two files hold now."""
    rows = [row for name in ("serve.txt", "dev.txt") for row in (HERE / name).read_text().splitlines()]
    return dict(row.split()[0].split("==") for row in rows if "==" in row)


def without(pins: Pins, names: Iterable[str]) -> Pins:
    left_out = set(names)
    return {name: version for name, version in pins.items() if name not in left_out}


def resolve(project: str, kept: Pins) -> Pins:
    """Everything that a project needs, at the kept versions where they fit, on this Python and machine."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.writelines(f"{name}=={version}\n" for name, version in kept.items())
        constraints.flush()
        found = dict(packages(pip("-c", constraints.name, BUILD, "-e", project)))
    names = sorted(name for name in found if not name.startswith(NOT_LOCKED))
    return {name: found[name][0] for name in names}


def hashes_of_wheels(pins: Pins) -> dict[str, set[str]]:
    """Hashes of the wheels that each Python and machine would install. A package without a wheel is an error."""
    hashes: dict[str, set[str]] = {name: set() for name in pins}
    with tempfile.TemporaryDirectory() as target:
        for python, machine in product(PYTHONS, MACHINES):
            print(f"hashes for Python {python} on {machine} ...", file=sys.stderr)
            tags = [*(f"manylinux_2_{glibc}" for glibc in ANY_GLIBC), *OLD_TAGS]
            platforms = [word for tag in tags for word in ("--platform", f"{tag}_{machine}")]
            where = ["--target", target, "--only-binary=:all:", "--python-version", python, *platforms]
            exact = [f"{name}=={version}" for name, version in pins.items()]
            for name, (_, sha256) in packages(pip("--no-deps", *where, *exact)):
                hashes[name].add(sha256)
    return hashes


def pip(*arguments: str) -> dict[str, Any]:
    """pip's report of what it would install into an empty environment."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report"]
        subprocess.run([*command, report.name, *arguments], check=True)
        found: dict[str, Any] = json.load(report)
        return found


def packages(report: dict[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Each package's name, version and SHA-256 (none for the project itself)."""
    for item in report["install"]:
        name = item["metadata"]["name"].lower().replace("_", "-").replace(".", "-")
        sha256 = item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256", "")
        yield name, (item["metadata"]["version"], sha256)


def lines(pins: Pins, hashes: dict[str, set[str]]) -> Iterator[str]:
    for name, version in pins.items():
        allowed = (f"--hash=sha256:{value}" for value in sorted(hashes[name]))
        yield " \\\n    ".join([f"{name}=={version}", *allowed]) + "\n"


if __name__ == "__main__":
    main()
