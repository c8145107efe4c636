"""Text to token ids and back, from the files of a Hugging Face model folder."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from tandem.common.errors import TandemError
from tandem.common.fair_work import FairWork
from tandem.router.tenants.caller import ANYBODY, Caller
from tandem.router.text.cuts import cut, cut_pattern, steps
from tandem.router.text.literal_text import RenderedChat, SpecialTokens
from tandem.router.text.pieces import PIECE_CHARACTERS, piece_pattern, pieces
from tandem.router.text.token_cache import TokenCache
from tandem.router.text.tokenizer_file import open_tokenizer, whole_failures

INLINE_CHARACTERS = 4000
"""Text up to this long (about 1 ms) is tokenized on the event loop, longer text in a thread, a piece at a time."""
THREADS = 2
MAX_WAITING = 4096
"""Requests of one tenant whose texts wait for a thread."""
LONG_PIECE_CHARACTERS = 4 * PIECE_CHARACTERS
"""What is longer and can be cut nowhere has a thread of its own, so that ordinary text never waits for it."""
MAX_PIECE_BYTES = 2 << 20
"""It takes 300 MB while it is tokenized, and 40 ms of the interpreter's lock where each byte becomes a token."""
MAX_TOKENS = 1 << 20
"""Tokens of one text."""
INLINE_TOKENS = 2000
"""Tokens that are still decoded on the event loop."""
LONG_TOKENS = 50_000


class ModelText:
    """Tokenizer of one model. Safe to use from several threads, but for `encode`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "tokenizer.json"
        self._tokenizer = open_tokenizer(self.path)
        self._work = FairWork("tokenizer", THREADS, max_waiting=MAX_WAITING)
        self._long_work = FairWork("tokenizer of long words", 1, max_waiting=MAX_WAITING)
        self._piece_pattern = piece_pattern(self._tokenizer)
        self._cuts = cut_pattern(self._tokenizer)
        self.special = SpecialTokens(self._tokenizer)
        self._around = self._tokenizer.num_special_tokens_to_add(False) > 0
        self._cache = TokenCache()
        self._bytes_of_char = _bytes_of_char() if _is_byte_level(self._tokenizer) else None
        self._special_ids = frozenset(
            token_id for token_id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self.token_bytes = lru_cache(maxsize=65536)(self._token_bytes)
        """Bytes that a token stands for; a special token stands for its name."""

    @property
    def highest_id(self) -> int:
        """The highest id of its tokens; -1 where there are none."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    async def encode(
        self, text: str, *, add_special_tokens: bool, salt: bytes | None = None, caller: Caller = ANYBODY
    ) -> list[int]:
        """`salt`: of the tenant's KV cache. With one, parts between special tokens that the same salt has brought
        before (earlier turns, a system message) are not tokenized again. `caller`: in whose turn long text is
        tokenized. To be called on one event loop. Raises TandemError `overloaded`, `request_too_large`."""
        return await self._encoded(self._tokenizer, self._cuts, text, add_special_tokens, salt, caller)

    async def encode_all(self, texts: Sequence[str], *, caller: Caller = ANYBODY) -> list[list[int]]:
        """Ids of each, without special tokens around it."""
        return await self._ids(self._tokenizer, texts, False, caller)

    async def encode_chat(
        self,
        chat: RenderedChat,
        *,
        add_special_tokens: bool = False,
        salt: bytes | None = None,
        caller: Caller = ANYBODY,
    ) -> list[int]:
        """The same of a chat, in which special tokens are those of its template only."""
        if chat.renamed is None:
            return await self.encode(chat.text, add_special_tokens=add_special_tokens, salt=salt, caller=caller)
        tokenizer, cuts = await self._work.run(caller.line, caller.weight, lambda: self._renamed)
        salt = None if salt is None else b"renamed" + salt  # a part may look the same and have other ids
        return await self._encoded(tokenizer, cuts, chat.renamed, add_special_tokens, salt, caller)

    async def _encoded(
        self,
        tokenizer: Tokenizer,
        cuts: re.Pattern[str] | None,
        text: str,
        add_special_tokens: bool,
        salt: bytes | None,
        caller: Caller,
    ) -> list[int]:
        if salt is None or cuts is None or (add_special_tokens and self._around):
            return (await self._ids(tokenizer, [text], add_special_tokens, caller))[0]
        parts = cut(text, cuts)
        if len(parts) == 1:  # no conversation
            return (await self._ids(tokenizer, parts, False, caller))[0]
        found: dict[str, bytes] = {}
        missing: list[str] = []
        for part in dict.fromkeys(parts):
            if (known := self._cache.get(salt, part)) is None:
                missing.append(part)
            else:
                found[part] = known
        new = await self._ids(tokenizer, missing, False, caller) if missing else []
        for part, ids in zip(missing, new, strict=True):
            found[part] = array("I", ids).tobytes()
            self._cache.put(salt, part, found[part])
        return array("I", b"".join(map(found.__getitem__, parts))).tolist()

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, re.Pattern[str] | None]:
        """Made when it is first needed: it takes as much time and memory as the tokenizer itself."""
        tokenizer = self.special.renamed_tokenizer()
        return tokenizer, cut_pattern(tokenizer)

    @cached_property
    def special_tokens_around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text."""
        [inner] = _encode(self._tokenizer, ["a"], False)
        [outer] = _encode(self._tokenizer, ["a"], True)
        for start in range(len(outer)):
            if outer[start : start + len(inner)] == inner:
                return outer[:start], outer[start + len(inner) :]
        return [], []

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """The text of some token ids. Raises TokenizerPanic (a TandemError `invalid_request`) where the library
        panics."""
        with whole_failures():
            if len(token_ids) <= INLINE_TOKENS:
                return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
            # the call without "batch" keeps the interpreter lock
            return self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]

    async def decode_long(self, token_ids: list[int], *, skip_special_tokens: bool = True, caller: Caller) -> str:
        """The same of any number of tokens, in a thread where there are many. Raises TandemError `overloaded`."""
        if len(token_ids) <= INLINE_TOKENS:
            return self.decode(token_ids, skip_special_tokens=skip_special_tokens)
        work = self._work if len(token_ids) <= LONG_TOKENS else self._long_work
        decode = partial(self.decode, token_ids, skip_special_tokens=skip_special_tokens)
        return await work.run(caller.line, caller.weight, decode)

    def token_text(self, token_id: int) -> str:
        """The token by itself; bytes that are no whole character become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_id(self, token: str) -> int | None:
        """Id of one token by its name, such as `<tool_call>`; None where the vocabulary has none."""
        return self._tokenizer.token_to_id(token)

    def is_special(self, token: str) -> bool:
        """Whether decoding leaves it out unless special tokens are asked for."""
        return self._tokenizer.token_to_id(token) in self._special_ids

    def is_special_id(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def close(self) -> None:
        self._work.close()
        self._long_work.close()

    async def _ids(
        self, tokenizer: Tokenizer, texts: Sequence[str], add_special_tokens: bool, caller: Caller
    ) -> list[list[int]]:
        if sum(map(len, texts)) <= INLINE_CHARACTERS:
            return _encode(tokenizer, texts, add_special_tokens)
        found: list[list[int]] = []
        short: list[str] = []
        size = 0
        for text in texts:
            if len(text) > PIECE_CHARACTERS:
                found += await self._in_turn(tokenizer, short, add_special_tokens, caller)
                found.append(await self._long_ids(tokenizer, text, add_special_tokens, caller))
                short, size = [], 0
                continue
            short.append(text)
            size += len(text)
            if size > PIECE_CHARACTERS:
                found += await self._in_turn(tokenizer, short, add_special_tokens, caller)
                short, size = [], 0
        return found + await self._in_turn(tokenizer, short, add_special_tokens, caller)

    async def _long_ids(self, tokenizer: Tokenizer, text: str, add_special_tokens: bool, caller: Caller) -> list[int]:
        """A piece after the other, each in its turn."""
        ids: list[int] = []
        if self._piece_pattern is None:
            [ids] = await self._in_turn(tokenizer, [text], add_special_tokens, caller)
            return ids
        before, after = self.special_tokens_around if add_special_tokens else ([], [])
        ids += before
        cuts = pieces(text, self._piece_pattern)
        while (more := await self._work.run(caller.line, caller.weight, _next_ids, tokenizer, cuts)) is not None:
            if isinstance(more, str):
                [more] = await self._in_turn(tokenizer, [more], False, caller)
            ids += more
            if len(ids) > MAX_TOKENS:
                raise TandemError("request_too_large", f"the text has more than {MAX_TOKENS} tokens; split it")
        return ids + after

    async def _in_turn(
        self, tokenizer: Tokenizer, texts: Sequence[str], add_special_tokens: bool, caller: Caller
    ) -> list[list[int]]:
        if not texts:
            return []
        longest = max(map(len, texts))
        work = self._work if longest <= LONG_PIECE_CHARACTERS else self._long_work
        return await work.run(caller.line, caller.weight, _encode, tokenizer, texts, add_special_tokens)

    def _token_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._special_ids:
            return token.encode()
        if self._bytes_of_char is not None:
            values = [self._bytes_of_char.get(char) for char in token]
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()


def _encode(tokenizer: Tokenizer, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    # The call without "batch" keeps the interpreter lock, and counts offsets that nobody wants. Several texts in
    # one call would go to the library's own threads, which costs more than tokenizing a short one.
    encode = tokenizer.encode_batch_fast
    for text in texts:
        if len(text) > LONG_PIECE_CHARACTERS and len(text.encode(errors="replace")) > MAX_PIECE_BYTES:
            problem = f"a text of {len(text)} characters has no place where it could be cut; it may have"
            raise TandemError("request_too_large", f"{problem} {MAX_PIECE_BYTES} bytes")
    with whole_failures():
        return [encode([text], add_special_tokens=add_special_tokens)[0].ids for text in texts]


def _next_ids(tokenizer: Tokenizer, cuts: Iterator[str]) -> list[int] | str | None:
    """Ids of the next piece; the piece itself where it is long; None: there is none."""
    piece = next(cuts, None)
    if piece is None or len(piece) > LONG_PIECE_CHARACTERS:
        return piece
    return _encode(tokenizer, [piece], False)[0]


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    return any(step.get("type") == "ByteLevel" for step in steps(tokenizer.decoder))


def _bytes_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 byte values, reversed."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    mapping = {chr(value): value for value in printable}
    others = [value for value in range(256) if value not in mapping.values()]
    mapping.update({chr(256 + index): value for index, value in enumerate(others)})
    assert set(mapping) == set(ByteLevel.alphabet())
    return mapping
