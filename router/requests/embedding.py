"""What an embeddings body asks of the workers, and vectors from their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from tandem.common.errors import TandemError
from tandem.common.sampling import SamplingParams
from tandem.proto import worker_pb2
from tandem.router.calls.choice import Choice, ChoiceSpec
from tandem.router.fields.sampling import check_salt, in_range, invalid, output_tokens
from tandem.router.fields.strict import Fields
from tandem.router.fields.truncation import Side, truncation_of
from tandem.router.placing.dispatch import SequenceSpec
from tandem.router.service import Service
from tandem.router.tenants.caller import Caller
from tandem.router.text.served_model import Prompt

MAX_INPUTS = 2048
"""OpenAI's."""
AT_ONCE = 64
"""Inputs of one request that are on the workers at a time."""

Vector = npt.NDArray[np.float32]

_POOLING = {"mean": worker_pb2.POOLING_MEAN, "last": worker_pb2.POOLING_LAST}


class EmbeddingsBody(Fields):
    """Body of POST /v1/embeddings."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    pooling: Literal["mean", "last"] = "last"
    """What the vector is made of: the mean of the last layer's normalised hidden states, or that of the last token."""
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Side | None = None


async def embedding_groups(body: EmbeddingsBody, service: Service, caller: Caller) -> list[list[ChoiceSpec]]:
    """Groups of inputs, each to be run as one call. Raises TandemError naming the field."""
    service.model.check_name(body.model)
    in_range("priority", body.priority, -(2**31), 2**31 - 1)
    check_salt(body.cache_salt)
    prompts = await _prompts(body, service, caller)
    specs = [_spec(prompt, body, service, caller) for prompt in prompts]
    return [specs[start : start + AT_ONCE] for start in range(0, len(specs), AT_ONCE)]


def vectors(choices: Sequence[Choice], dimensions: int | None) -> list[Vector]:
    """Vectors of length 1, as OpenAI's. Raises TandemError where `dimensions` were asked for that they have not."""
    found = [_unit(choice.embedding) for choice in choices]
    for vector in found:
        if dimensions not in (None, len(vector)):
            raise invalid("dimensions", f"must be left out or {len(vector)}: this model's vectors are not cut")
    return found


async def _prompts(body: EmbeddingsBody, service: Service, caller: Caller) -> list[Prompt]:
    """The four forms: a text, texts, token ids, lists of token ids."""
    model, given = service.model, body.input
    truncation = truncation_of(
        body.truncate_prompt_tokens,
        body.truncation_side,
        output_tokens=0,
        max_model_len=service.max_model_len,
        default="right",
    )

    async def of_text(text: str, param: str) -> Prompt:
        """The prompt of one text. Raises TandemError naming `param`."""
        special = body.add_special_tokens is not False
        return await model.text_prompt(
            text, param=param, caller=caller, add_special_tokens=special, truncation=truncation
        )

    if isinstance(given, str):
        return [await of_text(given, "input")]
    if not given:
        raise invalid("input", "must not be empty")
    if isinstance(given[0], int):
        kept = given if truncation is None else truncation.cut(given)
        model.check_length(len(kept), "input")
        ids = [item for item in kept if isinstance(item, int)]
        if len(ids) == len(kept):
            return [model.token_prompt(ids, param="input")]
    if len(given) > MAX_INPUTS:
        raise invalid("input", f"may hold at most {MAX_INPUTS} inputs, got {len(given)}")
    if any(isinstance(item, int) for item in given):
        raise invalid("input", "must be a string, strings, token ids, or lists of token ids, not a mixture")
    prompts: list[Prompt] = []
    for index, item in enumerate(given):
        if isinstance(item, str):
            prompts.append(await of_text(item, f"input[{index}]"))
            await asyncio.sleep(0)  # each may take a millisecond
        elif isinstance(item, list):
            prompts.append(model.token_prompt(item, param=f"input[{index}]", truncation=truncation))
    return prompts


def _spec(prompt: Prompt, body: EmbeddingsBody, service: Service, caller: Caller) -> ChoiceSpec:
    max_tokens = output_tokens(
        0,
        default=None,
        prompt_tokens=len(prompt.token_ids),
        max_model_len=service.max_model_len,
        param="input",
        prompt_param="input",
        least=0,
    )
    return ChoiceSpec(
        SequenceSpec(
            prompt,
            SamplingParams(max_tokens=max_tokens, temperature=0.0),
            caller,
            body.cache_salt or "",
            caller.priority(body.priority),
            pooling=_POOLING[body.pooling],
        ),
        no_output=True,
    )


def _unit(embedding: bytes) -> Vector:
    """The worker's vector with length 1."""
    vector = np.frombuffer(embedding, "<f4")
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or not length:
        raise TandemError("internal", "the worker's embedding of this input is empty or not finite")
    unit: Vector = np.divide(vector, np.float32(length), dtype=np.float32)
    return unit
