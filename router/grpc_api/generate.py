"""Generate and Complete: text of a prompt or of a conversation, in pieces or whole."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

from tandem.common.errors import TandemError
from tandem.proto import inference_pb2 as pb
from tandem.proto.worker_pb2 import TokenLogprobs
from tandem.router.answers.large_answers import written
from tandem.router.answers.logprobs import LOWEST
from tandem.router.calls.choice import ChoiceSpec, Delta
from tandem.router.calls.generate import Call, Usage, account_of, limited_sending
from tandem.router.endpoints.plan import TextPlan
from tandem.router.endpoints.plans import plan_chat, plan_completion
from tandem.router.grpc_api.exchange import GrpcExchange
from tandem.router.grpc_api.explain import account_message
from tandem.router.grpc_api.requests import generation_body, naming, our_names
from tandem.router.requests.bodies import CompletionBody
from tandem.router.service import Service
from tandem.router.text.choice_text import Piece
from tandem.router.text.tokenizer import ModelText
from tandem.router.tools.events import CallArguments, CallStart, Event, PlainText, Text


async def generate(exchange: GrpcExchange, request: pb.GenerateRequest, service: Service) -> None:
    """Generate: what is new of each choice as it comes, then the usage. Raises TandemError."""
    plan = await _plan(exchange, request, service)
    async with _call(exchange, request, service, plan, streaming=True) as call:
        answers = _Answers(exchange, request, service, plan, call)
        try:
            async with limited_sending(call):
                while not call.finished:
                    for delta in await call.next():
                        if answers.begun(delta):
                            await exchange.send(answers.of(delta))
                        else:  # it tells of the prompt, which may be long
                            await exchange.send(await written(call, exchange.memory, partial(answers.of, delta)))
                last = pb.GenerateResponse(request_id=exchange.request_id, usage=usage_message(call.usage()))
                if request.explain:
                    last.explain.CopyFrom(account_message(account_of(call)))
                await exchange.send(last)
        except TimeoutError as error:
            raise call.error or TandemError("cancelled", "the client reads too slowly") from error


async def complete(exchange: GrpcExchange, request: pb.GenerateRequest, service: Service) -> pb.CompleteResponse:
    """Complete: the whole answer. Raises TandemError."""
    plan = await _plan(exchange, request, service)
    async with _call(exchange, request, service, plan, streaming=False) as call:
        answers = _Answers(exchange, request, service, plan, call)
        deltas = await call.result()
        choices = await written(call, exchange.memory, lambda: list(map(answers.of, deltas)))
        answer = pb.CompleteResponse(request_id=exchange.request_id, choices=choices, usage=usage_message(call.usage()))
        if request.explain:
            answer.explain.CopyFrom(account_message(account_of(call)))
    return answer


async def _plan(exchange: GrpcExchange, request: pb.GenerateRequest, service: Service) -> TextPlan:
    with naming(request):
        body = await exchange.off_loop(generation_body, request)
        if isinstance(body, CompletionBody):
            plan = await plan_completion(body, service, exchange)
        else:
            plan = await plan_chat(body, service, exchange)
    exchange.ignore(our_names(name for choice in plan.choices for name in choice.ignored))
    return plan


def _call(
    exchange: GrpcExchange, request: pb.GenerateRequest, service: Service, plan: TextPlan, *, streaming: bool
) -> AbstractAsyncContextManager[Call]:
    return service.call(
        exchange.request_id,
        plan.choices,
        arrived=exchange.arrived,
        traceparent=exchange.traceparent,
        streaming=streaming,
        timeout_s=exchange.timeout_s(request.timeout_s if request.HasField("timeout_s") else None),
    )


class _Answers:
    """Makes messages of what comes of the choices of one call."""

    def __init__(
        self, exchange: GrpcExchange, request: pb.GenerateRequest, service: Service, plan: TextPlan, call: Call
    ) -> None:
        self._request_id = exchange.request_id
        self._request = request
        self._text = service.model.text
        self._plan = plan
        self._choices = call.choices
        self._parsers = [plan.tools.parser() if plan.tools else PlainText() for _ in call.choices]
        self._before: dict[int, int] = {}
        """Characters that the text of a choice begins with, of those that have begun."""
        self._called: set[int] = set()
        """Choices that have called a function."""

    def begun(self, delta: Delta) -> bool:
        """Whether something has been told of this choice before."""
        return delta.index in self._before

    def of(self, delta: Delta) -> pb.GenerateResponse:
        """The message for what is new of one choice; the first one also has what is told of the prompt."""
        answer = pb.GenerateResponse(request_id=self._request_id, index=delta.index, token_ids=delta.piece.token_ids)
        if delta.index not in self._before:
            self._add_prompt(answer)
        parser = self._parsers[delta.index]
        self._add(answer, parser.feed(delta.piece.text))
        if delta.finish_reason is not None:
            self._add(answer, parser.finish())
            called = delta.finish_reason == "stop" and delta.index in self._called
            answer.finish_reason = "tool_calls" if called else delta.finish_reason
        match delta.stop_reason:
            case str():
                answer.stop_string = delta.stop_reason
            case int():
                answer.stop_token_id = delta.stop_reason
        self._add_logprobs(answer, delta.piece)
        return answer

    def _add_prompt(self, answer: pb.GenerateResponse) -> None:
        """What is told of the prompt, before the output."""
        choice, request = self._choices[answer.index], self._request
        prompt = choice.spec.sequence.prompt
        if request.return_token_ids:
            answer.prompt_token_ids.extend(prompt.token_ids)
        if self._plan.prompt_text is not None:
            answer.prompt_text = self._plan.prompt_text
        answer.text = self._echoed(choice.spec)
        self._before[answer.index] = len(answer.text)
        for position, (token_id, entry) in enumerate(zip(prompt.token_ids, choice.prompt_logprobs, strict=False)):
            answer.prompt_logprobs.append(token_logprob(self._text, token_id, entry if position else None))

    def _echoed(self, spec: ChoiceSpec) -> str:
        """What the text of a choice begins with."""
        if not self._request.echo:
            return ""
        if self._plan.echoed is not None:
            return self._plan.echoed
        prompt = spec.sequence.prompt
        if prompt.text is not None:
            return prompt.text
        return self._text.decode(prompt.token_ids, skip_special_tokens=spec.skip_special_tokens)

    def _add_logprobs(self, answer: pb.GenerateResponse, piece: Piece) -> None:
        if not piece.logprobs:
            return
        for token_id, entry, offset in zip(piece.token_ids, piece.logprobs, piece.offsets, strict=True):
            token = token_logprob(self._text, token_id, entry)
            token.offset = self._before[answer.index] + offset
            answer.logprobs.append(token)

    def _add(self, answer: pb.GenerateResponse, events: Sequence[Event]) -> None:
        calls = {call.index: call for call in answer.tool_calls}

        def call_of(index: int) -> pb.ToolCall:
            if index not in calls:
                calls[index] = answer.tool_calls.add(index=index)
            return calls[index]

        for event in events:
            match event:
                case Text(text):
                    answer.text += text
                case CallStart(index, name):
                    assert self._plan.tools is not None  # without tools everything is text
                    self._called.add(answer.index)
                    call_of(index).MergeFrom(pb.ToolCall(id=self._plan.tools.format.new_id(), name=name))
                case CallArguments(index, text):
                    call_of(index).arguments += text


def token_logprob(text: ModelText, token_id: int, entry: TokenLogprobs | None) -> pb.TokenLogprob:
    """`entry` None: the first token of a prompt, which has none."""
    if entry is None:
        return _token(text, token_id)
    chosen = _token(text, token_id)
    chosen.logprob, chosen.rank = max(entry.logprob, LOWEST), entry.rank
    for place, (other, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True)):
        likely = _token(text, other)
        likely.logprob, likely.rank = max(logprob, LOWEST), place + 1
        chosen.top.append(likely)
    return chosen


def _token(text: ModelText, token_id: int) -> pb.TokenLogprob:
    raw = text.token_bytes(token_id)
    return pb.TokenLogprob(token_id=token_id, token=raw.decode(errors="replace"), raw=raw)


def usage_message(usage: Usage) -> pb.Usage:
    """Usage of a call, as a message."""
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        cached_by_tier=usage.cached_by_tier,
        cached_tokens_near=usage.near_tokens,
    )
