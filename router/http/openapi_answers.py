"""What answers look like, for `openapi.py`: JSON schemas by name. Tests hold them against real answers."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
ANYTHING: Schema = {}


def one(properties: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object that has all `properties` and may have those that are `optional`."""
    return {"type": "object", "properties": {**properties, **(optional or {})}, "required": list(properties)}


def many(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def exactly(value: Any) -> Schema:
    return {"const": value}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def by_name(schema: Schema) -> Schema:
    return {"type": "object", "additionalProperties": schema}


def listed(name: str) -> Schema:
    return one({"object": exactly("list"), "data": many(ref(name))})


def page(name: str) -> Schema:
    rest: dict[str, Schema] = {"first_id": or_null(TEXT), "last_id": or_null(TEXT), "has_more": FLAG}
    return one({"object": exactly("list"), "data": many(ref(name)), **rest})


_HEAD = {"id": TEXT, "created": COUNT, "model": TEXT, "system_fingerprint": or_null(TEXT)}
_FINISH = or_null({"enum": ["stop", "length", "tool_calls"]})
_CHOICE = {"index": COUNT, "finish_reason": _FINISH}
_IDS = {"token_ids": or_null(many(COUNT)), "prompt_token_ids": or_null(many(COUNT)), "stop_reason": ANYTHING}
_CALL = one(
    {"function": one({}, {"name": TEXT, "arguments": TEXT})}, {"id": TEXT, "type": exactly("function"), "index": COUNT}
)
_SPOKEN = {
    "role": exactly("assistant"),
    "content": or_null(TEXT),
    "refusal": or_null(TEXT),
    "tool_calls": or_null(many(_CALL)),
}
_EXTRAS = {"usage": or_null(ref("Usage")), "explain": ref("Account"), "prompt_logprobs": ANYTHING}
_USED = one({"input_tokens": COUNT, "output_tokens": COUNT})

ANSWERS: dict[str, Schema] = {
    "Error": one({"error": one({"message": TEXT, "type": TEXT, "param": or_null(TEXT), "code": TEXT})}),
    "AnthropicError": one(
        {"type": exactly("error"), "error": one({"type": TEXT, "message": TEXT}), "request_id": TEXT},
    ),
    "Usage": one(
        {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT, "prompt_tokens_details": ANYTHING},
        {"completion_tokens_details": ANYTHING},
    ),
    "Completion": one(
        {
            **_HEAD,
            "object": exactly("text_completion"),
            "choices": many(
                one({**_CHOICE, "text": TEXT, "logprobs": ANYTHING}, {**_IDS, "prompt_logprobs": ANYTHING})
            ),
        },
        _EXTRAS,
    ),
    "ChatCompletion": one(
        {
            **_HEAD,
            "object": exactly("chat.completion"),
            "choices": many(one({**_CHOICE, "message": one({"role": TEXT}, _SPOKEN), "logprobs": ANYTHING}, _IDS)),
        },
        _EXTRAS,
    ),
    "ChatCompletionChunk": one(
        {
            **_HEAD,
            "object": exactly("chat.completion.chunk"),
            "choices": many(one({**_CHOICE, "delta": one({}, _SPOKEN)}, {"logprobs": ANYTHING, **_IDS})),
        },
        _EXTRAS,
    ),
    "ExplainEvent": one(
        {"object": exactly("tandem.explain"), "choices": many(ANYTHING), "explain": ref("Account")}, {"type": TEXT}
    ),
    "Event": one({"type": TEXT}),
    "Response": one(
        {
            "id": TEXT,
            "object": exactly("response"),
            "created_at": COUNT,
            "status": TEXT,
            "model": TEXT,
            "output": many(one({"type": {"enum": ["message", "function_call"]}})),
            "usage": or_null(one({"input_tokens": COUNT, "output_tokens": COUNT, "total_tokens": COUNT})),
            "error": ANYTHING,
            "incomplete_details": ANYTHING,
        },
    ),
    "InputTokens": one({"object": exactly("response.input_tokens"), "input_tokens": COUNT}),
    "CountedTokens": one({"input_tokens": COUNT}),
    "AnthropicMessage": one(
        {
            "id": TEXT,
            "type": exactly("message"),
            "role": exactly("assistant"),
            "model": TEXT,
            "content": many(one({"type": {"enum": ["text", "tool_use"]}})),
            "stop_reason": or_null(TEXT),
            "stop_sequence": or_null(TEXT),
            "usage": _USED,
        },
        {"explain": ref("Account")},
    ),
    "Embeddings": one(
        {
            "object": exactly("list"),
            "data": many(
                one({"object": exactly("embedding"), "index": COUNT, "embedding": {"anyOf": [many(NUMBER), TEXT]}})
            ),
            "model": TEXT,
            "usage": one({"prompt_tokens": COUNT, "total_tokens": COUNT}),
        },
        {"explain": ref("Account")},
    ),
    "Tokens": one(
        {"count": COUNT, "max_model_len": COUNT, "tokens": many(COUNT), "token_strs": or_null(many(TEXT))},
    ),
    "Detokenized": one({"prompt": TEXT}),
    "Context": one(
        {
            "object": exactly("context"),
            "name": TEXT,
            "version": COUNT,
            "tokens": COUNT,
            "resident_tokens": COUNT,
            "created_at": COUNT,
            "expires_at": COUNT,
        },
    ),
    "ContextList": listed("Context"),
    "Deleted": one({"object": TEXT, "deleted": FLAG}, {"id": TEXT, "name": TEXT}),
    "Upload": one(
        {"purpose": exactly("batch"), "file": {"type": "string", "contentMediaType": "application/octet-stream"}},
        {"expires_after[anchor]": exactly("created_at"), "expires_after[seconds]": COUNT},
    ),
    "File": one(
        {
            "id": TEXT,
            "object": exactly("file"),
            "bytes": COUNT,
            "created_at": COUNT,
            "expires_at": or_null(COUNT),
            "filename": TEXT,
            "purpose": TEXT,
            "status": TEXT,
        },
    ),
    "FileList": page("File"),
    "Batch": one(
        {
            "id": TEXT,
            "object": exactly("batch"),
            "endpoint": TEXT,
            "errors": ANYTHING,
            "input_file_id": TEXT,
            "completion_window": TEXT,
            "status": TEXT,
            "output_file_id": or_null(TEXT),
            "error_file_id": or_null(TEXT),
            **{f"{event}_at": or_null(COUNT) for event in ("in_progress", "expires", "finalizing", "completed")},
            **{f"{event}_at": or_null(COUNT) for event in ("failed", "expired", "cancelling", "cancelled")},
            "created_at": COUNT,
            "request_counts": one({"total": COUNT, "completed": COUNT, "failed": COUNT}),
            "metadata": or_null(by_name(TEXT)),
        },
    ),
    "BatchList": page("Batch"),
    "Model": one(
        {"id": TEXT},
        {
            "object": exactly("model"),
            "created": COUNT,
            "owned_by": TEXT,
            "root": TEXT,
            "parent": or_null(TEXT),
            "max_model_len": COUNT,
        },
    ),
    "ModelList": listed("Model"),
    "TenantUsage": one(
        {
            "tenant": TEXT,
            "since": ANYTHING,
            "requests": COUNT,
            "failed": ANYTHING,
            "rejected": ANYTHING,
            "prompt_tokens": COUNT,
            "prompt_tokens_details": ANYTHING,
            "completion_tokens": COUNT,
            "total_tokens": COUNT,
            "hours": ANYTHING,
        },
    ),
    "UsageList": listed("TenantUsage"),
    "Account": one(
        {
            "id": TEXT,
            "tenant": TEXT,
            "arrived_at": NUMBER,
            "outcome": TEXT,
            "prompt_tokens": COUNT,
            "cached_tokens": COUNT,
            "output_tokens": COUNT,
            "choices": COUNT,
            "queued_s": or_null(NUMBER),
            "finished_s": or_null(NUMBER),
            "attempts": many(one({"choice": COUNT, "attempt": COUNT, "decode": TEXT, "prefill": or_null(TEXT)})),
        },
    ),
    "Version": one({"version": TEXT}),
    "Health": one({"status": exactly("ok")}),
    "Ready": one(
        {
            "status": {"enum": ["ready", "not ready"]},
            "draining": FLAG,
            "workers": many(
                one(
                    {
                        "role": TEXT,
                        "target": TEXT,
                        "worker": or_null(TEXT),
                        "connected": FLAG,
                        "draining": FLAG,
                        "problem": or_null(TEXT),
                        "row_invariant": FLAG,
                    }
                )
            ),
            "problems": many(TEXT),
        },
    ),
    "OpenApi": one({"openapi": TEXT, **dict.fromkeys(("info", "tags", "paths", "components"), ANYTHING)}),
}
