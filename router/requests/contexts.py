"""Prompt prefixes that a tenant has given a name, kept by a store node and reused by name. HTTP and gRPC share it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

from tandem.common.errors import TandemError
from tandem.common.sampling import SamplingParams
from tandem.kvstore.identity import Namespace, keyed_salt, request_namespace
from tandem.proto import kvnode_pb2
from tandem.router.calls.choice import ChoiceSpec
from tandem.router.calls.generate import Call
from tandem.router.fields.sampling import in_range, invalid, output_tokens
from tandem.router.fleet.workers import no_worker
from tandem.router.placing.contexts import ContextClient, unknown
from tandem.router.placing.dispatch import SequenceSpec
from tandem.router.requests.bodies import ContextBody
from tandem.router.service import Service
from tandem.router.tenants.caller import Caller
from tandem.router.text.served_model import Prompt

MAX_VERSION = 2**63 - 1
SAVED_S = 2.0
"""Longest that an answer waits for the KV to be saved, which happens in the background."""
_SAVED_POLL_S = 0.02


async def create(
    body: ContextBody,
    service: Service,
    caller: Caller,
    open_call: Callable[[Sequence[ChoiceSpec]], AbstractAsyncContextManager[Call]],
) -> kvnode_pb2.Context:
    """Registers the context, then computes it once, as an ordinary request, so that its KV is stored.

    Raises TandemError naming the field.
    """
    store = contexts_of(service)
    service.model.check_name(body.model)
    in_range("version", body.version, 1, MAX_VERSION)
    prompt = await _prompt(body, service, caller)
    max_tokens = output_tokens(
        1,
        default=None,
        prompt_tokens=len(prompt.token_ids),
        max_model_len=service.max_model_len,
        param="prompt",
        prompt_param="prompt" if body.messages is None else "messages",
    )
    root = _root(service, caller)
    if root is None:
        raise no_worker()
    await store.put(caller.tenant, body.name, prompt.token_ids, root=root, ttl_s=body.ttl_s, version=body.version or 0)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    sequence = SequenceSpec(prompt, sampling, caller, exact_kv=True)
    async with open_call([ChoiceSpec(sequence, no_output=True)]) as call:
        await call.result()
    return await _saved(store, caller.tenant, body.name)


async def recipe(service: Service, caller: Caller, name: str) -> list[int]:
    """Token ids of the caller's context. Raises TandemError `not_found` or `unavailable`."""
    if not name:
        raise unknown(name)
    context = await contexts_of(service).recipe(caller.tenant, name)
    root = _root(service, caller)
    if root is not None and root != context.root:  # its token ids may mean something else now
        raise TandemError(
            "not_found",
            f"The context `{name}` was made for another model or sharing group; create it again.",
            param="context",
        )
    return list(context.token_ids)


async def _prompt(body: ContextBody, service: Service, caller: Caller) -> Prompt:
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "or messages is required, and not both")
    if isinstance(body.prompt, str):
        return await service.model.text_prompt(body.prompt, param="prompt", caller=caller)
    if body.prompt is not None:
        return service.model.token_prompt(body.prompt, param="prompt")
    chat = await service.model.render_chat(body.messages or [], caller, add_generation_prompt=False)
    return await service.model.chat_prompt(chat, caller=caller)


async def _saved(contexts: ContextClient, tenant: str, name: str) -> kvnode_pb2.Context:
    """Once all full chunks are stored, or SAVED_S have passed."""
    end = time.monotonic() + SAVED_S
    while True:
        context = await contexts.get(tenant, name)
        full = context.num_tokens - context.num_tokens % context.chunk_tokens
        if context.resident_tokens >= full or time.monotonic() > end:
            return context
        await asyncio.sleep(_SAVED_POLL_S)


def contexts_of(service: Service) -> ContextClient:
    """The store node that keeps named contexts. Raises TandemError `not_found` where there is none."""
    if service.contexts is None:
        raise TandemError(
            "not_found",
            "This router keeps no named contexts; its setting kv_store_address names the store node that does.",
            param="context",
        )
    return service.contexts


def _root(service: Service, caller: Caller) -> bytes | None:
    """Root of the caller's prefix chains, as the workers make them; None while no worker is connected."""
    decode = service.fleet.decode
    salt = keyed_salt(service.salt_key, caller.cache_salt(""))
    return request_namespace(Namespace(decode[0].info.namespace), salt) if decode else None
