"""Where requests go on traffic that no weight was tuned on: the policies and the pool of `placement.py`, other traces.

    python bench/placement_heldout.py --azure AzureLLMInferenceTrace_conv.csv.gz --servegen SAMPLED.csv.gz \\
        [--dynamo PYTHON] [--repeats 3] [--parts ...] [--policies ...] [--json FILE]

Both traces are arrivals and lengths of real requests without what was in them, so which prefixes are shared is made
here, in two ways as unlike each other as they are unlike the trace of `placement.py`: long chains that one user
extends, and a few prompts that whole applications have in common.
"""

from __future__ import annotations

import csv
import gzip
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from itertools import count
from pathlib import Path

from mock_pool import Request
from placement import A100_70B, H100_8B, Part, arguments, faster, measure_all, unified
from placement_agents import BLOCK as AGENT_BLOCK
from placement_agents import agents

BLOCK = 64
MESSAGE_TOKENS = 256
"""What a user says next, at most."""
REMEMBERED_S = 600.0
"""After that a conversation is not taken up again."""
READ_S = 0.03
"""Of each token of an answer: sooner nobody has read it."""


def conversations(path: Path) -> list[Request]:
    """Azure's conversation trace. A request goes on with an earlier one where its prompt is as long as that one's
    prompt and answer and a message of up to `MESSAGE_TOKENS`: with the longest such, each once. The trace does not say
    which are turns of one conversation; that is as many as there can be."""
    requests: list[Request] = []
    open_: list[tuple[int, int]] = []  # prompt and answer tokens, number
    waiting: list[tuple[float, int, int]] = []
    fresh = count()
    start: float | None = None
    for row in _rows(path):
        at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
        start = at if start is None else start
        at -= start
        prompt, answer = int(row["ContextTokens"]), max(1, int(row["GeneratedTokens"]))
        while waiting and waiting[0][0] <= at:
            _, tokens, number = waiting.pop(0)
            insort(open_, (tokens, number))
        place = bisect_left(open_, (prompt, -1)) - 1
        shared: tuple[int, ...] = ()
        while place >= 0 and open_[place][0] >= prompt - MESSAGE_TOKENS:
            _, number = open_.pop(place)
            before = requests[number]
            if at - before.arrival_s <= REMEMBERED_S:
                shared = before.blocks[: before.prompt_tokens // BLOCK]
                break
            place -= 1
        blocks = (*shared, *(next(fresh) for _ in range(-(-prompt // BLOCK) - len(shared))))
        insort(waiting, (at + READ_S * answer, prompt + answer, len(requests)))
        requests.append(Request(at, prompt, answer, blocks))
    return requests


def applications(path: Path) -> list[Request]:
    """ServeGen's sample with 35 clients. Each client's prompts begin alike, for as many tokens as all but the shortest
    tenth of them have."""
    rows = list(_rows(path))
    lengths: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        lengths[row["client"]].append(int(row["input_tokens"]))
    common = {client: sorted(tokens)[len(tokens) // 10] // BLOCK for client, tokens in lengths.items()}
    fresh = count()
    starts = {client: tuple(next(fresh) for _ in range(blocks)) for client, blocks in common.items()}
    requests = []
    for row in rows:
        prompt = max(1, int(row["input_tokens"]))
        shared = starts[row["client"]][: (prompt - 1) // BLOCK]
        blocks = (*shared, *(next(fresh) for _ in range(-(-prompt // BLOCK) - len(shared))))
        requests.append(Request(float(row["timestamp_s"]), prompt, max(1, int(row["output_tokens"])), blocks))
    return requests


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", newline="") as lines:
        yield from csv.DictReader(lines)


def reusable(requests: list[Request]) -> float:
    """Share of prompt tokens in blocks that an earlier prompt has had."""
    seen: set[int] = set()
    found = 0
    for request in requests:
        found += sum(block in seen for block in request.blocks) * BLOCK
        seen.update(request.blocks)
    return found / sum(request.prompt_tokens for request in requests)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--azure", type=Path, required=True)
    parser.add_argument("--servegen", type=Path, required=True)
    options = parser.parse_args()
    chats, apps = conversations(options.azure), applications(options.servegen)
    parts = [
        Part("conversations x 16, 8B on H100", H100_8B, 10, BLOCK, faster(chats, 16)),
        Part("applications x 12, 8B on H100", H100_8B, 10, BLOCK, faster(apps, 12)),
        Part("conversations x 4, 70B on A100", A100_70B, 10, BLOCK, faster(chats, 4)),
        Part("applications x 3, 70B on A100", A100_70B, 10, BLOCK, faster(apps, 3)),
    ]
    sessions = agents(300, 250.0, seed=1)
    parts += [
        Part(f"agents x {rate}, 8B on H100", H100_8B, 10, AGENT_BLOCK, faster(sessions, rate)) for rate in (1, 4, 10)
    ]
    about = {
        name: {
            "requests": len(requests),
            "prompt_tokens": sum(request.prompt_tokens for request in requests),
            "reusable": round(reusable(requests), 4),
        }
        for name, requests in (("conversations", chats), ("applications", apps))
    }
    runs = [run for part in parts for run in unified(part, options.dynamo, options.repeats, move=True)]
    measure_all(runs, options, dict(about))


if __name__ == "__main__":
    main()
