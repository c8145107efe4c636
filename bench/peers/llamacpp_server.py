"""Serve a GGUF file with llama.cpp's own OpenAI-compatible server (through the prebuilt ``xllamacpp`` wheel).

Set up for comparison: one KV context per slot, continuous batching, and every form of prompt reuse turned
off, so that a repeated prompt costs what a new one does. ``--prompt-cache`` turns reuse on again.

    python llamacpp_server.py model.gguf --port 8080 --slots 16 --threads 1
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import xllamacpp


def server_parameters(
    model: Path, *, port: int, slots: int, context: int, threads: int, prompt_cache: bool
) -> xllamacpp.CommonParams:
    """Return parameters for ``slots`` parallel requests of ``context`` tokens each (prompt and output)."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = port
    parameters.n_parallel = slots
    parameters.n_ctx = slots * context
    parameters.cont_batching = True
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    parameters.n_threads_http = slots + 2
    parameters.n_gpu_layers = 0
    parameters.fit_params = False
    parameters.cache_prompt = prompt_cache
    if not prompt_cache:
        parameters.cache_ram_mib = 0
        parameters.slot_prompt_similarity = 0.0
    return parameters


def main() -> None:
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--slots", type=int, default=16, help="requests decoded together (default: 16)")
    parser.add_argument("--context", type=int, default=2048, help="tokens per slot (default: 2048)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--prompt-cache", action="store_true", help="reuse the KV of earlier prompts")
    arguments = parser.parse_args()
    parameters = server_parameters(
        arguments.model,
        port=arguments.port,
        slots=arguments.slots,
        context=arguments.context,
        threads=arguments.threads,
        prompt_cache=arguments.prompt_cache,
    )
    server = xllamacpp.Server(parameters)
    print(f"listening on {server.listening_address}", flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()
