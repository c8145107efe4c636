"""What a chat body asks of the workers: template, tools, limits, sampling. Shared by the three chat APIs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tandem.common.sampling import MAX_LOGPROBS
from tandem.router.asks.bad_words import bad_word_tokens
from tandem.router.asks.constraints import Asking, CheckedConstraint, constraint_of
from tandem.router.asks.tool_choice import ToolUse, tool_use
from tandem.router.calls.choice import ChoiceSpec
from tandem.router.fields.sampling import in_range, invalid, output_tokens, sampling_params, stop_strings
from tandem.router.fields.truncation import truncation_of
from tandem.router.placing.dispatch import SequenceSpec
from tandem.router.requests.bodies import ChatBody
from tandem.router.service import Service
from tandem.router.tenants.caller import Caller
from tandem.router.text.messages import template_variables
from tandem.router.text.served_model import Prompt, ServedModel
from tandem.router.tools.events import PlainText, ToolParser
from tandem.router.web.errors import renamed


@dataclass(frozen=True, slots=True)
class AskedChat:
    """What one choice of a chat is."""

    spec: ChoiceSpec
    tools: ToolUse | None
    """None: the answer is text, whatever it looks like."""

    def named(self, names: Sequence[tuple[str, str]]) -> AskedChat:
        """The same with the names that another API has for what is ignored, see `renaming`."""
        ignored = tuple(renamed(field, names) for field in self.spec.ignored)
        return replace(self, spec=replace(self.spec, ignored=ignored))

    def parser(self) -> ToolParser:
        return PlainText() if self.tools is None else self.tools.parser()


async def chat_prompt(
    body: ChatBody, service: Service, caller: Caller, *, any_length: bool = False
) -> tuple[Prompt, ToolUse | None, CheckedConstraint | None]:
    """What the model reads, the tools that it may call, and what its output must match. `any_length`: also what is too
    long for the model.

    Raises TandemError naming the field.
    """
    model = service.model
    model.check_name(body.model)
    body.check()
    asking = Asking(caller, model.text, body.n or 1)
    answer = await constraint_of(body, asking)
    tools = await tool_use(
        body.tools,
        body.tool_choice,
        parallel=body.parallel_tool_calls is not False,
        format=model.template.tool_format if model.template else None,
        asking=asking,
        answer=answer,
    )
    chat = await model.render_chat(
        body.messages,
        caller,
        add_generation_prompt=body.generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        **_variables(body, model),
        tools=None if tools is None else tools.for_template,
    )
    prompt = await model.chat_prompt(
        chat,
        caller=caller,
        add_special_tokens=bool(body.add_special_tokens),
        salt=caller.cache_salt(body.cache_salt or ""),
        any_length=any_length,
        truncation=truncation_of(
            body.truncate_prompt_tokens,
            body.truncation_side,
            output_tokens=body.output_limit,
            max_model_len=service.max_model_len,
        ),
    )
    return prompt, tools, answer if tools is None else tools.constraint


async def asked_chat(body: ChatBody, service: Service, caller: Caller) -> AskedChat:
    """Raises TandemError naming the field."""
    model = service.model
    prompt, tools, checked = await chat_prompt(body, service, caller)
    max_tokens = output_tokens(
        body.output_limit,
        default=model.defaults.max_new_tokens,
        prompt_tokens=len(prompt.token_ids),
        max_model_len=service.max_model_len,
        param="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        prompt_param="messages",
        least=body.fewest_tokens,
    )
    sampling = sampling_params(
        body,
        defaults=model.defaults,
        vocab_size=model.vocab_size,
        max_tokens=max_tokens,
        logprobs=_logprobs(body),
        prompt_logprobs=body.prompt_logprobs,
        bad_words=await bad_word_tokens(body.bad_words, model.text, model.vocab_size, caller),
        constraint=checked.constraint if checked else None,
    )
    marked = tools is not None and any(map(model.text.is_special, tools.format.marks))
    spec = ChoiceSpec(
        SequenceSpec(prompt, sampling, caller, body.cache_salt or "", caller.priority(body.priority)),
        stop=stop_strings(body),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False and not marked,
        keep_tokens=bool(body.return_token_ids) or sampling.logprobs is not None,
        no_output=max_tokens == 0,
        ignored=_ignored(body, model) + (checked.ignored if checked else ()),
    )
    return AskedChat(spec, tools)


def _variables(body: ChatBody, model: ServedModel) -> dict[str, Any]:
    """What the template is told beside the messages. Raises TandemError `invalid_request`."""
    variables = dict(template_variables(body.chat_template_kwargs))
    if body.documents:
        if not model.template_reads("documents"):
            raise invalid("documents", "are not read by this model's chat template; write them into a message")
        variables["documents"] = body.documents
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    return variables


def _ignored(body: ChatBody, model: ServedModel) -> tuple[str, ...]:
    told = body.reasoning_effort is None or model.template_reads("reasoning_effort")
    return () if told else ("reasoning_effort",)


def _logprobs(body: ChatBody) -> int | None:
    in_range("top_logprobs", body.top_logprobs, 0, MAX_LOGPROBS)
    if not body.logprobs:
        if body.top_logprobs:
            raise invalid("top_logprobs", "needs logprobs: true")
        return None
    return body.top_logprobs or 0
