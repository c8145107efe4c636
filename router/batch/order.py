"""In which order the requests of a batch run, so that every shared prefix is computed once. Pure.

After BatchLLM: the whole job is known, so its prompts form a tree of prefixes. Requests that share a prefix run one
after another while its KV is there; the first of them goes ahead, the others follow once it has computed the prefix.
Groups with much to decode for each prompt token go first: their long decoding then runs beside the prompts of the
later groups, instead of alone at the end.
"""

from __future__ import annotations

import heapq
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import xxhash

BLOCK_TOKENS = 64
"""Prefixes are compared in steps of so many tokens; waiting for a shorter one does not pay."""
_KEY_BYTES = 8


@dataclass(frozen=True, slots=True)
class Item:
    """What the order needs to know of one request."""

    keys: bytes = b""
    """See `prompt_keys`; empty: shares nothing."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    """How many it may generate."""


def prompt_keys(token_ids: Sequence[int], salt: str = "") -> bytes:
    """Eight bytes per full block, a hash of everything up to its end: two prompts with an equal n-th key share n
    blocks. Equal bytes of different prefixes (2**-64) would cost order, never an answer."""
    tokens = array("I", token_ids)
    view = memoryview(tokens).cast("B")
    step = BLOCK_TOKENS * tokens.itemsize
    key = xxhash.xxh3_64_intdigest(salt.encode())
    keys = bytearray()
    for end in range(step, len(view) + 1, step):
        key = xxhash.xxh3_64_intdigest(view[end - step : end], seed=key)
        keys += key.to_bytes(_KEY_BYTES, "big")
    return bytes(keys)


def shared_blocks(left: bytes, right: bytes) -> int:
    """Leading blocks that two prompts have in common. A binary search: keys that are equal had equal keys before."""
    low, high = 0, min(len(left), len(right)) // _KEY_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        place = slice((middle - 1) * _KEY_BYTES, middle * _KEY_BYTES)
        low, high = (middle, high) if left[place] == right[place] else (low, middle - 1)
    return low


class LineOrder:
    """Gives out the items of one job. Between `next` and `computed` an item is about to compute its prompt; no other
    item is given out that would compute a block of it at the same time."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._ranks, leaders = _ordered(items)
        """Place in the order of each item, by its index."""
        self._followers: dict[int, list[int]] = defaultdict(list)
        self._ready: list[tuple[int, int]] = []
        for index, leader in enumerate(leaders):
            if leader is None:
                self._ready.append((self._ranks[index], index))
            else:
                self._followers[leader].append(index)
        heapq.heapify(self._ready)

    def peek(self) -> int | None:
        """Index of the first item in order that need not wait for another one's prompt. None: all such are out."""
        return self._ready[0][1] if self._ready else None

    def next(self) -> int | None:
        """Gives out what `peek` tells of."""
        return heapq.heappop(self._ready)[1] if self._ready else None

    def awaited(self, index: int) -> bool:
        """Whether others wait for its prompt."""
        return index in self._followers

    def computed(self, index: int) -> None:
        """Its prompt is computed, or it has ended: those that waited for it are free. May be called again."""
        for follower in self._followers.pop(index, ()):
            self.put_back(follower)

    def put_back(self, index: int) -> None:
        """It was given out and could not run now."""
        heapq.heappush(self._ready, (self._ranks[index], index))


@dataclass(slots=True)
class _Node:
    """A prefix that several items share, or one item (a leaf)."""

    blocks: int
    """Length of the prefix."""
    item: int | None = None
    children: list[_Node] = field(default_factory=list)
    prompt_tokens: int = 0
    """Prompt tokens to compute for everything below the parent's prefix, each shared prefix once."""
    output_tokens: int = 0
    above: int = 0
    """Blocks of the parent."""
    first: int = 0
    """The item that goes ahead."""


def _ordered(items: Sequence[Item]) -> tuple[list[int], list[int | None]]:
    """Rank of each item, and the item whose prompt must be computed before it."""
    ranks = [0] * len(items)
    leaders: list[int | None] = [None] * len(items)
    root = _tree(items)
    _weigh(root, items)
    stack: list[tuple[_Node, int | None]] = [(root, None)]
    rank = 0
    while stack:
        node, leader = stack.pop()
        if node.item is not None:
            ranks[node.item], leaders[node.item] = rank, leader
            rank += 1
            continue
        first = node.first if node.blocks else None
        for place in range(len(node.children) - 1, 0, -1):
            stack.append((node.children[place], first))
        if node.children:
            stack.append((node.children[0], leader))
    return ranks, leaders


def _tree(items: Sequence[Item]) -> _Node:
    """Sorted keys put shared prefixes side by side; one pass over neighbours then builds the tree."""
    root = _Node(0)
    path = [root]
    previous: int | None = None
    for index in sorted(range(len(items)), key=lambda index: items[index].keys):
        if previous is not None:
            _hang(path, previous, shared_blocks(items[previous].keys, items[index].keys), items)
        previous = index
    if previous is not None:
        _hang(path, previous, 0, items)
    return root


def _hang(path: list[_Node], item: int, next_shares: int, items: Sequence[Item]) -> None:
    """Adds a leaf at the end of `path`, and shortens the path to what the next leaf shares with it."""
    last = _Node(len(items[item].keys) // _KEY_BYTES, item)
    while path[-1].blocks > next_shares:
        path[-1].children.append(last)
        last = path.pop()
    if path[-1].blocks < next_shares:
        path.append(_Node(next_shares))
    path[-1].children.append(last)


def _weigh(root: _Node, items: Sequence[Item]) -> None:
    """Sums tokens from the leaves up, and sorts children by them. Without recursion: chats nest deeply."""
    downwards = [root]
    for node in downwards:
        for child in node.children:
            child.above = node.blocks
        downwards.extend(node.children)
    for node in reversed(downwards):
        if node.item is not None:
            node.prompt_tokens = max(0, items[node.item].prompt_tokens - node.above * BLOCK_TOKENS)
            node.output_tokens = items[node.item].output_tokens
            node.first = node.item
        else:
            node.prompt_tokens = (node.blocks - node.above) * BLOCK_TOKENS
            node.prompt_tokens += sum(child.prompt_tokens for child in node.children)
            node.output_tokens = sum(child.output_tokens for child in node.children)
            node.children.sort(key=_decode_share, reverse=True)
            node.first = node.children[0].first if node.children else 0


def _decode_share(node: _Node) -> float:
    return node.output_tokens / max(1, node.prompt_tokens)
