"""`tandem profile`: measures a running worker, and writes the table that the planner's model of it reads."""

from __future__ import annotations

import queue
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tandem.common.errors import ConfigError
from tandem.common.secret import read_secret
from tandem.common.settings import Group, parse_settings
from tandem.planner.measured import Point, write_points
from tandem.runtime.drain import MAX_MESSAGE_BYTES, REACH_S
from tandem.runtime.running import worker_named

if TYPE_CHECKING:
    from tandem.proto import worker_pb2
    from tandem.proto.worker_pb2_grpc import WorkerStub

EXAMPLES = (
    ("a worker of the `tandem serve` that runs here", "tandem profile decode-1 --out decode.csv"),
    (
        "a worker elsewhere, over a grid of one's own",
        "tandem profile 10.0.0.5:9200 --batch 1,64 --context 8192",
    ),
)
STEPS = 24
"""Steps of decoding that a point is measured over."""
ATTEMPTS = 6
"""For requests that do not run together, each time with answers twice as long."""
MAX_POINTS = 2000
MAX_BATCH, MAX_CONTEXT = 4096, 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileConfig:
    """Settings of `tandem profile`."""

    basics: ClassVar[Group]
    """Basics"""
    target: str
    """The decode worker: its address (HOST:PORT or unix:/path), or its name in the `tandem serve` that runs here, such
    as decode-1. Nothing else should run on it meanwhile."""
    out: Path | None = None
    """File for the table. Empty: it is printed."""
    batch: list[str] = field(default_factory=list)
    """Numbers of requests that decode together. Empty: 1, 2, 4 and so on, as many as the worker
    takes."""
    context: list[str] = field(default_factory=list)
    """Tokens of KV of each request, and of the prompts. Empty: 64, 256, 1024 and so on, as
    long as the model allows."""
    repeats: int = 3
    """How often each point is measured; the table has all of them, and its reader takes the median."""
    timeout_s: float = 300.0
    """Longest time for a point."""
    secret_file: str = ""
    """File with the deployment's secret. Empty: the variable TANDEM_SECRET holds it, or that of the `tandem serve` that
    runs here."""

    def __post_init__(self) -> None:
        """Raises ConfigError: the field that makes no sense."""
        self.batches()
        self.contexts()
        if self.out is not None and (self.out.is_dir() or not self.out.absolute().parent.is_dir()):
            raise ConfigError(f"out {self.out}: must be a file in a folder that exists")
        if not 1 <= self.repeats <= 100:
            raise ConfigError(f"repeats {self.repeats}: must be between 1 and 100")
        if not 1 <= self.timeout_s <= 86_400:
            raise ConfigError(f"timeout_s {self.timeout_s:g}: must be between a second and a day")

    def batches(self) -> list[int]:
        return _numbers("batch", self.batch, MAX_BATCH)

    def contexts(self) -> list[int]:
        return _numbers("context", self.context, MAX_CONTEXT)


def _numbers(name: str, texts: Sequence[str], most: int) -> list[int]:
    for text in texts:
        if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
            raise ConfigError(f"{name} {text[:40]}: must be a whole number between 1 and {most}")
    return sorted({int(text) for text in texts})


SETTINGS = ProfileConfig


class ProfileError(Exception):
    """A point could not be measured. The message is for people."""


def main(argv: Sequence[str]) -> int:
    """Exit status: 1 when the worker cannot be reached, or fails a request. Raises ConfigError."""
    config = parse_settings(
        ProfileConfig,
        argv,
        command="tandem profile",
        description="Measures a running worker over a grid of batch and context: what prompts and steps of decoding "
        "take. Writes the table that the planner's performance model reads (docs/planner.md).",
        examples=EXAMPLES,
        word="target",
    )
    address, secret_file = worker_named(config.target)
    secret = read_secret(config.secret_file or secret_file)
    try:
        text = _profile(address, secret, config)
    except ProfileError as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:
        _say("stopped; nothing is written")
        return 130
    if config.out is None:
        print(text, end="")
    else:
        config.out.write_text(text)
        _say(f"the table is in {config.out}")
    return 0


def _profile(address: str, secret: bytes, config: ProfileConfig) -> str:
    import grpc

    from tandem.common.credentials import open_channel, remedy
    from tandem.proto import worker_pb2, worker_pb2_grpc

    with open_channel(address, secret, [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        try:
            info = stub.GetInfo(worker_pb2.GetInfoRequest(), timeout=REACH_S)
            if info.role != worker_pb2.ROLE_DECODE:
                raise ConfigError(f"target {config.target}: is no decode worker; these compute prompts too")
            grid = Grid.of(info, config)
            points = list(_measure(Requests(stub, info, config.timeout_s), grid, config.repeats))
        except grpc.RpcError as error:
            details = (error.details() if isinstance(error, grpc.Call) else "") or str(error)
            raise ProfileError(f"the worker {address} does not answer: {details}{remedy(details, secret)}") from error
    about = (
        f"# model {info.model}, hardware class {info.hardware_class}, {info.num_parameters} parameters\n"
        f"# kv_tokens {info.num_blocks * info.block_size}, kv_bytes_per_token {info.kv_bytes_per_token}\n"
    )
    return about + write_points(points)


@dataclass(frozen=True, slots=True)
class Grid:
    """Points to measure: (uncached tokens, context) of prompts, and (batch, context) of decoding."""

    prefill: tuple[tuple[int, int], ...]
    decode: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, info: worker_pb2.WorkerInfo, config: ProfileConfig) -> Grid:
        """Those points that the worker has room for. Raises ConfigError where it has none for any."""
        room, longest = info.num_blocks * info.block_size, info.max_model_len - 1
        batches = config.batches() or [1 << i for i in range(max(info.max_num_seqs, 1).bit_length())]
        contexts = config.contexts() or [4**i for i in range(3, 11)]
        contexts = [n for n in contexts if n <= min(longest, room - 1)]
        prompts = [(n, 0) for n in contexts] + [(n, 4 * n) for n in contexts if 5 * n <= min(longest, room - 1)]
        decode = [
            (batch, n)
            for batch in batches
            for n in contexts
            if batch <= info.max_num_seqs
            and n + _outputs(batch, n, info) <= longest
            and batch * (n + _outputs(batch, n, info) + info.block_size) <= room
        ]
        if not prompts or not decode:
            raise ConfigError(
                f"batch, context: the worker has no room for any of them: it takes {info.max_num_seqs} requests of at "
                f"most {info.max_model_len} tokens, and its memory holds {room}"
            )
        if len(prompts) + len(decode) > MAX_POINTS:
            raise ConfigError(f"batch, context: {len(prompts) + len(decode)} points are more than {MAX_POINTS}")
        return cls(tuple(prompts), tuple(decode))


def _outputs(batch: int, context: int, info: worker_pb2.WorkerInfo) -> int:
    """Tokens after which the first request still runs while the last one's steps are measured: prompts are computed in
    chunks, and a step has at least one."""
    chunk = max(min(info.chunk_tokens or context, context), 1)
    return STEPS + 2 + batch * -(-context // chunk)


def _measure(requests: Requests, grid: Grid, repeats: int) -> Iterator[Point]:
    total = (len(grid.prefill) + len(grid.decode)) * repeats
    done = 0
    requests.prefill(*grid.prefill[0])  # what is compiled or allocated at the first use is not measured
    for _ in range(repeats):
        for tokens, context in grid.prefill:
            point = requests.prefill(tokens, context)
            done += 1
            _progress(done, total, f"prompt of {tokens} tokens behind {context}", point)
            yield point
        for batch, context in grid.decode:
            point = requests.decode(batch, context)
            done += 1
            _progress(done, total, f"{batch} requests with {context} tokens each", point)
            yield point


class Requests:
    """Requests to one worker, and how long they take."""

    def __init__(self, stub: WorkerStub, info: worker_pb2.WorkerInfo, timeout_s: float) -> None:
        self._stub = stub
        self._info = info
        self._timeout_s = timeout_s
        self._random = random.Random(0)
        self._sent = 0
        self._run = random.SystemRandom().randbytes(8)
        """Part of each salt: nobody finds what an earlier run has cached."""

    def prefill(self, tokens: int, context: int) -> Point:
        """As the worker itself measures it, from the prompt's first step to its token. Context is what its cache has of
        the prompt, computed before."""
        salt, prompt = self._salt(), self._prompt(context + tokens)
        if context:
            self._first_output(prompt[:context], salt)
        report = self._first_output(prompt, salt).prompt
        cached = report.cached_tokens
        return Point("prefill", len(prompt) - cached, cached, max(report.prefill_s, 1e-9))

    def decode(self, batch: int, context: int) -> Point:
        """Time between tokens, while all of the batch decode and no prompt is computed. Requests that did not run
        together are sent again, for longer answers."""
        info = self._info
        room = min(info.max_model_len - 1, info.num_blocks * info.block_size // batch - info.block_size) - context
        for attempt in range(ATTEMPTS):
            tokens = max(min(_outputs(batch, context, info) << attempt, room), STEPS + 2)
            submits = [self._submit(self._prompt(context), self._salt(), tokens) for _ in range(batch)]
            point = self._steps(submits, context)
            if point is not None:
                return point
        raise ProfileError(f"{batch} requests of {context} tokens do not run together: is the worker busy?")

    def _steps(self, submits: Sequence[worker_pb2.Submit], context: int) -> Point | None:
        """None where a request was over before all had run together for long enough. Waits for the end of all, so that
        the next point has the worker to itself."""
        batch, counts, over = len(submits), dict[str, int](), False
        began, at_begin, point = 0.0, 0, None
        for output in self._outputs_of(submits):
            counts[output.key.request_id] = counts.get(output.key.request_id, 0) + len(output.token_ids)
            if point is None and not over and len(counts) == batch and output.token_ids:
                now, given = time.perf_counter(), sum(counts.values())
                if not began:
                    began, at_begin = now, given
                elif given - at_begin >= batch * STEPS:
                    seconds = (now - began) * batch / (given - at_begin)
                    point = Point("decode", batch, context + round((at_begin + given) / (2 * batch)), seconds)
            over |= bool(output.finish_reason)
        return point

    def _first_output(self, prompt: list[int], salt: bytes) -> worker_pb2.RequestOutput:
        for output in self._outputs_of([self._submit(prompt, salt, 1)]):
            if output.HasField("prompt"):
                return output
        raise ProfileError(f"the worker's answer to a prompt of {len(prompt)} tokens has no report")

    def _outputs_of(self, submits: Sequence[worker_pb2.Submit]) -> Iterator[worker_pb2.RequestOutput]:
        """Outputs of requests of a session of their own, until all are over. Raises ProfileError."""
        from tandem.proto import worker_pb2

        pending: queue.SimpleQueue[worker_pb2.SessionRequest | None] = queue.SimpleQueue()
        pending.put(worker_pb2.SessionRequest(hello=worker_pb2.Hello(router_id="tandem profile")))
        for submit in submits:
            pending.put(worker_pb2.SessionRequest(submit=submit))
        session = self._stub.Session(iter(pending.get, None), timeout=self._timeout_s)
        running = len(submits)
        try:
            for response in session:
                for output in response.outputs:
                    if output.HasField("error"):
                        raise ProfileError(f"the worker refused a request: {output.error.message}")
                    yield output
                    running -= output.finish_reason != worker_pb2.FINISH_REASON_UNSPECIFIED
                if not running:
                    return
        finally:
            pending.put(None)
            session.cancel()

    def _submit(self, prompt: list[int], salt: bytes, max_tokens: int) -> worker_pb2.Submit:
        from tandem.common.sampling import SamplingParams
        from tandem.proto import worker_pb2

        self._sent += 1
        return worker_pb2.Submit(
            key=worker_pb2.RequestKey(request_id=f"profile-{self._run.hex()}-{self._sent}", epoch=1),
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True).to_proto(),
            cache_salt=salt,
            tenant="tandem-profile",
        )

    def _prompt(self, tokens: int) -> list[int]:
        return [self._random.randrange(self._info.vocab_size) for _ in range(tokens)]

    def _salt(self) -> bytes:
        return self._run + self._random.randbytes(8)


def _progress(done: int, total: int, what: str, point: Point) -> None:
    print(f"{done}/{total}  {what}: {1000 * point.seconds:.2f} ms", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    print(f"tandem profile: {text}", file=sys.stderr)
