"""What becomes of a request before it is queued: checked, hashed, given a seed."""

from __future__ import annotations

import random

from tandem.common.errors import TandemError
from tandem.common.sampling import check_ids
from tandem.engine.model.loader import LoadedModel
from tandem.engine.request import EngineRequest, Pooling
from tandem.engine.schedule.sequence import Sequence
from tandem.engine.settings import EngineConfig
from tandem.kvstore.identity import prefix_chain, request_namespace


class Intake:
    """Makes a `Sequence` of each request that can be served. Engine thread only."""

    def __init__(self, config: EngineConfig, loaded: LoadedModel, max_model_len: int) -> None:
        self._block_size = config.block_size
        self._caching = config.enable_prefix_caching
        self._namespace = loaded.namespace
        self.vocab_size = loaded.config.vocab_size
        self._eos_ids = frozenset(loaded.config.eos_token_ids)
        self._max_model_len = max_model_len

    def sequence(self, request: EngineRequest, submitted: float) -> Sequence:
        """The state of `request`, which came at time.monotonic() `submitted`. Raises TandemError naming the field for
        what can never be served, and for token ids that would break the step they are part of."""
        self._validate(request)
        params = request.sampling
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_ids)
        params.check_leaves_a_token(stop_ids, self.vocab_size)
        root = request_namespace(self._namespace, request.cache_salt)
        return Sequence(
            request,
            root=root,
            chain=prefix_chain(root, request.token_ids, self._block_size) if self._caching else [],
            seed=random.getrandbits(64) if params.seed is None else params.seed,
            stop_ids=stop_ids,
            max_model_len=self._max_model_len,
            submitted=submitted,
        )

    def _validate(self, request: EngineRequest) -> None:
        prompt, output, params = request.prompt_token_ids, request.output_token_ids, request.sampling
        params.check(self.vocab_size)
        if not prompt:
            raise TandemError("invalid_request", "the prompt is empty", param="prompt")
        pools = request.pooling is not Pooling.NONE
        if pools and (request.kv_export or request.kv_import or output or params.constraint):
            raise TandemError(
                "invalid_request", "pooling goes without hand-over, output_token_ids and constraint", param="pooling"
            )
        if pools and params.prompt_logprobs is not None:
            raise TandemError("invalid_request", "prompt_logprobs cannot be had with pooling", param="prompt_logprobs")
        if len(prompt) + (0 if pools else min(params.max_tokens, 1)) > self._max_model_len:
            raise TandemError(
                "context_length_exceeded",
                f"the prompt has {len(prompt)} tokens; the maximum context length is {self._max_model_len} tokens, "
                "output included",
                param="prompt",
            )
        if output and (len(output) >= params.max_tokens or len(prompt) + len(output) >= self._max_model_len):
            raise TandemError(
                "invalid_request",
                f"output_token_ids holds {len(output)} tokens: nothing is left to generate with max_tokens "
                f"{params.max_tokens} and a context of {self._max_model_len} tokens",
                param="output_token_ids",
            )
        for name, ids in (("prompt", prompt), ("output_token_ids", output)):
            check_ids(name, ids, self.vocab_size)
