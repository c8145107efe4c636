"""The methods of the public gRPC API that generate no text."""

from __future__ import annotations

from functools import partial

from tandem.proto import inference_pb2 as pb
from tandem.proto import kvnode_pb2
from tandem.router.calls.generate import account_of
from tandem.router.endpoints.plans import plan_embeddings
from tandem.router.grpc_api.exchange import GrpcExchange
from tandem.router.grpc_api.explain import account_message
from tandem.router.grpc_api.requests import context_body, detokenize_body, embeddings_body, naming, tokenize_body
from tandem.router.requests import contexts as named_contexts
from tandem.router.requests.contexts import contexts_of
from tandem.router.requests.embedding import vectors
from tandem.router.requests.tokenize import detokenized, tokenized
from tandem.router.service import Service
from tandem.router.tenants.usage import TenantUsage


async def embed(exchange: GrpcExchange, request: pb.EmbedRequest, service: Service) -> pb.EmbedResponse:
    """Embed: a vector for each input, of length 1. Raises TandemError."""
    body = await exchange.off_loop(embeddings_body, request)
    timeout_s = exchange.timeout_s(request.timeout_s if request.HasField("timeout_s") else None)
    answer = pb.EmbedResponse(request_id=exchange.request_id)
    plan = await plan_embeddings(body, service, exchange)
    for choices in plan.calls:
        async with service.call(
            exchange.request_id,
            choices,
            arrived=exchange.arrived,
            traceparent=exchange.traceparent,
            timeout_s=timeout_s,
        ) as call:
            await call.result()
            for vector in vectors(call.choices, body.dimensions):
                answer.embeddings.add(values=vector.tolist())
            answer.usage.prompt_tokens += call.usage().prompt_tokens
            if request.explain:
                answer.explain.CopyFrom(account_message(account_of(call)))
    return answer


async def tokenize(exchange: GrpcExchange, request: pb.TokenizeRequest, service: Service) -> pb.TokenizeResponse:
    """Tokenize: token ids of a text or a chat. Raises TandemError."""
    with naming(request):
        body = await exchange.off_loop(tokenize_body, request)
        tokens = await tokenized(body, service.model, exchange.caller)
    text = service.model.text
    strings: list[str] = (
        await exchange.off_loop(list, map(text.token_text, tokens)) if request.return_token_strs else []
    )
    return pb.TokenizeResponse(token_ids=tokens, token_strs=strings, max_model_len=service.max_model_len)


async def detokenize(exchange: GrpcExchange, request: pb.DetokenizeRequest, service: Service) -> pb.DetokenizeResponse:
    body = await exchange.off_loop(detokenize_body, request)
    return pb.DetokenizeResponse(text=await detokenized(body, service.model, exchange.caller))


async def list_models(exchange: GrpcExchange, request: pb.ListModelsRequest, service: Service) -> pb.ListModelsResponse:
    """Those that the caller may use."""
    model, allowed = service.model, exchange.caller.models
    if allowed is not None and model.name not in allowed:
        return pb.ListModelsResponse()
    served = pb.Model(id=model.name, max_model_len=service.max_model_len, created=model.created)
    return pb.ListModelsResponse(models=[served])


async def create_context(exchange: GrpcExchange, request: pb.CreateContextRequest, service: Service) -> pb.Context:
    """CreateContext: computes a prompt prefix and gives it a name. Raises TandemError."""
    open_call = partial(service.call, exchange.request_id, arrived=exchange.arrived, traceparent=exchange.traceparent)
    with naming(request):
        body = await exchange.off_loop(context_body, request)
        return _context(await named_contexts.create(body, service, exchange.caller, open_call))


async def get_context(exchange: GrpcExchange, request: pb.GetContextRequest, service: Service) -> pb.Context:
    return _context(await contexts_of(service).get(exchange.caller.tenant, request.name))


async def list_contexts(
    exchange: GrpcExchange, request: pb.ListContextsRequest, service: Service
) -> pb.ListContextsResponse:
    """ListContexts: all of the caller's."""
    found = await contexts_of(service).list(exchange.caller.tenant)
    return pb.ListContextsResponse(contexts=map(_context, found))


async def delete_context(
    exchange: GrpcExchange, request: pb.DeleteContextRequest, service: Service
) -> pb.DeleteContextResponse:
    """DeleteContext: its name is free again. Raises TandemError `not_found`."""
    await contexts_of(service).drop(exchange.caller.tenant, request.name)
    return pb.DeleteContextResponse()


async def get_usage(exchange: GrpcExchange, request: pb.GetUsageRequest, service: Service) -> pb.GetUsageResponse:
    return pb.GetUsageResponse(tenants=map(_tenant_usage, await service.usage(exchange.caller)))


def _context(context: kvnode_pb2.Context) -> pb.Context:
    return pb.Context(
        name=context.name,
        version=context.version,
        tokens=context.num_tokens,
        resident_tokens=context.resident_tokens,
        created_at=int(context.created_at),
        expires_at=int(context.expires_at),
    )


def _tenant_usage(usage: TenantUsage) -> pb.TenantUsage:
    return pb.TenantUsage(
        tenant=usage.tenant,
        since=usage.since,
        requests=usage.requests,
        failed=usage.failed,
        rejected=usage.rejected,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_by_tier=usage.cached_by_tier,
        hours=[
            pb.HourUsage(
                start=hour.start,
                requests=hour.requests,
                rejected=hour.rejected,
                prompt_tokens=hour.prompt_tokens,
                cached_tokens=hour.cached_tokens,
                completion_tokens=hour.completion_tokens,
            )
            for hour in usage.hours
        ],
    )
