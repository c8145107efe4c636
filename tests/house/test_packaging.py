"""The package can be installed in every way users install it, and its folder names shadow nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ["common", "decode", "engine", "planner", "kvstore", "prefill", "router", "runtime"]


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_standard_library_operator_wins_in_the_project_root() -> None:
    assert run(sys.executable, "-c", "import operator; print(operator.itemgetter(1)('ab'))") == "b\n"


def test_operator_and_proto_have_no_init() -> None:
    assert not (ROOT / "operator" / "__init__.py").exists()
    assert not (ROOT / "proto" / "__init__.py").exists()


def test_editable_install_points_at_the_working_tree() -> None:
    code = "import tandem.engine, tandem.proto.worker_pb2; print(tandem.engine.__file__)"
    assert Path(run(sys.executable, "-c", code, cwd=Path("/")).strip()).resolve().is_relative_to(ROOT)


def test_every_room_is_linked() -> None:
    links = {path.name: path.resolve() for path in (ROOT / "src" / "tandem").iterdir() if path.is_symlink()}
    model = {"small_model": ROOT / "examples" / "small_model" / "model"}
    assert links == model | {room: ROOT / room for room in [*ROOMS, "operator", "proto"]}


def test_wheel_works_in_a_clean_venv(tmp_path: Path) -> None:
    skipped = shutil.ignore_patterns(".*", "examples", "bench", "tests", "build", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=skipped)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, source)
    (wheel,) = tmp_path.glob("tandem_llm-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"tandem/{room}/__init__.py" for room in ROOMS} <= names
    assert {"tandem/proto/worker_pb2.py", "tandem/proto/worker.proto", "tandem/engine/native.c"} <= names
    assert {"tandem/router/pages/home.html", "tandem/router/pages/docs.html"} <= names
    assert not [name for name in names if name.split("/")[0] not in {"tandem"} and ".dist-info/" not in name]

    home = tmp_path / "venv"
    venv.create(home, system_site_packages=False, with_pip=True)
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    # The dependencies come from this environment: what is tested is the wheel, not the package index.
    site = next(path for path in sys.path if path.endswith("site-packages"))
    code = (
        f"import sys; sys.path.append({site!r}); import tandem.engine.batch, tandem.router, tandem.proto.worker_pb2;"
        "print(tandem.engine.batch.__file__)"
    )
    where = Path(run(python, "-c", code, cwd=tmp_path).strip())
    assert where.is_relative_to(home)
    assert "usage: tandem" in run(
        python,
        "-c",
        f"import sys; sys.path.append({site!r}); sys.argv=['tandem','--help'];"
        "from tandem.runtime.cli import main; main()",
        cwd=tmp_path,
    )
