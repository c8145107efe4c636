"""Model folders are input too: whatever is in them, a model is loaded or a ConfigError says what is wrong."""

from __future__ import annotations

import copy
import json
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.common.errors import ConfigError, TandemError
from tandem.engine.model.loader import load_model
from tandem.router.settings import RouterConfig
from tandem.router.text.served_model import ServedModel
from tandem.router.text.tokenizer import ModelText
from tandem.runtime.preflight import checked, in_a_fork
from tandem.runtime.settings import ServeConfig
from tests.models import tiny_model

MUCH_KIB = 1 << 20
DEEP: Any = "x"
for _ in range(500):
    DEEP = [DEEP]

_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_EXTREMES: list[Any] = [
    10**9, 10**18, 10**400, -1, 0, 1, 1e300, 1e-300, -0.0, 0.5, float("nan"), float("inf"), float("-inf"), "", "x",
    "x" * 10**5, "\ud800", "\0", None, True, False, [], {}, [[]], [None], {"": None}, DEEP, "1e9", [10**9], [-1],
    {"rope_type": "yarn", "factor": 1e-30}, {"rope_type": "llama3"}, {"type": "linear", "factor": 1e30},
    "{{ 9**9**9 }}", "{% for", [{"name": "default", "template": "x"}],
]  # fmt: skip
_NEW_FIELDS = (
    "head_dim", "sliding_window", "layer_types", "rope_scaling", "rope_parameters", "rope_theta", "max_window_layers",
    "use_sliding_window", "partial_rotary_factor", "quantization_config", "attention_bias", "mlp_bias", "chat_template",
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "eos_token_id", "bos_token",
    "added_tokens_decoder", "original_max_position_embeddings", "vision_config", "tie_word_embeddings", "vocab_size",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3", tmp_path_factory.mktemp("rogue") / "made")


@pytest.fixture(scope="module")
def folder(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("rogue") / "copy"))


def loaded(folder: Path) -> str:
    """Empty, or what is said to be wrong."""
    try:
        model = ServedModel.load(RouterConfig(model=str(folder), decode_workers=["unix:/nowhere"]))
        model.close()
        load_model(folder, dtype="float32", device="cpu", quantization=None, attention="torch")
    except ConfigError as error:
        return str(error)
    return ""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Those of all values inside, of long lists and objects the first few."""
    if isinstance(value, dict):
        inside = list(value.items())[:40]
    elif isinstance(value, list):
        inside = list(enumerate(value[:5]))
    else:
        inside = []
    return [path, *(place for key, part in inside for place in places(part, (*path, key)))]


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    content = copy.copy(content)
    content[place[0]] = changed(content[place[0]], place[1:], value) if place[1:] else value
    return content


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_a_rogue_field_is_an_error_that_names_the_folder_or_harmless(
    made: Path, folder: Path, data: st.DataObject
) -> None:
    file = data.draw(st.sampled_from(_FILES))
    content = json.loads((made / file).read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        value = data.draw(st.sampled_from(_EXTREMES))
        if data.draw(st.booleans()):
            content = changed(content, data.draw(st.sampled_from(places(content))), value)
        elif isinstance(content, dict):
            content = {**content, data.draw(st.sampled_from(_NEW_FIELDS)): value}
    try:
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        problem = loaded(folder)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MUCH_KIB
    finally:
        shutil.copy(made / file, folder / file)
    if problem:
        assert any(name in problem for name in (folder.name, "config.json", "tokenizer", "template")), problem
        assert len(problem) < 1500


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_a_rogue_header_of_weights_is_an_error_that_names_the_folder(
    made: Path, folder: Path, data: st.DataObject
) -> None:
    raw = (made / "model.safetensors").read_bytes()
    [size] = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    place = data.draw(st.sampled_from(places(header)))
    new = json.dumps(changed(header, place, data.draw(st.sampled_from(_EXTREMES)))).encode()
    size = data.draw(st.sampled_from([len(new), len(new) + 1, 0, 1 << 40, (1 << 64) - 1]))
    try:
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + new + raw[8 + len(header) :])
        assert folder.name in (loaded(folder) or folder.name)
    finally:
        shutil.copy(made / "model.safetensors", folder / "model.safetensors")


def rewritten(folder: Path, file: str, change: Callable[[Any], Any]) -> None:
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def test_an_expression_that_goes_back_and_forth_is_refused_at_the_start(copied: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    rewritten(copied, "tokenizer.json", lambda content: content.update(pre_tokenizer=split))
    with pytest.raises(ConfigError, match=r"tokenizer\.json: cannot be used as a tokenizer"):
        ModelText(copied)


async def test_a_text_that_the_tokenizer_fails_on_is_an_error_of_the_request(copied: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(q+)+z"}, "behavior": "Isolated", "invert": False}
    rewritten(copied, "tokenizer.json", lambda content: content.update(pre_tokenizer=split))
    text = ModelText(copied)
    for size in (60, 6000):  # on the event loop, and in a thread
        with pytest.raises(TandemError, match="tokenizer fails on this text") as caught:
            await text.encode("q" * size, add_special_tokens=False)
        assert caught.value.code == "invalid_request"
    text.close()


def test_a_million_added_tokens_are_refused_at_once(copied: Path) -> None:
    def change(content: Any) -> None:
        [token, *_] = content["added_tokens"]
        content["added_tokens"] += [{**token, "id": 1000 + i, "content": f"<{i}>"} for i in range(100_000)]

    rewritten(copied, "tokenizer.json", change)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: added_tokens: 100003 are more than"):
        ModelText(copied)


def test_tokens_beyond_the_vocabulary_are_warned_of(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = RouterConfig(model=str(copied), decode_workers=["unix:/nowhere"])
    ServedModel.load(config).close()
    assert "beyond vocab_size" not in caplog.text
    rewritten(copied, "config.json", lambda content: content.update(vocab_size=100))
    ServedModel.load(config).close()
    assert "tokenizer.json: has token ids up to" in caplog.text
    assert "beyond vocab_size 100 of config.json" in caplog.text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", b"{{ '\xff' }}"),
        ("chat_template.jinja", b"{{ " + b"(" * 5000 + b"1" + b")" * 5000 + b" }}"),
        ("config.json", b'{"architectures": ' + b"[" * 900 + b"]" * 900 + b"}"),
        ("config.json", b"[" * 10**6),
        ("tokenizer.json", b'{"model": ' + b'{"a":' * 500 + b"1" + b"}" * 501),
        ("tokenizer_config.json", b'{"chat_template": "\\ud800{{"}'),
    ],
)
def test_tandem_serve_says_one_line_of_a_folder_that_cannot_be_served(copied: Path, file: str, content: bytes) -> None:
    (copied / "chat_template.jinja").unlink()
    (copied / file).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        checked(ServeConfig(model=str(copied)))
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_check_that_takes_for_ever_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.runtime.preflight.CHECK_CPU_S", 1)

    def forever() -> None:
        while True:
            pass

    with pytest.raises(ConfigError, match="cannot be read within 1 s"):
        in_a_fork(forever)
