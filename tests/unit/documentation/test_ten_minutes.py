"""scripts/ten_minutes.py, shortened and in this process: from init to a private commit of the trained bytes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from tests.faults.conftest import Run, onecard
from tests.harness.hub_stand_in import HubStandIn
from tests.unit.documentation.commands import ROOT

__all__ = ["onecard"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    spec = importlib.util.spec_from_file_location("ten_minutes", ROOT / "scripts" / "ten_minutes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_from_init_to_push(
    script: ModuleType, onecard: Run, hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def in_this_process(_: HubStandIn, folder: Path, verb: str, arguments: list[str]) -> float:
        status, _, err = onecard(verb, *arguments)
        assert status == 0, err
        return 1.5

    @contextmanager
    def this_hub() -> Iterator[HubStandIn]:
        yield hub

    monkeypatch.setattr(script, "serve", this_hub)
    monkeypatch.setattr(script, "onecard", in_this_process)
    short = ["training.max_steps=2", "data.max_samples=24", "eval.max_samples=4"]
    monkeypatch.setattr("sys.argv", ["ten_minutes.py", str(tmp_path), *short])
    script.main()
    table = capsys.readouterr().out.splitlines()
    assert [line.split("`")[1] for line in table if "onecard" in line] == [
        f"onecard {verb}" for verb in ("init", "plan", "train", "report", "generate", "push")
    ]
    assert table[-1] == "| in all | 9.0 |"
    hub.commits[0]["files"]["README.md"] += b"changed on the way"
    with pytest.raises(SystemExit, match="the Hub has other bytes"):
        script.check(tmp_path / "run", hub)
    hub.repositories[script.REPOSITORY]["private"] = False
    with pytest.raises(SystemExit, match="not one private commit"):
        script.check(tmp_path / "run", hub)


def test_a_verb_is_a_command_of_its_own_and_its_failure_ends_it(
    script: ModuleType, hub: HubStandIn, tmp_path: Path
) -> None:
    assert 0 < script.onecard(hub, tmp_path, "schema", []) < 600
    said = (tmp_path / "schema.txt").read_text()
    assert json.loads(said[said.index("{") :])["properties"]
    with pytest.raises(SystemExit, match=r"onecard plan: exit code 2\n"):
        script.onecard(hub, tmp_path, "plan", [str(tmp_path / "nothing.yaml")])
