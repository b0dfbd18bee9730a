"""What `pt-trtllm run` is asked: prompts and their options, from the command line or a file of JSON lines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.params import SamplingParams


def read_entries(
    prompts: list[str], input_ids: str | None, input_file: Path | None
) -> list[tuple[str, dict[str, Any]]]:
    """(label for messages, {"prompt": ...} or {"input_ids": ...} with options) from the one way that was used."""
    if sum((bool(prompts), input_ids is not None, input_file is not None)) != 1:
        raise ConfigError("give exactly one of --prompt, --input-ids and --input-file")
    if prompts:
        return [(f"prompt {index}", {"prompt": text}) for index, text in enumerate(prompts)]
    if input_ids is not None:
        ids = parse_json(input_ids, "--input-ids")
        if isinstance(ids, list) and ids and all(isinstance(token, int) for token in ids):
            ids = [ids]
        if not isinstance(ids, list):
            raise ConfigError("--input-ids: expected lists of token ids, as [[1,2,3],[4,5]]")
        return [(f"--input-ids {index}", {"input_ids": row}) for index, row in enumerate(ids)]
    assert input_file is not None
    try:
        text = input_file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{input_file}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    lines = enumerate(text.split("\n"), start=1)  # JSON strings may hold other line separators
    return [(f"{input_file}:{n}", parse_json(line, f"{input_file}:{n}")) for n, line in lines if line.strip()]


def parse_entry(entry: Any, label: str, defaults: SamplingParams) -> tuple[str | list[int], SamplingParams]:
    """(text or token ids, its sampling options)"""
    if not isinstance(entry, dict) or ("prompt" in entry) == ("input_ids" in entry):
        raise ConfigError(f'{label}: expected an object with either "prompt" or "input_ids"')
    options = {key: value for key, value in entry.items() if key not in ("prompt", "input_ids")}
    unknown = sorted(set(options) - {field.name for field in dataclasses.fields(SamplingParams)})
    if unknown:
        raise ConfigError(f"{label}: unknown options {unknown}")
    try:
        params = dataclasses.replace(defaults, **options)
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from None
    if "prompt" in entry:
        if not isinstance(entry["prompt"], str):
            raise ConfigError(f"{label}: prompt is {json.dumps(entry['prompt'])[:80]}, expected text")
        return entry["prompt"], params
    ids = entry["input_ids"]
    if not (isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)):
        raise ConfigError(f"{label}: input_ids is {json.dumps(ids)[:80]}, expected a list of token ids")
    return ids, params


def parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ConfigError(f"{where}: not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None


def text_or_file(value: str | None, option: str) -> str | None:
    """The text itself, or what the file named after an @ holds."""
    if value is None or not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option}: cannot read {value[1:]!r}: {error}") from None
