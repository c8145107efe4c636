"""Writes `docs/api-fields.md` from the bodies of requests and `field_table.py`: run it with `python -m`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tandem.router.http import batches as http_batches
from tandem.router.requests.bodies import ChatBody, CompletionBody, ContextBody, DetokenizeBody, TokenizeBody
from tandem.router.requests.embedding import EmbeddingsBody
from tandem.router.requests.messages import MessagesBody
from tandem.router.requests.responses import ResponsesBody
from tandem.router.web.field_table import Other, Refused
from tandem.router.web.request_fields import Inside, KnownFields, known_fields

BODIES: dict[str, type] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/responses": ResponsesBody,
    "/v1/messages": MessagesBody,
    "/v1/embeddings": EmbeddingsBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/v1/contexts": ContextBody,
    "/v1/batches": http_batches.BatchBody,
}
"""Bodies by path. `/v1/responses/input_tokens` and `/v1/messages/count_tokens` take what the endpoint above them
takes."""
_COLUMNS = {
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/v1/embeddings": "embeddings",
}
_HEAD = """\
# Fields of requests

Made by `python -m tandem.router.http.field_docs > docs/api-fields.md`; a test compares.

Nothing that a request asks for is ignored in silence. A field is one of

- **yes**: implemented;
- **refused**: it would change the answer and is not supported: a 400 that names it and says what to use instead. Null,
  false and empty values ask for nothing and pass, and so do values that ask for what is done anyway;
- **tolerated**: it has no effect, and clients send it as a matter of course. Its answer has them in the header
  `x-tandem-ignored` (`user, messages[].refusal`), and the router's log names each of them once;
- unknown: a 400 where it looks like a field that is known (`temprature`: "did you mean temperature?"); otherwise
  tolerated, as clients get new fields faster than servers.

Lines of a batch are read as the same requests. What a field means is said by the references of OpenAI, Anthropic and
vLLM.
"""


def markdown() -> str:
    """Text of `docs/api-fields.md`."""
    known = {path: known_fields(body) for path, body in BODIES.items()}
    parts = [_HEAD, "## Generation and embeddings\n", *_matrix({path: known[path] for path in _COLUMNS})]
    parts.append("\n## Other endpoints\n")
    parts += [f"- `{path}`: {_listed(known[path])}" for path in BODIES if path not in _COLUMNS]
    parts.append("\n## Inside fields\n\n| object | implemented | refused | tolerated |\n|---|---|---|---|")
    seen: set[int] = set()
    for path in _COLUMNS:
        for place, fields in nested(known[path], ""):
            if id(fields) not in seen:
                seen.add(id(fields))
                parts.append(f"| `{place}` of {_COLUMNS[path]} | {' | '.join(_kinds(fields))} |")
    return "\n".join(parts) + "\n"


def nested(known: KnownFields, place: str, seen: tuple[int, ...] = ()) -> Iterator[tuple[str, KnownFields]]:
    """Objects inside objects, by their path."""
    for name, inside in known.fields.items():
        if inside is not None:
            yield from _objects(inside, f"{place}{name}", seen)


def _objects(inside: Inside, path: str, seen: tuple[int, ...]) -> Iterator[tuple[str, KnownFields]]:
    if inside.one is not None and id(inside.one) not in seen:
        yield path, inside.one
        yield from nested(inside.one, f"{path}.", (*seen, id(inside.one)))
    if inside.each is not None:
        yield from _objects(inside.each, f"{path}[]", seen)


def _matrix(known: Mapping[str, KnownFields]) -> Iterator[str]:
    yield f"| field | {' | '.join(_COLUMNS[path] for path in known)} | note |"
    yield "|---" * (len(known) + 2) + "|"
    names = sorted({name for each in known.values() for name in (*each.fields, *each.others)})
    for name in names:
        cells = " | ".join(_cell(each, name) for each in known.values())
        yield f"| `{name}` | {cells} | {_note(known, name)} |"


def _note(known: Mapping[str, KnownFields], name: str) -> str:
    notes = {_COLUMNS[path]: each.others[name].why for path, each in known.items() if name in each.others}
    different = dict.fromkeys(notes.values())
    return "; ".join(different if len(different) < 2 else (f"{column}: {note}" for column, note in notes.items()))


def _cell(known: KnownFields, name: str) -> str:
    if name in known.fields:
        return "yes"
    return _word(known.others[name]) if name in known.others else ""


def _word(other: Other) -> str:
    return "refused" if isinstance(other, Refused) else "tolerated"


def _listed(known: KnownFields) -> str:
    implemented, refused, tolerated = _kinds(known)
    return "; ".join(
        text
        for text in (implemented, refused and f"refused: {refused}", tolerated and f"tolerated: {tolerated}")
        if text
    )


def _kinds(known: KnownFields) -> tuple[str, str, str]:
    def names(of: Iterator[str]) -> str:
        return ", ".join(f"`{name}`" for name in of)

    return (
        names(iter(known.fields)),
        names(name for name, other in known.others.items() if isinstance(other, Refused)),
        names(name for name, other in known.others.items() if not isinstance(other, Refused)),
    )


if __name__ == "__main__":
    print(markdown(), end="")
