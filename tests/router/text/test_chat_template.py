"""Chat templates as model folders have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem.common.errors import ConfigError, TandemError
from tandem.router.text.chat_template import ChatTemplate

USER = [{"role": "user", "content": "a<b"}]


def template(folder: Path, source: object, **config: object) -> ChatTemplate:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": source, **config}))
    loaded = ChatTemplate.load(folder)
    assert loaded is not None
    return loaded


def test_string_template_with_special_tokens(tmp_path: Path) -> None:
    loaded = template(
        tmp_path,
        "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        bos_token="<s>",
        eos_token={"content": "</s>"},
    )
    assert loaded.render(USER) == "<s>a<b</s>"


def test_named_templates_use_the_default(tmp_path: Path) -> None:
    sources = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert template(tmp_path, sources).render(USER) == "yes"


def test_file_wins_over_config(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert template(tmp_path, "from the config").render(USER) == "from the file"


def test_additional_templates_are_files_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("with tools")
    (folder / "rag.jinja").write_text("{% if %} nobody asks for this one")
    loaded = template(tmp_path, "from the config")
    assert [loaded.render(USER), loaded.render(USER, tools=[{}])] == ["from the config", "with tools"]
    (tmp_path / "chat_template.jinja").write_text("from the file")
    loaded = template(tmp_path, [{"name": "tool_use", "template": "no"}])
    assert [loaded.render(USER), loaded.render(USER, tools=[{}])] == ["from the file", "with tools"]


def test_special_tokens_may_have_a_file_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    assert template(tmp_path, "{{ bos_token }}-{{ eos_token }}").render(USER) == "<s>-</s>"


@pytest.mark.parametrize("source", [7, [{"name": "default"}], ["default"], {"default": "x"}])
def test_a_template_of_another_type_is_a_configuration_error(tmp_path: Path, source: object) -> None:
    with pytest.raises(ConfigError, match="chat_template must be a string or a list of templates"):
        template(tmp_path, source)


def test_a_template_that_is_not_utf8_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"hello \xff")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja: is not UTF-8"):
        ChatTemplate.load(tmp_path)


def test_folder_without_template(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None


def test_what_templates_use_is_there(tmp_path: Path) -> None:
    source = (
        "{%- for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{% generation %}kept{% endgeneration %}"
        "{% if tools is none and not enable_thinking %}!{% endif %}{% if add_generation_prompt %}>{% endif %}"
    )
    rendered = template(tmp_path, source).render(USER * 2, enable_thinking=False)
    assert rendered == '{"role": "user", "content": "a<b"}4kept!>'


def test_template_that_objects_is_the_clients_error(tmp_path: Path) -> None:
    loaded = template(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TandemError, match="roles must alternate") as caught:
        loaded.render(USER)
    assert (caught.value.code, caught.value.param) == ("invalid_request", "messages")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].x.y }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_sandbox_and_type_errors_are_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(TandemError):
        template(tmp_path, source).render(USER)


def test_template_that_does_not_compile_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not compile"):
        template(tmp_path, "{% if %}")
