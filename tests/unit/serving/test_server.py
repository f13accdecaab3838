"""transformers' own server in front of the adapted model says what `generate` says."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.faults.conftest import MODEL
from tests.unit.serving.test_chat import QUESTION, adapted
from toolkit.errors import RecipeError
from toolkit.evaluate import answer, encode_chat, require_harness
from toolkit.serving.server import build_app, require_server


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
    wanted = answer(model, tokenizer, [encode_chat(tokenizer, messages)], max_new_tokens=8)[0]
    with testclient.TestClient(build_app(model, tokenizer, "mine")) as client:
        asked = {"messages": messages, "max_tokens": 8, "temperature": 0}
        reply = client.post("/v1/chat/completions", json=asked).json()
        assert reply["choices"][0]["message"]["content"].strip() == wanted
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["mine"]
        assert client.post("/v1/chat/completions", json={**asked, "model": "another"}).status_code == 400
