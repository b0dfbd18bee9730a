"""From a conversation to the text a model continues, by the model's own jinja template."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pt_trtllm.errors import ConfigError
from pt_trtllm.openai.errors import ApiError

PLAIN_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
{{ message.role | capitalize }}: {{ message.content }}

{% endfor %}
{%- if add_generation_prompt %}Assistant:{% endif %}"""
PLAIN_STOP = ("\nUser:",)
"""Where a model that continues a transcript would go on with the other side's words."""


MAX_REASON = 300
"""Characters of what a template says."""


class GenerationTag(Extension):
    """{% generation %} marks the assistant's own words for training; for a prompt it means nothing. What is set
    inside stays inside, as where models are trained."""

    tags = {"generation"}  # noqa: RUF012 (so declared by jinja2)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class ChatTemplate:
    """A compiled template. It comes with a model, so it runs in a sandbox and cannot change what it is given."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        where: str,
        is_own: bool = True,
        stop: Sequence[str] = (),
    ) -> None:
        """`is_own`: it came with the model, or was given for it."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self.stop = tuple(stop)
        self.is_own = is_own
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"{where}: not a chat template: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None) -> str:
        """The prompt, up to where the assistant's answer begins."""
        given = {"tools": None, "documents": None, **self._special_tokens, **(variables or {})}
        try:
            return self._template.render(**given, messages=messages, add_generation_prompt=True)
        except Exception as error:  # a template can raise anything, and what it is given comes from the client
            says = str(error)[:MAX_REASON] or type(error).__name__
            raise ApiError(f"the chat template refused the messages: {says}", param="messages") from None


def load_chat_template(tokenizer_dir: Path, file: Path | None = None) -> ChatTemplate:
    """The file asked for, else the tokenizer's own, else a plain transcript."""
    config = read_json(tokenizer_dir / "tokenizer_config.json")
    tokens = special_tokens({**read_json(tokenizer_dir / "special_tokens_map.json"), **config})
    for path in (file, tokenizer_dir / "chat_template.jinja"):
        if path is not None and (path is file or path.is_file()):
            try:
                return ChatTemplate(path.read_text(encoding="utf-8"), tokens, where=str(path))
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{path}: cannot read the chat template: {error}") from None
    where = f"{tokenizer_dir / 'tokenizer_config.json'}: chat_template"
    own = _default_of(config.get("chat_template"), where)
    if own is not None:
        return ChatTemplate(own, tokens, where=where)
    return ChatTemplate(PLAIN_TEMPLATE, tokens, where="a plain transcript", is_own=False, stop=PLAIN_STOP)


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like, written as text or as an entry with `content`; "" for those not set."""
    found = {"bos_token": "", "eos_token": "", "pad_token": "", "unk_token": ""}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


def _default_of(template: Any, where: str) -> str | None:
    """A template may be one text, or several with names."""
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if not isinstance(named.get("default"), str):
            raise ConfigError(
                f"{where} has {sorted(map(str, named))}, expected one named 'default'; use --chat-template"
            )
        return str(named["default"])
    if template is not None and not isinstance(template, str):
        raise ConfigError(f"{where} is a {type(template).__name__}, expected text")
    return template


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: is a {type(data).__name__}, expected an object")
    return data


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Unlike jinja's own, without escapes for HTML: models were trained on plain JSON."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
