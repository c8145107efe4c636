"""The public gRPC service `tandem.v1.Inference`, with health and reflection: the same core as HTTP, in protobuf."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tandem.common.errors import ConfigError, TandemError
from tandem.proto import inference_pb2, inference_pb2_grpc
from tandem.router.accounts import Accounts
from tandem.router.caller import ANYBODY, Caller
from tandem.router.choice import ChoiceSpec, Delta, with_seeds
from tandem.router.dispatch import SequenceSpec
from tandem.router.http_types import MAX_N
from tandem.router.sampling_fields import (
    MAX_LOGPROBS,
    SamplingFields,
    in_range,
    invalid,
    output_tokens,
    sampling_params,
    stop_strings,
)
from tandem.router.served_model import Prompt
from tandem.router.service import Service
from tandem.router.tenants import Tenants

log = logging.getLogger(__name__)

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
_OPTIONAL_FIELDS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
    "min_tokens",
)

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(inference_pb2_grpc.InferenceServicer):
    def __init__(self, service: Service, tenants: Tenants | None, accounts: Accounts) -> None:
        self._service = service
        self._tenants = tenants
        self._accounts = accounts

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        arrived = time.monotonic()
        request_id = uuid.uuid4().hex
        caller = ANYBODY
        try:
            caller = self._authenticate(context)
            self._accounts.limits.check(caller)
            self._service.check_load()
            choices = await self._choices(request, caller)
            with self._service.call(
                request_id, choices, arrived=arrived, traceparent=_metadata(context, "traceparent"), streaming=True
            ) as call:
                while not call.finished:
                    for delta in await call.next():
                        yield _response(request_id, delta)
                usage = call.usage()
            yield inference_pb2.GenerateResponse(
                request_id=request_id,
                usage=inference_pb2.Usage(
                    prompt_tokens=usage.prompt_tokens,
                    completion_tokens=usage.completion_tokens,
                    cached_tokens=usage.cached_tokens,
                    cached_by_tier=usage.cached_by_tier,
                ),
            )
        except TandemError as error:
            self._accounts.refused(caller, error)
            await _abort(context, error)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        async def tokenize() -> inference_pb2.TokenizeResponse:
            self._service.model.check_name(request.model)
            special = request.add_special_tokens if request.HasField("add_special_tokens") else True
            ids = await self._service.model.text.encode(request.text, add_special_tokens=special)
            return inference_pb2.TokenizeResponse(token_ids=ids)

        return await self._guarded(context, tokenize)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        async def list_models() -> inference_pb2.ListModelsResponse:
            model = inference_pb2.Model(id=self._service.model.name, max_model_len=self._service.max_model_len)
            return inference_pb2.ListModelsResponse(models=[model])

        return await self._guarded(context, list_models)

    async def _guarded(self, context: Context, handler: Callable[[], Awaitable[T]]) -> T:
        try:
            self._authenticate(context)
            return await handler()
        except TandemError as error:
            await _abort(context, error)

    def _authenticate(self, context: Context) -> Caller:
        if self._tenants is None:
            return ANYBODY
        return self._tenants.authenticate(_metadata(context, "authorization"))

    async def _choices(self, request: inference_pb2.GenerateRequest, caller: Caller) -> list[ChoiceSpec]:
        model = self._service.model
        model.check_name(request.model)
        fields = SamplingFields(
            stop=list(request.stop),
            stop_token_ids=list(request.stop_token_ids),
            ignore_eos=request.ignore_eos,
        )
        for name in _OPTIONAL_FIELDS:
            if request.HasField(name):  # type: ignore[arg-type]
                setattr(fields, name, getattr(request, name))
        in_range("n", fields.n, 1, MAX_N)
        logprobs = request.logprobs if request.HasField("logprobs") else None
        in_range("logprobs", logprobs, 0, MAX_LOGPROBS)
        prompt = await self._prompt(request, caller)
        max_tokens = output_tokens(
            fields.max_tokens,
            default=None,
            prompt_tokens=len(prompt.token_ids),
            max_model_len=self._service.max_model_len,
            param="max_tokens",
            prompt_param=request.WhichOneof("input") or "prompt",
        )
        sampling = sampling_params(
            fields, defaults=model.defaults, vocab_size=model.vocab_size, max_tokens=max_tokens, logprobs=logprobs
        )
        sequence = SequenceSpec(prompt, sampling, caller, priority=caller.priority(None))
        spec = ChoiceSpec(sequence, stop=stop_strings(fields), keep_tokens=True)
        return with_seeds(spec, fields.n or 1)

    async def _prompt(self, request: inference_pb2.GenerateRequest, caller: Caller) -> Prompt:
        model = self._service.model
        match request.WhichOneof("input"):
            case "prompt":
                return await model.text_prompt(request.prompt, param="prompt")
            case "prompt_token_ids":
                return model.token_prompt(list(request.prompt_token_ids.ids), param="prompt_token_ids")
            case "chat":
                messages = [{"role": m.role, "content": m.content} for m in request.chat.messages]
                text = model.render_chat(messages)
                return await model.text_prompt(text, param="chat", add_special_tokens=False, salt=caller.cache_salt(""))
            case _:
                raise invalid("input", "is required: prompt, prompt_token_ids or chat")


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
        options = [
            ("grpc.max_receive_message_length", service.config.max_body_bytes),
            ("grpc.so_reuseport", int(shared)),
        ]
        self._server = grpc.aio.server(options=options)
        servicer = InferenceService(service, tenants, accounts)
        inference_pb2_grpc.add_InferenceServicer_to_server(servicer, self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"--grpc_port {port}: cannot listen on {address}; is it in use?") from error

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


def _response(request_id: str, delta: Delta) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        request_id=request_id,
        index=delta.index,
        text=delta.piece.text,
        token_ids=delta.piece.token_ids,
        finish_reason=delta.finish_reason or "",
    )


def _metadata(context: Context, name: str) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == name and isinstance(value, str):
            return value
    return ""


async def _abort(context: Context, error: TandemError) -> NoReturn:
    """Code, field and Retry-After travel as trailing metadata, as HTTP has them in body and header."""
    trailing = [("tandem-error", error.code)]
    if error.param:
        trailing.append(("tandem-param", error.param))
    if error.retry_after_s is not None:
        trailing.append(("retry-after", str(max(1, math.ceil(error.retry_after_s)))))
    await context.abort(grpc.StatusCode[error.kind.grpc_code], error.message[:500], tuple(trailing))
    raise error  # abort has raised already
