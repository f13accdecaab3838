"""Pushing to a stand-in Hub: one commit, private, nothing sent before verification, every failure one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness.hub_stand_in import HEAD, HubStandIn, serve
from toolkit.artifact import check_token, push_artifact, read_manifest, training_answers
from toolkit.artifact.manifest import file_entry, write_json
from toolkit.errors import HubError, ModelError

# huggingface_hub reads its switches at import, so one process of its own makes all the calls.
CLIENT = """
import json, sys
from toolkit.errors import OnecardError
from toolkit.artifact import check_token, push_artifact

good, damaged = sys.argv[1:3]

def outcome(call, *args, **kwargs):
    try:
        return {"ok": call(*args, **kwargs)}
    except OnecardError as error:
        return {"error": type(error).__name__, "line": str(error)}

print(json.dumps({
    "who": outcome(check_token, "good"),
    "wrong token": outcome(check_token, "wrong-secret"),
    "reader": outcome(check_token, "reader"),
    "dry run": outcome(push_artifact, good, "alice/dry", token="good", dry_run=True),
    "damaged": outcome(push_artifact, damaged, "alice/damaged", token="good"),
    "new": outcome(push_artifact, good, "alice/new", token="good"),
    "known": outcome(push_artifact, good, "alice/known", token="good", revision="v2", commit_message="second"),
    "public": outcome(push_artifact, good, "alice/public", token="good"),
    "pull request": outcome(push_artifact, good, "alice/known", token="good", create_pr=True),
    "conflict": outcome(push_artifact, good, "alice/conflict", token="good"),
    "forbidden": outcome(push_artifact, good, "alice/other", token="reader"),
    "bad name": outcome(push_artifact, good, "a/b/c", token="good"),
    "unreachable": outcome(push_artifact, good, "alice/new", token="good", endpoint="http://127.0.0.1:9"),
}))
"""


@pytest.fixture(scope="module")
def pushed(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], HubStandIn]:
    """Outcomes by name, and the stand-in as the calls left it."""
    damaged = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("damaged") / "adapter"))
    (damaged / "README.md").write_text("changed")
    with serve() as hub:
        hub.repositories["alice/known"] = {"private": True, "files": ["mtp_head.safetensors", "notes.md", "README.md"]}
        hub.repositories["alice/public"] = {"private": False, "files": []}
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_") and "PROXY" not in k.upper()},
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HOME": str(tmp_path_factory.mktemp("home")),
        }
        command = [sys.executable, "-c", CLIENT, str(pristine), str(damaged)]
        root = Path(__file__).parents[3]
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), hub


def test_the_token_is_checked_early(pushed: tuple[dict[str, Any], HubStandIn]) -> None:
    outcomes, _ = pushed
    assert outcomes["who"] == {"ok": "alice"}
    assert outcomes["wrong token"]["error"] == "HubError"
    assert "Invalid user token" in outcomes["wrong token"]["line"]
    assert "token is read-only" in outcomes["reader"]["line"]


def test_a_push_is_one_private_commit_of_the_manifests_files(
    pushed: tuple[dict[str, Any], HubStandIn], pristine: Path
) -> None:
    outcomes, hub = pushed
    assert outcomes["new"] == {"ok": f"{hub.url}/alice/new/commit/{'b' * 40}"}
    assert hub.repositories["alice/new"]["private"]
    (commit,) = [c for c in hub.commits if "alice/new" in c["path"]]
    assert commit["files"] == {path.name: path.read_bytes() for path in pristine.iterdir()}
    assert commit["header"]["parentCommit"] == HEAD


def test_a_known_repository_loses_only_what_an_earlier_artifact_left(pushed: tuple[dict[str, Any], HubStandIn]) -> None:
    outcomes, hub = pushed
    assert "ok" in outcomes["known"]
    commit, request = [c for c in hub.commits if "alice/known" in c["path"]]
    assert commit["deleted"] == ["mtp_head.safetensors"]
    assert commit["path"].endswith("/commit/v2")
    assert commit["header"]["summary"] == "second"
    assert request["path"].endswith("/commit/main?create_pr=1")
    assert outcomes["pull request"]["ok"].endswith("/discussions/1")


def test_nothing_is_sent_before_verification_or_in_a_dry_run(pushed: tuple[dict[str, Any], HubStandIn]) -> None:
    outcomes, hub = pushed
    assert outcomes["dry run"] == {"ok": f"{hub.url}/alice/dry"}
    assert outcomes["damaged"]["error"] == "ModelError"
    assert {"alice/dry", "alice/damaged"}.isdisjoint(hub.repositories)


def test_a_private_artifact_never_enters_a_public_repository(pushed: tuple[dict[str, Any], HubStandIn]) -> None:
    outcomes, hub = pushed
    assert "is public" in outcomes["public"]["line"]
    assert not any("alice/public" in c["path"] for c in hub.commits)


@pytest.mark.parametrize("case", ["conflict", "forbidden", "bad name", "unreachable"])
def test_a_failure_is_one_line_that_says_how_to_repeat(
    pushed: tuple[dict[str, Any], HubStandIn], pristine: Path, case: str
) -> None:
    outcome = pushed[0][case]
    assert outcome["error"] == "HubError"
    assert "\n" not in outcome["line"]
    assert f"is whole; repeat with `onecard push {pristine} " in outcome["line"]


def test_a_commit_that_came_in_meanwhile_is_not_overwritten(pushed: tuple[dict[str, Any], HubStandIn]) -> None:
    outcomes, hub = pushed
    assert "A commit has happened since. Please refresh" in outcomes["conflict"]["line"]
    assert not any("alice/conflict" in c["path"] for c in hub.commits)


def test_no_message_holds_the_token(pushed: tuple[dict[str, Any], HubStandIn]) -> None:
    assert "wrong-secret" not in json.dumps(pushed[0])


def test_offline_is_a_hub_error(monkeypatch: pytest.MonkeyPatch, pristine: Path) -> None:
    with serve() as hub:
        url = hub.url
    with pytest.raises(HubError, match="hf auth login"):
        check_token("any", endpoint=url)
    with pytest.raises(HubError, match="is whole"):
        push_artifact(pristine, "alice/new", token="any", endpoint=url)


def test_the_answers_of_every_data_set_are_looked_for(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "one"}]
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "two"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}))
    (tmp_path / "b.jsonl").write_text(json.dumps({"conversations": talk}) + '\n{"conversations": [{"from": "x"}]}')
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": turns[:1], "completion": turns[1:]}))
    listed = f"[{tmp_path}/a.jsonl, {{path: {tmp_path}/b.jsonl, weight: 2}}, {tmp_path}/c.jsonl, owner/name]"
    (tmp_path / "recipe.yaml").write_text(f"model: {{model_name_or_path: nano}}\ndata: {{train: {listed}}}\n")
    assert training_answers(tmp_path) == ["one", "two", "one"]


def test_a_push_names_each_thing_that_may_not_leave(pristine: Path, tmp_path: Path) -> None:
    run, token, row = tmp_path / "run", "hf_" + "a1B2" * 8, "a fern is a flowerless plant with feathery leaves"
    artifact = Path(shutil.copytree(pristine, run / "adapter"))
    turns = [{"role": "user", "content": "What is a fern?"}, {"role": "assistant", "content": row}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (run / "recipe.yaml").write_text(f"model: {{model_name_or_path: nano}}\ndata: {{train: {tmp_path}/rows.jsonl}}\n")
    assert training_answers(run) == [row]
    with (artifact / "chat_template.jinja").open("a") as file:
        file.write(f"{{# {token} from /home/alice/secret, as in: {row} #}}")
    manifest = read_manifest(artifact)
    manifest["files"]["chat_template.jinja"] = file_entry(artifact / "chat_template.jinja")
    write_json(artifact / "manifest.json", manifest)
    with serve() as hub, pytest.raises(ModelError) as caught:
        push_artifact(artifact, "alice/new", token="good", endpoint=hub.url, rows=training_answers(run))
    said = str(caught.value)
    for words in ("what looks like a Hub token", "the local path /home/alice", "row 1 of the data"):
        assert f"chat_template.jinja holds {words}" in said
    assert token not in said
    assert not hub.created
