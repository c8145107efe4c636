"""One RPC and its answer: who asks, what travels as metadata, and errors as statuses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

import grpc.aio
from google.protobuf.message import Message

from tandem.common.errors import TandemError
from tandem.common.fair_work import FairWork
from tandem.router.calls.accounts import Accounts
from tandem.router.fields.sampling import in_range
from tandem.router.grpc_api.errors import Metadata, status_of
from tandem.router.tenants.caller import ANYBODY
from tandem.router.web.body_memory import BodyMemory
from tandem.router.web.exchange import IGNORED_HEADER, header_list
from tandem.router.web.off_loop import off_loop
from tandem.router.web.request_fields import log_ignored
from tandem.router.web.request_ids import request_id_of, traceparent_of

MAX_TIMEOUT_S = 1e6

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]


class GrpcExchange:
    """One RPC on the event loop; the counterpart of HTTP's `Exchange`."""

    def __init__(self, method: str, context: Context, accounts: Accounts, work: FairWork) -> None:
        """`work`: threads for what would hold the event loop."""
        self.method = method
        self.arrived = time.monotonic()
        self.caller = ANYBODY
        """Set once the API key is checked."""
        self.memory = BodyMemory()
        self._context = context
        self._accounts = accounts
        self._work = work
        self._metadata = dict(context.invocation_metadata() or ())
        self._ignored: list[str] = []
        self._begun = False
        self.request_id = request_id_of(self.metadata("x-request-id"))
        self.traceparent = traceparent_of(self.metadata("traceparent"))

    def metadata(self, name: str) -> str:
        """Empty where it is absent."""
        value = self._metadata.get(name, "")
        return value if isinstance(value, str) else ""

    @property
    def authorization(self) -> str:
        """Value that HTTP's header would have. Empty where no key was sent."""
        key = self.metadata("x-api-key")
        return self.metadata("authorization") or (f"Bearer {key}" if key else "")

    def timeout_s(self, asked: float | None) -> float | None:
        """Time from arrival on that the request asks for, or the RPC's deadline where that comes first.

        Raises TandemError naming the field.
        """
        in_range("timeout_s", asked, 0, MAX_TIMEOUT_S)
        left = self._context.time_remaining()
        return min([each for each in (asked, left) if each is not None], default=None)

    async def off_loop(self, function: Callable[..., T], *args: Any) -> T:
        """The result of a function that takes long where the message is large, on the tenant's account. Raises
        TandemError `overloaded`, and what the function raises."""
        return await off_loop(self._work, self.caller, self.memory.size, function, *args)

    def ignore(self, names: Iterable[str]) -> None:
        """Fields of the request that have no effect: the answer's metadata tells the client, the log says it once."""
        names = list(names)
        self._ignored += names
        log_ignored(names, self.method)

    async def begin(self) -> None:
        """Sends what HTTP has in headers. Once; after that it does nothing."""
        if not self._begun:
            self._begun = True
            await self._context.send_initial_metadata(self._headers())

    async def send(self, message: Message) -> None:
        """Sends a message of a stream. Returns when the transport has taken it, which waits for a slow client."""
        await self.begin()
        await self._context.write(message.SerializeToString())

    async def abort(self, error: TandemError) -> NoReturn:
        code, message, trailing = status_of(error)
        await self._context.abort(code, message, trailing if self._begun else (*self._headers(), *trailing))
        raise error  # abort has raised already

    def _headers(self) -> Metadata:
        headers: list[tuple[str, str | bytes]] = [("x-request-id", self.request_id)]
        if self._ignored:
            headers.append((IGNORED_HEADER.decode(), header_list(self._ignored).decode()))
        if not self.caller.rates.unlimited:
            limits = self._accounts.limits.headers(self.caller)
            headers += [(name.decode(), value.decode()) for name, value in limits]
        return tuple(headers)
