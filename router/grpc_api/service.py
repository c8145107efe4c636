"""The public gRPC service `tandem.v1.Inference`, with health and reflection: the same core as HTTP, in protobuf."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tandem.common.addresses import in_url
from tandem.common.errors import ConfigError, TandemError
from tandem.proto import inference_pb2 as pb
from tandem.router.calls.accounts import Accounts
from tandem.router.grpc_api import info as grpc_info
from tandem.router.grpc_api.exchange import Context, GrpcExchange
from tandem.router.grpc_api.explain import get_request
from tandem.router.grpc_api.generate import complete, generate
from tandem.router.grpc_api.messages import read_message
from tandem.router.service import Service
from tandem.router.tenants.tenants import Tenants
from tandem.router.web.request_fields import SMALL_BODY_BYTES

log = logging.getLogger(__name__)

_SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]
SERVICE_NAME = _SERVICE.full_name
MAX_METADATA_BYTES = 64 << 10
"""Most bytes of metadata, as of HTTP's headers."""
MAX_STREAMS = 1024
"""RPCs at a time on one connection; more wait at the client."""
MAX_CONNECTION_AGE_S = 1800.0
"""Then clients are told to connect anew, which spreads them over routers and ends what hangs. RPCs in progress get
GRACE_S more than the longest request."""
GRACE_S = 60.0
PING_S = 30.0
"""Seconds of silence, after which the server asks whether the client is alive."""
CLIENT_PING_MS = 10_000
"""Clients may ask as often as that."""

Handler = Callable[[GrpcExchange, Any, Service], Awaitable[Message | None]]


@dataclass(frozen=True, slots=True)
class Method:
    """How one method of the service is read and answered."""

    request: type[Message]
    handler: Handler
    generates: bool = False
    """It goes to the workers."""
    costs: bool = True
    """It counts among its tenant's requests, as a POST over HTTP does."""


METHODS = {
    "Generate": Method(pb.GenerateRequest, generate, generates=True),
    "Complete": Method(pb.GenerateRequest, complete, generates=True),
    "Embed": Method(pb.EmbedRequest, grpc_info.embed, generates=True),
    "Tokenize": Method(pb.TokenizeRequest, grpc_info.tokenize),
    "Detokenize": Method(pb.DetokenizeRequest, grpc_info.detokenize),
    "ListModels": Method(pb.ListModelsRequest, grpc_info.list_models, costs=False),
    "CreateContext": Method(pb.CreateContextRequest, grpc_info.create_context),
    "GetContext": Method(pb.GetContextRequest, grpc_info.get_context, costs=False),
    "ListContexts": Method(pb.ListContextsRequest, grpc_info.list_contexts, costs=False),
    "DeleteContext": Method(pb.DeleteContextRequest, grpc_info.delete_context, costs=False),
    "GetRequest": Method(pb.GetRequestRequest, get_request, costs=False),
    "GetUsage": Method(pb.GetUsageRequest, grpc_info.get_usage, costs=False),
}


class InferenceService:
    """Every method of the service: reads the message itself, so that one that cannot be read gets an answer, too."""

    def __init__(self, service: Service, tenants: Tenants | None, accounts: Accounts) -> None:
        """`tenants` None: everybody may come in."""
        self._service = service
        self._tenants = tenants
        self._accounts = accounts

    def handlers(self) -> grpc.GenericRpcHandler:
        """Requests and responses as bytes."""
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {}
        for name, method in METHODS.items():
            streams = _SERVICE.methods_by_name[name].server_streaming
            make = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
            methods[name] = make(self._behaviour(name, method), None, None)
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    def _behaviour(self, name: str, method: Method) -> Callable[[bytes, Context], Awaitable[bytes | None]]:
        async def answer(raw: bytes, context: Context) -> bytes | None:
            """Runs the handler of one RPC, and turns errors into statuses. Counts it and writes its line in the
            log, whatever becomes of it."""
            exchange = GrpcExchange(f"/{SERVICE_NAME}/{name}", context, self._accounts, self._service.work)
            metrics, status = self._service.metrics, "CANCELLED"
            try:
                response = await self._answer(method, exchange, raw)
                status = "OK"
                return response
            except TandemError as error:
                self._accounts.refused(exchange.caller, error)
                status = error.kind.grpc_code
                await exchange.abort(error)
            except grpc.aio.BaseError:  # the client has gone
                raise
            except Exception:
                log.exception("request %s to %s failed", exchange.request_id, exchange.method)
                status = "INTERNAL"
                await exchange.abort(TandemError("internal", "an internal error; the router's log has more"))
            finally:
                exchange.memory.release()
                metrics.requests.inc(exchange.method, status)
                if status == "CANCELLED":
                    metrics.disconnects.inc()
                self._service.note_request(
                    request_id=exchange.request_id,
                    tenant=exchange.caller.tenant,
                    arrived=exchange.arrived,
                    call=exchange.method,
                    status=status,
                    generates=method.generates,
                )

        return answer

    async def _answer(self, method: Method, exchange: GrpcExchange, raw: bytes) -> bytes | None:
        """None of a stream, which has been sent. Raises TandemError."""
        if self._tenants is not None:
            exchange.caller = self._tenants.authenticate(exchange.authorization)
        exchange.memory.hold(len(raw), exchange.caller.tenant)
        if not method.costs:
            return await self._run(method, exchange, raw)
        async with self._accounts.entering(exchange.caller, lambda: len(raw), generates=method.generates) as place:
            if len(raw) > SMALL_BODY_BYTES:
                place.has_read(len(raw))
            if method.generates:
                self._service.check_in_flight()
            return await self._run(method, exchange, raw)

    async def _run(self, method: Method, exchange: GrpcExchange, raw: bytes) -> bytes | None:
        request, unknown = await exchange.off_loop(read_message, method.request, raw)
        exchange.ignore(unknown)
        response = await method.handler(exchange, request, self._service)
        if response is None:
            return None
        await exchange.begin()
        return response.SerializeToString()


class GrpcServer:
    """The public service on a port of its own."""

    def __init__(
        self,
        service: Service,
        tenants: Tenants | None,
        accounts: Accounts,
        host: str,
        port: int,
        *,
        shared: bool = False,
    ) -> None:
        """`shared`: other processes may listen on the same port."""
        config = service.config
        options = [
            ("grpc.max_receive_message_length", config.max_body_bytes),
            ("grpc.max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.max_concurrent_streams", MAX_STREAMS),
            ("grpc.max_connection_age_ms", round(1000 * MAX_CONNECTION_AGE_S)),
            ("grpc.max_connection_age_grace_ms", round(1000 * (config.request_timeout_s + GRACE_S))),
            ("grpc.keepalive_time_ms", round(1000 * PING_S)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", CLIENT_PING_MS),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", CLIENT_PING_MS),
            ("grpc.so_reuseport", int(shared)),
        ]
        self._server = grpc.aio.server(options=options, maximum_concurrent_rpcs=2 * config.max_requests)
        self._server.add_generic_rpc_handlers((InferenceService(service, tenants, accounts).handlers(),))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        address = f"{in_url(host)}:{port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"--grpc-port {port}: cannot listen on {address}; is it in use?") from error

    async def start(self) -> None:
        await self._server.start()

    async def set_ready(self, ready: bool) -> None:
        """What the health service says, of the server and of `tandem.v1.Inference`."""
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
