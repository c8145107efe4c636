"""What clients feel while machines are cut off in silence, come back elsewhere, or hold other weights.

    python bench/hosts.py                                             # every pair, 2, 20 and 60 s (half an hour)
    python bench/hosts.py --pairs router/decode-0 --seconds 2,20      # some

Router, Redis, one prefill and two decode workers, each on a host made of namespaces (tests/e2e/hosts.py; needs root),
while clients stream greedy answers without a pause and compare every token with the answer they had first. Prints
JSON: requests that failed, tokens that were others, the longest time between two tokens of an answer (or to its first),
and how long after the end of the trouble the router had all its workers again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from batch_beside import machine, tell  # noqa: E402

from tests.e2e.cluster import costly_model  # noqa: E402
from tests.e2e.host_clients import HostClients  # noqa: E402
from tests.e2e.hosts import Hosts  # noqa: E402
from tests.e2e.serving import eventually  # noqa: E402

PLACES = ("router", "redis", "prefill-0", "decode-0", "decode-1")
WORKERS = {"prefill-0", "decode-0", "decode-1"}
QUESTIONS = [{"prompt": [50 + number, *range(20, 320)], "max_tokens": 128} for number in range(12)]
SETTLE_S = 3.0
"""Streamed before and after each trouble, so that what it left shows."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one trouble cost."""

    trouble: str
    seconds: float
    answered: int
    failed: int
    different: int
    longest_gap_s: float
    recovered_s: float
    """From its end until the router has all workers."""
    first_failure: str = ""


def suffered(hosts: Hosts, trouble: str, begin: Callable[[], object], seconds: float, end: Callable[[], object]) -> Row:
    """Streams while `begin` has happened, for `seconds`, and until all is well after `end`."""
    with HostClients(hosts, QUESTIONS, 6, strict=False) as clients:
        time.sleep(SETTLE_S)
        clients.forget_gaps()
        begin()
        time.sleep(seconds)
        end()
        ended = time.monotonic()
        expected = {hosts.network.address(worker) for worker in WORKERS}
        eventually(lambda: hosts.addresses() == expected, what=f"all workers are back after {trouble}")
        recovered = time.monotonic() - ended
        time.sleep(SETTLE_S)
    return Row(
        trouble,
        seconds,
        clients.answered,
        len(clients.failed),
        len(clients.different),
        round(clients.longest_gap_s, 3),
        round(recovered, 3),
        clients.failed[0][:300] if clients.failed else "",
    )


def cut(hosts: Hosts, pair: str, seconds: float) -> Row:
    one, other = pair.split("/")
    network = hosts.network
    return suffered(hosts, f"cut {pair}", lambda: network.cut(one, other), seconds, lambda: network.heal(one, other))


def moved(hosts: Hosts, host: str) -> Row:
    """A host dies without a word and comes back, empty, under another address."""

    def die() -> None:
        hosts.network.cut(host)
        for part in hosts.on(host):
            part.kill(signal.SIGKILL)

    def come_back() -> None:
        hosts.network.move(host)
        hosts.start(hosts.on(host))

    return suffered(hosts, f"{host} moves", die, 5.0, come_back)


def beside_other_weights(hosts: Hosts, folder: Path) -> Row:
    """The router starts again while one decode worker has other weights, which it gets rid of afterwards."""
    worker, router = hosts["decode@decode-1"], hosts["router@router"]
    right = (hosts.folder / "decode-1" / "small").resolve()

    def begin() -> None:
        worker.kill(signal.SIGKILL)
        hosts.give_model("decode-1", costly_model(folder, initializer_range=0.05))
        hosts.start([worker])
        router.kill(signal.SIGKILL)
        hosts.start([router])

    def end() -> None:
        worker.kill(signal.SIGKILL)
        hosts.give_model("decode-1", right)
        hosts.start([worker])

    return suffered(hosts, "router restarts beside other weights", begin, 5.0, end)


def main() -> int:
    pairs = [f"{one}/{other}" for one, other in itertools.combinations(PLACES, 2)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default=",".join(pairs))
    parser.add_argument("--seconds", default="2,20,60")
    parser.add_argument("--disaggregate", default="always", choices=("auto", "always", "never"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    before = machine()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        model = costly_model(Path(folder))
        with Hosts(model, TANDEM_DISAGGREGATE=options.disaggregate) as hosts:
            hosts.start()
            eventually(lambda: hosts.workers() == WORKERS, what="all workers are connected")
            for pair, seconds in itertools.product(filter(None, options.pairs.split(",")), options.seconds.split(",")):
                rows.append(cut(hosts, pair, float(seconds)))
                print(json.dumps(asdict(rows[-1])), file=sys.stderr, flush=True)
            rows.append(moved(hosts, "decode-1"))
            rows.append(beside_other_weights(hosts, Path(folder) / "other"))
    tell({"machine": before, "load_after": os.getloadavg(), "rows": [asdict(row) for row in rows]}, options.out)
    return int(any(row.different for row in rows))


if __name__ == "__main__":
    sys.exit(main())
