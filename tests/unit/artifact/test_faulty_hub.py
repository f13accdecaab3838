"""Each fault of a Hub, at the commit and both steps of a large file: a line or a retry, and one commit in the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.hub_stand_in import serve
from toolkit.artifact import verify_artifact

REFUSED = ("401", "403", "409", "412")
PASSING = ("429", "500", "503", "reset", "timeout")
FAULTS = [f"{where}-{what}" for where in ("commit", "batch", "put") for what in (*REFUSED, *PASSING)] + ["commit-lost"]

CLIENT = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from toolkit.errors import OnecardError
from toolkit.artifact import push_artifact

def outcome(name):
    try:
        return push_artifact(sys.argv[1], name, token="good")
    except OnecardError as error:
        return {"error": type(error).__name__, "line": str(error)}

def twice(fault):
    return fault, [outcome(f"alice/fault-{fault}") for _ in range(2)]

with ThreadPoolExecutor(14) as pool:
    print(json.dumps(dict(pool.map(twice, sys.argv[2:]))))
"""


@pytest.fixture(scope="module")
def outcomes(pristine: Path, tmp_path_factory: pytest.TempPathFactory):
    with serve() as hub:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_") and "PROXY" not in k.upper()},
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HOME": str(tmp_path_factory.mktemp("home")),
            "ONECARD_HUB_TIMEOUT": "5",
        }
        command = [sys.executable, "-c", CLIENT, str(pristine), *FAULTS]
        root = Path(__file__).parents[3]
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), hub.commits


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_or_a_retry_and_the_rerun_leaves_one_commit(outcomes, pristine: Path, fault: str) -> None:
    (first, second), commits = outcomes[0][fault], outcomes[1]
    where, _, what = fault.partition("-")
    # huggingface_hub itself tries again what may pass, except the commit, which could be made twice.
    if where == "commit" or what in REFUSED:
        assert first["error"] == "HubError"
        assert "\n" not in first["line"]
        assert f"repeat with `onecard push {pristine} alice/fault-{fault}`" in first["line"]
        assert what not in REFUSED or what in first["line"]
    else:
        assert isinstance(first, str), first
    assert isinstance(second, str), second
    assert sum(f"/fault-{fault}/" in commit["path"] for commit in commits) == 1
    assert verify_artifact(pristine).ok
