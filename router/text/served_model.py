"""The model a router speaks for: name, tokenizer, chat template, limits and defaults, all from its folder."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.common.checkpoint import model_name, read_json, resolve_model, shown
from tandem.common.errors import ConfigError, TandemError
from tandem.common.fair_work import FairWork
from tandem.common.fingerprint import fingerprint
from tandem.common.sampling import MAX_REPETITION_PENALTY, MAX_TEMPERATURE, MAX_TOP_K, MIN_REPETITION_PENALTY
from tandem.kvstore.identity import BlockHash, Namespace, prefix_chain
from tandem.router.fields.truncation import Truncation
from tandem.router.settings import RouterConfig
from tandem.router.tenants.caller import Caller
from tandem.router.text.chat_template import ChatTemplate
from tandem.router.text.literal_text import RenderedChat
from tandem.router.text.messages import Message, template_messages
from tandem.router.text.templates.costs import Elsewhere, check_tree
from tandem.router.text.templates.process import Task
from tandem.router.text.tokenizer import ModelText
from tandem.router.tools.formats import format_named

logger = logging.getLogger(__name__)

MAX_HASHED_BLOCKS = 1024
"""Prefix affinity looks at this many blocks of a prompt; hashing them takes one or two milliseconds."""


CHARACTERS_PER_TOKEN = 8
"""Where a prompt has more for each token of the context, its tokens are counted before it is taken as a whole."""
RENDERINGS = 2
"""Renderings at once, beside the event loop."""
MAX_WAITING = 64
"""Chats of one tenant that wait to be rendered there."""
SHORT_MESSAGES, SHORT_TEXT = 256, 1 << 17
"""What may be rendered on the event loop: messages, and characters in them and in variables of the template."""
PART = 64
"""Characters that a part of a message or a tool call counts beside its text."""
CUT_TOKENS = 16
"""What cutting a text may add, at the most."""


DEFAULTS_WITHIN = {
    "temperature": (0.0, MAX_TEMPERATURE),
    "top_p": (1e-9, 1.0),
    "top_k": (-1, MAX_TOP_K),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
    "max_new_tokens": (1, 1 << 31),
}
"""Fields of `generation_config.json` that count, with the least and the greatest value."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What `generation_config.json` recommends where a request is silent; as vLLM reads it."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    """Default length of the output; None: the rest of the context."""

    @classmethod
    def load(cls, folder: Path) -> SamplingDefaults:
        """A value that no request could have is left out, with a warning."""
        path = folder / "generation_config.json"
        config = read_json(path)
        known: dict[str, Any] = {}
        for name, (least, most) in DEFAULTS_WITHIN.items():
            value = config.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
                known[name] = int(value) if name in ("top_k", "max_new_tokens") else float(value)
            elif value is not None:
                logger.warning(
                    "%s: %s is %s and is ignored; it must be %g to %g", path, name, shown(value), least, most
                )
        return cls(**known)


def _fair_renderings() -> FairWork:
    return FairWork("chat-templates", RENDERINGS, max_waiting=MAX_WAITING, share=1)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The served model as the router needs it: no weights. On the event loop; long work goes to threads and
    processes."""

    name: str
    text: ModelText
    template: ChatTemplate | None
    defaults: SamplingDefaults
    vocab_size: int
    max_position_embeddings: int
    created: int
    """Seconds since 1970; OpenAI's model object has it."""
    fingerprint: str
    """Hexadecimal digits with which that of a worker must begin. Empty: nothing is known of the weights."""
    _renderings: FairWork = field(default_factory=_fair_renderings)

    @classmethod
    def load(cls, config: RouterConfig) -> ServedModel:
        """Raises ConfigError where the folder lacks something."""
        folder = resolve_model(config.model, weights=False)
        settings = read_json(folder / "config.json")
        vocab_size = _size(folder, settings, "vocab_size")
        name = config.served_model_name or model_name(config.model)
        template = ChatTemplate.load(folder)
        if config.tool_format:
            kind = format_named(config.tool_format)
            if template is None:
                raise ConfigError(f"--tool-format {config.tool_format}: the model has no chat template")
            template.tool_format = kind
        text = ModelText(folder)
        if text.highest_id >= vocab_size:
            logger.warning(
                "%s: has token ids up to %d, beyond vocab_size %d of config.json: prompts with such tokens are refused",
                text.path,
                text.highest_id,
                vocab_size,
            )
        return cls(
            name=name,
            text=text,
            template=template,
            defaults=SamplingDefaults.load(folder),
            vocab_size=vocab_size,
            max_position_embeddings=_size(folder, settings, "max_position_embeddings"),
            created=int(time.time()),
            fingerprint=config.model_fingerprint.lower() or fingerprint(folder).hex(),
        )

    def close(self) -> None:
        """Ends the threads and processes that render and tokenize."""
        self._renderings.close()
        if self.template is not None:
            self.template.close()
        self.text.close()

    def check_name(self, name: str | None) -> None:
        """Raises TandemError `model_not_found`. None or empty means the served model."""
        if name and name != self.name:
            raise TandemError(
                "model_not_found",
                f"The model `{name[:64]}` does not exist; this router serves `{self.name}`.",
                param="model",
            )

    def template_reads(self, variable: str) -> bool:
        return self.template is not None and variable in self.template.variables

    async def render_chat(self, messages: list[Message], caller: Caller, **variables: Any) -> RenderedChat:
        """What takes longer than a moment waits for `caller`'s turn, off the event loop. Raises TandemError."""
        template = self.template
        if template is None:
            raise TandemError(
                "invalid_request",
                f"The model `{self.name}` has no chat template; use /v1/completions.",
                param="messages",
            )

        def task() -> Task:
            return Task(template_messages(messages), variables, self.text.special)

        with contextlib.suppress(Elsewhere):
            _check_short(messages, variables)
            return template.render_here(task())
        return await self._renderings.run(caller.line, caller.weight, lambda: template.render_elsewhere(task()))

    async def text_prompt(
        self,
        text: str,
        *,
        param: str,
        caller: Caller,
        add_special_tokens: bool = True,
        salt: bytes | None = None,
        truncation: Truncation | None = None,
    ) -> Prompt:
        """`salt`: of the tenant's KV cache, where parts of the text are expected to come again. `truncation`: what is
        too long is cut."""
        if truncation is not None:
            return await self._cut_prompt(RenderedChat(text), param, truncation, add_special_tokens, caller)
        if len(text) > CHARACTERS_PER_TOKEN * self.max_position_embeddings:
            await self._refuse_too_long(text, param, caller)
        token_ids = await self.text.encode(text, add_special_tokens=add_special_tokens, salt=salt, caller=caller)
        return _prompt(token_ids, text, param)

    async def chat_prompt(
        self,
        chat: RenderedChat,
        *,
        caller: Caller,
        add_special_tokens: bool = False,
        salt: bytes | None = None,
        any_length: bool = False,
        truncation: Truncation | None = None,
    ) -> Prompt:
        """The prompt of some messages, otherwise as `text_prompt`. `any_length`: also what the model cannot read."""
        if truncation is not None:
            return await self._cut_prompt(chat, "messages", truncation, add_special_tokens, caller)
        if not any_length and len(chat.text) > CHARACTERS_PER_TOKEN * self.max_position_embeddings:
            await self._refuse_too_long(chat.text, "messages", caller)
        token_ids = await self.text.encode_chat(chat, add_special_tokens=add_special_tokens, salt=salt, caller=caller)
        return _prompt(token_ids, chat.text, "messages")

    async def _cut_prompt(
        self, chat: RenderedChat, param: str, truncation: Truncation, add_special_tokens: bool, caller: Caller
    ) -> Prompt:
        """Reads as much of the text as it takes: a megabyte of it takes the tokenizer a second and 150 MB."""
        before, after = self.text.special_tokens_around if add_special_tokens else ([], [])
        keep = truncation.keep - len(before) - len(after)
        if keep < 1:
            special = len(before) + len(after)
            raise TandemError(
                "invalid_request",
                f"truncate_prompt_tokens must be above {special}, the number of special tokens",
                param="truncate_prompt_tokens",
            )
        text = chat.text if chat.renamed is None else chat.renamed
        size = CHARACTERS_PER_TOKEN * (keep + CUT_TOKENS)
        while True:
            piece = text[-size:] if truncation.side == "left" else text[:size]
            part = RenderedChat(piece, None if chat.renamed is None else piece)
            token_ids = await self.text.encode_chat(part, caller=caller)
            if len(piece) == len(text) or len(token_ids) >= keep + CUT_TOKENS:
                break
            size *= 2
        whole = len(piece) == len(text) and len(token_ids) <= keep
        kept = _prompt(truncation.cut(token_ids, keep), chat.text, param).token_ids
        return Prompt([*before, *kept, *after], chat.text if whole else None)

    async def _refuse_too_long(self, text: str, param: str, caller: Caller) -> None:
        """Counts a piece after the other: a megabyte of text takes the tokenizer a second and 150 MB."""
        most = self.max_position_embeddings
        counted = 0
        for start in range(0, len(text), CHARACTERS_PER_TOKEN * most):
            piece = text[start : start + CHARACTERS_PER_TOKEN * most]
            counted += len(await self.text.encode(piece, add_special_tokens=False, caller=caller)) - CUT_TOKENS
            if counted > most:
                raise self._too_long(f"more than {counted}", param)

    def token_prompt(self, token_ids: list[int], *, param: str, truncation: Truncation | None = None) -> Prompt:
        """Raises TandemError `invalid_request` on an id outside the vocabulary, `context_length_exceeded`."""
        if not token_ids:
            raise TandemError("invalid_request", f"{param} must hold at least one token", param=param)
        if truncation is not None:
            token_ids = truncation.cut(token_ids)
        self.check_length(len(token_ids), param)
        self.check_ids(token_ids, param)
        return Prompt(token_ids)

    def check_length(self, tokens: int, param: str) -> None:
        """Raises TandemError `context_length_exceeded`."""
        if tokens > self.max_position_embeddings:
            raise self._too_long(tokens, param)

    def check_ids(self, token_ids: list[int], param: str) -> None:
        """Raises TandemError `invalid_request` on an id outside the vocabulary."""
        if min(token_ids) < 0 or max(token_ids) >= self.vocab_size:
            wrong = next(token for token in token_ids if not 0 <= token < self.vocab_size)
            raise TandemError(
                "invalid_request",
                f"{param}: token id {str(wrong)[:64]} is not in the vocabulary of {self.vocab_size} tokens",
                param=param,
            )

    def _too_long(self, tokens: int | str, param: str) -> TandemError:
        return TandemError(
            "context_length_exceeded",
            f"This model's maximum context length is {self.max_position_embeddings} tokens, but the prompt has "
            f"{tokens}.",
            param=param,
        )


def _size(folder: Path, settings: dict[str, Any], name: str) -> int:
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        raise ConfigError(f"{folder / 'config.json'}: {name}: must be a positive integer, not {shown(value)}")
    return value


def _check_short(messages: list[Message], variables: dict[str, Any]) -> None:
    """Raises Elsewhere."""
    if len(messages) > SHORT_MESSAGES:
        raise Elsewhere
    check_tree(list(variables.values()), SHORT_TEXT)
    characters = 0
    for message in messages:
        content = message.content or ""
        characters += len(content) if isinstance(content, str) else sum(PART + len(part.text or "") for part in content)
        characters += sum(PART + len(call.function.arguments) for call in message.tool_calls or ())
    if characters > SHORT_TEXT:
        raise Elsewhere


def _prompt(token_ids: list[int], text: str, param: str) -> Prompt:
    if not token_ids:
        raise TandemError("invalid_request", f"{param} must hold at least one token", param=param)
    return Prompt(token_ids, text)


class Prompt:
    """Token ids of one prompt with their prefix chain, which is made once and shared by `n` choices and retries."""

    __slots__ = ("_chain", "_chain_of", "text", "token_ids")

    def __init__(self, token_ids: list[int], text: str | None = None) -> None:
        self.token_ids = token_ids
        self.text = text
        """The text it was made from; None for a prompt of token ids."""
        self._chain: list[BlockHash] = []
        self._chain_of: tuple[bytes, int] | None = None

    def chain(self, root: Namespace, block_size: int) -> list[BlockHash]:
        """Hashes of the prompt's full blocks from `root` on, the first `MAX_HASHED_BLOCKS` at the most. The latest
        answer is kept."""
        if self._chain_of != (root, block_size):
            self._chain = prefix_chain(root, self.token_ids[: MAX_HASHED_BLOCKS * block_size], block_size)
            self._chain_of = (root, block_size)
        return self._chain
