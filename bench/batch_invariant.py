"""What `batch_invariant` costs: a model with it, without it, and with oneDNN's linear layers, in interleaved rounds.

    python bench/batch_invariant.py [--model DIR] [--dtype bfloat16] [--rounds 7] [--threads 1] [--out FILE]

Steps of the decoder and the sampler, without scheduler and network: a prompt chunk of 512 tokens, and decode steps of 1
and 16 streams with 500 tokens of context, greedy and sampled. Processor time, which other work on the machine changes
least. Prints a table on stderr and JSON on stdout: medians of tokens per second, with the range over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from bench.codecs import processor  # noqa: E402
from tandem.engine.model.loader import LoadedModel, load_model  # noqa: E402
from tandem.engine.step.sampler import Sampler  # noqa: E402
from tests.engine.paged_model import PagedModel  # noqa: E402
from tests.engine_harness import make_sequence  # noqa: E402

BUNDLED = ROOT / "examples" / "small_model" / "model"
CHUNK, CONTEXT, STREAMS = 512, 500, 16
REPEATS = 5
SAMPLING = {"temperature": 0.8, "top_p": 0.9, "seed": 7}
WAYS = ("batch_invariant", "default", "onednn")


def load(way: str, args: argparse.Namespace) -> LoadedModel:
    options = {"dtype": args.dtype, "device": "cpu", "quantization": None, "batch_invariant": way == "batch_invariant"}
    if way != "onednn":
        return load_model(args.model, **options)
    with mock.patch("tandem.engine.model.loader.faster_than_library", return_value=False):
        return load_model(args.model, **options)


def tokens_per_s(loaded: LoadedModel, way: str) -> dict[str, float]:
    """One round: the best of REPEATS for each kind of step."""
    paged = PagedModel(loaded, STREAMS + 1, CONTEXT + CHUNK)
    for request in range(STREAMS):
        paged.lengths[request] = CONTEXT
    invariant = way == "batch_invariant"
    sampler = Sampler(STREAMS, loaded.config.vocab_size, loaded.device, batch_invariant=invariant)
    greedy = [make_sequence(str(n), [n]) for n in range(STREAMS)]
    sampled = [make_sequence(str(n), [n], **SAMPLING) for n in range(STREAMS)]
    for sequences in (greedy, sampled):
        for row, sequence in enumerate(sequences):
            sampler.admit(sequence, row)

    def prefill() -> int:
        paged.lengths[STREAMS] = 0
        paged.step(prefills=[(STREAMS, list(range(CHUNK)))])
        return CHUNK

    def decode(streams: int, sequences: list) -> int:
        logits, _ = paged.step([(request, 5) for request in range(streams)])
        sampler.sample(logits, sequences[:streams])
        for request in range(streams):
            paged.lengths[request] = CONTEXT
        return streams

    steps = {
        "prefill 512": prefill,
        "decode 1": lambda: decode(1, greedy),
        "decode 16": lambda: decode(STREAMS, greedy),
        "decode 16 sampled": lambda: decode(STREAMS, sampled),
    }
    found = {}
    for name, step in steps.items():
        best = float("inf")
        for _ in range(REPEATS):
            started = time.process_time()
            tokens = step()
            best = min(best, (time.process_time() - started) / tokens)
        found[name] = 1 / best
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {way: load(way, args) for way in WAYS}
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way, loaded in models.items():
            rounds[way].append(tokens_per_s(loaded, way))
    results = {
        way: {
            step: {
                "tokens_per_s": round(statistics.median(each[step] for each in measured)),
                "range": [round(min(each[step] for each in measured)), round(max(each[step] for each in measured))],
            }
            for step in measured[0]
        }
        for way, measured in rounds.items()
    }
    for way, steps in results.items():
        print(f"{way:16}", *(f"{name}: {value['tokens_per_s']:>7}" for name, value in steps.items()), file=sys.stderr)
    report = {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "arguments": {**vars(args), "model": args.model.name, "out": None},
        "kernels": {way: loaded.decoder.kernels for way, loaded in models.items()},
        "results": results,
    }
    text = json.dumps(report, indent=1)
    if args.out is not None:
        args.out.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
