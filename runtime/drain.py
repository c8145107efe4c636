"""`tandem drain`: empties a worker, so that it can be stopped and nobody notices."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tandem.common.errors import ConfigError
from tandem.common.secret import read_secret
from tandem.common.settings import Group, parse_settings
from tandem.runtime.running import worker_named

if TYPE_CHECKING:
    from grpc import Future

    from tandem.proto import worker_pb2
    from tandem.proto.worker_pb2_grpc import WorkerStub

EXAMPLES = (
    ("a worker of the `tandem serve` that runs here", "tandem drain decode-1"),
    ("a worker elsewhere", "tandem drain 10.0.0.5:9200 --secret-file secret"),
    ("five minutes for what runs there, before the rest goes on elsewhere", "tandem drain decode-1 --grace-s 5m"),
)
REACH_S = 10.0
"""Time for the worker to answer at all."""
ANSWER_S = 30.0
"""Time beyond the grace period, in which the worker ends what is left."""

MAX_MESSAGE_BYTES = 64 << 20
"""A session begins with what the worker has cached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainConfig:
    """Settings of `tandem drain`."""

    basics: ClassVar[Group]
    """Basics"""
    target: str
    """The worker: its address (HOST:PORT or unix:/path), or its name in the `tandem serve` that runs here, such as
    decode-1."""
    grace_s: float = 60.0
    """How long what runs there may take. The rest is ended, and routers go on with it on other workers."""
    secret_file: str = ""
    """File with the deployment's secret. Empty: the variable TANDEM_SECRET holds it, or that of the `tandem serve` that
    runs here."""

    def __post_init__(self) -> None:
        if self.grace_s < 0:
            raise ConfigError(f"grace_s {self.grace_s:g}: must not be negative")


SETTINGS = DrainConfig


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 once the worker is empty, 1 when it cannot be reached or does not answer. Raises ConfigError."""
    config = parse_settings(
        DrainConfig,
        argv,
        command="tandem drain",
        description="Empties a worker: it takes nothing new from now on, what runs there ends or goes on elsewhere. "
        "Shows how far it is, and returns once the worker can be stopped. To be used again, it must be started anew.",
        examples=EXAMPLES,
        word="target",
    )
    address, secret_file = worker_named(config.target)
    secret = read_secret(config.secret_file or secret_file)
    try:
        return _drain(address, config.grace_s, secret)
    except KeyboardInterrupt:
        _say("not waited for any longer; the worker takes nothing new, and what runs there goes on")
        return 130


def _drain(address: str, grace_s: float, secret: bytes) -> int:
    import grpc

    from tandem.common.credentials import open_channel, remedy
    from tandem.proto import worker_pb2, worker_pb2_grpc

    name = address
    with open_channel(address, secret, [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        try:
            name = stub.GetInfo(worker_pb2.GetInfoRequest(), timeout=REACH_S).worker_id
            draining = stub.Drain.future(worker_pb2.DrainRequest(grace_s=grace_s), timeout=grace_s + ANSWER_S)
            _show_until_done(stub, name, draining)
            done = draining.result()
        except grpc.RpcError as error:
            details = (error.details() if isinstance(error, grpc.Call) else "") or str(error)
            _say(f"the worker {name} does not answer: {details}{remedy(details, secret)}")
            return 1
    early = f", {done.aborted} were ended, for other workers to go on with" if done.aborted else ""
    print(f"{name} is empty: {done.finished} requests finished{early}. It can be stopped.")
    return 0


def _show_until_done(stub: WorkerStub, name: str, draining: Future[worker_pb2.DrainResponse]) -> None:
    """Tells, at most once a second, how much runs on the worker; a session says so, as it does to routers."""
    import grpc

    from tandem.proto import worker_pb2

    over = threading.Event()

    def greeting() -> Iterator[worker_pb2.SessionRequest]:
        yield worker_pb2.SessionRequest(hello=worker_pb2.Hello(router_id="tandem drain"))
        over.wait()

    session = stub.Session(greeting())

    def end(_: object) -> None:
        session.cancel()

    draining.add_done_callback(end)
    said, said_at = "", 0.0
    try:
        for response in session:
            status, now = response.status, time.monotonic()
            text = f"{name}: {status.running} running, {status.waiting} waiting"
            if response.HasField("status") and text != said and now - said_at >= 1.0:
                said, said_at = text, now
                print(text, flush=True)
    except grpc.RpcError:
        pass  # cancelled, or the worker is gone; `draining` tells
    finally:
        over.set()


def _say(text: str) -> None:
    print(f"tandem drain: {text}", file=sys.stderr)
