"""The messages of a conversation, as templates want them."""

from __future__ import annotations

from typing import Any

from pt_trtllm.openai import fields
from pt_trtllm.openai.errors import ApiError

ROLES = ("system", "developer", "user", "assistant", "tool")


def read_message(entry: Any, index: int) -> dict[str, Any]:
    """A message with its content as one text. OpenAI's developer role is what templates call system."""
    where = f"messages[{index}]"
    if not isinstance(entry, dict):
        raise ApiError(f"{where} is {fields.shown(entry)}, expected an object", param="messages")
    role = entry.get("role")
    if role not in ROLES:
        raise ApiError(f"{where}.role is {fields.shown(role)}, expected one of {', '.join(ROLES)}", param="messages")
    content = entry.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{place}]") for place, part in enumerate(content))
    elif content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise ApiError(f"{where}.content is {fields.shown(content)}, expected text", param="messages")
    return {**entry, "role": "system" if role == "developer" else role, "content": content}


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else part
    raise ApiError(f"{where} is {fields.shown(kind)}, expected a part of type text", param="messages")
