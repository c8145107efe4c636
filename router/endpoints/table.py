"""The endpoints that generate, by path: how the JSON of each is read, and what it asks for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from tandem.router.endpoints.plan import Asker, Plan
from tandem.router.endpoints.plans import (
    plan_chat,
    plan_completion,
    plan_embeddings,
    plan_messages,
    plan_responses,
)
from tandem.router.requests.bodies import ChatBody, CompletionBody
from tandem.router.requests.embedding import EmbeddingsBody
from tandem.router.requests.messages import MessagesBody
from tandem.router.requests.responses import ResponsesBody
from tandem.router.service import Service
from tandem.router.web.request_fields import BodyReader


class Body(Protocol):
    """What all bodies have."""

    @property
    def request_id(self) -> str | None:
        """The request's id, where the client names it."""


B = TypeVar("B", bound=Body)


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[B]):
    """One of the API's POST endpoints that go to the workers."""

    reader: BodyReader[B]
    plan: Callable[[B, Service, Asker], Awaitable[Plan]]
    """What a body asks for. Raises TandemError naming the field."""
    ignored: Callable[[B], list[str]] = lambda body: []
    """What of a body has no effect, beside whole fields."""


ENDPOINTS: dict[str, Endpoint[Any]] = {
    "/v1/completions": Endpoint(BodyReader(CompletionBody), plan_completion),
    "/v1/chat/completions": Endpoint(BodyReader(ChatBody), plan_chat),
    "/v1/embeddings": Endpoint(BodyReader(EmbeddingsBody), plan_embeddings),
    "/v1/responses": Endpoint(BodyReader(ResponsesBody), plan_responses, ResponsesBody.ignored),
    "/v1/messages": Endpoint(BodyReader(MessagesBody), plan_messages, MessagesBody.ignored),
}
