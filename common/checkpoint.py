"""Finds a model folder in Hugging Face format. Used by workers (weights) and the router (tokenizer, limits)."""

from __future__ import annotations

from pathlib import Path

from tandem.common.errors import ConfigError


def resolve_model(model: str) -> Path:
    """Returns the folder of `model`: a local folder, or a hub id fetched with `huggingface_hub`.

    Raises ConfigError where it is neither, or the hub cannot be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"--model {model}: the folder has no config.json; give a folder in Hugging Face format")
        return folder.resolve()
    if folder.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise ConfigError(f"--model {model}: no such folder, and not a hub id of the form OWNER/NAME")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"--model {model}: not a local folder, and fetching it from the hub failed ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:200]}). Download it where there is a network and pass its folder."
        ) from error
