"""How each engine under test is started, in one place: Tandem (unified, disaggregated), vLLM, llama.cpp, transformers.

Each gets one compute thread per worker and the dtype that Tandem chooses here: bf16 where the processor computes in it,
else float32 (llama.cpp always f16, which is faster there). Peers live in virtual environments made by
`bench/peers/setup.sh` (under TANDEM_PEERS, default .peers/).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(os.environ.get("TANDEM_PEERS", ROOT / ".peers"))
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI-compatible server in a process of its own."""

    name: str
    command: Callable[[int], list[str]]
    """From the port to listen on."""
    needs: Path
    """Present where this system is set up."""
    env: dict[str, str] = field(default_factory=dict)
    ready_path: str = "/health"

    @property
    def log(self) -> Path:
        return Path(tempfile.gettempdir()) / f"tandem-bench-{self.name}.log"

    def start(self) -> tuple[subprocess.Popen[bytes], str]:
        """The process and its base URL; it may not be ready yet."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                self.command(port), stdout=log, stderr=log, env={**os.environ, **ONE_THREAD, **self.env}
            )
        return process, f"http://127.0.0.1:{port}"


@dataclass(slots=True)
class Job:
    """transformers' `generate`, called in a process that stays alive: no server, so nothing but its own work counts."""

    name: str
    mode: str
    """sequential or batched"""
    model: Path
    needs: Path = PEERS / "transformers"
    _process: subprocess.Popen[str] | None = None

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> dict[str, list[float]]:
        """Seconds since the job began, per prompt: `ttft_s`, `finish_s`; and `wall_s` in a list of one."""
        if self._process is None:
            self._process = subprocess.Popen(
                [str(self.needs / "bin/python"), str(ROOT / "bench/peers/transformers_job.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, **ONE_THREAD},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"model": str(self.model), "prompts": prompts, "max_tokens": max_tokens, "mode": self.mode}
        job["dtype"] = dtype_here()
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return {"wall_s": [answer["wall_s"]], "ttft_s": answer["ttft_s"], "finish_s": answer["finish_s"]}

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def gguf_of(model: Path) -> Path:
    """The model as GGUF, converted once into a cache beside the peers."""
    target = PEERS / f"{model.resolve().parent.name}.f16.gguf"
    if not target.exists() or target.stat().st_mtime < (model / "model.safetensors").stat().st_mtime:
        python = PEERS / "llamacpp/bin/python"
        converter = ROOT / "bench/peers/to_gguf.py"
        subprocess.run([python, converter, model, target, "--dtype", "f16"], check=True, stdout=sys.stderr)
    return target


def dtype_here() -> str:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def machine(*packages: str) -> dict[str, object]:
    """What figures depend on: processor, load (of 1, 5 and 15 minutes, this bench included), versions of `packages`."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "flags": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in text],
        "cores": os.cpu_count(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }


def all_systems(model: Path) -> list[Server | Job]:
    here = [sys.executable, "-m", "tandem.runtime.cli", "serve", "--model", str(model), "--dtype", dtype_here()]
    vllm = [str(PEERS / "vllm/bin/vllm"), "serve", str(model), "--dtype", dtype_here()]
    vllm += ["--served-model-name", "small"]
    vllm_env = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_NO_USAGE_STATS": "1"}
    llamacpp = [str(PEERS / "llamacpp/bin/python"), str(ROOT / "bench/peers/llamacpp_server.py")]
    return [
        Server("unified", lambda port: [*here, "--port", str(port), "--prefill", "0"], ROOT, ready_path="/readyz"),
        Server(
            "disaggregated",
            lambda port: [*here, "--port", str(port), "--disaggregate", "always"],
            ROOT,
            ready_path="/readyz",
        ),
        Server(
            "vllm",
            lambda port: [*vllm, "--port", str(port), "--max-model-len", "2048", "--no-enable-prefix-caching"],
            PEERS / "vllm",
            vllm_env,
        ),
        Server(
            "llamacpp",
            lambda port: [*llamacpp, str(gguf_of(model)), "--port", str(port), "--threads", "1", "--slots", "16"],
            PEERS / "llamacpp",
        ),
        Job("hf_sequential", "sequential", model),
        Job("hf_batched", "batched", model),
    ]
