"""Taking stock of a checkpoint on the Hub: config and headers are all that is fetched, every refusal is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save

from tests.faults.conftest import MODEL
from tests.harness.hub_stand_in import HubStandIn, serve
from toolkit.plan import audit

# huggingface_hub reads its switches at import, so one process of its own makes all the calls, through the command.
CLIENT = """
import contextlib, io, json, sys
from toolkit.cli import main

def outcome(model):
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["onecard", "plan", model, *([] if "planned" in model else ["--audit"]), "--json"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}

print(json.dumps({model: outcome(model) for model in sys.argv[1:]}))
"""

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
HEADER_BYTES = 100_001
"""What huggingface_hub asks for at once; each file here is larger."""

Outcomes = dict[str, dict[str, Any]]


def contents() -> dict[str, dict[str, bytes]]:
    """The embedded model in one file, in two, and in two that are spoilt in one way each."""
    tensors = load_file(MODEL / "model.safetensors")
    names = sorted(tensors, key=lambda name: tensors[name].nbytes)
    parts = {FIRST: names[0::2], SECOND: names[1::2]}
    weights = {file: save({name: tensors[name] for name in part}) for file, part in parts.items()}
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    config = {"config.json": (MODEL / "config.json").read_bytes()}
    sharded = {**config, **weights, "model.safetensors.index.json": json.dumps(index).encode()}
    dense = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}).encode()
    narrow = json.dumps({**json.loads(config["config.json"]), "moe_intermediate_size": 40}).encode()
    return {
        "single": {**config, "model.safetensors": (MODEL / "model.safetensors").read_bytes()},
        "sharded": sharded,
        "planned": sharded,
        "lacking": {name: content for name, content in sharded.items() if name != SECOND},
        "damaged": {**sharded, FIRST: b"\xff" * 1000},
        "pickled": {**config, "pytorch_model.bin": b"x"},
        "bare": {"README.md": b"nothing"},
        "dense": {**sharded, "config.json": dense},
        "narrow": {**sharded, "config.json": narrow},
    }


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcomes, HubStandIn]:
    """What the command said of each repository, and the stand-in as the calls left it."""
    with serve() as hub:
        hub.repositories = {f"alice/{name}": {"content": content} for name, content in contents().items()}
        hub.repositories["alice/gated"] = {"content": {}, "gated": True}
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_") and "PROXY" not in k.upper()},
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path_factory.mktemp("home")),
        }
        command = [sys.executable, "-c", CLIENT, *hub.repositories, "alice/unknown"]
        root = Path(__file__).parents[3]
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return {name.removeprefix("alice/"): said for name, said in json.loads(done.stdout).items()}, hub


@pytest.mark.parametrize("name", ["single", "sharded"])
def test_the_hub_and_a_folder_say_the_same(asked: tuple[Outcomes, HubStandIn], name: str) -> None:
    said = asked[0][name]
    assert said["code"] == 0, said["err"]
    local = audit(str(MODEL)).to_dict()
    assert json.loads(said["out"]) == json.loads(json.dumps({**local, "model": f"alice/{name}"}))


def test_a_plan_knows_the_true_bytes_from_headers_alone(asked: tuple[Outcomes, HubStandIn]) -> None:
    said, hub = asked[0]["planned"], asked[1]
    assert said["code"] == 0, said["err"]
    plan, tensors = json.loads(said["out"]), load_file(MODEL / "model.safetensors")
    held = sum(tensor.nbytes for tensor in tensors.values())
    assert plan["stored"] == {"bytes": held, "dtypes": {"BF16": held}, "is_here": False, "is_int8": False, "note": ""}
    assert plan["disk"]["download"] == held
    fetched = {key: size for key, size in hub.served.items() if "alice/planned/" in key and key.endswith("safetensors")}
    assert set(fetched.values()) == {HEADER_BYTES}


def test_config_index_and_headers_are_all_that_is_fetched(asked: tuple[Outcomes, HubStandIn]) -> None:
    _, hub = asked
    for name, files in (("single", ["model.safetensors"]), ("sharded", [FIRST, SECOND])):
        repository = hub.repositories[f"alice/{name}"]["content"]
        served = {key.rpartition("/")[2]: size for key, size in hub.served.items() if f"alice/{name}/" in key}
        assert served.keys() == {"config.json", *files} | ({"model.safetensors.index.json"} & repository.keys())
        for file in files:
            assert served[file] == HEADER_BYTES < len(repository[file]) / 10
        assert all(served[file] == len(repository[file]) for file in served.keys() - set(files))


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("lacking", 4, f"alice/lacking: lacks the shard {SECOND}"),
        ("damaged", 4, FIRST),
        ("pickled", 4, "alice/pickled: no readable safetensors there"),
        ("bare", 4, "alice/bare: no config.json there"),
        ("dense", 4, "not a Mixture-of-Experts model"),
        ("narrow", 4, "experts.down_proj is 8×128×128 in the files and 8×128×40 by config.json"),
        ("gated", 7, "alice/gated: gated; accept its terms"),
        ("unknown", 7, "alice/unknown: no such model on the Hub, or a private one"),
    ],
)
def test_what_cannot_be_taken_stock_of_is_one_line(
    asked: tuple[Outcomes, HubStandIn], name: str, code: int, words: str
) -> None:
    said = asked[0][name]
    assert said["code"] == code, said["err"]
    assert said["out"] == ""
    (line,) = said["err"].strip().splitlines()
    assert line.startswith("onecard: ")
    assert words in line
