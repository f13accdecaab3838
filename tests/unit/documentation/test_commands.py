"""Every command in README and docs is run and parsed; every verb has its how-to and says what to type next."""

from __future__ import annotations

import builtins
import io
import json
import re
import runpy
import shlex
import shutil
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import typer

from tests.faults.conftest import Run, onecard
from tests.harness.hub_stand_in import HubStandIn
from tests.unit.documentation.commands import (
    ELSEWHERE,
    FOREIGN,
    PAGES,
    ROOT,
    Shown,
    foreign,
    is_walked,
    named_test,
    shown,
    shown_in,
    source_of,
)
from tests.unit.documentation.conftest import onecard_takes
from toolkit.cli import app
from toolkit.steps import Steps

__all__ = ["onecard"]
VERBS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
HOW_TO = ROOT / "docs" / "verbs.md"
README = ROOT / "README.md"
WALKED = ("verbs.md", "quickstart.md")
ON_THEIR_OWN = {"serve", "sweep"}
"""Verbs with a test of their own: one does not end, one begins a cluster."""
QUESTION = "Which category is it: oak - a tree?"


def test_commands_are_found() -> None:
    block = "```bash\nonecard train r.yaml \\\n    a.b=1  # why\n\n# no\npip install x\n```"
    found = shown(f"{block}\n`onecard plan RUN`, `train`, `onecard`")
    assert [each.words for each in found] == [
        ["onecard", "train", "r.yaml", "a.b=1"], ["pip", "install", "x"], ["onecard", "plan", "runs/quickstart"],
    ]  # fmt: skip
    forms = ("onecard push A [--tag]", "onecard train", "onecard doctor")
    assert [shown(f"`{text}`")[0].is_synopsis for text in forms] == [True, True, False]
    (piped,) = shown('```bash\necho "a b" | onecard generate RUN --prompt -\n```')
    assert (piped.typed, piped.words[1]) == ("a b", "generate")


def test_every_verb_has_a_how_to_with_a_command() -> None:
    sections = HOW_TO.read_text(encoding="utf-8").split("\n## ")[1:]
    assert sorted(section.partition("\n")[0] for section in sections) == VERBS
    for section in sections:
        verb = section.partition("\n")[0]
        assert any(each.words[1] == verb for each in shown(section)), verb


def test_every_verb_that_a_program_may_read_takes_json() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    silent = {verb for verb in VERBS if "--json" not in {opt for each in commands[verb].params for opt in each.opts}}
    assert silent == {"chat", "serve", "schema"}, "a conversation, a server, and what is JSON anyway"


def test_every_command_is_run_or_is_another_program() -> None:
    """Each has one place; every test that is named exists; every pattern is needed."""
    commands = [each for page in PAGES for each in shown_in(page) if not each.is_synopsis]
    for command in commands:
        places = [command.script, named_test(command), foreign(command), is_walked(command) or None]
        assert sum(place is not None for place in places) == 1, command
    assert {test for _, test in ELSEWHERE} == {test for each in commands if (test := named_test(each))}
    assert {why for _, why in FOREIGN} == {why for each in commands if (why := foreign(each))}
    assert len({each.text for each in commands if foreign(each)}) <= 11 < 130 < len(commands)


def test_what_is_shown_is_what_the_named_tests_run() -> None:
    """Verb or program, and every option: they stand in the test, or it takes the page's own words."""
    for page in PAGES:
        for command in shown_in(page):
            test = None if command.is_synopsis else named_test(command)
            if test is None:
                continue
            source = source_of(test)
            if "shown_in(" in source and page.name in source:
                continue
            wanted = [command.words[1], *(word for word in command.words if word.startswith("--"))]
            assert all(Path(word).name in source for word in wanted), (command, test)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one_that_its_program_takes(page: Path, parse: Callable[[list[str]], None]) -> None:
    for command in shown_in(page):
        if command.is_synopsis:
            if command.text.startswith("onecard "):
                assert command.words[1] in [*VERBS, "…"], command
            continue
        try:
            parse(command.words)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{command.page}: {command.text}: {error}")


class Walk:
    """Runs commands one after the other in one folder, as a reader types them."""

    def __init__(self, onecard: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self.onecard, self.monkeypatch = onecard, monkeypatch
        self.hinted: set[str] = set()

    def run(self, command: Shown) -> str:
        """Stdout; fails unless it ends with 0, says what comes next, and prints JSON where that is asked for."""
        _, verb, *arguments = command.words
        answers = iter([QUESTION if command.page == HOW_TO.name else "/help", ""])
        self.monkeypatch.setattr(builtins, "input", lambda _: next(answers))
        self.monkeypatch.setattr("sys.stdin", io.StringIO(command.typed))
        status, out, err = self.onecard(verb, *arguments)
        assert status == 0, f"{command.page}: {command.text}: {err}"
        if "--json" in arguments or verb == "schema":
            json.loads(out)
        assert self.is_hinted(err), f"{command.text}: says nothing of what comes next: {err}"
        self.hinted.add(verb)
        return out

    def is_hinted(self, err: str) -> bool:
        """Whether there are commands after `next`, each of them one that the program takes."""
        _, _, after = err.rpartition("next\n")
        hints = [shlex.split(line) for line in after.splitlines() if line.startswith("  ")]
        for _, verb, *arguments in hints:
            onecard_takes(verb, arguments)
        return bool(hints)


def parts_seen(monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], set[str]]:
    """The parts of all verbs from now on: those begun, and those that said how far they are."""
    begun: set[str] = set()
    counted: set[str] = set()
    begin, advance = Steps.begin, Steps.advance

    def beginning(self: Steps, name: str, drawn: bool = True) -> None:
        begun.add(name)
        begin(self, name, drawn)

    def advancing(self: Steps, done: float, total: float, unit: str) -> None:
        counted.update(part.name for part in self._open[-1:])
        advance(self, done, total, unit)

    monkeypatch.setattr(Steps, "begin", beginning)
    monkeypatch.setattr(Steps, "advance", advancing)
    return begun, counted


def interrupted(server: ThreadingHTTPServer) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def walk(onecard: Run, folder: Path, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> Walk:
    """In the cut folder, with a Hub, and servers that end at once."""
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", interrupted)
    return Walk(onecard, monkeypatch)


def test_every_command_of_the_how_tos_runs_and_says_what_comes_next(
    walk: Walk, folder: Path, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, counted = parts_seen(monkeypatch)
    commands = [each for each in shown_in(HOW_TO) if not each.is_synopsis]
    for command in filter(is_walked, commands):
        walk.run(command)
    assert walk.hinted == set(VERBS) - ON_THEIR_OWN
    assert {each.words[1] for each in commands if named_test(each)} >= ON_THEIR_OWN
    assert {"download", "load", "quantise", "tokenise", "train", "evaluate", "export", "upload"} <= begun
    assert {"load", "quantise", "tokenise", "evaluate", "export"} <= counted
    assert len(hub.commits) == 1
    assert (folder / "runs" / "quickstart" / "report.html").is_file()


def test_the_commands_of_the_other_pages_run(
    walk: Walk, folder: Path, hub: HubStandIn, lm_eval: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After what the how-tos begin with: a run, another one, and an adapter on the Hub."""
    for command in (
        "train RECIPE",
        "train RECIPE training.learning_rate=1e-3 training.output_dir=B",
        "push A OWNER/NAME",
    ):
        walk.run(Shown("", f"onecard {command}"))
    pages = [page for page in PAGES if page.name not in WALKED]
    commands = [each for page in pages for each in shown_in(page) if is_walked(each)]
    for command in commands:
        walk.run(command)
    assert len(commands) >= 19
    harness = [each.text.partition("#")[0] for each in commands if "--lm-eval" in each.text]
    asked = [json.loads(walk.run(Shown("", f"{text} --json")))["lm_eval"] for text in harness]
    assert [sorted(found["adapted"]) for found in asked] == [["arc_easy", "piqa"], ["my_task"]]
    assert all(found["base"] != found["adapted"] for found in asked)


def test_the_quickstart_runs(walk: Walk, folder: Path) -> None:
    steps = [each for each in shown_in(ROOT / "docs" / "quickstart.md") if is_walked(each)]
    for command in steps:
        walk.run(command)
    assert len(steps) >= 9
    assert (folder / "runs" / "tutorial" / "report.html").is_file()


def test_the_python_of_the_pages_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order that makes a run first: the page of the Python interface, then those that open its adapter."""
    blocks = 0
    names = ("python", "evaluation", "export", "rewards")
    for page in (*(ROOT / "docs" / f"{name}.md" for name in names), README):
        for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            (folder / "block.py").write_text(code, encoding="utf-8")
            runpy.run_path(str(folder / "block.py"))
            blocks += 1
        if not (folder / "runs" / "run").exists():
            shutil.copytree(folder / "runs" / "quickstart", folder / "runs" / "run")
    assert blocks == len([0 for page in PAGES for _ in re.findall("```python\n", page.read_text(encoding="utf-8"))])
    said = capsys.readouterr().out
    assert "runs/quickstart/adapter" in said
    assert "did you mean learning_rate" in said
