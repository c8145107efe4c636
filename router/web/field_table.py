"""Fields that clients send and that have no place in our structs: refused by name, or tolerated.

One row per field, under the name of the struct that it would be a field of; a struct has the rows of those that it
derives from, too. `docs/api-fields.md` is made of this and of the structs. See `request_fields.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Refused:
    """It would change the answer: a 400. Nulls, false and what is empty ask for nothing and pass."""

    why: str
    """The reason, and what to use instead; ends the sentence "FIELD is not supported: ..."."""
    fine: tuple[Any, ...] = ()
    """Values that ask for what is done anyway."""


@dataclass(frozen=True, slots=True)
class Tolerated:
    """It has no effect, and clients send it as a matter of course: told in the header `x-tandem-ignored`."""

    why: str
    fine: tuple[Any, ...] = ()
    """Values that ask for what is done anyway: not told."""


Other = Refused | Tolerated

_TENANT = Tolerated("who asks is known by the API key")
_STORED = Tolerated("answers are not stored")
_PROMPT_CACHE = Tolerated("prefixes are cached without being told; cache_salt keeps caches apart")
_TIER = Tolerated("there is one tier; priority orders requests", ("auto", "default", "standard_only"))
_MODERATION = Tolerated("nothing is moderated")
_THINKING = Tolerated("what a model thinks is text of its answer")
_HISTORY = Tolerated("templates are not told of it")
_TEXT_ONLY = Refused("models here read and write text only")
_TEMPLATE = Refused("the model's own chat template is used; chat_template_kwargs sets its variables")
_NO_STATE = Refused("nothing is kept here; send the whole conversation")
_OWN_TRANSFER = Refused("KV travels between workers by itself")
_TOP_LEVEL = Refused("send the fields that it holds at the top level of the body")
_MAX_TOKENS = Refused("use max_tokens")
_MAX_OUTPUT_TOKENS = Refused("use max_output_tokens")
_STOP = Refused("use stop")
_SERVER_TOOLS = Refused("no tool runs on the server; give functions as tools, and run them")
_TOOL_HINTS: dict[str, Other] = {
    "cache_control": _PROMPT_CACHE,
    "defer_loading": Tolerated("all tools are told to the model at once"),
    "allowed_callers": Tolerated("the model is the only caller"),
    "output_schema": Tolerated("what a tool returns is text for the model"),
    "eager_input_streaming": Tolerated("arguments are streamed as they come"),
    "input_examples": Tolerated("templates are not told of it"),
    "async": Tolerated("whoever runs the tools decides when"),
}
_GENERATION: dict[str, Other] = {
    "user": _TENANT,
    "safety_identifier": _TENANT,
    "session_id": Tolerated("requests are placed by what is cached of their prompts"),
    "store": _STORED,
    "metadata": _STORED,
    "service_tier": _TIER,
    "moderation": _MODERATION,
    "prompt_cache_key": _PROMPT_CACHE,
    "prompt_cache_options": _PROMPT_CACHE,
    "prompt_cache_retention": _PROMPT_CACHE,
    "spaces_between_special_tokens": Tolerated("special tokens are written without spaces between them"),
    "guided_decoding_backend": Tolerated("there is one"),
    "stream_interval": Tolerated("tokens are sent as they come", (1,)),
    "do_sample": Tolerated("temperature decides: 0 is greedy"),
    "return_mm_kwargs": Tolerated("there are no images or sounds", (True,)),
    "return_token_offsets": Tolerated("text_offset of logprobs has them"),
    "use_beam_search": Refused("use n, or temperature 0"),
    "length_penalty": Refused("it belongs to beam search; use max_tokens", (1,)),
    "early_stopping": Refused("it belongs to beam search"),
    "logits_processors": Refused("use logit_bias, allowed_token_ids or bad_words"),
    "logprob_token_ids": Refused("use logprobs"),
    "repetition_detection": Refused("use repetition_penalty, or stop reading: a client that leaves ends its request"),
    "thinking_token_budget": Refused("use max_tokens", (-1,)),
    "watermarking": Refused("there is no watermark"),
    "vllm_xargs": Refused("there are no extensions that would read it"),
    "kv_transfer_params": _OWN_TRANSFER,
    "ec_transfer_params": _OWN_TRANSFER,
    "routed_experts_prompt_start": Refused("experts are not told of"),
    "mm_processor_kwargs": _TEXT_ONLY,
    "media_io_kwargs": _TEXT_ONLY,
    "prompt_embeds": Refused("send text or token ids"),
    "extra_body": _TOP_LEVEL,
    "extra_args": _TOP_LEVEL,
    "max_new_tokens": _MAX_TOKENS,
    "max_length": _MAX_TOKENS,
    "n_predict": _MAX_TOKENS,
    "num_predict": _MAX_TOKENS,
    "stop_sequences": _STOP,
    "stop_words": _STOP,
    "repeat_penalty": Refused("use repetition_penalty"),
    "random_seed": Refused("use seed"),
}

OTHERS: dict[str, dict[str, Other]] = {
    "GenerationBody": _GENERATION,
    "CompletionBody": {
        "suffix": Refused("models here write on at the end"),
        "messages": Tolerated("prompt is read; chats go to /v1/chat/completions"),
        "max_completion_tokens": _MAX_TOKENS,
        "top_logprobs": Refused("use logprobs, a number here"),
        "tools": Refused("use /v1/chat/completions"),
    },
    "ChatBody": {
        "verbosity": Tolerated("models here are not told of it"),
        "prediction": Tolerated("it is a hint for speed only"),
        "reasoning": _THINKING,
        "include_reasoning": Tolerated("what a model thinks is text of its answer", (True,)),
        "functions": Refused("use tools and tool_choice"),
        "function_call": Refused("use tools and tool_choice", ("none", "auto")),
        "audio": _TEXT_ONLY,
        "modalities": Refused("models here write text only", (["text"],)),
        "web_search_options": _SERVER_TOOLS,
        "chat_template": _TEMPLATE,
        "context": Refused("use /v1/completions"),
        "prompt": Tolerated("messages are read; texts go to /v1/completions"),
        "max_output_tokens": Refused("use max_completion_tokens"),
    },
    "StreamOptions": {
        "include_obfuscation": Tolerated("events are not padded"),
    },
    "Message": {
        "refusal": _HISTORY,
        "annotations": _HISTORY,
        "reasoning": _HISTORY,
        "reasoning_content": _HISTORY,
        "thinking_blocks": _HISTORY,
        "provider_specific_fields": _HISTORY,
        "cache_control": _PROMPT_CACHE,
        "audio": _TEXT_ONLY,
        "function_call": Refused("use tool_calls"),
        "prefix": Refused("use continue_final_message"),
        "partial": Refused("use continue_final_message"),
    },
    "ContentPart": {
        "cache_control": _PROMPT_CACHE,
        "prompt_cache_breakpoint": _PROMPT_CACHE,
        "annotations": _HISTORY,
        "logprobs": _HISTORY,
    },
    "ToolCall": {
        "index": Tolerated("calls are in the order of the list"),
        "provider_specific_fields": _HISTORY,
        "extra_content": _HISTORY,
    },
    "Tool": _TOOL_HINTS,
    "FunctionSpec": _TOOL_HINTS,
    "EmbeddingsBody": {
        "user": _TENANT,
        "metadata": _STORED,
        "service_tier": _TIER,
        "input_type": Tolerated("texts are embedded as they are; write a prefix into them where the model wants one"),
        "mm_processor_kwargs": _TEXT_ONLY,
        "messages": Refused("use input, with the text that the template would make"),
        "embed_dtype": Refused("vectors are float32", ("float32",)),
        "endianness": Refused("base64 holds little-endian numbers", ("native", "little")),
        "normalize": Refused("vectors always have length 1", (True,)),
        "use_activation": Refused("vectors always have length 1", (True,)),
    },
    "TokenizeBody": {
        "chat_template": _TEMPLATE,
        "mm_processor_kwargs": _TEXT_ONLY,
        "media_io_kwargs": _TEXT_ONLY,
    },
    "ResponsesBody": {
        "store": _STORED,
        "service_tier": _TIER,
        "safety_identifier": _TENANT,
        "moderation": _MODERATION,
        "prompt_cache_key": _PROMPT_CACHE,
        "prompt_cache_options": _PROMPT_CACHE,
        "prompt_cache_retention": _PROMPT_CACHE,
        "reasoning": _THINKING,
        "stream_options": Tolerated("events are not padded"),
        "max_tool_calls": Tolerated("it counts tools that run on the server; there are none"),
        "access_programs": Tolerated("there are none"),
        "truncation": Refused("shorten the input", ("disabled",)),
        "previous_response_id": _NO_STATE,
        "conversation": _NO_STATE,
        "background": Refused("use /v1/batches"),
        "prompt": Refused("there are no stored prompts; use instructions and input"),
        "context_management": _NO_STATE,
        "image": _TEXT_ONLY,
        "messages": Refused("use input"),
        "max_tokens": _MAX_OUTPUT_TOKENS,
        "max_completion_tokens": _MAX_OUTPUT_TOKENS,
        "response_format": Refused("use text.format"),
        "n": Refused("there is one answer; use /v1/chat/completions", (1,)),
    },
    "InputItem": {
        "id": _HISTORY,
        "status": _HISTORY,
        "phase": _HISTORY,
        "summary": _HISTORY,
        "encrypted_content": _HISTORY,
        "caller": _HISTORY,
        "namespace": _HISTORY,
    },
    "FunctionTool": _TOOL_HINTS,
    "TextConfig": {
        "verbosity": Tolerated("models here are not told of it"),
    },
    "CountBody": {
        "metadata": _TENANT,
        "service_tier": _TIER,
        "thinking": Tolerated("what a model thinks is text of its answer", ({"type": "disabled"},)),
        "cache_control": _PROMPT_CACHE,
        "context_management": Tolerated("the conversation is read as it was sent"),
        "speed": _TIER,
        "inference_geo": Tolerated("there is one place"),
        "diagnostics": _STORED,
        "betas": Tolerated("there are none"),
        "user_profile_id": _TENANT,
        "workspace_id": _TENANT,
        "container": _SERVER_TOOLS,
        "mcp_servers": _SERVER_TOOLS,
        "max_completion_tokens": _MAX_TOKENS,
        "stop": Refused("use stop_sequences"),
    },
    "Block": {
        "cache_control": _PROMPT_CACHE,
        "citations": _HISTORY,
        "is_error": Tolerated("the model reads the result as it is"),
        "caller": _HISTORY,
        "toolset_name": _HISTORY,
        "thinking": _HISTORY,
        "signature": _HISTORY,
        "data": _HISTORY,
    },
    "AnthropicTool": _TOOL_HINTS,
    "OutputConfig": {
        "effort": Tolerated("models here are not told of it"),
    },
}
