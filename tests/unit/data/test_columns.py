"""Columns beside those of a format, turns as other tools write them: followed, refused or told, never dropped."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.data.conversation import ROLES
from toolkit.data.files import read_rows
from toolkit.data.formats import SHAPES, TWO_SYSTEMS
from toolkit.data.problems import InvalidRow
from toolkit.data.reading import Reading
from toolkit.errors import DataError

ASKED, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = {"messages": [ASKED, ANSWER]}
FORMATS: dict[str, dict[str, Any]] = {
    "messages": CHAT,
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "prompt-completion": {"prompt": [ASKED], "completion": [ANSWER]},
    "alpaca": {"instruction": "q", "output": "a"},
}
TOOL = {"name": "pay", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": TOOL}


def parsed(shape: str, **columns: Any) -> Any:
    return SHAPES[shape].parse({**FORMATS[shape], **columns})


def said(example: Any) -> list[tuple[str, Any]]:
    return [(turn["role"], turn.get("content")) for turn in example.messages]


def read(write: Any, rows: list[Any], **options: Any) -> tuple[Any, dict[str, int]]:
    given = {"format": "auto", "columns": {}, "system_prompt": None, "on_invalid": "error", **options}
    reading = Reading(**given)
    path = write(rows)
    split = reading.read("train", str(path), read_rows(path))
    return split, {text: count for text, count in reading.notices.items() if count}


@pytest.mark.parametrize("as_text", [False, True])
def test_history_becomes_turns(as_text: bool) -> None:
    history: Any = [["q1", "a1"], ["q2", "a2"]]
    example = parsed("alpaca", history=json.dumps(history) if as_text else history, system="s")
    turns = [
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", "a2"),
        ("user", "q"),
        ("assistant", "a"),
    ]
    assert said(example) == [("system", "s"), *turns]


def test_all_answers_of_a_history_are_trained(build: Any, trained: Any) -> None:
    batches = build([{"instruction": "q", "output": "a", "history": [["q1", "a1"]]}])
    assert trained(batches) == ["a1<|im_end|>", "a<|im_end|>"]
    assert not any("history" in notice for notice in batches.report.notices)


@pytest.mark.parametrize("history", ["words", [["q"]], [["q", None]], ["qa"], {"q": "a"}, [["q", ""]]])
def test_a_history_that_is_none_is_refused(history: Any, build: Any) -> None:
    with pytest.raises(DataError, match=r":1: history: a list of \[question, answer\] is expected"):
        build([{"instruction": "q", "output": "a", "history": history}])


@pytest.mark.parametrize("shape", FORMATS)
@pytest.mark.parametrize("empty", [None, "", [], [[]]])
def test_empty_columns_say_nothing(shape: str, empty: Any, write: Any) -> None:
    columns = ("history", "images", "rejected", "chosen", "system", "tools", "note", "functions", "kto_tag")
    kept = [c for c in columns if not (empty == [[]] and c in ("system", "tools", "functions"))]
    split, notices = read(write, [{**FORMATS[shape], **dict.fromkeys(kept, empty)}])
    assert said(split.examples[0]) == [("user", "q"), ("assistant", "a")]
    assert not notices


@pytest.mark.parametrize("shape", FORMATS)
def test_system_functions_and_template_arguments_are_followed(shape: str) -> None:
    example = parsed(shape, system="s", functions=[TOOL], chat_template_kwargs={"enable_thinking": False})
    assert said(example) == [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert example.tools == [WRAPPED]
    assert example.chat_template_kwargs == {"enable_thinking": False}
    assert example.given == (2 if shape == "prompt-completion" else 0)
    assert example.key != parsed(shape, system="s", functions=[TOOL]).key
    assert example.identity != parsed(shape, system="s", functions=[TOOL]).identity


def test_template_arguments_as_text_and_what_is_not_the_rows_to_give() -> None:
    assert parsed("messages", chat_template_kwargs='{"a": 1}').chat_template_kwargs == {"a": 1}
    refused = {"an object is": "x", "an object": [1], "tools cannot be set by a row": {"tools": [1]}}
    for words, given in refused.items():
        with pytest.raises(InvalidRow, match=words):
            parsed("messages", chat_template_kwargs=given)


def test_a_system_column_beside_a_system_turn_is_told() -> None:
    turns = [{"role": "system", "content": "own"}, ASKED, ANSWER]
    assert parsed("messages", messages=turns, system="other").notes == (TWO_SYSTEMS,)
    assert parsed("messages", messages=turns, system="own").notes == ()
    assert said(parsed("messages", messages=turns, system="other"))[0] == ("system", "own")


def test_tools_and_functions_exclude_each_other(build: Any) -> None:
    with pytest.raises(DataError, match=r":1: the row has both tools and functions"):
        build([{**CHAT, "tools": [WRAPPED], "functions": [TOOL]}])


@pytest.mark.parametrize("column", ["system", "tools", "functions", "chat_template_kwargs"])
def test_plain_text_has_no_place_for_what_a_chat_has(column: str, build: Any) -> None:
    value = {"system": "s", "chat_template_kwargs": {"a": 1}}.get(column, [WRAPPED])
    with pytest.raises(DataError, match=rf":1: plain text has no place for {column}"):
        build([{"prompt": "q", "completion": "a", column: value}])


REFUSED = [
    ("images", ["a.png"], "more than text"),
    ("videos", ["a.mp4"], "more than text"),
    ("audio", {"path": "a.wav"}, "more than text"),
    ("rejected", "worse", "learn from both with training.method: dpo"),
    ("chosen", [ANSWER], "learn from both with training.method: dpo"),
    ("rejected_response", "worse", "learn from both with training.method: dpo"),
    ("kto_tag", False, "marks the answer as bad"),
    ("label", False, "marks the answer as bad"),
    ("weight", 0.5, "weight is 0.5"),
    ("weight", "2", "weight is 2"),
]


@pytest.mark.parametrize("shape", FORMATS)
@pytest.mark.parametrize(("column", "value", "words"), REFUSED)
def test_what_would_mean_another_training_is_refused(
    shape: str, column: str, value: Any, words: str, write: Any
) -> None:
    rows = [FORMATS[shape], {**FORMATS[shape], column: value}]
    with pytest.raises(DataError, match=words) as error:
        read(write, rows)
    assert ":2: " in str(error.value)
    assert f"data.remove_columns: [{column}]" in str(error.value)
    assert "\n" not in str(error.value)
    split, _ = read(write, rows, on_invalid="drop")
    assert (len(split.examples), split.rows, split.drops.total()) == (1, 2, 1)
    split, notices = read(write, rows, remove_columns=[column])
    assert (len(split.examples), notices) == (2, {})


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": "0"}, {"weight": 0.0}, {"train": False}, {"train": "false"}, {"loss": False}]
)
def test_rows_marked_as_not_trained_are_left_out_and_counted(mark: dict[str, Any], write: Any) -> None:
    split, notices = read(write, [CHAT, {**CHAT, **mark}, {**CHAT, **mark}])
    assert (len(split.examples), split.rows, dict(split.drops)) == (1, 3, {"weight 0 or train: false": 2})
    assert not notices


@pytest.mark.parametrize("mark", [{"weight": 1}, {"weight": "1.0"}, {"train": True}, {"loss": True}, {"label": 0}])
def test_rows_marked_as_trained_are(mark: dict[str, Any], write: Any) -> None:
    assert len(read(write, [{**CHAT, **mark}])[0].examples) == 1


def test_other_columns_are_told_once_with_a_count(build: Any) -> None:
    chats = [{"messages": [{**ASKED, "content": str(i)}, ANSWER]} for i in range(4)]
    rows = [{**chat, "solution": "4", "id": i} for i, chat in enumerate(chats[:3])]
    assert build([*rows, {**chats[3], "parallel_tool_calls": False}]).report.notices == {
        "column 'solution' is not used": 3,
        "column 'id' is not used": 3,
        "column 'parallel_tool_calls' is not used": 1,
    }


def test_many_other_columns_are_told_together(write: Any) -> None:
    row = {**CHAT, **{f"c{i:02}": i for i in range(1, 31)}}
    _, notices = read(write, [row, row])
    assert len(notices) == 13
    assert notices["18 more columns are not used"] == 2


def test_a_column_that_appears_late_is_told(write: Any) -> None:
    _, notices = read(write, [CHAT] * 150 + [{**CHAT, "solution": 1}])
    assert notices == {"column 'solution' is not used": 1}


def test_renamed_columns_are_used(write: Any) -> None:
    rows = [{"question": "q", "answer": "a", "output": "not read"}]
    columns = {"instruction": "question", "output": "answer"}
    split, notices = read(write, rows, columns=columns)
    assert said(split.examples[0]) == [("user", "q"), ("assistant", "a")]
    assert notices == {"column 'output' is not used": 1}


def test_removed_columns_decide_no_format(write: Any) -> None:
    split, _ = read(write, [{**CHAT, "text": "t"}], remove_columns=["messages"])
    assert split.examples[0].text == "t"


def test_a_column_to_remove_that_is_nowhere_is_refused(build: Any) -> None:
    with pytest.raises(DataError, match=r"data.remove_columns: no column 'imges'; did you mean images\?"):
        build([{**CHAT, "images": []}], remove_columns=["imges"])


def turns_of(*turns: dict[str, Any]) -> Any:
    return SHAPES["sharegpt"].parse({"conversations": [{"from": "human", "value": "q"}, *turns]}).messages


CALLS = [
    ('{"name": "pay", "arguments": {"to": "x"}}', 1),
    ('[{"name": "pay", "arguments": {"to": "x"}}, {"name": "pay", "arguments": {"to": "x"}}]', 2),
    ({"name": "pay", "arguments": '{"to": "x"}'}, 1),
    ('{"name": "pay", "parameters": {"to": "x"}}', 1),
    ([{"type": "function", "function": {"name": "pay", "arguments": {"to": "x"}}}], 1),
]
PAID = {"type": "function", "function": {"name": "pay", "arguments": {"to": "x"}}}


@pytest.mark.parametrize("speaker", ["function_call", "tool_call"])
@pytest.mark.parametrize(("value", "calls"), CALLS)
def test_calls_and_their_answers_by_speaker(speaker: str, value: Any, calls: int) -> None:
    for answerer in ("observation", "function_response", "tool_response", "tool", "function"):
        turns = turns_of(
            {"from": speaker, "value": value}, {"from": answerer, "value": "r"}, {"from": "gpt", "value": "a"}
        )
        assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "assistant"]
        assert turns[1]["tool_calls"] == [PAID] * calls


def test_calls_and_their_answers_by_role() -> None:
    turns = [ASKED, {"role": "tool_call", "content": CALLS[0][0]}, {"role": "tool_response", "content": "r"}, ANSWER]
    messages = parsed("messages", messages=turns).messages
    assert [turn["role"] for turn in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"] == [PAID]


def test_a_call_belongs_to_the_assistants_turn_before_it() -> None:
    call = {"from": "function_call", "value": CALLS[0][0]}
    turns = turns_of({"from": "gpt", "value": "wait"}, call, call, {"from": "observation", "value": "r"}, call)
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "assistant"]
    assert (turns[1]["content"], turns[1]["tool_calls"]) == ("wait", [PAID, PAID])
    marked = turns_of({"from": "gpt", "value": "wait", "train": False}, call)
    assert len(marked) == 3


def test_two_answers_in_a_row_stay_two() -> None:
    assert len(turns_of({"from": "gpt", "value": "a"}, {"from": "gpt", "value": "b"})) == 3


@pytest.mark.parametrize("value", ["words", "3", "[]", "[1]", None, ""])
def test_a_call_that_is_none_is_refused_with_its_turn(value: Any, build: Any) -> None:
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]}
    with pytest.raises(DataError, match=r":1: conversations\[1\]: a call is an object"):
        build([row])


def test_the_older_function_call_of_a_message() -> None:
    turn = {"role": "assistant", "content": None, "function_call": {"name": "pay", "arguments": '{"to": "x"}'}}
    messages = parsed("messages", messages=[ASKED, turn]).messages
    assert messages[1]["tool_calls"] == [PAID]
    assert "function_call" not in messages[1]
    plain = parsed("messages", messages=[ASKED, {**ANSWER, "function_call": None}]).messages
    assert "tool_calls" not in plain[1]


def test_a_turn_keeps_what_it_carries() -> None:
    extra = {"reasoning_content": "hm", "weight": 0, "train": False, "loss": False, "name": "n"}
    assert turns_of({"from": "gpt", "value": "a", **extra})[1] == {"role": "assistant", "content": "a", **extra}
    carried = turns_of({"from": "gpt", "value": "a", "tool_calls": [PAID]})[1]
    assert carried["tool_calls"] == [PAID]


MARKS = [
    ({"loss_weight": 0}, {"weight": 0}),
    ({"loss_scale": 1.0}, {"weight": 1.0}),
    ({"loss_mask": 0}, {"train": 0}),
    ({"mask": True}, {"train": False}),
    ({"mask": False}, {"train": True}),
    ({"mask": None}, {}),
    ({"weight": 0, "loss_weight": 0}, {"weight": 0}),
]


@pytest.mark.parametrize(("given", "ours"), MARKS)
def test_marks_of_a_turn_get_our_names(given: dict[str, Any], ours: dict[str, Any]) -> None:
    assert turns_of({"from": "gpt", "value": "a", **given})[1] == {"role": "assistant", "content": "a", **ours}
    message = parsed("messages", messages=[ASKED, {**ANSWER, **given}]).messages[1]
    assert message == {**ANSWER, **ours}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mask": 1}, r"mask is 1; write train"),
        ({"loss_weight": 0, "weight": 1}, r"loss_weight and weight say different things"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, r"train_detail"),
    ],
)
def test_marks_that_cannot_be_followed_are_refused(given: dict[str, Any], words: str, build: Any) -> None:
    with pytest.raises(DataError, match=rf":1: conversations\[1\]: {words}"):
        build([{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", **given}]}])


@pytest.mark.skipif("developer" not in ROLES, reason="conversations have no such role")
def test_a_developer_is_the_system() -> None:
    turns = [{"from": "developer", "value": "d"}, *FORMATS["sharegpt"]["conversations"]]
    example = SHAPES["sharegpt"].parse({"conversations": turns, "system": "s"})
    assert said(example)[0] == ("developer", "d")
    assert example.notes == (TWO_SYSTEMS,)


def test_text_that_begins_like_a_list_stays_text(build: Any, trained: Any) -> None:
    batches = build([{"prompt": "[1, 2] sorted: ", "completion": "[1, 2]"}])
    assert trained(batches) == ["[1, 2]<|im_end|>"]


def test_conversations_and_history_in_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["conversations", "weight", "images", "note"])
        writer.writerow([json.dumps(FORMATS["sharegpt"]["conversations"]), "1", "", "n"])
    reading = Reading("auto", {}, None, "error")
    split = reading.read("train", str(path), read_rows(path))
    assert said(split.examples[0]) == [("user", "q"), ("assistant", "a")]
    assert reading.notices["column 'note' is not used"] == 1
