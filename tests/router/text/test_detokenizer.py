"""Text that streams out equals the text decoded as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tandem.router.text.detokenizer import Detokenizer
from tandem.router.text.tokenizer import ModelText

ALPHABET = "aé世👩‍ z\n"


@pytest.fixture(scope="module")
def byte_level(model_folder: Path) -> ModelText:
    return ModelText(model_folder)


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    """As Llama 2: word-start marks, bytes for what is not in the vocabulary, a leading space that decoding drops."""
    words = ["▁hello", "▁world", "lo", "▁", "h", "e", "é", "<s>", "</s>"]
    names = ["<unk>", *(f"<0x{value:02X}>" for value in range(256)), *words]
    tokenizer = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder = tmp_path_factory.mktemp("sentencepiece")
    tokenizer.save(str(folder / "tokenizer.json"))
    return ModelText(folder)


def streamed(text: ModelText, groups: list[list[int]], prompt: list[int]) -> list[str]:
    detokenizer = Detokenizer(text, prompt)
    return [*(detokenizer.feed(group) for group in groups), detokenizer.flush()]


@given(st.text(ALPHABET, max_size=40), st.integers(1, 5))
@settings(max_examples=100)
def test_pieces_join_to_the_text(byte_level: ModelText, sentence: str, size: int) -> None:
    ids = byte_level._tokenizer.encode(sentence).ids
    groups = [ids[i : i + size] for i in range(0, len(ids), size)]
    pieces = streamed(byte_level, groups, [5, 6])
    assert "".join(pieces) == sentence
    assert all("\ufffd" not in piece for piece in pieces)


@given(st.lists(st.integers(3, 399), max_size=120))
@settings(max_examples=100)
def test_arbitrary_tokens_decode_as_a_whole_would(byte_level: ModelText, ids: list[int]) -> None:
    assert "".join(streamed(byte_level, [[token] for token in ids], [])) == byte_level.decode(ids)


def test_half_a_character_is_held_until_it_is_whole(byte_level: ModelText) -> None:
    ids = byte_level._tokenizer.encode("世").ids
    assert len(ids) == 3
    assert streamed(byte_level, [[token] for token in ids], []) == ["", "", "世", ""]


def test_character_that_never_completes_is_shown_as_broken_at_the_end(byte_level: ModelText) -> None:
    ids = byte_level._tokenizer.encode("a世").ids[:-1]
    pieces = streamed(byte_level, [[token] for token in ids], [])
    assert pieces[0] == "a"
    assert pieces[-1] == "\ufffd"


def test_broken_bytes_do_not_hold_the_stream_forever(byte_level: ModelText) -> None:
    lone = byte_level._tokenizer.encode("世").ids[0]
    detokenizer = Detokenizer(byte_level, [])
    shown = "".join(detokenizer.feed([lone]) for _ in range(30))
    assert len(shown) >= 20


@given(st.lists(st.sampled_from(["▁hello", "▁world", "lo", "▁", "é", "世", "👩"]), min_size=1, max_size=40))
@settings(max_examples=100)
def test_sentencepiece_spaces_and_byte_runs(sentence_piece: ModelText, words: list[str]) -> None:
    tokenizer = sentence_piece._tokenizer
    ids: list[int] = []
    for word in words:
        known = tokenizer.token_to_id(word)
        ids += [known] if known is not None else [tokenizer.token_to_id(f"<0x{b:02X}>") for b in word.encode()]
    prompt = [tokenizer.token_to_id("<s>"), tokenizer.token_to_id("▁hello")]
    pieces = streamed(sentence_piece, [[token] for token in ids], prompt)
    assert "".join(pieces) == "".join(words).replace("▁", " ")


def test_first_token_keeps_its_space_after_a_prompt(sentence_piece: ModelText) -> None:
    hello, world = (sentence_piece._tokenizer.token_to_id(word) for word in ("▁hello", "▁world"))
    assert streamed(sentence_piece, [[world]], [hello]) == [" world", ""]


def test_tokens_have_bytes(byte_level: ModelText, sentence_piece: ModelText) -> None:
    for token in byte_level._tokenizer.encode("é世 a").ids:
        assert len(byte_level.token_bytes(token)) >= 1
    assert b"".join(map(byte_level.token_bytes, byte_level._tokenizer.encode("é世 a").ids)) == "é世 a".encode()
    assert byte_level.token_bytes(1) == b"<|im_start|>"
    assert byte_level.token_bytes(511) == b""
    assert sentence_piece.token_bytes(sentence_piece._tokenizer.token_to_id("<0xE2>")) == b"\xe2"
    assert sentence_piece.token_text(sentence_piece._tokenizer.token_to_id("▁hello")) == " hello"
