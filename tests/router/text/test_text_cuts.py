"""Parts of a text, tokenized one by one, give the ids of the whole."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from tandem.router.text import cuts as text_cuts
from tandem.router.text.cuts import cut, cut_pattern
from tests.router.tokenizer_shapes import SHAPES, bundled

CUT_AT = {
    "bundled": {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"},
    "byte_level": {"<|endoftext|>", "<|im_start|>", "<|im_end|>"},
    "qwen": {"<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"},
    "llama_3": {"<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>", "<|reserved_special_token_1|>"},
    "mistral": {"<s>", "</s>", "[INST]", "[/INST]"},
    "phi_3": {"<s>", "<|user|>", "<|assistant|>", "<|end|>"},
    "unigram": {"</s>"},
    "bert": {"[CLS]", "[SEP]"},
    "overlapping": {"<|im_start|>", "<|im_end|>|", "<r>"},
}
NOT_CUT_AT = {
    "llama_3": {"\n\n", "  "},
    "bert": {"[MASK]"},
    "overlapping": {"<|im_end|>", "<w>", "word", "<l>", "River", "<strip>"},
}
_tokens = st.text("<>|ab_", min_size=1, max_size=4) | st.builds("<{}>".format, st.text("|ab_", min_size=1, max_size=3))
"""Without white space: the library panics, or takes all memory, where that of one is next to a token that strips."""


def raw(content: str, *, lstrip: bool = False, rstrip: bool = False, single_word: bool = False) -> AddedToken:
    return AddedToken(content, lstrip=lstrip, rstrip=rstrip, single_word=single_word, normalized=False)


def characters(added: list[AddedToken]) -> Tokenizer:
    """One token per character, and a mark in front of every stretch of text."""
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate("▁ <>|abcx\n_")}, []))
    tokenizer.normalizer = normalizers.Prepend("▁")
    tokenizer.add_tokens(added)
    return tokenizer


@pytest.mark.parametrize("shape", SHAPES)
def test_known_shapes_are_cut_at_their_special_tokens(shape: str) -> None:
    pattern = cut_pattern(SHAPES[shape]())
    assert pattern is not None
    assert all(pattern.fullmatch(token) for token in CUT_AT[shape])
    assert not any(pattern.search(token) for token in NOT_CUT_AT.get(shape, ()))


def test_parts_begin_with_tokens_and_join_to_the_text() -> None:
    pattern = cut_pattern(bundled())
    assert pattern is not None
    text = "a<|im_start|>user\n<|im_end|><|pad|><|im_e"
    assert cut(text, pattern) == ["a", "<|im_start|>user\n", "<|im_end|>", "<|pad|><|im_e"]
    assert cut(text[1:], pattern) == cut(text, pattern)[1:]
    assert cut("", pattern) == [""]
    assert cut("plain", pattern) == ["plain"]


WRONG: dict[str, tuple[str, list[AddedToken], str]] = {
    "inside another": ("<c>", [raw("<c>"), raw("|<c>")], "|<c>"),
    "another ends with its start": ("<c>", [raw("<c>"), raw("|<")], "|<c>"),
    "its end is its start": ("<c<", [raw("<c<")], "<c<c<"),
    "takes white space": ("<c>", [raw("<c>", lstrip=True)], "a <c>"),
    "only between words": ("<c>", [raw("<c>", single_word=True)], "a<c>"),
    "begins a word": ("c>", [raw("c>"), raw("|", single_word=True)], "|c>"),
    "found after normalizing": ("<c>", [AddedToken("<c>", normalized=True)], "a<c>"),
}


@pytest.mark.parametrize("reason", WRONG)
def test_tokens_before_which_a_cut_would_change_ids(reason: str) -> None:
    content, added, text = WRONG[reason]
    tokenizer = characters(added)
    before = text.rindex(content)
    apart = tokenizer.encode(text[:before]).ids + tokenizer.encode(text[before:]).ids
    assert apart != tokenizer.encode(text).ids
    pattern = cut_pattern(tokenizer)
    assert pattern is None or not pattern.search(content)


def test_random_merges_and_repeated_texts_forbid_cuts() -> None:
    drawn = bundled()
    drawn.model.dropout = 0.1  # type: ignore[attr-defined]
    assert cut_pattern(drawn) is None
    repeated = bundled()
    repeated.post_processor = processors.TemplateProcessing(single="$A $A", special_tokens=[])
    assert cut_pattern(repeated) is None


@pytest.mark.parametrize("kinds", ["PRE_TOKENIZERS", "NORMALIZERS", "POST_PROCESSORS"])
def test_unknown_kinds_forbid_cuts(kinds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_cuts, kinds, frozenset())
    assert cut_pattern(SHAPES["qwen"]() if kinds == "NORMALIZERS" else bundled()) is None


def test_thousands_of_tokens_are_found_in_one_pass() -> None:
    names = [f"<unused{i}>" for i in range(3000)] + [f"<|x{i}|>" for i in range(3000)]
    tokenizer = characters([raw(name) for name in names])
    pattern = cut_pattern(tokenizer)
    assert pattern is not None
    assert all(pattern.fullmatch(name) for name in names)
    assert not pattern.search("<unused3000> <unused-1> <unused12 > <|x|> <|x01|>")


@st.composite
def vocabularies(draw: st.DrawFn) -> list[AddedToken]:
    flags = st.booleans() | st.just(False)
    return [
        AddedToken(
            content,
            lstrip=draw(flags),
            rstrip=draw(flags),
            single_word=draw(flags),
            normalized=draw(flags),
            special=draw(st.booleans()),
        )
        for content in draw(st.lists(_tokens, min_size=1, max_size=5, unique=True))
    ]


@given(vocabularies(), st.data(), st.sampled_from(["first", "always", "never"]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_added_tokens(
    added: list[AddedToken], data: st.DataObject, scheme: Literal["first", "always", "never"], strip: bool
) -> None:
    tokenizer = characters(added)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    if strip:
        tokenizer.normalizer = normalizers.Strip()
    pattern = cut_pattern(tokenizer)
    if pattern is None:
        return
    pieces = st.sampled_from([token.content for token in added]) | st.text("<>|ab_ \n", max_size=4)
    text = "".join(data.draw(st.lists(pieces, max_size=12)))
    parts = [tokenizer.encode(part).ids for part in cut(text, pattern)]
    assert [token for part in parts for token in part] == tokenizer.encode(text).ids
