"""How far the planner's performance model is from what was measured elsewhere: H100 rows of three engines, DistServe's
coefficients, Splitwise's table.

    python bench/perf_model.py [--out FILE]

Reads the folder `TANDEM_TRACES` (default: ../shared/traces beside the project) and does nothing where it is absent.
Prints a table on stderr and JSON on stdout. `docs/planner.md` says what the figures mean.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from bench.codecs import processor  # noqa: E402
from tandem.planner.calibration import calibrate  # noqa: E402
from tandem.planner.hardware import hardware  # noqa: E402
from tandem.planner.measured import Point, Table  # noqa: E402
from tandem.planner.model_spec import ModelSpec  # noqa: E402
from tandem.planner.performance import Chunk  # noqa: E402
from tandem.planner.roofline import Efficiency, Roofline, efficiency_of  # noqa: E402
from tests.planner import known_models as known  # noqa: E402

TRACES = Path(os.environ.get("TANDEM_TRACES", ROOT.parent / "shared" / "traces"))
TOKEN_BUDGET = 8192
"""Tokens of a step of the measured engines, as far as their rows let one know: the default of the newer ones."""

CONFIGS = {
    "meta-llama/Llama-3.1-8B-Instruct": known.LLAMA_8B,
    "meta-llama/Llama-3.1-70B": known.LLAMA_70B,
    "Qwen/Qwen3-32B": known.QWEN3_32B,
    "Qwen/Qwen3-235B-A22B-FP8": known.QWEN3_235B,
    "openai/gpt-oss-120b": known.GPT_OSS_120B,
}
DENSE = tuple(CONFIGS)[:3]


@dataclass(frozen=True, slots=True)
class Row:
    """One measured run: so many clients, each with one request after the other."""

    engine: str
    model: str
    weights: str
    prompt: int
    output: int
    clients: int
    devices: int
    ttft_s: float
    tpot_s: float

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.prompt, self.output, self.devices


def silicon_rows() -> list[Row]:
    rows = []
    with gzip.open(TRACES / "silicon" / "measured_h100.csv.gz", "rt") as file:
        for r in csv.DictReader(file):
            attention_dp = int(r["attention_dp_size"] or 1)
            if r["mode"] != "agg" or r["model_path"] not in CONFIGS or attention_dp > 1 or r["pp_size"] != "1":
                continue
            weights = {"fp8": "fp8", "fp4": "fp4"}.get(r["precision"], "bfloat16")
            rows.append(
                Row(
                    r["backend"],
                    r["model_path"],
                    weights,
                    int(r["isl"]),
                    int(r["osl"]),
                    int(r["batch_size"]),
                    int(r["tp_size"]),
                    float(r["silicon_ttft_ms"]) / 1e3,
                    float(r["silicon_tpot_ms"]) / 1e3,
                )
            )
    return rows


@cache
def spec(model: str, weights: str) -> ModelSpec:
    own = "" if weights == "fp4" or "-FP8" in model else weights
    return ModelSpec.from_config(CONFIGS[model], model, weights=own)


@dataclass(frozen=True, slots=True)
class Protocol:
    """How the runs were made, as far as their rows tell: clients come together and go on in step for a while."""

    together: float = 1.0
    """Others whose prompts arrive at the same moment, however many clients there are."""
    waiting: float = 0.1
    """Share of all others whose prompts one waits for."""
    between: float = 1.0
    """Share of the others' prompts that come between one's tokens; the rest are computed while everybody waits."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """What is learned from rows."""

    efficiency: Efficiency
    protocol: Protocol


PLAIN = Fitted(efficiency_of(hardware("nvidia-h100")), Protocol())
PROTOCOLS = [
    Protocol(together, waiting, between)
    for together in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
    for waiting in (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
    for between in (0.4, 0.55, 0.7, 0.85, 1.0)
]


@dataclass(frozen=True, slots=True)
class Parts:
    """Times of a run under given efficiencies, before its protocol."""

    running: float
    """Clients whose KV fits; the others wait until one is through."""
    step_s: float
    """Of decoding."""
    prompt_s: float
    added_s: float
    """By which a prompt makes steps longer that it shares with decoding."""

    def tpot_s(self, row: Row, protocol: Protocol) -> float:
        """Each of the others computes its prompt once while a client is given `output` tokens."""
        return self.step_s + protocol.between * (self.running - 1) / row.output * self.added_s

    def ttft_s(self, row: Row, protocol: Protocol) -> float:
        others = self.running - 1
        before = min(protocol.together, others) + protocol.waiting * others
        turn_s = self.prompt_s + row.output * self.tpot_s(row, protocol)
        queue_s = (row.clients - self.running) / self.running * turn_s
        return queue_s + self.prompt_s + self.step_s * (others > 0) + before * self.added_s


def parts(row: Row, efficiency: Efficiency) -> Parts:
    engine = Roofline(spec(row.model, row.weights), hardware("nvidia-h100"), row.devices, efficiency)
    running = min(float(row.clients), max(engine.kv_tokens / (row.prompt + row.output / 2.0), 1.0))
    kv = running * (row.prompt + row.output / 2.0)
    step_s = engine.decode_step_s(running, kv)
    starts = range(0, row.prompt, TOKEN_BUDGET)
    prompt_s = sum(engine.prefill_s(min(TOKEN_BUDGET, row.prompt - start), start) for start in starts)
    beside = max(1, min(TOKEN_BUDGET // row.prompt, row.clients))
    chunks = [Chunk(min(row.prompt, TOKEN_BUDGET))] * beside
    steps = max(1.0, row.prompt / TOKEN_BUDGET)
    added_s = steps * (engine.step_s(chunks, running, kv) - step_s) / beside
    return Parts(running, step_s, prompt_s, added_s)


MAX_FIT_ROWS = 60


def fit(rows: Sequence[Row]) -> Fitted:
    """By turns the protocol and the efficiencies, on at most `MAX_FIT_ROWS` rows, evenly spaced."""
    rows = rows[:: max(1, math.ceil(len(rows) / MAX_FIT_ROWS))]
    found = PLAIN
    for _ in range(3):
        found = Fitted(found.efficiency, _protocol(rows, found.efficiency))
        times = [timed for row in rows for timed in _timed(row, found.protocol)]
        found = Fitted(calibrate(times, found.efficiency), found.protocol)
    return Fitted(found.efficiency, _protocol(rows, found.efficiency))


def _timed(row: Row, protocol: Protocol) -> list[tuple[Callable[[Efficiency], float], float]]:
    of = cache(partial(parts, row))
    return [
        (lambda efficiency: of(efficiency).tpot_s(row, protocol), row.tpot_s),
        (lambda efficiency: of(efficiency).ttft_s(row, protocol), row.ttft_s),
    ]


def _protocol(rows: Sequence[Row], efficiency: Efficiency) -> Protocol:
    of = [(row, parts(row, efficiency)) for row in rows]

    def loss(protocol: Protocol) -> float:
        return sum(
            abs(math.log(p.ttft_s(row, protocol) / row.ttft_s)) + abs(math.log(p.tpot_s(row, protocol) / row.tpot_s))
            for row, p in of
        )

    return min(PROTOCOLS, key=loss)


def errors(predicted: Sequence[tuple[Row, Fitted]]) -> dict[str, float]:
    """Relative errors."""
    ttft, tpot = [], []
    for row, fitted in predicted:
        of = parts(row, fitted.efficiency)
        ttft.append(abs(of.ttft_s(row, fitted.protocol) / row.ttft_s - 1))
        tpot.append(abs(of.tpot_s(row, fitted.protocol) / row.tpot_s - 1))
    return {"rows": len(predicted), **summary(ttft, "ttft"), **summary(tpot, "tpot")}


def summary(values: Sequence[float], name: str) -> dict[str, float]:
    ranked = sorted(values)
    return {
        f"{name}_median_error": round(median(ranked), 4),
        f"{name}_p90_error": round(ranked[int(0.9 * (len(ranked) - 1))], 4),
    }


def by_shape(rows: Sequence[Row], folds: int = 3) -> list[tuple[Row, Fitted]]:
    """Each row by what the rows of other lengths and numbers of devices say: a third of the shapes is left out."""
    shapes = sorted({row.shape for row in rows})
    predicted = []
    for fold in range(folds):
        held = set(shapes[fold::folds])
        fitted = fit([row for row in rows if row.shape not in held])
        predicted += [(row, fitted) for row in rows if row.shape in held]
    return predicted


LEAST_ROWS = 30
"""Of other models: seven efficiencies are not learned from fewer."""


def by_model(rows: Sequence[Row], known_rows: Sequence[Row]) -> list[tuple[Row, Fitted]]:
    """Each row by what other models' rows of that engine say; none where there are too few of them."""
    predicted = []
    for model in sorted({row.model for row in rows}):
        others = [row for row in known_rows if row.model != model]
        if len(others) >= LEAST_ROWS:
            fitted = fit(others)
            predicted += [(row, fitted) for row in rows if row.model == model]
    return predicted


def silicon() -> dict[str, object]:
    rows = silicon_rows()
    found: dict[str, object] = {}
    for kind, models in (("dense", DENSE), ("experts", tuple(CONFIGS)[3:])):
        mine = [row for row in rows if row.model in models]
        engines = defaultdict(list)
        for row in mine:
            engines[row.engine].append(row)
        shape, model = [], []
        of_engine: dict[str, object] = {}
        for engine, part in sorted(engines.items()):
            shaped = by_shape(part) if len({row.shape for row in part}) > 3 else []
            dense = [row for row in rows if row.engine == engine and row.model in DENSE]
            modelled = by_model(part, part if kind == "dense" else part + dense)
            shape += shaped
            model += modelled
            of_engine[engine] = {
                "fit_on_all_rows": asdict(fit(part)),
                "plain": errors([(row, PLAIN) for row in part]),
                **({"held_out_shapes": errors(shaped)} if shaped else {}),
                **({"held_out_models": errors(modelled)} if modelled else {}),
            }
        found[kind] = {
            "plain_roofline": errors([(row, PLAIN) for row in mine]),
            "held_out_shapes": errors(shape),
            **({"held_out_models": errors(model)} if model else {}),
            "engines": of_engine,
        }
    return found


OPT = {
    "facebook/opt-13b": known.OPT_13B,
    "facebook/opt-66b": known.OPT_13B
    | {"hidden_size": 9216, "ffn_dim": 36864, "num_hidden_layers": 64, "num_attention_heads": 72},
}
A100 = hardware("nvidia-a100-sxm4-80gb")


def distserve_points() -> dict[str, list[tuple[Callable[[Efficiency], float], float]]]:
    """Times that DistServe's coefficients give, within the range that its paper measured."""
    coefficients = json.loads((TRACES / "distserve" / "profiler-a100-80g.distserve.json").read_text())
    found: dict[str, list[tuple[Callable[[Efficiency], float], float]]] = {}
    for name, by_devices in coefficients.items():
        points = found.setdefault(name, [])
        model = ModelSpec.from_config(OPT[name], name)
        for devices, c in by_devices.items():
            of = cache(partial(Roofline, model, A100, int(devices)))
            for tokens in (128, 256, 512, 1024, 2048):
                a, b, square = c["prefill"]
                points.append((partial(_prefill, of, tokens), (a + b * tokens + square * tokens**2) / 1e3))
            for batch in (1, 8, 32, 64, 128):
                for context in (256, 1024):
                    small = batch < c["decoding_large_small_bs_threshold"]
                    a, b, each = c["decoding_smallbs" if small else "decoding_largebs"]
                    measured = (a + b * batch * context + each * batch) / 1e3
                    points.append((partial(_decode, of, batch, context), measured))
    return found


def _prefill(of: Callable[[Efficiency], Roofline], tokens: int, efficiency: Efficiency) -> float:
    return of(efficiency).prefill_s(tokens)


def _decode(of: Callable[[Efficiency], Roofline], batch: int, context: int, efficiency: Efficiency) -> float:
    return of(efficiency).decode_step_s(batch, float(batch * context))


def distserve() -> dict[str, object]:
    points, plain = distserve_points(), efficiency_of(A100)
    found: dict[str, object] = {}
    for name, mine in points.items():
        fitted = calibrate([point for other, theirs in points.items() if other != name for point in theirs], plain)
        for kind, efficiency in (("plain_roofline", plain), ("fit_on_other_models", fitted)):
            off = [abs(predict(efficiency) / seconds - 1) for predict, seconds in mine]
            half = {
                "prefill": [e for e, (p, _) in zip(off, mine, strict=True) if p.func is _prefill],  # type: ignore[attr-defined]
                "decode": [e for e, (p, _) in zip(off, mine, strict=True) if p.func is _decode],  # type: ignore[attr-defined]
            }
            found.setdefault(name, {})[kind] = summary(half["prefill"], "prefill") | summary(half["decode"], "decode")  # type: ignore[index]
        found[name]["efficiency"] = asdict(fitted)  # type: ignore[index]
    return found


def splitwise() -> dict[str, object]:
    """The table back-end: each inner point by what the others say."""
    with gzip.open(TRACES / "splitwise" / "perf_model.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    tables: dict[tuple[str, str, str], list[Point]] = defaultdict(list)
    for r in rows:
        prompt, batch, output = int(r["prompt_size"]), int(r["batch_size"]), int(r["token_size"])
        key = r["model"], r["hardware"], r["tensor_parallel"]
        tables[key].append(Point("prefill", prompt * batch, 0, float(r["prompt_time"]) / 1e3))
        if output == 128 and prompt == 512:
            tables[key].append(Point("decode", batch, prompt + output / 2, float(r["token_time"]) / 1e3))
    off: dict[str, list[float]] = {"prefill": [], "decode": []}
    for points in tables.values():
        for phase, errors_ in off.items():
            mine = [p for p in points if p.phase == phase]
            for tokens in sorted({p.tokens for p in mine})[1:-1]:
                held = [p for p in mine if p.tokens == tokens]
                table = Table([p for p in mine if p.tokens != tokens], 0)
                context = held[0].context
                said = table.prefill_s(tokens) if phase == "prefill" else table.decode_step_s(tokens, tokens * context)
                errors_.append(abs(said / median(p.seconds for p in held) - 1))
    return {"tables": len(tables), **summary(off["prefill"], "prefill"), **summary(off["decode"], "decode")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write JSON here, and not on stdout")
    out = parser.parse_args().out
    if not (TRACES / "silicon").is_dir():
        sys.exit(f"perf_model: skipped: {TRACES} has no measured rows; set TANDEM_TRACES to the folder of traces")
    began = time.monotonic()
    result: dict[str, object] = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "load": round(os.getloadavg()[0], 1),
    }
    for name, part in (("silicon_h100", silicon), ("distserve", distserve), ("splitwise_table", splitwise)):
        result[name] = part()
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    result["seconds"] = round(time.monotonic() - began, 1)
    text = json.dumps(result, indent=1) + "\n"
    for kind, figures in result["silicon_h100"].items():  # type: ignore[attr-defined]
        for how in ("plain_roofline", "held_out_shapes", "held_out_models"):
            if how in figures:
                f = figures[how]
                print(
                    f"{kind:8} {how:16} {f['rows']:4} rows: TTFT {f['ttft_median_error']:.1%}, "
                    f"TPOT {f['tpot_median_error']:.1%} (p90 {f['ttft_p90_error']:.0%}, {f['tpot_p90_error']:.0%})",
                    file=sys.stderr,
                )
    if out is None:
        print(text, end="")
    else:
        out.write_text(text)


if __name__ == "__main__":
    main()
