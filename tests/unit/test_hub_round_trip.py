"""From a recipe to the Hub and back, through the command: pushed, verified, used, and trained on from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import MODEL, recipe
from tests.hub_stand_in import HEAD, HubStandIn, serve

__all__ = ["recipe"]

# One process for all: huggingface_hub reads its switches at import, and torch is dear to import.
CLIENT = """
import contextlib, io, json, sys
from toolkit.cli import main

def call(arguments):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["onecard", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()

print(json.dumps([call(arguments) for arguments in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def calls(hub: HubStandIn, home: Path, token: str, *arguments: list[str]) -> list[tuple[int, str, str]]:
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_") and "PROXY" not in k.upper()},
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(home),
        "HF_TOKEN": token,
    }
    command = [sys.executable, "-c", CLIENT, json.dumps(arguments)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[tuple[int, str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_pushed_verified_used_and_trained_on_from_the_hub(recipe: Path, tmp_path: Path, home: Path) -> None:
    name, question = f"hf://alice/mine@{HEAD}", "Which category is it: oak - a tree?"
    short = ["training.max_steps=2", "training.save_steps=2", "eval.max_samples=4"]
    with serve() as hub:
        found: Any = calls(
            hub,
            home,
            "good",
            ["train", str(recipe), *short, "hub.push_to_hub=true", "hub.hub_model_id=alice/mine"],
            ["verify", name, "--base", str(MODEL)],
            ["generate", name, "--base", str(MODEL), "--prompt", question, "--max-new-tokens", "4"],
            ["generate", str(tmp_path / "run"), "--prompt", question, "--max-new-tokens", "4"],
            ["eval", name, *_data(recipe), "--base", str(MODEL), "--json"],
            ["eval", str(tmp_path / "run"), "--json"],
            ["train", str(recipe), *short, f"lora.adapter_name_or_path={name}", f"training.output_dir={tmp_path}/on"],
        )
    assert [code for code, *_ in found] == [0] * 7, [err[-600:] for code, _, err in found if code]
    (commit,) = hub.commits
    artifact = tmp_path / "run/adapter"
    assert commit["files"] == {path.name: path.read_bytes() for path in artifact.iterdir()}
    assert hub.repositories["alice/mine"]["private"]
    assert found[0][1].strip() == f"{hub.url}/alice/mine/commit/{'b' * 40}"
    assert found[2][1] == found[3][1] != ""
    assert json.loads(found[4][1]) == json.loads(found[5][1])
    first, second = (
        json.loads((folder / "summary.json").read_bytes()) for folder in (tmp_path / "run", tmp_path / "on")
    )
    assert second["results"]["base"]["loss"] == first["results"]["base"]["loss"]
    assert second["training"]["loss"] < first["training"]["loss"]  # it began where the first had ended


def test_a_refused_token_is_found_before_anything_is_trained(recipe: Path, tmp_path: Path, home: Path) -> None:
    with serve() as hub:
        ((code, _, err),) = calls(
            hub, home, "wrong", ["train", str(recipe), "hub.push_to_hub=true", "hub.hub_model_id=alice/mine"]
        )
    assert code == 7
    assert "the Hub does not accept the token" in err
    assert "hf auth login" in err
    assert not (tmp_path / "run").exists()
    assert not hub.commits


def _data(recipe: Path) -> list[str]:
    """An artifact names no file of this machine, so the data are given again."""
    from toolkit.recipe import load

    data = load(recipe, note=lambda line: None).data
    return [f"data.train={data.train}", *([f"data.validation={data.validation}"] if data.validation else [])]
