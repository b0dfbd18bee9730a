"""Chat templates give what `transformers` gives, and cannot do anything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pt_trtllm.errors import ConfigError
from pt_trtllm.openai.chat_template import ChatTemplate, load_chat_template, special_tokens
from pt_trtllm.openai.errors import ApiError

pytestmark = pytest.mark.unit

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"
BRACKETS = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system, turns = 'You are kind.', messages %}
{%- endif %}
<|system|>{{ system | trim }}
{% for message in turns %}
    {%- if message.role not in ['user', 'assistant'] %}{% continue %}{% endif %}
<|{{ message.role }}|>{{ message['content'] }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}

{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{%- endif %}"""
COUNTING = """\
{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}
  {%- if message.role == "user" -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{% for message in messages %}
  {%- if loop.index0 == ns.last %}[LAST {{ ns.last }}]{% endif -%}
[{{ message.role | upper }}] {{ message | tojson }} {{ {"ü": [1, 2]} | tojson(indent=2) }}
{% if loop.index0 > 2 %}{% break %}{% endif %}
{% endfor %}{% if enable_thinking is defined and not enable_thinking %}no thoughts{% endif %}"""
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello <b>&</b> 'you' \"there\""}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Größe? {{ 7 * 7 }}"}],
    [
        {"role": "user", "content": "One\n\ntwo"},
        {"role": "assistant", "content": "Three"},
        {"role": "tool", "content": "{}"},
        {"role": "user", "content": ""},
        {"role": "user", "content": "Five"},
    ],
]


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(EXAMPLE / "tokenizer.json"), bos_token="<|bos|>", eos_token="<|eos|>"
    )


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("source", [BRACKETS, COUNTING])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_the_text_is_that_of_transformers(
    reference: PreTrainedTokenizerFast, source: str, messages: list[dict[str, Any]], variables: dict[str, Any]
) -> None:
    template = ChatTemplate(source, {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}, where="test")
    expected = reference.apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=True, **variables
    )
    assert template.render(messages, variables) == expected


MARKED = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
<|assistant|>{% generation %}{% set tail = '!' %}
{{ message.content }}{{ tail }}{% endgeneration %}{{ tail }}
    {%- else %}
{{ message.role }}: {{ message.content }}
    {%- endif %}
{% endfor %}"""


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_a_template_may_mark_the_assistants_words(
    reference: PreTrainedTokenizerFast, messages: list[dict[str, Any]]
) -> None:
    expected = reference.apply_chat_template(messages, chat_template=MARKED, tokenize=False)
    assert ChatTemplate(MARKED, {}, where="test").render(messages) == expected


def test_a_template_that_is_too_deep_for_python_is_the_clients_to_hear() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ApiError, match="the chat template refused the messages"):
        ChatTemplate("{{ deep | tojson }}", {}, where="test").render([], {"deep": deep})


def folder_with(tmp_path: Path, config: dict[str, Any], template: str | None = None) -> Path:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    return tmp_path


def test_the_template_is_found_where_models_keep_it(tmp_path: Path) -> None:
    def rendered(folder: Path, file: Path | None = None) -> str:
        return load_chat_template(folder, file).render([{"role": "user", "content": "x"}])

    tokens = {"bos_token": {"content": "<s>", "special": True}}
    assert rendered(folder_with(tmp_path, {**tokens, "chat_template": "{{ bos_token }}config"})) == "<s>config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    assert rendered(folder_with(tmp_path, {"chat_template": named})) == "named"
    folder = folder_with(tmp_path, {"chat_template": "config"}, "a file of its own")
    assert rendered(folder) == "a file of its own"
    given = tmp_path / "given.jinja"
    given.write_text("the one asked for")
    assert rendered(folder, given) == "the one asked for"


def test_without_a_template_the_conversation_is_a_plain_transcript(tmp_path: Path) -> None:
    shutil.copy(EXAMPLE / "tokenizer_config.json", tmp_path)
    template = load_chat_template(tmp_path)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert template.render(messages) == "<|bos|>System: Be kind.\n\nUser: Hi\n\nAssistant:"
    assert template.stop == ("\nUser:",)
    assert not template.is_own


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append('x') }}",
        "{% set _ = messages[0].update({'content': 'changed'}) %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ raise_exception('only two roles') }}",
        "{{ messages[5].content.upper() }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_stays_in_its_sandbox_and_its_failure_is_the_clients_to_hear(source: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(ApiError, match="the chat template refused the messages"):
        ChatTemplate(source, {}, where="test").render(messages)
    assert messages == [{"role": "user", "content": "x"}]


def test_a_broken_template_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a chat template"):
        load_chat_template(folder_with(tmp_path, {"chat_template": "{% if %}"}))
    with pytest.raises(ConfigError, match="expected one named 'default'"):
        load_chat_template(folder_with(tmp_path, {"chat_template": [{"name": "rag", "template": "x"}]}))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected an object"):
        load_chat_template(tmp_path)


def test_special_tokens_are_texts_or_entries() -> None:
    found = special_tokens({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "model_max_length": 5})
    assert found == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "", "unk_token": ""}
