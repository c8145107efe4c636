"""Model folders: what is fetched of a hub's repository, which folders are refused and by which name, special tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.common.checkpoint import resolve_model, special_tokens, weight_map
from tandem.common.errors import ConfigError
from tests.common.fake_hub import FakeHub, fake_hub
from tests.models import write_tokenizer

REPOSITORY = "someone/some-model"
TEXT_NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
TEXT = {name: json.dumps({"name": name}).encode() for name in TEXT_NAMES}
TEXT["additional_chat_templates/tool_use.jinja"] = b"hello"
OTHERS = {
    "README.md": b"# A model",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same weights again",
    "original/params.json": b"{}",
    "onnx/model.safetensors": b"others",
    "vocab.json": b"{}",
}
WEIGHTS = {"model-00001.safetensors": b"one", "model-00002.safetensors": b"two"}
INDEX = {"model.safetensors.index.json": json.dumps({"weight_map": dict(zip("ab", WEIGHTS, strict=True))}).encode()}

PROGRAM = """
import sys
from tandem.common.checkpoint import resolve_model
from tandem.common.errors import ConfigError
from tandem.common.telemetry import set_up_logging
set_up_logging("test")
try:
    print(resolve_model(sys.argv[1], weights=sys.argv[2] == "weights"))
except ConfigError as error:
    sys.exit(f"refused: {error}")
"""


def fetch(hub: FakeHub, cache: Path, what: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the library reads its environment when it is imported."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, REPOSITORY, what],
        env={name: value for name, value in os.environ.items() if not name.startswith("HF_")} | settings,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("weights", [INDEX | WEIGHTS, {"model.safetensors": b"all"}], ids=["sharded", "one file"])
def test_a_worker_fetches_text_and_weights_and_a_router_text_only(tmp_path: Path, weights: dict[str, bytes]) -> None:
    with fake_hub(REPOSITORY, TEXT | OTHERS | weights) as hub:
        router = fetch(hub, tmp_path, "text")
        assert router.returncode == 0, router.stderr
        assert sorted(hub.fetched) == sorted(TEXT)
        worker = fetch(hub, tmp_path, "weights")
        assert worker.returncode == 0, worker.stderr
        assert sorted(hub.fetched) == sorted(TEXT | weights)
        assert {path.name for path in Path(worker.stdout.strip()).iterdir() if path.is_file()} == {
            name for name in TEXT | weights if "/" not in name
        }
        assert f"fetching {REPOSITORY}: {len(TEXT)} files" in router.stderr
        for line in (router.stderr + worker.stderr).splitlines():
            assert "HTTP" not in line
    again = fetch(hub, tmp_path, "weights")
    assert again.returncode == 0, again.stderr
    assert again.stdout == worker.stdout, "without a network, what is in the cache has to do"


def test_a_repository_of_gguf_files_is_refused_as_such(tmp_path: Path) -> None:
    with fake_hub(REPOSITORY, {"README.md": b"", "model-q4.gguf": b"GGUF"}) as hub:
        answer = fetch(hub, tmp_path, "weights")
    assert answer.returncode == 1
    assert answer.stderr.splitlines()[-1].startswith(f"refused: --model {REPOSITORY}: holds GGUF files")
    assert hub.fetched == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.Q4_K_M.gguf", "GGUF"),
        ("adapter_config.json", "LoRA adapter"),
        ("model_index.json", "diffusion"),
        ("params.json", "own format"),
        ("model.onnx", "ONNX"),
        ("notes.txt", "no config.json"),
    ],
)
def test_a_folder_of_something_else_is_named_as_what_it_is(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=kind):
        resolve_model(str(tmp_path))


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="is a GGUF file"):
        resolve_model(str(path))


@pytest.mark.parametrize("name", ["../../etc/passwd", "sub/model.safetensors", 7])
def test_an_index_names_files_of_the_folder_only(tmp_path: Path, name: object) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ConfigError, match="is not a file name"):
        weight_map(index)


ADDED = {"__type": "AddedToken", "content": "<|im_start|>"}


@pytest.mark.parametrize("lists_added_tokens", [False, True])
@pytest.mark.parametrize("configured", [{}, {"bos_token": "<|im_start|>"}, {"eos_token": ADDED}])
@pytest.mark.parametrize("as_object", [False, True])
def test_special_tokens_are_those_of_transformers(
    tmp_path: Path, lists_added_tokens: bool, configured: dict[str, object], as_object: bool
) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "added_tokens_decoder"):
        config.pop(name, None)
    if lists_added_tokens:
        config["added_tokens_decoder"] = {"1": {"content": "<|im_start|>", "special": True}}
    path.write_text(json.dumps(config | configured))
    named = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    mapped = {name: {"content": text} if as_object else text for name, text in named.items()}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(mapped))
    theirs = AutoTokenizer.from_pretrained(tmp_path).special_tokens_map
    assert special_tokens(tmp_path) == {name: text for name, text in theirs.items() if isinstance(text, str)}
