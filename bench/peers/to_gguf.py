"""Convert a Hugging Face Llama folder to a GGUF file, so that llama.cpp can be measured on the same weights.

Needs only ``numpy`` and ``gguf``. Covers what the benchmark models use: ``LlamaForCausalLM`` weights in
safetensors (one file or shards), tied or separate output embeddings, a byte-level BPE tokenizer, and the
``default`` and ``llama3`` rope types. Anything else raises ``UnsupportedModel`` instead of writing a file
that answers wrongly.

    python to_gguf.py MODEL_DIR model.gguf --dtype f16
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Config = dict[str, Any]

FILE_TYPES: dict[str, tuple[gguf.LlamaFileType, gguf.GGMLQuantizationType]] = {
    "f32": (gguf.LlamaFileType.ALL_F32, gguf.GGMLQuantizationType.F32),
    "f16": (gguf.LlamaFileType.MOSTLY_F16, gguf.GGMLQuantizationType.F16),
    "bf16": (gguf.LlamaFileType.MOSTLY_BF16, gguf.GGMLQuantizationType.BF16),
    "q8_0": (gguf.LlamaFileType.MOSTLY_Q8_0, gguf.GGMLQuantizationType.Q8_0),
}

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


class UnsupportedModel(ValueError):
    """The folder holds something this converter would get wrong."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of a config, in either the flat or the ``rope_parameters`` spelling."""

    theta: float
    kind: str
    scaling: Config

    @classmethod
    def of(cls, config: Config) -> Rope:
        """Read ``rope_parameters``, or ``rope_theta`` and ``rope_scaling`` as older configs write them."""
        parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
        theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        return cls(float(theta), kind, parameters)

    def frequency_divisors(self, head_dim: int) -> Float32 | None:
        """Return the [head_dim / 2] divisors that llama.cpp calls ``rope_freqs``, or None for plain rope."""
        if self.kind == "default":
            return None
        if self.kind != "llama3":
            raise UnsupportedModel(f"rope type {self.kind!r}")
        factor = float(self.scaling["factor"])
        low, high = float(self.scaling["low_freq_factor"]), float(self.scaling["high_freq_factor"])
        original = float(self.scaling["original_max_position_embeddings"])
        wavelength = 2 * math.pi * self.theta ** (np.arange(0, head_dim, 2) / head_dim)
        smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
        return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def read_safetensors(folder: Path) -> Iterator[tuple[str, Float32]]:
    """Yield the tensors of the folder's safetensors files as float32; by hand, as numpy has no bfloat16."""
    for path in sorted(folder.glob("*.safetensors")):
        raw = np.memmap(path, dtype=np.uint8, mode="r")
        header_size = int(raw[:8].view("<u8")[0])
        header = json.loads(raw[8 : 8 + header_size].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = (8 + header_size + offset for offset in entry["data_offsets"])
            yield name, _to_float32(raw[start:end], entry["dtype"]).reshape(entry["shape"])


def _to_float32(raw: NDArray[np.uint8], dtype: str) -> Float32:
    if dtype == "BF16":
        return (np.frombuffer(raw.tobytes(), "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype in ("F16", "F32"):
        return np.frombuffer(raw.tobytes(), "<f2" if dtype == "F16" else "<f4").astype(np.float32)
    raise UnsupportedModel(f"weights of type {dtype}")


def interleave_rope(weight: Float32, heads: int) -> Float32:
    """Reorder the rows of Q or K from Hugging Face's rotate-half pairs to llama.cpp's adjacent pairs.

    ``weight`` is [heads * head_dim, ...]. In each head, row i of the second half moves behind row i of the
    first.
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def pre_tokenizer_name(tokenizer: Config) -> str:
    """Name, in llama.cpp's words, the regular expression that splits text before BPE."""
    pre = tokenizer.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    if [s.get("type") for s in steps] == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if steps[0].get("type") == "Split" and steps[0]["pattern"].get("Regex") == LLAMA3_SPLIT:
        return "llama-bpe"
    raise UnsupportedModel("unknown pre-tokenizer; pass --pre with llama.cpp's name for it")


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: Config, pre: str | None) -> None:
    """Write vocabulary, merges, special tokens and chat template of a byte-level BPE ``tokenizer.json``."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if tokenizer["model"]["type"] != "BPE" or tokenizer["model"].get("byte_fallback"):
        raise UnsupportedModel("only byte-level BPE tokenizers are converted")
    size = config["vocab_size"]
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [gguf.TokenType.UNUSED] * size
    for text, index in tokenizer["model"]["vocab"].items():
        tokens[index], kinds[index] = text, gguf.TokenType.NORMAL
    for added in tokenizer.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], kind
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre or pre_tokenizer_name(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    for key in ("bos", "eos", "pad"):
        value = config.get(f"{key}_token_id")
        if value is not None:
            getattr(writer, f"add_{key}_token_id")(value[0] if isinstance(value, list) else value)
    template = folder / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def convert(folder: Path, output: Path, dtype: str = "f16", pre: str | None = None) -> None:
    """Write ``output`` from the model in ``folder``.

    Matrices are stored as ``dtype``, vectors (norms) as float32. ``pre`` overrides the pre-tokenizer's name.
    Raises UnsupportedModel for architectures, tokenizers and rope types listed nowhere above.
    """
    config: Config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("architectures") != ["LlamaForCausalLM"]:
        raise UnsupportedModel(f"architecture {config.get('architectures')}")
    file_type, matrix_type = FILE_TYPES[dtype]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    layers = config["num_hidden_layers"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = Rope.of(config)

    writer = gguf.GGUFWriter(output, "llama")
    writer.add_name(folder.resolve().name)
    writer.add_file_type(file_type)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    add_tokenizer(writer, folder, config, pre)

    divisors = rope.frequency_divisors(head_dim)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for source, tensor in read_safetensors(folder):
        if source == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        target = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise UnsupportedModel(f"tensor {source}")
        if "q_proj" in source:
            tensor = interleave_rope(tensor, heads)
        elif "k_proj" in source:
            tensor = interleave_rope(tensor, kv_heads)
        kind = matrix_type if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(target, gguf.quants.quantize(tensor, kind), raw_dtype=kind)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("folder", type=Path, help="Hugging Face model folder")
    parser.add_argument("output", type=Path, help="GGUF file to write")
    parser.add_argument("--dtype", choices=FILE_TYPES, default="f16", help="of the matrices (default: f16)")
    parser.add_argument("--pre", help="llama.cpp's name of the pre-tokenizer, when it cannot be told")
    arguments = parser.parse_args()
    convert(arguments.folder, arguments.output, arguments.dtype, arguments.pre)
    size = arguments.output.stat().st_size / 1e6
    print(f"{arguments.output}: {size:.1f} MB, matrices in {arguments.dtype}")


if __name__ == "__main__":
    main()
