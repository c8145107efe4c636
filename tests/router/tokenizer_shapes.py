"""Tokenizers in the shapes that known models have, trained on a page of text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

ROOT = Path(__file__).resolve().parents[2]
_CORPUS = [
    (ROOT / "README.md").read_text(encoding="utf-8"),
    "I'll say WE'VE seen 1,234 cafés in São Paulo; they're “naïve” — isn't it? 世界 こんにちは привет мир €20 x²",
]
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3 = _QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(
    *, pattern: str | None = None, special: list[str] | None = None, ignore_merges: bool = False
) -> Tokenizer:
    """As GPT-2, or with another pattern before its byte stand-ins."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    stand_ins = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = (
        stand_ins
        if pattern is None
        else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), stand_ins])
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=_CHATML if special is None else special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def bundled() -> Tokenizer:
    return Tokenizer.from_file(str(ROOT / "examples/small_model/model/tokenizer.json"))


def qwen() -> Tokenizer:
    tokenizer = byte_level(pattern=_QWEN)
    tokenizer.normalizer = normalizers.NFC()
    marks = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in marks])
    return tokenizer


def llama_3() -> Tokenizer:
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special += [f"<|reserved_special_token_{i}|>" for i in range(30)]
    tokenizer = byte_level(pattern=_LLAMA_3, special=special, ignore_merges=True)
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("  ", normalized=False)])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]),
        ]
    )
    return tokenizer


def _sentence_piece(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    names = ["<unk>", *special, *(f"<0x{value:02X}>" for value in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(" ".join(_CORPUS).split(" "), trainer)
    return tokenizer


def mistral() -> Tokenizer:
    """Prepends a word-start mark to the text, not to what stands between two special tokens."""
    tokenizer = _sentence_piece(["<s>", "</s>", "[INST]", "[/INST]"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def phi_3() -> Tokenizer:
    """Special tokens take the white space behind them, and a normalizer prepends."""
    tokenizer = _sentence_piece(["<s>"])
    tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    marks = ["<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.add_special_tokens([AddedToken(mark, rstrip=True, normalized=False, special=True) for mark in marks])
    return tokenizer


def unigram() -> Tokenizer:
    """As T5: normalizes and strips, and a mark begins every stretch."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def bert() -> Tokenizer:
    """Lower case; `[MASK]` takes the white space before it, and may not be cut before."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("[MASK]", lstrip=True, normalized=False, special=True)])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def overlapping() -> Tokenizer:
    """Added tokens that reach into each other, are looked for between words or after normalizing."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens(
        [
            AddedToken("<|im_end|>|", normalized=False),
            AddedToken("<w>", normalized=False, single_word=True),
            AddedToken("word", normalized=False, single_word=True),
            AddedToken("<l>", normalized=False, lstrip=True, rstrip=True),
            AddedToken("<r>", normalized=False, rstrip=True),
            AddedToken("River", normalized=True),
            AddedToken("<strip>", normalized=True, lstrip=True, rstrip=True),
        ]
    )
    return tokenizer


SHAPES: dict[str, Callable[[], Tokenizer]] = {
    make.__name__: make for make in (bundled, byte_level, qwen, llama_3, mistral, phi_3, unigram, bert, overlapping)
}
