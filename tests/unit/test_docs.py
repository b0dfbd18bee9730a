"""What the documents promise exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pt_trtllm.cli.main import COMMANDS
from pt_trtllm.env import VARIABLES

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_environment_variable_is_documented_with_its_default() -> None:
    rows = re.findall(r"^\| `(PT_\w+)` \| (.*?) \|", (ROOT / "docs/environment.md").read_text(), re.MULTILINE)
    assert {name: default.strip("`") for name, default in rows} == {v.name: v.default or "(empty)" for v in VARIABLES}


def test_no_other_variable_is_read() -> None:
    sources = [*(ROOT / "pt_trtllm").rglob("*.py"), *(ROOT / "plugins").rglob("*.cpp")]
    read = set(re.findall(r'"(PT_[A-Z0-9_]+)"', "\n".join(path.read_text() for path in sources)))
    assert read <= {variable.name for variable in VARIABLES}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(document: Path) -> None:
    text = document.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link]
    paths = re.findall(r"`((?:pt_trtllm|plugins|scripts|tests|docs|examples)/[\w./-]*\w)`", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert missing == []


def test_the_readme_shows_only_commands_that_exist() -> None:
    shown = set(re.findall(r"^pt-trtllm (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert shown <= set(COMMANDS)
    assert {"convert", "build", "run"} <= shown


def test_architecture_names_every_package_folder() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    folders = {path.parent.name for path in (ROOT / "pt_trtllm").glob("*/__init__.py")}
    assert [name for name in sorted(folders) if f"`{name}/`" not in text] == []
