"""From a completions body to what workers get: prompts, limits, sampling. HTTP and gRPC share it."""

from __future__ import annotations

from tandem.router.caller import Caller
from tandem.router.choice import ChoiceSpec, with_seeds
from tandem.router.constraints import CheckedConstraint, constraint_of
from tandem.router.dispatch import SequenceSpec
from tandem.router.http_types import MAX_CHOICES, CompletionBody
from tandem.router.named_contexts import recipe
from tandem.router.sampling_fields import MAX_LOGPROBS, in_range, invalid, output_tokens, sampling_params, stop_strings
from tandem.router.served_model import Prompt
from tandem.router.service import Service

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


async def plan_completion(body: CompletionBody, service: Service, caller: Caller) -> list[ChoiceSpec]:
    """Prompts x n. Raises TandemError naming the field."""
    service.model.check_name(body.model)
    body.check()
    in_range("logprobs", body.logprobs, 0, MAX_LOGPROBS)
    n = body.n or 1
    prompts = await _prompts_after_context(body, service, caller)
    if len(prompts) * n > MAX_CHOICES:
        raise invalid("prompt", f"x n may make at most {MAX_CHOICES} choices, got {len(prompts) * n}")
    checked = await constraint_of(body, service.model.text)
    choices: list[ChoiceSpec] = []
    for prompt in prompts:
        choices += with_seeds(_spec(body, prompt, service, caller, checked), n)
    return choices


async def _prompts_after_context(body: CompletionBody, service: Service, caller: Caller) -> list[Prompt]:
    if body.context is None:
        return await _prompts(body.prompt, service)
    before = await recipe(service, caller, body.context)
    prompts = await _prompts(body.prompt, service, add_special_tokens=False)  # the context begins the sequence
    return [Prompt([*before, *prompt.token_ids]) for prompt in prompts]


async def _prompts(
    given: str | list[str | int | list[int]], service: Service, *, add_special_tokens: bool = True
) -> list[Prompt]:
    """The four forms: a text, texts, token ids, lists of token ids."""
    model = service.model
    if isinstance(given, str):
        return [await model.text_prompt(given, param="prompt", add_special_tokens=add_special_tokens)]
    if not given:
        raise invalid("prompt", "must not be empty")
    texts = [item for item in given if isinstance(item, str)]
    ids = [item for item in given if isinstance(item, int)]
    lists = [item for item in given if isinstance(item, list)]
    if len(ids) == len(given):
        return [model.token_prompt(ids, param="prompt")]
    if len(given) > MAX_CHOICES:
        raise invalid("prompt", f"may hold at most {MAX_CHOICES} prompts, got {len(given)}")
    if len(texts) == len(given):
        return [
            await model.text_prompt(text, param=f"prompt[{i}]", add_special_tokens=add_special_tokens)
            for i, text in enumerate(texts)
        ]
    if len(lists) == len(given):
        return [model.token_prompt(entry, param=f"prompt[{i}]") for i, entry in enumerate(lists)]
    raise invalid("prompt", "must be a string, strings, token ids, or lists of token ids, not a mixture")


def _spec(
    body: CompletionBody, prompt: Prompt, service: Service, caller: Caller, checked: CheckedConstraint | None
) -> ChoiceSpec:
    score_only = bool(body.echo) and body.max_tokens == 0
    max_tokens = output_tokens(
        1 if score_only else body.max_tokens,
        default=DEFAULT_MAX_TOKENS,
        prompt_tokens=len(prompt.token_ids),
        max_model_len=service.max_model_len,
        param="max_tokens",
        prompt_param="prompt",
    )
    sampling = sampling_params(
        body,
        defaults=service.model.defaults,
        vocab_size=service.model.vocab_size,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        constraint=checked.constraint if checked else None,
    )
    return ChoiceSpec(
        SequenceSpec(prompt, sampling, caller, body.cache_salt or "", caller.priority(body.priority)),
        stop=stop_strings(body),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        keep_tokens=bool(body.return_token_ids) or sampling.logprobs is not None,
        no_output=score_only,
        ignored=checked.ignored if checked else (),
    )
