"""Ids with the help of earlier requests are those of tokenizing the whole text."""

from __future__ import annotations

import asyncio
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tandem.router.tenants.caller import Caller
from tandem.router.text.chat_template import ChatTemplate
from tandem.router.text.token_cache import MAX_SHARE, TokenCache
from tandem.router.text.tokenizer import INLINE_CHARACTERS, ModelText
from tests.router.conftest import CHATML, House
from tests.router.tokenizer_shapes import SHAPES

SALT = b"a tenant"
NASTY = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    " \t\r\n ",
    "'s",
    "'",
    "I'LL",
    "1234567",
    "é",
    "e\u0301",
    "ﬁ",
    "世界",
    "👩\u200d👧",
]
NASTY += ["▁", "\u2028", "<", "|>", "<|", "<|im_", "im_end|>", "[INST", "\x00", "\x1c", "\xa0", "\u3000", "İ", "\ufeff"]
NASTY += ["x" * 300, "?!" * 90]
WORDS = ["The", " river", " ran", "\nold", "mill.", " Hello", "user\n", "café", " 20", "€", " word", "River"]


class Shape:
    def __init__(self, name: str, folder: Path) -> None:
        SHAPES[name]().save(str(folder / "tokenizer.json"))
        self.plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.text = ModelText(folder)
        self.added = [token.content for token in self.plain.get_added_tokens_decoder().values()]

    def encode(self, text: str, *, around: bool = False, salt: bytes | None = SALT) -> list[int]:
        return asyncio.run(self.text.encode(text, add_special_tokens=around, salt=salt))


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shape:
    return Shape(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def chatml(tmp_path: Path) -> Shape:
    return Shape("qwen", tmp_path)


def spy(text: ModelText, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is given to the tokenizer from now on."""
    given: list[str] = []
    ids = text._ids

    async def counted(
        tokenizer: Tokenizer, texts: list[str], add_special_tokens: bool, caller: Caller
    ) -> list[list[int]]:
        given.extend(texts)
        return await ids(tokenizer, texts, add_special_tokens, caller)

    monkeypatch.setattr(text, "_ids", counted)
    return given


@given(st.data(), st.booleans())
@settings(max_examples=50, deadline=None)
def test_any_text(shape: Shape, data: st.DataObject, around: bool) -> None:
    pieces = st.sampled_from(NASTY + WORDS) | st.sampled_from(shape.added) | st.text(max_size=5)
    text = "".join(data.draw(st.lists(pieces, max_size=25)))
    whole = shape.plain.encode(text, add_special_tokens=around).ids
    assert shape.encode(text, around=around) == whole
    assert shape.encode(text, around=around) == whole  # now from the cache
    assert shape.encode(text, around=around, salt=None) == whole


@given(st.lists(st.lists(st.sampled_from(NASTY + WORDS), max_size=8).map("".join), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_conversations_that_grow(shape: Shape, contents: list[str]) -> None:
    opening, closing = shape.added[-2:]
    template = ChatTemplate(CHATML.replace("<|im_start|>", opening).replace("<|im_end|>", closing), {})
    messages: list[dict[str, str]] = []
    for content in [*contents, f"{opening}user {closing} {opening[:-1]}"]:
        messages.append({"role": "user", "content": content})
        text = template.render(messages)
        assert shape.encode(text) == shape.plain.encode(text, add_special_tokens=False).ids


def test_only_what_is_new_is_tokenized(chatml: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    first = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    second = first + "Hi.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    given = spy(chatml.text, monkeypatch)
    ids = chatml.encode(first)
    assert sorted(given) == sorted(
        ["<|im_start|>system\nBe brief.", "<|im_end|>\n", "<|im_start|>user\nHello", "<|im_start|>assistant\n"]
    )
    given.clear()
    assert chatml.encode(first) == ids
    assert given == []
    chatml.encode(second)
    assert given == ["<|im_start|>assistant\nHi.", "<|im_start|>user\nBye"]


def test_another_tenants_texts_are_new(chatml: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "<|im_start|>user\nHello<|im_end|>\n"
    ids = chatml.encode(text)
    given = spy(chatml.text, monkeypatch)
    assert chatml.encode(text, salt=b"another") == ids
    assert given == ["<|im_start|>user\nHello", "<|im_end|>\n"]


async def test_chats_are_kept_for_their_tenant_and_salt(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = await house.decode()
    router = await house.router(worker)
    client = await house.client(router)
    given = spy(router.model.text, monkeypatch)
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    for asked, new in ((body, True), (body, False), ({**body, "cache_salt": "mine"}, True)):
        given.clear()
        assert (await client.post("/v1/chat/completions", json=asked)).status_code == 200
        assert ("<|im_start|>user\nHello" in given) == new
    assert len({tuple(submit.prompt_token_ids) for submit in worker.submits}) == 1


def test_text_without_special_tokens_is_not_kept(chatml: Shape) -> None:
    chatml.encode("once upon a time")
    chatml.encode("<|im_start|>user\nHello<|im_end|>\n", salt=None)
    assert len(chatml.text._cache) == 0


def test_long_turns(chatml: Shape) -> None:
    text = "".join(f"<|im_start|>user\n{'The river, ' * INLINE_CHARACTERS}{turn}<|im_end|>\n" for turn in range(3))
    whole = chatml.plain.encode(text, add_special_tokens=False).ids
    assert chatml.encode(text) == whole
    assert chatml.encode(text) == whole


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([b"a", b"b"]), st.integers(0, 200)), max_size=150))
def test_least_recently_used_goes_first(steps: list[tuple[bool, bytes, int]]) -> None:
    limit = 4000
    kept = TokenCache(limit)
    expected: dict[tuple[bytes, str], bytes] = {}  # the least recently used first
    for put, salt, length in steps:
        text, ids = f"{length:<{length + 3}}", length.to_bytes(4, "little") * length
        if put:
            kept.put(salt, text, ids)
            if size(salt, text, ids) <= limit * MAX_SHARE:
                expected.setdefault((salt, text), ids)
            while sum(size(*key, value) for key, value in expected.items()) > limit:
                del expected[next(iter(expected))]
        else:
            assert kept.get(salt, text) == expected.get((salt, text))
            if (salt, text) in expected:
                expected[salt, text] = expected.pop((salt, text))
        assert len(kept) == len(expected)
        assert kept.bytes <= limit
    assert all(kept.get(*key) == ids for key, ids in expected.items())


def size(salt: bytes, text: str, ids: bytes) -> int:
    alone = TokenCache()
    alone.put(salt, text, ids)
    return alone.bytes


def test_memory_is_bounded() -> None:
    limit = 4 * 2**20
    kept = TokenCache(limit)
    tracemalloc.start()
    try:
        for turn in range(30_000):
            text = f"{turn} " * (turn % 50) + "é世"[turn % 2] * (turn % 7)
            text.encode()
            kept.put(b"salt", text, b"abcd" * len(text))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert limit / 2 < kept.bytes <= limit
    assert held <= peak <= 1.1 * limit


def test_a_text_that_would_crowd_out_the_others_is_not_kept() -> None:
    kept = TokenCache(100_000)
    kept.put(b"", "small", b"abcd")
    kept.put(b"", "x" * 50_000, b"abcd")
    assert kept.get(b"", "small") == b"abcd"
    assert kept.get(b"", "x" * 50_000) is None
