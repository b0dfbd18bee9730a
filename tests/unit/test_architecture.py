"""Dependencies point one way: nothing imports from a layer above its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

PACKAGE = Path(__file__).parents[2] / "pt_trtllm"
LAYERS = [
    {"errors", "processes", "trace"},
    {"config", "env", "native"},
    {"mapping"},
    {"checkpoint", "comm"},
    {"network"},
    {"engine", "vllm"},
    {"runtime"},
    {"serving"},
    {"openai"},
    {"testing"},
    {"bench"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports_of(path: Path) -> set[str]:
    """Top-level parts of this package that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "pt_trtllm":
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pt_trtllm.")}
    return found & set(LEVEL)


def test_nothing_imports_from_above() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in LEVEL, f"{own} has no place in the layers: add it to this test and to docs/architecture.md"
        wrong += [
            f"{path.relative_to(PACKAGE)} imports {name}" for name in imports_of(path) if LEVEL[name] > LEVEL[own]
        ]
    assert wrong == []
