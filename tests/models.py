"""Small random models in Hugging Face format, written by `transformers` itself: what the engine is checked against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0, 1 and 2. Generation ends at `<|endoftext|>` or `<|im_end|>`."""
VOCAB_SIZE = 512
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_TEXT = (
    "The river ran past the old mill and under the bridge, where two boats lay tied in the shade.",
    "She asked what time the train would leave, and he said that it had left an hour ago.",
    "You are a helpful assistant. Answer the question in one short sentence. Hello! How are you?",
    "In the morning the market was full of people who bought bread, apples, fish and flowers.",
    "system user assistant: write a list of three things, 1, 2 and 3; then say why each of them matters.",
)


def tiny_model(family: str, path: Path, *, shard_size: str = "5GB", **overrides: Any) -> Path:
    """Makes a random model of `family` (one of FAMILIES) with a tokenizer in `path` and returns `path`.

    `overrides` are fields of the family's `transformers` config. Weights are float32 and the same for the same
    arguments; biases and norm weights are random too. An existing model in `path` is kept as it is.
    """
    if (path / "config.json").is_file():
        return path
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "mistral":
        settings["sliding_window"] = None
    if family == "qwen3":
        settings["head_dim"] = 16
    settings.update(overrides)
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("bias"):
                    weight.normal_(0.0, 0.3)
                elif "norm" in name:
                    weight.uniform_(0.7, 1.3)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[2, 0], pad_token_id=0)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path, max_shard_size=shard_size)
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path) -> None:
    """Writes a byte-level BPE tokenizer with SPECIAL_TOKENS and a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[2],
        pad_token=SPECIAL_TOKENS[0],
        chat_template=CHATML,
    )
    fast.save_pretrained(path)
