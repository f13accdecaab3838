"""From a recipe to the Hub and back, through the command: pushed, verified, used, and trained on from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.faults.conftest import MODEL, recipe
from tests.harness.hub_stand_in import HEAD, HubStandIn, serve

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


def calls(hub: HubStandIn, home: Path, *arguments: list[str]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command, one after the other, logged in to the Hub at `hub`."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_") and "PROXY" not in k.upper()},
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(home),
        "HF_TOKEN": "good",
        "OLD_TOKEN": "wrong-secret",
    }
    command = [sys.executable, "-c", CLIENT, json.dumps(arguments)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[tuple[int, str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_pushed_verified_used_and_trained_on_from_the_hub(recipe: Path, tmp_path: Path) -> None:
    name, question = f"hf://alice/mine@{HEAD}", "Which category is it: oak - a tree?"
    train = ["train", str(recipe), "training.max_steps=2", "training.save_steps=2", "eval.max_samples=4"]
    push = ["hub.push_to_hub=true", "hub.hub_model_id=alice/mine"]
    with serve() as hub:
        refused, *done = calls(
            hub,
            tmp_path / "home",
            [*train, *push, "hub.hub_token=${OLD_TOKEN}", f"training.output_dir={tmp_path}/never"],
            [*train, *push],
            ["verify", name, "--base", str(MODEL)],
            ["generate", name, "--base", str(MODEL), "--prompt", question, "--max-new-tokens", "4"],
            ["generate", str(tmp_path / "run"), "--prompt", question, "--max-new-tokens", "4"],
            ["eval", name, *_data(recipe), "--base", str(MODEL), "--json"],
            [*train, f"lora.adapter_name_or_path={name}", f"training.output_dir={tmp_path}/on"],
        )
    code, _, err = refused
    assert code == 7
    assert "the Hub does not accept the token" in err
    assert "nothing has been trained yet" in err
    assert "wrong-secret" not in err
    assert not (tmp_path / "never").exists()
    assert [code for code, *_ in done] == [0] * 6, [err[-600:] for code, _, err in done if code]
    (commit,) = hub.commits
    artifact = tmp_path / "run/adapter"
    assert commit["files"] == {path.name: path.read_bytes() for path in artifact.iterdir()}
    assert hub.repositories["alice/mine"]["private"]
    assert done[0][1].strip() == f"{hub.url}/alice/mine/commit/{'b' * 40}"
    assert done[2][1] == done[3][1] != ""
    first, second = (json.loads((tmp_path / run / "summary.json").read_bytes()) for run in ("run", "on"))
    assert json.loads(done[4][1]) == {part: value for part, value in first["results"].items() if part != "training"}
    assert second["results"]["base"]["loss"] == first["results"]["base"]["loss"]
    assert second["training"]["loss"] < first["training"]["loss"]  # it began where the first had ended


def _data(recipe: Path) -> list[str]:
    """An artifact names no file of this machine, so the data are given again."""
    from toolkit.recipe import load

    data = load(recipe, note=lambda line: None).data
    return [f"data.train={data.train}", *([f"data.validation={data.validation}"] if data.validation else [])]
