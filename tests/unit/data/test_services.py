"""Rows as services and other trainers write them: the same examples as in our own form, or one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trl

from toolkit.data.formats import SHAPES
from toolkit.data.problems import InvalidRow
from toolkit.data.speakers import as_turns
from toolkit.errors import DataError

QWEN = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
ASKED, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
WORSE = {"role": "assistant", "content": "b"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "enum": ["STRING"]}}}
FUNCTION = {"name": "look", "description": "d", "parameters": SCHEMA}
CAPITALS = {"type": "OBJECT", "properties": {"city": {"type": "STRING", "enum": ["STRING"]}}}


def ours(result: str) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "look", "arguments": {"city": "X"}}}
    said = {"role": "assistant", "reasoning_content": "hm", "content": "wait", "tool_calls": [call]}
    turns = [ASKED, said, {"role": "tool", "content": result}, {"role": "user", "content": "go"}, ANSWER]
    return {"messages": turns, "system": "s", "tools": [{"type": "function", "function": FUNCTION}]}


ANTHROPIC = {
    "system": [{"type": "text", "text": "s"}],
    "messages": [
        ASKED,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": "wait"},
                {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"city": "X"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "5"}]},
                {"type": "text", "text": "go"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ],
    "tools": [{"name": "look", "description": "d", "input_schema": SCHEMA}],
}
GEMINI = {
    "systemInstruction": {"role": "system", "parts": [{"text": "s"}]},
    "contents": [
        {"role": "user", "parts": [{"text": "q"}]},
        {
            "role": "model",
            "parts": [
                {"text": "hm", "thought": True},
                {"text": "wait"},
                {"functionCall": {"name": "look", "args": {"city": "X"}}},
            ],
        },
        {"role": "user", "parts": [{"functionResponse": {"name": "look", "response": {"t": 5}}}, {"text": "go"}]},
        {"role": "model", "parts": [{"text": "a"}]},
    ],
    "tools": [{"functionDeclarations": [{**FUNCTION, "parameters": CAPITALS}]}],
}


@pytest.mark.parametrize(("row", "result"), [(ANTHROPIC, "5"), (GEMINI, '{"t": 5}')], ids=["Anthropic", "Gemini"])
def test_parts_are_trained_as_our_own_keys_are(row: Any, result: str, build: Any, trained: Any) -> None:
    options = {"chat_template": QWEN, "max_length": 9000}
    theirs, own = build([row], **options), build([ours(result)], **options)
    assert list(theirs.train) == list(own.train)
    runs = [run for index in range(len(theirs.train)) for run in trained(theirs, index)]
    assert [("hm" in run, "<tool_call>" in run) for run in runs] == [(True, True), (False, False)]


@pytest.mark.parametrize("key", ["signature", "is_error"])
def test_what_a_part_says_beside_is_told(key: str, build: Any) -> None:
    row = json.loads(json.dumps(ANTHROPIC))
    row["messages"][2]["content"][0]["is_error"] = True
    notices = build([row], chat_template=QWEN, max_length=9000).report.notices
    assert any(f"message key '{key}'" in notice for notice in notices)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["tool_use", "text"], "its parts are tool_use, text; chat templates write one thought"),
        (["thinking", "thinking"], "its parts are thinking, thinking"),
        (["redacted_thinking"], None),
    ],
)
def test_parts_that_no_template_writes_are_refused(parts: list[str], message: str | None) -> None:
    turn = {"role": "assistant", "content": [{"type": kind, "text": "a"} for kind in parts]}
    with pytest.raises(InvalidRow, match=message or "a part of type 'redacted_thinking'; only text is trained"):
        SHAPES["messages"].parse({"messages": [ASKED, turn]})


@pytest.mark.parametrize("part", [{"inlineData": {}}, {"text": "a", "functionCall": {}}, {}, 3])
def test_other_parts_of_gemini_are_refused_with_their_place(part: Any, build: Any) -> None:
    row = {"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [part]}]}
    with pytest.raises(DataError, match=r":1: contents\[1\]\.parts\[0\]: a part of .*; only text is trained"):
        build([row])


def test_a_column_called_contents_is_not_geminis(build: Any) -> None:
    assert "column 'contents' is not used" in build([{"text": "words", "contents": ["a"]}]).report.notices


@pytest.mark.parametrize("names", [("System", "User", "Chatbot"), ("system", "human", "model")])
@pytest.mark.parametrize(("role", "content"), [("role", "content"), ("from", "value")])
def test_speakers_are_known_in_any_case(names: tuple[str, ...], role: str, content: str) -> None:
    turns = as_turns([{role: name, content: "x"} for name in names], "messages")
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant"]


def test_an_answer_of_weight_0_is_fed_and_not_trained(build: Any, trained: Any) -> None:
    rows = [{"messages": [ASKED, {**ANSWER, "weight": 0}, ASKED, {**WORSE, "weight": 1}], "parallel_tool_calls": False}]
    batches = build(rows)
    assert trained(batches) == ["b<|im_end|>"]
    assert "column 'parallel_tool_calls' is not used" in batches.report.notices


OWN = {"prompt": [ASKED], "chosen": [ANSWER], "rejected": [WORSE]}
SPOKEN = {side: {"from": "gpt", "value": OWN[side][0]["content"]} for side in ("chosen", "rejected")}
PAIRS: dict[str, dict[str, Any]] = {
    "OpenAI": {"input": {"messages": [ASKED]}, "preferred_output": [ANSWER], "non_preferred_output": [WORSE]},
    "Axolotl": {"messages": [ASKED], "chosen": ANSWER, "rejected": WORSE},
    "texts beside messages": {"messages": [ASKED], "chosen": "a", "rejected": "b"},
    "LLaMA-Factory": {"conversations": [{"from": "human", "value": "q"}], **SPOKEN},
    "instruction": {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
    "ms-swift": {"messages": [ASKED, ANSWER], "rejected_response": "b"},
    "ms-swift, whole": {"messages": [ASKED, ANSWER], "rejected_messages": [ASKED, WORSE]},
    "single turns": {"prompt": [ASKED], "chosen": ANSWER, "rejected": WORSE},
}


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS.keys())
def test_pairs_of_others_are_ours(row: Any, build: Any) -> None:
    assert list(build([row], pairs=True).train) == list(build([OWN], pairs=True).train)


def test_an_instruction_with_a_history_is_no_pair_without_it(build: Any) -> None:
    with pytest.raises(DataError, match=":1: no prompt"):
        build([{**PAIRS["instruction"], "history": [["q", "a"]]}], pairs=True)


@pytest.mark.parametrize("mark", ["label", "kto_tag"])
@pytest.mark.parametrize(("value", "is_good"), [(True, True), (1.0, True), (0.0, False), ("true", True), ("0", False)])
def test_a_label_beside_a_conversation_judges_its_last_answer(mark: str, value: Any, is_good: bool, build: Any) -> None:
    other = {"prompt": [ASKED], "completion": [WORSE], "label": not is_good}
    theirs = build([{"messages": [ASKED, ANSWER, ASKED, WORSE], mark: value}, other], pairs=True, unpaired=True)
    own = {"prompt": [ASKED, ANSWER, ASKED], "completion": [WORSE], "label": is_good}
    assert list(theirs.train) == list(build([own, other], pairs=True, unpaired=True).train)


def test_a_column_that_the_recipe_names_is_read_by_that_name(build: Any) -> None:
    rows = [{"prompt": [ASKED], "completion": [ANSWER], "kto_tag": tag} for tag in (True, False)]
    assert len(build(rows, pairs=True, unpaired=True, columns={"label": "kto_tag"}).train) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"custom_id": "1", "method": "POST", "url": "/v1", "body": {}},
            "join both files by custom_id",
        ),
        ({"custom_id": "1", "response": {}, "error": None}, "join both files by custom_id"),
        ({"object": "chat.completion", "choices": []}, "answers of an API without their questions"),
        (PAIRS["OpenAI"], "learn from both with training.method: dpo"),
    ],
)
def test_rows_that_are_known_and_not_read_say_what_to_do(row: Any, message: str, build: Any) -> None:
    with pytest.raises(DataError, match=message) as error:
        build([row])
    assert "\n" not in str(error.value)
