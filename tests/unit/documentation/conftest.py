"""A folder to try the documentation's commands in, the Hub of this machine, and the programs' own parsers."""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer

from tests.harness.hub_stand_in import HubStandIn, serve_this_process
from tests.unit.documentation.commands import ROOT
from toolkit.cli import app
from toolkit.recipe import load

CUT = ["training.max_steps=2", "data.max_samples=24", "eval.max_samples=4", "eval.max_new_tokens=4"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository's recipes, the quickstarts cut to two steps, 200 examples, 40 held out, to start commands in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    for path in (ROOT / "recipes").iterdir():
        (tmp_path / "recipes" / path.name).symlink_to(path)
    data = tmp_path / "recipes" / "quickstart" / "data"
    data.parent.unlink()
    data.mkdir(parents=True)
    for path in (ROOT / "recipes" / "quickstart").iterdir():
        if path.name != data.name:
            (data.parent / path.name).symlink_to(path)
    for path in (ROOT / "recipes" / "quickstart" / "data").iterdir():
        rows = path.read_text(encoding="utf-8").splitlines()[: 40 if "validation" in path.name else 200]
        (data / path.name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    for name in ("quickstart", "quickstart-mtp", "quickstart-dpo", "quickstart-grpo"):
        more = ["mtp.own_answers=4"] if name == "quickstart-mtp" else []
        path = tmp_path / "recipes" / f"{name}.yaml"
        path.unlink()
        text = (ROOT / "recipes" / path.name).read_text(encoding="utf-8")
        for override in [*CUT, *more]:
            section, key, value = re.split(r"[.=]", override)
            text = re.sub(rf"\n  {key}: \S+", "", text)
            text = re.sub(rf"\n{section}:\n", f"\n{section}:\n  {key}: {value}\n", text)
        path.write_text(text, encoding="utf-8")
        assert load(path).training.max_steps == 2
    own = (data / "dialog.train.jsonl").read_text(encoding="utf-8").splitlines()[:120]
    (tmp_path / "mine.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")
    (tmp_path / "runs").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "my_task.yaml").write_text("task: my_task\n")
    (tmp_path / "metric.py").write_text("def same_category(answer, wanted):\n    return float(answer == wanted)\n")
    return tmp_path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A Hub on this machine that this process's client talks to."""
    with serve_this_process(monkeypatch, tmp_path / "hub") as stand_in:
        yield stand_in


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for lm-evaluation-harness."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "stand_ins" / "lm_eval"))
    known = [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]
    kept = {name: sys.modules.pop(name) for name in known}
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        del sys.modules[name]
    sys.modules.update(kept)


class Parsed(Exception):
    """The program has read its arguments and would begin."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """`parse(words)`: let the command's own program read its arguments, and no more; raises where it refuses them."""
    read, read_known = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args
    strictly: list[argparse.ArgumentParser] = []

    def parse_args(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        strictly.append(self)
        try:
            read(self, *args, **kwargs)  # type: ignore[call-overload]
        finally:
            strictly.pop()
        raise Parsed

    def parse_known_args(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> object:
        found = read_known(self, *args, **kwargs)  # type: ignore[call-overload]
        if self not in strictly:
            raise Parsed
        return found

    def parse(words: list[str]) -> None:
        match words:
            case ["onecard", verb, *arguments]:
                onecard_takes(verb, arguments)
            case ["python", "-m", module, *arguments]:
                script(Path(module.replace(".", "/") + ".py"), arguments)
            case ["python", path, *arguments]:
                script(Path(path), arguments)
            case ["bash", path, *arguments] if path.endswith("finetune.sh"):
                onecard_takes("train", arguments[2:] if arguments[:1] == ["--processes"] else arguments)
            case ["bash", path, *arguments]:
                assert (ROOT / path).is_file(), path
                missing = [each for each in arguments if each.startswith("tests") and not (ROOT / each).exists()]
                assert not missing, missing
            case ["accelerate", "launch", *arguments]:
                accelerate_takes(arguments)
            case ["pip", "install", name, *_]:
                extras(name)
            case [path, *arguments] if path.endswith(".py"):
                script(Path(path), arguments)

    def script(path: Path, arguments: list[str]) -> None:
        """Up to where it has parsed; one that reads names without a parser is only looked for."""
        assert (ROOT / path).is_file(), path
        if "argparse" not in (ROOT / path).read_text(encoding="utf-8"):
            return
        with monkeypatch.context() as inside:
            inside.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            inside.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
            inside.setattr(sys, "argv", [path.name, *arguments])
            inside.setattr(sys, "path", [str((ROOT / path).parent), *sys.path])
            known = set(sys.modules)
            try:
                runpy.run_path(str(ROOT / path), run_name="__main__")
            except Parsed:
                return
            finally:
                for name in set(sys.modules) - known:
                    if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "scripts")):
                        del sys.modules[name]
        raise AssertionError(f"{path} ended without reading its arguments")

    return parse


def onecard_takes(verb: str, arguments: list[str]) -> None:
    """Raises where the verb's parser refuses the arguments."""
    group = typer.main.get_command(app)
    if verb.startswith("--"):
        assert verb in {option for parameter in group.params for option in parameter.opts} | {"--help"}, verb
        return
    commands = group.commands  # type: ignore[attr-defined]
    assert verb in commands, verb
    commands[verb].make_context(verb, list(arguments))


def accelerate_takes(arguments: list[str]) -> None:
    """accelerate's launcher, and behind `-m toolkit` ours."""
    from accelerate.commands.launch import launch_command_parser

    given = launch_command_parser().parse_args(arguments)
    assert given.training_script == "toolkit"
    verb, *rest = given.training_script_args
    onecard_takes(verb, rest)


def extras(name: str) -> None:
    """The extras of `onecard[a,b]` are ours; `.` is this folder."""
    import tomllib

    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    asked = re.fullmatch(r"onecard\[([\w,-]+)\]|[\w-]+|\.", name)
    assert asked is not None, name
    assert set((asked[1] or "").split(",")) - {""} <= known.keys(), name
