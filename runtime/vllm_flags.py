"""Flags of `vllm serve` at `tandem serve`: those that differ in name become ours, the others say what to do here.

docs/from-vllm.md shows them; a test runs what it says. Flags that are the same in both are not listed.
"""

from __future__ import annotations

from collections.abc import Mapping

from tandem.common.settings import Foreign

_ALWAYS = frozenset({"true"})
_NEVER = frozenset({"false"})
_ONE = frozenset({"1"})
_PROXY = "TLS and paths are a proxy's work; put nginx, Caddy or an ingress in front"
_NO_LORA = "adapters are not served; merge them into the weights"
_WHOLE_MODEL = (
    "a model is served whole by each worker; for more throughput start more workers with --decode and --prefill"
)
_NO_REVISION = "download the revision you want, and pass its folder as the model"

VLLM_FLAGS: Mapping[str, Foreign] = {
    # Model
    "tensor_parallel_size": Foreign(fine=_ONE, remedy=_WHOLE_MODEL),
    "pipeline_parallel_size": Foreign(fine=_ONE, remedy=_WHOLE_MODEL),
    "data_parallel_size": Foreign(fine=_ONE, remedy="say how many workers there are with --decode and --prefill"),
    "enable_expert_parallel": Foreign(switch=True, fine=_NEVER, remedy="mixtures of experts are not served"),
    "distributed_executor_backend": Foreign(
        fine=frozenset({"mp", "uni"}),
        remedy="workers are processes of this machine; on others start `tandem prefill` and `tandem decode`",
    ),
    "trust_remote_code": Foreign(
        switch=True, fine=_NEVER, remedy="refused: code in a model folder is never run; see README for what is served"
    ),
    "tokenizer": Foreign(remedy="the tokenizer is read from the model's folder; put it there"),
    "tokenizer_mode": Foreign(fine=frozenset({"auto", "hf"}), remedy="the tokenizer is tokenizer.json of the model"),
    "revision": Foreign(fine=frozenset({"main"}), remedy=_NO_REVISION),
    "tokenizer_revision": Foreign(fine=frozenset({"main"}), remedy=_NO_REVISION),
    "download_dir": Foreign(remedy="set the variable HF_HUB_CACHE to that folder"),
    "hf_token": Foreign(remedy="set the variable HF_TOKEN"),
    "load_format": Foreign(fine=frozenset({"auto", "safetensors"}), remedy="weights are read from safetensors files"),
    "runner": Foreign(
        fine=frozenset({"auto", "generate"}), remedy="leave it out: /v1/embeddings is there with every model"
    ),
    "task": Foreign(
        fine=frozenset({"auto", "generate"}), remedy="leave it out: /v1/embeddings is there with every model"
    ),
    "generation_config": Foreign(fine=frozenset({"auto"}), remedy="defaults come from the model's own file; edit it"),
    "hf_overrides": Foreign(remedy="edit config.json in a copy of the model's folder"),
    "rope_scaling": Foreign(remedy="edit config.json in a copy of the model's folder"),
    "enable_lora": Foreign(switch=True, fine=_NEVER, remedy=_NO_LORA),
    "chat_template": Foreign(remedy="put it into a copy of the model's folder, as chat_template.jinja"),
    "lora_modules": Foreign(remedy=_NO_LORA),
    "limit_mm_per_prompt": Foreign(remedy="images and audio are not served"),
    "speculative_config": Foreign(remedy="speculative decoding is not there yet; leave it out"),
    "dtype": Foreign(becomes="dtype", values={"half": "float16", "float": "float32"}),
    # Memory
    "gpu_memory_utilization": Foreign(
        remedy="say it in bytes with --gpu-memory-bytes, such as 40GiB; without it a worker takes what is free, or, "
        "beside others on its GPU, its part of that"
    ),
    "kv_cache_memory_bytes": Foreign(becomes="kv_cache_bytes"),
    "kv_cache_dtype": Foreign(
        fine=frozenset({"auto"}), remedy="the pool holds KV as --dtype has it; stored KV is encoded by --kv-disk-codec"
    ),
    "swap_space": Foreign(fine=frozenset({"0"}), remedy="host memory for KV is --kv-host-bytes, such as 4GiB"),
    "cpu_offload_gb": Foreign(fine=frozenset({"0"}), remedy="weights stay on one device; --kv-host-bytes is for KV"),
    "kv_offloading_size": Foreign(remedy="host memory for KV is --kv-host-bytes, such as 4GiB; it is on by default"),
    "num_gpu_blocks_override": Foreign(remedy="say it in bytes with --kv-cache-bytes"),
    # Batches and speed
    "enable_chunked_prefill": Foreign(
        switch=True, fine=_ALWAYS, remedy="prompts are always computed in chunks, of --max-num-batched-tokens at most"
    ),
    "enforce_eager": Foreign(switch=True, fine=_ALWAYS | _NEVER),
    "scheduling_policy": Foreign(
        fine=frozenset({"priority"}), remedy="requests with a `priority` always go by it; without one all are alike"
    ),
    "seed": Foreign(remedy="send `seed` with a request; one without it gets a seed of its own"),
    "compilation_config": Foreign(remedy="nothing is compiled at the start; leave it out"),
    "attention_backend": Foreign(remedy="see --attention: auto, torch or triton"),
    # Prefill and decode
    "kv_transfer_config": Foreign(
        remedy="nothing to configure: --prefill 1 --decode 2 starts workers that hand KV over"
    ),
    "kv_events_config": Foreign(remedy="nothing to configure: the router follows the workers' caches"),
    # Front door
    "api_server_count": Foreign(becomes="routers"),
    "uvicorn_log_level": Foreign(becomes="log_level", values={"trace": "debug", "critical": "error"}),
    "disable_log_stats": Foreign(
        switch=True,
        remedy="figures are at /metrics and in `tandem status`; --log-requests false keeps them out of the log",
    ),
    "enable_log_requests": Foreign(switch=True, becomes="log_requests"),
    "disable_log_requests": Foreign(switch=True, becomes="log_requests", values={"true": "false", "false": "true"}),
    "allow_credentials": Foreign(
        switch=True, fine=_NEVER, remedy="pages send their key in a header; cookies are never asked for"
    ),
    "allowed_methods": Foreign(fine=frozenset({'["*"]'}), remedy="pages may send what a path takes"),
    "allowed_headers": Foreign(fine=frozenset({'["*"]'}), remedy="pages may send any header"),
    "disable_uvicorn_access_log": Foreign(switch=True, fine=_ALWAYS, remedy="there is no access log of uvicorn's"),
    "disable_frontend_multiprocessing": Foreign(
        switch=True, fine=_NEVER, remedy="the router is a process of its own; --routers says how many"
    ),
    "ssl_keyfile": Foreign(remedy=_PROXY),
    "ssl_certfile": Foreign(remedy=_PROXY),
    "ssl_ca_certs": Foreign(remedy=_PROXY),
    "root_path": Foreign(remedy=_PROXY),
    "middleware": Foreign(remedy=_PROXY),
    "uds": Foreign(remedy="the server listens on TCP: --host 127.0.0.1 keeps it on this machine"),
    "response_role": Foreign(fine=frozenset({"assistant"}), remedy="answers have the role assistant"),
    "max_logprobs": Foreign(fine=frozenset({"20"}), remedy="20 at most, as OpenAI has it"),
    "enable_request_id_headers": Foreign(switch=True, fine=_ALWAYS, remedy="each answer has an x-request-id"),
    "enable_prompt_tokens_details": Foreign(switch=True, fine=_ALWAYS, remedy="`usage` always says what was cached"),
    "enable_force_include_usage": Foreign(
        switch=True, fine=_NEVER, remedy="clients ask for it with stream_options.include_usage"
    ),
    # Tools and constraints
    "enable_auto_tool_choice": Foreign(switch=True, fine=_ALWAYS, remedy="send tool_choice: none where it is unwanted"),
    "tool_call_parser": Foreign(becomes="tool_format"),
    "structured_outputs_config": Foreign(remedy="there is one back-end, llguidance; leave it out"),
    "guided_decoding_backend": Foreign(
        fine=frozenset({"auto", "guidance"}), remedy="there is one back-end, llguidance; leave it out"
    ),
    "reasoning_parser": Foreign(remedy="what a model thinks is text of its answer; leave it out"),
    # Before, `tandem serve` itself had these.
    "roles": Foreign(fine=frozenset({"disaggregated"}), remedy="--prefill 0 is what `unified` was"),
}

SHORT_FLAGS = {
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "dp": "data_parallel_size",
    "q": "quantization",
    "asc": "api_server_count",
}
