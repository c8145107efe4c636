"""Turns eight old novels into clean paragraphs, because a model copies whatever noise it is fed.

Line breaks inside a paragraph, chapter headings, illustrations and publishers' pages are removed, and so are
paragraphs with slurs. Two contiguous stretches of every book are set aside and never trained on, so that
perplexity can be measured on text the model has not seen.
"""

import lzma
import re
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PLACES = (0.28, 0.77)  # where in each book the two held-out stretches begin
HELD_OUT_SHARE = 0.0125  # length of one stretch, as a share of the book

_HEADING = re.compile(r"^(chapter|book|part|adventure|epilogue|preface)\b.{0,70}$", re.IGNORECASE)
_NOISE = re.compile(r"^\W*$|^\[?illustration|^\(?trade mark|^the end\W*$", re.IGNORECASE)
_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "\r": ""})
_SLURS = re.compile(r"\bnigger|\bdark(y|ies)\b|\bcoons?\b", re.IGNORECASE)


@dataclass(frozen=True)
class Book:
    """Where a novel lies and where its story begins and ends."""

    file: str
    title: str
    author: str
    begins: str
    ends: str = ""


BOOKS = (
    Book("alice.txt.xz", "Alice's Adventures in Wonderland", "Lewis Carroll",
         "Alice was beginning", "THE END"),
    Book("sherlock.txt.xz", "The Adventures of Sherlock Holmes", "Arthur Conan Doyle",
         "To Sherlock Holmes she is", "Arthur Conan Doyle"),
    Book("pride.txt.xz", "Pride and Prejudice", "Jane Austen", "It is a truth universally"),
    Book("moby.txt.xz", "Moby Dick", "Herman Melville", "Call me Ishmael"),
    Book("war_of.txt.xz", "The War of the Worlds", "H. G. Wells", "No one would have believed"),
    Book("news_from.txt.xz", "News from Nowhere", "William Morris", "Up at the League", "FOOTNOTES:"),
    Book("little_colonel.txt.xz", "The Little Colonel's Hero", "Annie Fellows Johnston",
         '"Oh, Tarbaby!', "THE END."),
    Book("katrine.txt.xz", "Katrine", "Elinor Macartney Lane", "Ravenel Plantation occupies", "THE END"),
)  # fmt: skip

Document = list[str]  # the paragraphs of one chapter, in order


@dataclass
class Corpus:
    """Chapters to train on and stretches that are only ever measured."""

    train: list[Document]
    held_out: list[Document]


def load_corpus(folder: Path) -> Corpus:
    """Read every novel in `folder`, clean it and set the held-out stretches aside."""
    corpus = Corpus([], [])
    for book in BOOKS:
        with lzma.open(folder / book.file, "rt", encoding="utf-8") as file:
            raw = file.read()
        _divide(_chapters(_story(raw, book)), corpus)
    return corpus


def as_text(document: Document) -> str:
    """A document as the model reads it: paragraphs with an empty line between them."""
    return "\n\n".join(document)


def _story(raw: str, book: Book) -> str:
    """The text between title page and colophon, with quotes and marks normalised."""
    text = raw[raw.index(book.begins) :]
    if book.ends:
        text = text[: text.rindex("\n" + book.ends) if "\n" + book.ends in text else text.rindex(book.ends)]
    text = text.translate(_PLAIN)
    text = re.sub(r"\{\d+\}|\[\d+\]", "", text)  # footnote marks
    text = re.sub(r"[_=~|]", "", text)  # typesetting of italics and bold
    return _double_quotes(text) if text.count('"') < 200 else text


def _double_quotes(text: str) -> str:
    """Speech in 'single' quotes becomes speech in "double" quotes; apostrophes stay."""
    text = re.sub(r"(?<![\w.,!?;)])'(?=[A-Z\w(])", '"', text)
    return re.sub(r"(?<=[.,!?;:)-])'(?!\w)", '"', text)


def _chapters(story: str) -> list[Document]:
    chapters: list[Document] = [[]]
    for block in re.split(r"\n\s*\n", story):
        lines = [line for line in block.split("\n") if line.strip()]
        paragraph = _unwrap(lines)
        if _HEADING.match(paragraph) or (paragraph.upper() == paragraph and len(paragraph) < 90):
            if not _NOISE.match(paragraph) and chapters[-1] and not re.search('["!?]', paragraph):
                chapters.append([])
        elif not _NOISE.match(paragraph) and not _SLURS.search(paragraph):
            chapters[-1].append(paragraph)
    return [chapter for chapter in chapters if chapter]


def _unwrap(lines: list[str]) -> str:
    """Join wrapped lines; verse and letters, which are indented, keep their lines."""
    verse = len(lines) > 1 and all(line.startswith("  ") for line in lines)
    joined = "\n".join(line.strip() for line in lines) if verse else " ".join(line.strip() for line in lines)
    return re.sub(r" {2,}", " ", joined).strip()


def _divide(chapters: list[Document], corpus: Corpus) -> None:
    """Cut the held-out stretches out of one book; a cut ends a document on both sides."""
    total = sum(len(paragraph) for chapter in chapters for paragraph in chapter)
    windows = [(total * place, total * (place + HELD_OUT_SHARE)) for place in HELD_OUT_PLACES]
    position = 0
    for chapter in chapters:
        was_held_out: bool | None = None
        for paragraph in chapter:
            held_out = any(start <= position < end for start, end in windows)
            target = corpus.held_out if held_out else corpus.train
            if held_out != was_held_out:
                target.append([])
            target[-1].append(paragraph)
            was_held_out = held_out
            position += len(paragraph)
