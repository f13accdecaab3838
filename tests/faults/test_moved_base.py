"""A base that is another one under the same name and revision is refused by name when the run goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import QUICKSTART

ROOT = Path(__file__).parents[2]
MOVED = "; the Hub's commit moved: " + "a" * 40 + " -> "

# huggingface_hub reads its switches at import, and remembers what a name led to: one process of its own keeps the Hub
# and the libraries, and each run is a fork of it.
CLIENT = """
import contextlib, io, json, os, sys
from pathlib import Path
from safetensors.torch import load, save
from tests.harness.hub_stand_in import serve

place, model = Path(sys.argv[1]), Path(sys.argv[2])
content = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
config, tokenizer = (json.loads(content[name]) for name in ("config.json", "tokenizer_config.json"))
weights = load(content["model.safetensors"])
tokenizer["pad_token"] = "<|im_start|>"
weights["model.norm.weight"] = weights["model.norm.weight"] + 1
states = {
    "first": ("a", content),
    "card": ("b", {**content, "README.md": b"a better card"}),
    "weights": ("c", {**content, "model.safetensors": save(weights, {"format": "pt"})}),
    "config": ("d", {**content, "config.json": json.dumps({**config, "rms_norm_eps": 0.1}).encode()}),
    "tokenizer": ("e", {**content, "tokenizer_config.json": json.dumps(tokenizer).encode()}),
}

def train():
    (place / "run" / "summary.json").unlink(missing_ok=True)
    err, code = io.StringIO(), 0
    sys.argv = ["onecard", "train", str(place / "recipe.yaml")]
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    return {"code": code, "err": err.getvalue()}

with serve() as hub:
    os.environ["HF_ENDPOINT"] = hub.url
    from toolkit import plan
    from toolkit import run as job
    from toolkit.cli import main

    outcomes = {}
    for name, (commit, files) in states.items():
        hub.repositories["alice/base"] = {"private": False, "files": [], "content": files, "commit": commit * 40}
        child = os.fork()
        if child == 0:
            try:
                (place / name).write_text(json.dumps(train()))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        outcomes[name] = json.loads((place / name).read_text())
    print(json.dumps(outcomes))
"""

RECIPE = """\
model: {{model_name_or_path: alice/base, revision: main}}
lora: {{r: 2}}
data: {{train: {place}/rows.jsonl}}
training:
  {{output_dir: {place}/run, max_steps: 2, learning_rate: 1e-2, max_length: 64, use_cpu: true, packing: false}}
eval: {{enabled: false}}
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `train` says and does at each commit of the base, one after the other, in one run's folder."""
    place = tmp_path_factory.mktemp("moved")
    rows = (QUICKSTART / "data" / "category.train.jsonl").read_text().splitlines()[:12]
    (place / "rows.jsonl").write_text("\n".join(rows))
    (place / "recipe.yaml").write_text(RECIPE.format(place=place))
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_") and "PROXY" not in k.upper()},
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(place / "home"),
        "PYTHONPATH": str(ROOT),
    }
    model = QUICKSTART / "nano-qwen3moe-2m"
    command = [sys.executable, "-W", "ignore", "-c", CLIENT, str(place), str(model)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("state", "commit", "words"),
    [
        ("weights", "c", "the base's weights differ"),
        ("config", "d", "the base's config.json differs"),
        ("tokenizer", "e", "the tokenizer or its chat template differs"),
    ],
)
def test_a_revision_that_moved_to_another_base_is_refused(
    outcomes: dict[str, dict[str, Any]], state: str, commit: str, words: str
) -> None:
    assert outcomes["first"]["code"] == 0, outcomes["first"]["err"]
    assert outcomes[state]["code"] == 4, outcomes[state]["err"]
    line = outcomes[state]["err"].splitlines()[-1]
    assert words in line
    assert "--fork" in line
    assert (MOVED + commit * 40 in line) == (state != "tokenizer")


def test_a_revision_that_moved_to_the_same_bytes_goes_on(outcomes: dict[str, dict[str, Any]]) -> None:
    assert outcomes["card"]["code"] == 0, outcomes["card"]["err"]
    assert "resuming from checkpoint-2" in outcomes["card"]["err"]
