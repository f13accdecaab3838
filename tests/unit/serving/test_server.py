"""transformers' own server in front of the adapted model says what `generate` says."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationMixin

from scripts.parity.template_days import dictate
from scripts.parity.template_masks import trl_families
from scripts.parity.template_renderer import TODAY
from scripts.parity.template_run_case import Case, rows_of
from tests.faults.conftest import MODEL, Run, onecard
from tests.unit.documentation.commands import ROOT, shown_in
from tests.unit.serving.test_chat import QUESTION, adapted, plain_dialogue
from toolkit.artifact import write_artifact
from toolkit.checkpoint.identity import identify_base
from toolkit.data import ChatForm, Dialogue
from toolkit.errors import RecipeError
from toolkit.evaluate import answer, require_harness
from toolkit.serving.server import build_app, require_server

__all__ = ["onecard"]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.serving.server.find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(RecipeError, match=r"serve: uvicorn not installed; pip install \"onecard\[serve\]\""):
        require_server()
    monkeypatch.setattr("toolkit.evaluate.harness.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install \"onecard\[lm-eval\]\""):
        require_harness()


# fastapi and its client warn of each other's versions.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_server_says_what_generate_says() -> None:
    pytest.importorskip("openai")
    testclient = pytest.importorskip("fastapi.testclient")
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    model = adapted(4, seed=0)
    messages = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    wanted = answer(model, tokenizer, [ids], max_new_tokens=8)[0]
    with testclient.TestClient(build_app(model, tokenizer, plain_dialogue(), "mine")) as client:
        asked = {"messages": messages, "max_tokens": 8, "temperature": 0}
        reply = client.post("/v1/chat/completions", json=asked).json()
        assert reply["choices"][0]["message"]["content"].strip() == wanted
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["mine"]
        assert client.post("/v1/chat/completions", json={**asked, "model": "another"}).status_code == 400
        unread = client.post("/v1/chat/completions", json={**asked, "chat_template_kwargs": {"colour": "red"}})
        assert unread.json()["choices"][0]["message"]["content"].strip() == wanted


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("name", ["gptoss", "glm4moe", "qwen3_5_think", "deepseekv3"])
def test_the_server_reads_answers_by_the_chat_template(
    name: str, described: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is a qwen3_moe, whose usual form of answers these templates do not have."""
    pytest.importorskip("openai")
    testclient = pytest.importorskip("fastapi.testclient")
    case = Case(next(family for family in trl_families() if family.name == name), tmp_path)
    if not described:  # TRL knows published templates by their text
        case.tokenizer.chat_template += "{# #}"
    form = ChatForm(date=TODAY.isoformat(), stop_token_ids=tuple(case.stops))
    app = build_app(adapted(4, seed=0), case.tokenizer, Dialogue(case.tokenizer, form), "mine")
    monkeypatch.setattr(GenerationMixin, "generate", GenerationMixin.generate)
    with testclient.TestClient(app) as client:
        for kind in ("plain", "thought", "call"):
            row = rows_of(kind)[0]
            question, said = row["messages"][:2]
            dictate([case.example({**row, "messages": [question, said]})[1]] * 3)
            asked = {"messages": [question], "tools": row.get("tools"), "max_tokens": 99}
            told = client.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]
            assert told["content"] == said["content"]
            assert told.get("reasoning_content") == said.get("reasoning_content")
            calls = [call["function"] for call in told.get("tool_calls") or ()]
            assert [{**call, "arguments": json.loads(call["arguments"])} for call in calls] == [
                call["function"] for call in said.get("tool_calls", ())
            ]
            streamed = client.post("/v1/chat/completions", json={**asked, "stream": True}).text
            assert _joined(streamed, "content") == said["content"]
            assert _joined(streamed, "reasoning_content") == said.get("reasoning_content", "")
            streamed_calls = [call["function"] for each in _deltas(streamed) for call in each.get("tool_calls") or ()]
            assert streamed_calls == calls
            if not calls:  # the tools of this endpoint are written otherwise
                other = client.post("/v1/responses", json={"input": [question], "stream": True}).text
                assert _responded(other, "response.output_text.delta") == said["content"]
                assert _responded(other, "response.reasoning_text.delta") == said.get("reasoning_content", "")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_misspelt_option_of_a_request_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    testclient = pytest.importorskip("fastapi.testclient")
    case = Case(next(family for family in trl_families() if family.name == "qwen3_5_think"), tmp_path)
    app = build_app(adapted(4, seed=0), case.tokenizer, Dialogue(case.tokenizer, ChatForm()), "mine")
    asked = {"messages": [{"role": "user", "content": "Hi."}], "max_tokens": 9}
    monkeypatch.setattr(GenerationMixin, "generate", GenerationMixin.generate)
    dictate([[*case.stops]] * 2)
    with testclient.TestClient(app) as client:
        for name, status in (("enable_thinkin", 400), ("enable_thinking", 200), ("colour", 200)):
            options = {"chat_template_kwargs": {name: False}}
            told = client.post("/v1/chat/completions", json={**asked, **options})
            assert told.status_code == status
            assert ("did you mean enable_thinking?" in told.text) is (status == 400)


def _deltas(streamed: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: {")]
    return [json.loads(line)["choices"][0]["delta"] for line in lines]


def _responded(streamed: str, kind: str) -> str:
    events = [json.loads(line.removeprefix("data: ")) for line in streamed.splitlines() if line.startswith("data: {")]
    return "".join(event["delta"] for event in events if event["type"] == kind)


def _joined(streamed: str, key: str) -> str:
    return "".join(delta.get(key) or "" for delta in _deltas(streamed))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_serve_answers_what_the_documentation_asks_and_ends_with_ctrl_c(onecard: Run, tmp_path: Path) -> None:
    """The command of docs/talking.md's curl, to the server that `onecard serve` starts."""
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = next(each for each in shown_in(ROOT / "docs" / "talking.md") if each.text.startswith("curl ")).words
    address, body = asked[1].replace("8000", str(port)), asked[asked.index("-d") + 1]
    told: list[dict[str, Any]] = []

    def ask() -> None:
        request = urllib.request.Request(
            f"http://{address}", body.encode(), dict([asked[asked.index("-H") + 1].split(": ")])
        )
        for _ in range(600):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    told.append(json.load(answer))
                break
            except OSError:
                time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    write_artifact(
        adapted(4, seed=0),
        AutoTokenizer.from_pretrained(MODEL),
        tmp_path / "mine",
        base=identify_base(str(MODEL)),
        recipe_yaml="model: {model_name_or_path: nano}\ndata: {train: rows.jsonl}\nlora: {r: 4}\n",
        results={},
        coverage={},
    )
    asking = threading.Thread(target=ask)
    asking.start()
    status, _, err = onecard("serve", tmp_path / "mine", "--base", MODEL, "--port", port)
    asking.join()
    assert status == 0, err
    assert f"curl http://localhost:{port}/v1/chat/completions" in err
    assert "onecard export" in err.rpartition("next\n")[2]
    assert told[0]["choices"][0]["message"]["content"].strip()
