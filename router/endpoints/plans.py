"""The plan of each endpoint: `plan_...(body, service, asker)`. All raise TandemError naming the body's field."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Protocol

from tandem.router.answers.chat import ChatShapes
from tandem.router.answers.completions import CompletionShapes
from tandem.router.answers.messages import MessageShapes
from tandem.router.answers.responses import ResponseShapes
from tandem.router.calls.choice import with_seeds
from tandem.router.endpoints.plan import Asker, EmbeddingPlan, TextPlan
from tandem.router.requests.bodies import ChatBody, CompletionBody
from tandem.router.requests.chat import AskedChat, asked_chat, chat_prompt
from tandem.router.requests.completion import completion_choices
from tandem.router.requests.embedding import EmbeddingsBody, embedding_groups
from tandem.router.requests.messages import MessagesBody
from tandem.router.requests.responses import ResponsesBody
from tandem.router.service import Service
from tandem.router.web.errors import renaming


class StandsForChat(Protocol):
    """A body of another API over the same chat."""

    chat_names: ClassVar[list[tuple[str, str]]]
    """Fields of a chat request, as patterns, and what they are called there."""

    def chat(self) -> ChatBody:
        """The chat request that it stands for. Raises TandemError on what is not supported."""


async def plan_completion(body: CompletionBody, service: Service, asker: Asker) -> TextPlan:
    choices = await completion_choices(body, service, asker.caller)
    return TextPlan(choices, partial(CompletionShapes, service.model, body), bool(body.stream))


async def plan_chat(body: ChatBody, service: Service, asker: Asker) -> TextPlan:
    """Plan of a chat; `echoed` and `prompt_text` are told of by gRPC's answers, too."""
    asked = await asked_chat(body, service, asker.caller)
    prompt_text = None
    if body.return_prompt_text:
        ids = asked.spec.sequence.prompt.token_ids
        prompt_text = await service.model.text.decode_long(ids, skip_special_tokens=False, caller=asker.caller)
    return TextPlan(
        with_seeds(asked.spec, body.n or 1),
        partial(ChatShapes, service.model, body, asked, prompt_text),
        bool(body.stream),
        tools=asked.tools,
        echoed=body.echoed,
        prompt_text=prompt_text,
    )


async def plan_messages(body: MessagesBody, service: Service, asker: Asker) -> TextPlan:
    asked = await _asked(body, service, asker)
    return TextPlan([asked.spec], partial(MessageShapes, service.model, asked), bool(body.stream), tools=asked.tools)


async def plan_responses(body: ResponsesBody, service: Service, asker: Asker) -> TextPlan:
    asked = await _asked(body, service, asker)
    shapes = partial(ResponseShapes, service.model, asked, body.repeated())
    return TextPlan([asked.spec], shapes, bool(body.stream), tools=asked.tools)


async def plan_embeddings(body: EmbeddingsBody, service: Service, asker: Asker) -> EmbeddingPlan:
    return EmbeddingPlan(await embedding_groups(body, service, asker.caller), body, service.model.name)


async def input_tokens(body: StandsForChat, service: Service, asker: Asker) -> int:
    """How many tokens the model would read, of any length."""
    asker.caller.check_model(service.model.name)
    with renaming(body.chat_names):
        chat = await asker.off_loop(body.chat)
        prompt, _, _ = await chat_prompt(chat, service, asker.caller, any_length=True)
    return len(prompt.token_ids)


async def _asked(body: StandsForChat, service: Service, asker: Asker) -> AskedChat:
    with renaming(body.chat_names):
        chat = await asker.off_loop(body.chat)
        return (await asked_chat(chat, service, asker.caller)).named(body.chat_names)
