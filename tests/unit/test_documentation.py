"""The documentation: the tutorial runs, commands are ones the program takes, the reference is current, it builds."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tests.faults.conftest import Run, onecard
from toolkit.cli import app

__all__ = ["onecard"]
ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def commands(text: str) -> list[list[str]]:
    """Every `onecard VERB …` in code blocks and code spans."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`(onecard [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line for part in (*blocks, *spans) for line in part.replace("\\\n", " ").splitlines()]
    return [
        shlex.split(line, comments=True)[1:]
        for line in lines
        if re.match(r"(\S*/)?onecard [a-z]+\b", line) and not re.search(r"…| \[", line)
    ]


def test_commands_are_found() -> None:
    text = "```bash\nonecard train r.yaml a.b=1  \n```\nand `onecard plan x --json`, `onecard`, `toolkit`"
    assert commands(text) == [["train", "r.yaml", "a.b=1"], ["plan", "x", "--json"]]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_every_command_is_one_that_the_program_takes(page: Path) -> None:
    group = typer.main.get_command(app)
    for verb, *arguments in commands(page.read_text(encoding="utf-8")):
        if arguments in ([], ["alone"]):
            assert verb in group.commands  # type: ignore[attr-defined]
            continue
        group.commands[verb].make_context(verb, list(arguments))  # type: ignore[attr-defined]


def test_the_tutorial_runs(onecard: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "runs").mkdir()
    ran = 0
    for arguments in commands((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")):
        if (len(arguments) > 1 and "--serve" not in arguments) or arguments == ["doctor"]:
            status, _, err = onecard(*arguments)
            assert status == 0, (arguments, err)
            ran += 1
    assert ran >= 9
    assert (tmp_path / "runs" / "tutorial" / "report.html").is_file()


def test_the_recipe_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("recipe_reference", ROOT / "scripts" / "recipe_reference.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    written = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert written == script.reference(), "run scripts/recipe_reference.py docs/recipe.md"


@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="mkdocs-material is not installed")
def test_it_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    # The theme's advertisement against the builder's next version is no warning about these pages.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "site" / "tutorial" / "index.html").is_file()
