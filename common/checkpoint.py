"""A model folder in Hugging Face format, local or from the hub, and what workers and the router both read of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from reprlib import Repr
from typing import Any

import tandem
from tandem.common.errors import ConfigError

logger = logging.getLogger(__name__)

BUNDLED_MODEL = Path(tandem.__file__).resolve().parent / "small_model"
BUNDLED_NAME = "tandem-small"
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
"""What is read of a folder besides its weights."""
MAX_BYTES = 16 << 20
"""Bound of a text file of the folder."""
MAX_LONG_BYTES = 64 << 20
"""Bound of a tokenizer or an index of weights. The largest vocabularies take half of it."""
INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"
_OTHER_KINDS = (
    ("*.gguf", "GGUF files, which are not read; give the original model, with config.json and safetensors"),
    ("adapter_config.json", "a LoRA adapter, not a model; give the base model"),
    ("model_index.json", "a diffusion pipeline, not a language model"),
    ("params.json", "weights in their maker's own format; give the Hugging Face version"),
    ("*.onnx", "an ONNX model, which is not read; give the original model, with config.json and safetensors"),
)


def resolve_model(model: str, *, weights: bool = True) -> Path:
    """The folder of `model`: a local folder, or a hub id whose files are fetched with `huggingface_hub`, without the
    weights where they are not wanted.

    Raises ConfigError where it is neither, holds another kind of model, or the hub cannot be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        _check_folder(folder, f"--model {model}")
        return folder.resolve()
    if folder.is_file():
        kind = "a GGUF file, which is not read" if folder.suffix == ".gguf" else "a file"
        raise ConfigError(f"--model {model}: is {kind}; give a folder in Hugging Face format")
    if folder.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise ConfigError(f"--model {model}: no such folder, and not a hub id of the form OWNER/NAME")
    return _fetch(model, weights)


def model_name(model: str) -> str:
    """What clients call a folder or hub id: its last part; the model that comes with the project has a name of its
    own."""
    folder = Path(model).expanduser()
    if folder.resolve() == BUNDLED_MODEL.resolve():
        return BUNDLED_NAME
    return folder.name or folder.resolve().name


def read_json(path: Path, most: int = MAX_BYTES) -> dict[str, Any]:
    """An optional JSON file of the model folder; {} where there is none. Raises ConfigError if it is malformed, or has
    more than `most` bytes."""
    if not path.is_file():
        return {}
    text = read_text(path, most)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return content


def read_text(path: Path, most: int = MAX_BYTES) -> str:
    """Raises ConfigError where the file cannot be read, has more than `most` bytes, or is not UTF-8."""
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise ConfigError(f"{path}: has more than {most} bytes; no model needs that")
        return content.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start})") from error


_REPR = Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 80


def shown(value: Any) -> str:
    """A value of such a file as an error quotes it: short, whatever its size or depth."""
    return _REPR.repr(value)


def special_tokens(folder: Path) -> dict[str, str]:
    """Texts of the special tokens by name (SPECIAL_TOKEN_NAMES). As in `transformers`, `special_tokens_map.json` counts
    unless `tokenizer_config.json` lists its added tokens itself."""
    config = read_json(folder / "tokenizer_config.json")
    found = dict(config)
    if "added_tokens_decoder" not in config:
        found |= read_json(folder / "special_tokens_map.json")
    tokens: dict[str, str] = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = found.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _check_folder(folder: Path, what: str) -> None:
    if (folder / "config.json").is_file():
        return
    for pattern, kind in _OTHER_KINDS:
        if any(folder.glob(pattern)):
            raise ConfigError(f"{what}: holds {kind}")
    raise ConfigError(f"{what}: the folder has no config.json; give a folder in Hugging Face format")


def _fetch(model: str, weights: bool) -> Path:
    """The hub's files in its cache. Weights come second: an index says which of the repository's they are."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = _download(model, None, [*TEXT_FILES, *([INDEX_FILE] if weights else [])])
        if not (folder / "config.json").is_file():
            _refuse_repository(model)
        if weights:
            _download(model, folder.name, _weight_names(folder))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"--model {model}: not a local folder, and fetching it from the hub failed ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:200]}). Download it where there is a network and pass its folder."
        ) from error
    return folder


def _download(model: str, revision: str | None, names: list[str]) -> Path:
    """Fetches what is missing in the cache; without a network, what is there has to do. Bars show the progress at a
    terminal, two lines in a log."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        plan = snapshot_download(model, revision=revision, allow_patterns=names, dry_run=True)
        missing = [file.file_size or 0 for file in plan if file.will_download]
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError):
        missing = []
    if missing:
        logger.info("fetching %s: %d files, %.1f MB", model, len(missing), sum(missing) / 1e6)
    folder = Path(snapshot_download(model, revision=revision, allow_patterns=names))
    if missing:
        logger.info("fetched %s into %s", model, folder)
    return folder


def _weight_names(folder: Path) -> list[str]:
    index = folder / INDEX_FILE
    return sorted(weight_map(index)) if index.is_file() else [WEIGHTS_FILE]


def weight_map(index: Path) -> set[str]:
    """Names of the weight files that an index lists. Raises ConfigError where it is malformed, or names a path."""
    try:
        names = set(json.loads(read_text(index, MAX_LONG_BYTES))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{index}: must be a JSON object with a weight_map from tensor to file name") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise ConfigError(f"{index}: weight_map: {shown(name)} is not a file name")
    return names


def _refuse_repository(model: str) -> None:
    from huggingface_hub import HfApi

    names = [Path(name) for name in HfApi().list_repo_files(model)]
    for pattern, kind in _OTHER_KINDS:
        if any(name.match(pattern) for name in names):
            raise ConfigError(f"--model {model}: holds {kind}")
    raise ConfigError(f"--model {model}: the repository has no config.json; give a model in Hugging Face format")
