"""Where each token of an answer is in its text, also where a character takes several tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandem.router.text.choice_text import ChoiceText, Piece, joined, prompt_piece
from tandem.router.text.detokenizer import Detokenizer
from tandem.router.text.tokenizer import ModelText
from tests.router.conftest import House, events, write_model
from tests.router.conftest import joined as chained
from tests.router.fake_worker import Script

SPECIAL = 2


@cache
def model_text() -> ModelText:
    return ModelText(write_model(Path(mkdtemp()) / "tiny"))


def agrees(piece: Piece) -> None:
    """Offsets count characters, and the tokens from any of them on are the rest of the text."""
    assert piece.offsets == sorted(piece.offsets)
    for index, offset in enumerate(piece.offsets):
        if piece.token_ids[index] == SPECIAL:
            continue
        rest = zip(piece.token_ids[index:], piece.token_texts[index:], strict=True)
        assert piece.text[offset:] == "".join(text for token_id, text in rest if token_id != SPECIAL)


def read(token_ids: list[int], cuts: list[int], stops: tuple[str, ...] = ()) -> Piece:
    """Fed in parts, read after each of them."""
    text = ChoiceText(Detokenizer(model_text(), [40, 41]), stops, keep_tokens=True)
    whole = Piece()
    for start, end in zip([0, *cuts], [*cuts, len(token_ids)], strict=True):
        text.feed(token_ids[start:end])
        whole = joined(whole, text.take())
    text.finish()
    return joined(whole, text.take())


texts = st.text(st.characters(codec="utf-8"), max_size=12) | st.text("aé中🙂‍👩🏽🚀 \n", max_size=12)
tokens = st.lists(st.integers(3, 399) | st.just(SPECIAL), max_size=12)


@given(texts, st.data())
@example("👩🏽‍🚀🙂中é", None)
@settings(deadline=None)
def test_offsets_agree_with_the_text_however_it_is_read(text: str, data: st.DataObject | None) -> None:
    ids = model_text()._tokenizer.encode(text, add_special_tokens=False).ids
    cuts = [] if data is None else sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    piece = read(ids, cuts)
    assert (piece.text, piece.token_ids) == (text, ids)
    agrees(piece)
    assert piece == read(ids, list(range(len(ids))))


@given(tokens, st.booleans())
@example([97, 2], False)
@example([97, 97, 159, 2, 2, 2, 97, 2], False)
@settings(deadline=None)
def test_offsets_agree_where_bytes_are_no_characters(ids: list[int], stops: bool) -> None:
    piece = read(ids, [], ("never found",) if stops else ())
    assert piece.token_ids == ids
    agrees(piece)


@given(texts)
@settings(deadline=None)
def test_a_prompts_tokens_are_found_in_its_text(text: str) -> None:
    ids = model_text()._tokenizer.encode(text, add_special_tokens=False).ids
    piece = prompt_piece(model_text(), ids, text)
    agrees(piece)
    with_begin = prompt_piece(model_text(), [SPECIAL, *ids], text)
    assert with_begin.offsets == [0, *piece.offsets], "what the text does not show takes no place in it"
    shown = prompt_piece(model_text(), [SPECIAL, *ids], "<|im_end|>" + text)
    assert shown.offsets == [0, *(10 + offset for offset in piece.offsets)]


async def logprobs_of(client: httpx.AsyncClient, body: dict[str, object]) -> tuple[str, dict[str, list[object]]]:
    response = await client.post("/v1/completions", json=body)
    if not body.get("stream"):
        choice = response.json()["choices"][0]
        return choice["text"], choice["logprobs"]
    chunks = [event["choices"][0] for event in events(response.text)[:-1]]
    found = {
        name: chained((chunk["logprobs"] or {}).get(name, []) for chunk in chunks) for name in ("tokens", "text_offset")
    }
    return "".join(chunk["text"] for chunk in chunks), found


@pytest.mark.parametrize("echo", [False, True])
async def test_streamed_and_whole_answers_have_the_same_offsets(house: House, echo: bool) -> None:
    text = ModelText(house.model)
    said = await text.encode("a 👩🏽‍🚀🙂 中é!", add_special_tokens=False)
    worker, client = await house.pair(Script(tokens=lambda _: [*said, SPECIAL], stop_token_id=SPECIAL))
    body = {"prompt": "été 🙂", "logprobs": 0, "max_tokens": 99, "echo": echo}
    whole_text, whole = await logprobs_of(client, body)
    assert whole_text == ("été 🙂" if echo else "") + "a 👩🏽‍🚀🙂 中é!"
    for index, offset in enumerate(whole["text_offset"]):
        assert whole_text[offset:] == "".join(map(str, whole["tokens"][index:-1]))  # type: ignore[misc]
    assert (whole["tokens"][-1], whole["text_offset"][-1]) == ("<|im_end|>", len(whole_text))
    for per_output in (1, 3):
        worker.script.per_output = per_output
        streamed_text, streamed = await logprobs_of(client, {**body, "stream": True})
        assert (streamed_text, streamed["text_offset"]) == (whole_text, whole["text_offset"])
        assert streamed["tokens"] == whole["tokens"]
