"""Pieces of a long text, tokenized one by one, give the ids of the whole."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from tandem.router.text import pieces as text_pieces
from tandem.router.text.pieces import piece_pattern, pieces
from tests.router.tokenizer_shapes import SHAPES, byte_level

CUT = ["bundled", "byte_level", "qwen", "llama_3"]
WHOLE = [shape for shape in SHAPES if shape not in CUT]
MADE = {shape: SHAPES[shape]() for shape in CUT}
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MADE["gpt_4o"] = byte_level(pattern=GPT_4O)


def blanks_before_words() -> Tokenizer:
    """As newer SentencePiece models: a mark before each word."""
    tokenizer = SHAPES["mistral"]()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    return tokenizer


MADE["metaspace"] = blanks_before_words()

_words = ["a", "Word", "it's", "'", "1", "1234", "é", "世界", "²", ".", "--", "[", "/", "e\u0301", "\u0301"]
_blanks = [" ", " ", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000"]
_marks = ["<|im_end|>", "<tool_call>", "<|eot_id|>", "</s>", "\U0001f469\u200d\U0001f52c"]
_bits = st.sampled_from([*_words, *_blanks, *_marks])
_texts = st.lists(_bits, max_size=60).map("".join)


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("shape", MADE)
@given(text=_texts)
@settings(max_examples=150, deadline=None)
@example("a a" * 30)
@example("x. y\n z  w " * 8)
def test_pieces_give_the_ids_of_the_whole(shape: str, text: str) -> None:
    tokenizer, before = MADE[shape], text_pieces.PIECE_CHARACTERS
    pattern = piece_pattern(tokenizer)
    assert pattern is not None
    try:
        text_pieces.PIECE_CHARACTERS = 8
        found = list(pieces(text, pattern))
    finally:
        text_pieces.PIECE_CHARACTERS = before
    assert "".join(found) == text
    assert [number for piece in found for number in encoded(tokenizer, piece)] == encoded(tokenizer, text)


def test_pieces_of_prose_are_short_and_those_of_one_word_are_whole() -> None:
    prose = list(pieces("The river ran past the old mill. " * 10_000, piece_pattern(MADE["bundled"])))
    assert max(map(len, prose)) <= text_pieces.PIECE_CHARACTERS
    for text in ("a" * 100_000, " " * 100_000, ""):
        assert list(pieces(text, piece_pattern(MADE["bundled"]))) == [text]
    late = "a" * 100_000 + " b" * 20_000
    found = list(pieces(late, piece_pattern(MADE["bundled"])))
    assert len(found[0]) == 100_000
    assert max(map(len, found[1:])) <= text_pieces.PIECE_CHARACTERS


@pytest.mark.parametrize("shape", WHOLE)
def test_other_kinds_are_not_cut(shape: str) -> None:
    assert piece_pattern(SHAPES[shape]()) is None
    assert list(pieces("a b " * 10_000, None)) == ["a b " * 10_000]


def test_what_might_join_words_is_not_cut() -> None:
    for change in (
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Replace(Regex(" +"), " ")),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", None),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated")),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel(use_regex=False)),
        lambda tokenizer: tokenizer.add_tokens([AddedToken("old mill", normalized=False)]),
        lambda tokenizer: tokenizer.add_tokens([AddedToken("mill", normalized=False, rstrip=True)]),
    ):
        tokenizer = byte_level()
        assert piece_pattern(tokenizer) is not None
        change(tokenizer)
        assert piece_pattern(tokenizer) is None
