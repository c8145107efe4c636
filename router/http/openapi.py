"""`GET /openapi.json`: what this server takes and answers, as OpenAPI 3.1.

Bodies are made from the structs that read them, so they cannot be out of date; answers are described in
`openapi_answers.py`, which tests hold against real ones, as they hold `OPERATIONS` against the routes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

import tandem
from tandem.router.http.batches import BatchBody
from tandem.router.http.openapi_answers import ANSWERS
from tandem.router.requests.bodies import ChatBody, CompletionBody, ContextBody, DetokenizeBody, TokenizeBody
from tandem.router.requests.embedding import EmbeddingsBody
from tandem.router.requests.messages import CountBody, MessagesBody
from tandem.router.requests.responses import ResponsesBody

JSON = "application/json"
EVENTS = "text/event-stream"
SCHEMAS = "#/components/schemas/"

_ERRORS = {
    400: "The request cannot be served as it is; `param` names the field.",
    401: "The key is missing or wrong.",
    403: "The tenant may not do this.",
    404: "There is no such path, model or object.",
    413: "The body is too large.",
    429: "The tenant's limit is reached; `retry-after` says when to come back.",
    500: "A defect; the router's log has more.",
    503: "Too much is going on, or no worker is there; `retry-after` says when to come back.",
    504: "The request ran out of time.",
}
_HEADERS = {
    "explain": ("x-tandem-explain", "1: the answer tells where the request went, and why."),
    "request_id": ("x-request-id", "The request's id, up to 128 letters, digits, `._:-`; else one is made."),
}
_PAGE = {
    "after": ("after", "The id after which the page begins.", {"type": "string"}),
    "limit": ("limit", "Entries of a page.", {"type": "integer", "minimum": 1}),
    "order": ("order", "By time of creation.", {"enum": ["asc", "desc"]}),
    "purpose": ("purpose", "Files of this purpose only.", {"type": "string"}),
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One path and method, as the document lists it."""

    method: str
    path: str
    """Path with `{name}` for what varies."""
    tag: str
    summary: str
    answer: str = ""
    """Name of a schema in `ANSWERS`; empty: not JSON, see `kind`."""
    body: type[msgspec.Struct] | None = None
    events: str = ""
    """Name of the schema of each event, where `stream: true` streams."""
    kind: str = JSON
    """Content type of the answer."""
    query: tuple[str, ...] = ()
    """Keys of `_PAGE`."""
    is_open: bool = False
    """Needs no key."""
    errors: tuple[int, ...] = ()
    """Statuses beside those that all have."""


_TEXT, _STORE, _ABOUT = "Generation", "Files, batches, contexts", "About the server"
_GENERATES = (413, 429, 503, 504)

OPERATIONS = (
    Operation("POST", "/v1/chat/completions", _TEXT, "Answers a conversation", "ChatCompletion", ChatBody,
              "ChatCompletionChunk", errors=_GENERATES),
    Operation("POST", "/v1/completions", _TEXT, "Writes on after a text", "Completion", CompletionBody,
              "Completion", errors=_GENERATES),
    Operation("POST", "/v1/responses", _TEXT, "As OpenAI's responses, without state", "Response", ResponsesBody,
              "Event", errors=_GENERATES),
    Operation("POST", "/v1/responses/input_tokens", _TEXT, "How many tokens such a request has", "InputTokens",
              ResponsesBody, errors=(413,)),
    Operation("POST", "/v1/messages", _TEXT, "As Anthropic's messages", "AnthropicMessage", MessagesBody, "Event",
              errors=_GENERATES),
    Operation("POST", "/v1/messages/count_tokens", _TEXT, "How many tokens such a request has", "CountedTokens",
              CountBody, errors=(413,)),
    Operation("POST", "/v1/embeddings", _TEXT, "Vectors of texts", "Embeddings", EmbeddingsBody, errors=_GENERATES),
    Operation("POST", "/tokenize", _TEXT, "Tokens of a text or a conversation", "Tokens", TokenizeBody, errors=(413,)),
    Operation("POST", "/detokenize", _TEXT, "Text of tokens", "Detokenized", DetokenizeBody, errors=(413,)),
    Operation("GET", "/v1/contexts", _STORE, "Named prompt prefixes of the tenant", "ContextList", errors=(503,)),
    Operation("POST", "/v1/contexts", _STORE, "Computes a prompt prefix and keeps it under a name", "Context",
              ContextBody, errors=(413, 503, 504)),
    Operation("GET", "/v1/contexts/{name}", _STORE, "A named prompt prefix", "Context", errors=(503,)),
    Operation("DELETE", "/v1/contexts/{name}", _STORE, "Forgets a named prompt prefix", "Deleted", errors=(503,)),
    Operation("GET", "/v1/files", _STORE, "The tenant's files", "FileList",
              query=("after", "limit", "order", "purpose")),
    Operation("POST", "/v1/files", _STORE, "Uploads a file of requests", "File", errors=(413, 429)),
    Operation("GET", "/v1/files/{id}", _STORE, "A file", "File"),
    Operation("DELETE", "/v1/files/{id}", _STORE, "Deletes a file", "Deleted"),
    Operation("GET", "/v1/files/{id}/content", _STORE, "A file's content", kind="application/octet-stream"),
    Operation("GET", "/v1/batches", _STORE, "The tenant's batches", "BatchList", query=("after", "limit")),
    Operation("POST", "/v1/batches", _STORE, "Runs a file of requests on what others leave over", "Batch", BatchBody,
              errors=(413, 429)),
    Operation("GET", "/v1/batches/{id}", _STORE, "A batch", "Batch"),
    Operation("POST", "/v1/batches/{id}/cancel", _STORE, "Ends a batch early", "Batch"),
    Operation("GET", "/v1/models", _ABOUT, "The models that the caller may use", "ModelList"),
    Operation("GET", "/v1/models/{id}", _ABOUT, "A model", "Model"),
    Operation("GET", "/v1/usage", _ABOUT, "What the caller's tenant has used; an admin's: of all", "UsageList"),
    Operation("GET", "/v1/requests/{id}", _ABOUT, "Why a request went where it went", "Account"),
    Operation("GET", "/metrics", _ABOUT, "Prometheus metrics of all processes", kind="text/plain"),
    Operation("GET", "/version", _ABOUT, "The version", "Version"),
    Operation("GET", "/healthz", _ABOUT, "200 while the process lives", "Health", is_open=True),
    Operation("GET", "/health", _ABOUT, "As /healthz", "Health", is_open=True),
    Operation("GET", "/readyz", _ABOUT, "200 while requests are taken, else 503", "Ready", is_open=True),
    Operation("GET", "/", _ABOUT, "A page for people", kind="text/html", is_open=True),
    Operation("GET", "/docs", _ABOUT, "This document as a page", kind="text/html", is_open=True),
    Operation("GET", "/openapi.json", _ABOUT, "This document", "OpenApi", is_open=True),
)  # fmt: skip


def document(*, needs_key: bool) -> dict[str, Any]:
    """`needs_key`: whether clients must authenticate here."""
    bodies = list(dict.fromkeys(operation.body for operation in OPERATIONS if operation.body is not None))
    _, schemas = msgspec.json.schema_components(bodies, ref_template=SCHEMAS + "{name}")
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation, needs_key)
    schemes = {
        "key": {"type": "http", "scheme": "bearer", "description": "An API key, or a JWT of the configured issuer."},
        "anthropicKey": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same key."},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tandem",
            "version": tandem.__version__,
            "description": "OpenAI's API, Anthropic's messages, and what vLLM adds. Fields that are not listed are "
            "refused by name, or named in the answer's header `x-tandem-ignored`.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": tag} for tag in (_TEXT, _STORE, _ABOUT)],
        "paths": paths,
        "components": {"schemas": {**schemas, **ANSWERS}, "securitySchemes": schemes},
    }


def _described(operation: Operation, needs_key: bool) -> dict[str, Any]:
    value: dict[str, Any] = {
        "operationId": _identifier(operation),
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": _responses(operation, needs_key),
        "security": [{"key": []}, {"anthropicKey": []}] if needs_key and not operation.is_open else [],
    }
    if parameters := _parameters(operation):
        value["parameters"] = parameters
    if operation.body is not None:
        value["requestBody"] = {"required": True, "content": {JSON: {"schema": _ref(operation.body.__name__)}}}
    elif operation.path == "/v1/files" and operation.method == "POST":
        value["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _ref("Upload")}}}
    return value


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    inside = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in inside
    ]
    for name, text, schema in (_PAGE[key] for key in operation.query):
        found.append({"name": name, "in": "query", "description": text, "schema": schema})
    if operation.errors == _GENERATES:
        for name, text in _HEADERS.values():
            found.append({"name": name, "in": "header", "description": text, "schema": {"type": "string"}})
    return found


def _responses(operation: Operation, needs_key: bool) -> dict[str, Any]:
    schema = _ref(operation.answer) if operation.answer else {"type": "string"}
    content: dict[str, Any] = {operation.kind: {"schema": schema}}
    text = "The answer."
    if operation.events:
        event: dict[str, Any] = {**_ref(operation.events)}
        if operation.events != "Event":
            event = {"anyOf": [event, _ref("ExplainEvent")]}
        content[EVENTS] = {"schema": {"type": "string", "contentMediaType": JSON, "contentSchema": event}}
        text = f"The answer; with `stream: true` server-sent events whose `data` are each a {operation.events}"
        text += ", the last one `[DONE]`." if operation.events != "Event" else "."
    responses: dict[str, Any] = {"200": {"description": text, "content": content}}
    if operation.path == "/readyz":
        responses["503"] = {"description": "No requests are taken now.", "content": content}
    statuses = {*operation.errors} if operation.is_open else {400, 404, 500, *operation.errors}
    if needs_key and not operation.is_open:
        statuses |= {401, 403}
    error = _ref("AnthropicError" if operation.path.startswith("/v1/messages") else "Error")
    for status in sorted(statuses):
        responses[str(status)] = {"description": _ERRORS[status], "content": {JSON: {"schema": error}}}
        if status in (429, 503):
            retry = {"description": "Seconds.", "schema": {"type": "integer"}}
            responses[str(status)]["headers"] = {"retry-after": retry}
    return responses


def _identifier(operation: Operation) -> str:
    words = [word.strip("{}").replace(".", "_") for word in operation.path.split("/") if word and word != "v1"]
    return "_".join([operation.method.lower(), *words])


def _ref(name: str) -> dict[str, str]:
    return {"$ref": SCHEMAS + name}
