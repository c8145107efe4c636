"""Tokenizer and batches: how prose and chats become windows of tokens with labels.

Prose is learned token by token. Of a chat only what the assistant says is learned, together with the mark
that ends the turn, because a model that is to answer must neither imitate the user nor go on for ever.
"""

import random
from bisect import bisect_right
from collections.abc import Iterator

import torch
from chats import CHAT_TEMPLATE, END_OF_TEXT, PAD, TURN_END, TURN_START, Chat
from data import Document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
CONTEXT = 2048
IGNORED = -100  # label of tokens that are read but not learned

Sequence = tuple[list[int], list[int]]  # token ids and, for each, the label to learn (or IGNORED)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: it can spell anything and its first ids are the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, TURN_START, TURN_END, PAD]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=special,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


class Prose:
    """All prose as one stream of tokens that can be entered at the start of any paragraph."""

    def __init__(self, documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> None:
        self.stream: list[int] = []
        self.starts: list[int] = []
        (end,) = tokenizer.encode(END_OF_TEXT, add_special_tokens=False)
        for document in documents:
            for position, paragraph in enumerate(document):
                last = position == len(document) - 1
                self.starts.append(len(self.stream))
                ids = tokenizer.encode(paragraph if last else paragraph + "\n\n", add_special_tokens=False)
                self.stream += ids + [end] * last

    def windows(self, length: int, rng: random.Random) -> Iterator[Sequence]:
        """Endless windows of `length + 1` tokens; every pass covers the stream once, in random order."""
        last = len(self.stream) - length - 1
        while True:
            targets = list(range(rng.randrange(length), last, length))
            rng.shuffle(targets)
            for target in targets:
                start = min(self.starts[bisect_right(self.starts, target) - 1], last)
                ids = self.stream[start : start + length + 1]
                yield ids, ids


def encode_chat(chat: Chat, tokenizer: PreTrainedTokenizerFast) -> Sequence:
    """A chat as the template writes it; only what the assistant says, and its end mark, is learned."""
    ids: list[int] = []
    labels: list[int] = []
    for message in chat:
        head = tokenizer.encode(f"{TURN_START}{message['role']}\n", add_special_tokens=False)
        body = tokenizer.encode(message["content"] + TURN_END, add_special_tokens=False)
        tail = tokenizer.encode("\n", add_special_tokens=False)
        learned = message["role"] == "assistant"
        ids += head + body + tail
        labels += [IGNORED] * len(head) + (body if learned else [IGNORED] * len(body)) + [IGNORED] * len(tail)
    return ids, labels


def chat_windows(chats: list[Sequence], length: int, rng: random.Random) -> Iterator[Sequence]:
    """Endless windows that begin with a fresh chat and are filled up with further ones."""
    ids: list[int] = []
    labels: list[int] = []
    while True:
        for chat_ids, chat_labels in rng.sample(chats, len(chats)):
            ids, labels = ids + chat_ids, labels + chat_labels
            if len(ids) > length:
                yield ids[: length + 1], labels[: length + 1]
                ids, labels = [], []


def batches(
    prose: Prose, chats: list[Sequence], length: int, rows: int, chat_share: float, rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of inputs and the labels that follow them; each row is either prose or chats."""
    from_prose, from_chats = prose.windows(length, rng), chat_windows(chats, length, rng)
    while True:
        picked = [next(from_chats if rng.random() < chat_share else from_prose) for _ in range(rows)]
        yield (
            torch.tensor([ids[:-1] for ids, _ in picked]),
            torch.tensor([labels[1:] for _, labels in picked]),
        )
