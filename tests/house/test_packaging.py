"""The package can be installed in every way users install it, and its folder names shadow nothing."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from google.protobuf.internal import api_implementation

from tests.e2e.serving import environment

ROOT = Path(__file__).resolve().parents[2]
CLEAN = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
"""For other interpreters than this one: what is installed there is tested, not what a developer's shell names."""
ROOMS = [
    "common",
    "decode",
    "engine",
    "handover",
    "kvstore",
    "planner",
    "prefill",
    "router",
    "runtime",
    "wire",
    "worker",
]


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    env = None if command[0] == sys.executable else CLEAN
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=1500, env=env
    )
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


def test_messages_are_read_by_native_code() -> None:
    """Not the plain Python of a wheel for any machine, which reads and writes them 20 times slower."""
    assert api_implementation.Type() != "python"


def test_every_room_is_linked() -> None:
    links = {path.name: path.resolve() for path in (ROOT / "src" / "tandem").iterdir() if path.is_symlink()}
    model = {"small_model": ROOT / "examples" / "small_model" / "model"}
    assert links == model | {room: ROOT / room for room in [*ROOMS, "operator", "proto"]}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns(".*", "corpus", "bench", "tests", "build", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=skipped)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, source)
    (built,) = folder.glob("tandem_llm-*.whl")
    return built


def test_the_wheel_has_every_room_and_the_small_model_and_is_not_large(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"tandem/{room}/__init__.py" for room in ROOMS} <= names
    assert {"tandem/proto/worker_pb2.py", "tandem/proto/worker.proto"} <= names
    assert {f"tandem/engine/model/{path.name}" for path in (ROOT / "engine" / "model").glob("*.c")} <= names
    assert {f"tandem/router/http/html/{path.name}" for path in (ROOT / "router" / "http" / "html").iterdir()} <= names
    model = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
    assert {f"tandem/small_model/{name}" for name in model} <= names
    assert not [name for name in names if name.split("/")[0] not in {"tandem"} and ".dist-info/" not in name]
    assert wheel.stat().st_size < 30 << 20


def test_the_wheel_works_beside_what_is_installed_here(wheel: Path, tmp_path: Path) -> None:
    """The dependencies come from this environment: what is tested is the wheel, not the package index."""
    home = tmp_path / "venv"
    venv.create(home, system_site_packages=False, with_pip=True)
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    site = next(path for path in sys.path if path.endswith("site-packages"))
    (packages,) = (home / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(site)
    code = "from tandem.engine.model import batch; import tandem.router, tandem.proto.worker_pb2; print(batch.__file__)"
    assert Path(run(python, "-c", code, cwd=tmp_path).strip()).is_relative_to(home)
    assert "usage: tandem" in run(home / "bin" / "tandem", "--help", cwd=tmp_path)
    where = "from tandem.runtime.settings import ServeConfig; print(ServeConfig().model_folder)"
    assert (Path(run(python, "-c", where, cwd=tmp_path).strip()) / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.processes
def test_pip_install_into_a_clean_venv_is_enough_to_serve(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    pip = (home / "bin" / "python", "-m", "pip", "install", "--quiet")
    run(*pip, "--require-hashes", "--no-deps", "-r", ROOT / "requirements" / "serve.txt", cwd=tmp_path)
    run(*pip, f"torch=={version('torch').partition('+')[0]}", cwd=tmp_path)
    run(*pip, wheel, cwd=tmp_path)
    command = [home / "bin" / "tandem", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=CLEAN, cwd=tmp_path) as serve:
        assert serve.stdout is not None
        ready = next(line for line in serve.stdout if line.startswith("Tandem is ready"))
        url = ready.split()[3]
        said = run(home / "bin" / "tandem", "chat", "Who are you?", "--url", url, "--max-tokens", "20", cwd=tmp_path)
        serve.send_signal(signal.SIGINT)
        assert serve.wait(60) == 0
    assert said.strip()
