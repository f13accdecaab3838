"""scripts/ten_minutes.py, shortened and in this process: from init to a private commit of the trained bytes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.faults.conftest import Run, onecard
from tests.hub_stand_in import HubStandIn
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


def test_from_init_to_push(script: ModuleType, onecard: Run, hub: HubStandIn, tmp_path: Path) -> None:
    def in_this_process(_: HubStandIn, folder: Path, verb: str, arguments: list[str]) -> float:
        status, _, err = onecard(verb, *arguments)
        assert status == 0, err
        return 1.5

    short = ["training.max_steps=2", "data.max_samples=24", "eval.max_samples=4"]
    took = script.walk(tmp_path, short, hub, in_this_process)
    assert list(took) == ["init", "plan", "train", "report", "generate", "push"]
    assert "| in all | 9.0 |" in script.table(took)
    hub.commits[0]["files"]["README.md"] += b"changed on the way"
    with pytest.raises(SystemExit, match="the Hub has other bytes"):
        script.check(tmp_path / "run", hub)
    hub.repositories[script.REPOSITORY]["private"] = False
    with pytest.raises(SystemExit, match="not one private commit"):
        script.check(tmp_path / "run", hub)
