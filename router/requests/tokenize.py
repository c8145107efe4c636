"""Token ids of a text or of chat messages, and back. HTTP and gRPC share it."""

from __future__ import annotations

from tandem.router.fields.sampling import invalid
from tandem.router.requests.bodies import DetokenizeBody, TokenizeBody
from tandem.router.tenants.caller import Caller
from tandem.router.text.messages import template_variables
from tandem.router.text.served_model import ServedModel


async def tokenized(body: TokenizeBody, model: ServedModel, caller: Caller) -> list[int]:
    """Raises TandemError naming the field."""
    model.check_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "or messages is required, and not both")
    if body.messages is None:
        special = body.add_special_tokens is not False
        return await model.text.encode(body.prompt or "", add_special_tokens=special, caller=caller)
    if body.continue_final_message and body.add_generation_prompt:
        raise invalid("continue_final_message", "cannot be combined with add_generation_prompt: true")
    goes_on = bool(body.continue_final_message)
    chat = await model.render_chat(
        body.messages,
        caller,
        add_generation_prompt=not goes_on if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=goes_on,
        tools=[tool.for_template() for tool in body.tools] if body.tools else None,
        **template_variables(body.chat_template_kwargs),
    )
    return await model.text.encode_chat(chat, add_special_tokens=bool(body.add_special_tokens), caller=caller)


async def detokenized(body: DetokenizeBody, model: ServedModel, caller: Caller) -> str:
    """Raises TandemError naming the field."""
    model.check_name(body.model)
    if body.tokens:
        model.check_ids(body.tokens, "tokens")
    return await model.text.decode_long(body.tokens, skip_special_tokens=False, caller=caller)
