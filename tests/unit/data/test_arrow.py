"""Nulls that Arrow fills in go, nulls that somebody wrote stay; whichever way a data set was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, Json, List, Value

from toolkit.data.files import read_rows
from toolkit.data.formats import NULL_ARGUMENTS, NULL_PROPERTIES
from toolkit.data.reading import Reading
from toolkit.data.sources import open_source

PADDED = "nulls added by Arrow were removed from tool calls and schemas"


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def said(*calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [*calls]}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": schema}}


ASKED = {"role": "user", "content": "q"}
ANSWERED = {"role": "tool", "content": "r", "name": "find"}
PAY = tool("pay", amount={"type": "number"}, to={"type": "string", "enum": ["x", "y"]})
FIND = tool("find", q={"type": "string"})
ROWS = [
    {"messages": [ASKED, said(call("pay", amount=3, to="x"))], "tools": [PAY, FIND]},
    {"messages": [ASKED, said(call("pay", to="y"))], "tools": [PAY, FIND]},
    {
        "messages": [
            ASKED,
            said(call("find", q="z")),
            {"role": "tool", "content": "r", "name": "find"},
            said(call("pay")),
        ],
        "tools": [FIND],
    },
]
"""Calls and schemas that differ, so that Arrow must fill up."""

ONE_TOOL = [
    {"messages": [ASKED, said(call("pay", amount=3, to="x"))], "tools": [PAY]},
    {"messages": [ASKED, said(call("pay", amount=None, to=None))], "tools": [PAY]},
]
"""Written by somebody who writes null for what a text does not say."""


def read(path: Path) -> tuple[list[Any], dict[str, int]]:
    """Calls and tools of every example of a file, and the notices."""
    reading = Reading("auto", {}, None, "error")
    split = reading.read("train", str(path), read_rows(path))
    calls = [[t["tool_calls"] for t in example.messages if t.get("tool_calls")] for example in split.examples]
    notices = {text: count for text, count in reading.notices.items() if count}
    return [[a, b.tools] for a, b in zip(calls, split.examples, strict=True)], notices


def meant(rows: list[dict[str, Any]]) -> list[Any]:
    return [[[t["tool_calls"] for t in row["messages"] if t.get("tool_calls")], row["tools"]] for row in rows]


def to_jsonl(rows: list[dict[str, Any]], path: Path, features: Features | None = None) -> Path:
    datasets.Dataset.from_list(rows, features=features).to_json(path.with_suffix(".jsonl"))
    return path.with_suffix(".jsonl")


def to_json(rows: list[dict[str, Any]], path: Path, features: Features | None = None) -> Path:
    datasets.Dataset.from_list(rows, features=features).to_json(path.with_suffix(".json"), lines=False)
    return path.with_suffix(".json")


def to_parquet(rows: list[dict[str, Any]], path: Path, features: Features | None = None) -> Path:
    datasets.Dataset.from_list(rows, features=features).to_parquet(path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def to_bare_parquet(rows: list[dict[str, Any]], path: Path, features: Features | None = None) -> Path:
    """As a writer that keeps the metadata of `datasets` and knows no JSON type."""
    written = pq.read_table(to_parquet(rows, path, features))
    schema = pa.schema([(field.name, _without_json(field.type)) for field in written.schema], written.schema.metadata)
    pq.write_table(pa.Table.from_pylist(written.to_pylist(), schema), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def _without_json(kind: Any) -> Any:
    if isinstance(kind, pa.JsonType):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_without_json(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _without_json(field.type)) for field in kind])
    return kind


Writer = Callable[..., Path]


@pytest.mark.parametrize("write", [to_jsonl, to_json, to_parquet])
def test_what_arrow_fills_in_goes_and_is_told(write: Writer, tmp_path: Path) -> None:
    path = write(ROWS, tmp_path / "rows")
    found, notices = read(path)
    assert found == meant(ROWS)
    assert notices == {PADDED: 3}


JSON = Features({"messages": List(Json()), "tools": List(Json())})
WHOLE = Features({"messages": Json(), "tools": Json()})


@pytest.mark.parametrize("features", [JSON, WHOLE, "mixed"])
@pytest.mark.parametrize("write", [to_jsonl, to_parquet, to_bare_parquet])
@pytest.mark.parametrize("rows", [ROWS, ONE_TOOL])
def test_json_columns_are_read_and_keep_their_nulls(write: Writer, features: Any, rows: Any, tmp_path: Path) -> None:
    if features == "mixed":
        features = datasets.Dataset.from_list(ROWS, on_mixed_types="use_json").features
        assert "Json" in str(features)
        rows = ROWS + ONE_TOOL
    found, notices = read(write(rows, tmp_path / "rows", features))
    assert found == meant(rows)
    assert notices == ({NULL_ARGUMENTS: 1} if ONE_TOOL[1] in rows else {})


def test_a_json_column_beside_structs(tmp_path: Path) -> None:
    call_of = {"type": Value("string"), "function": {"name": Value("string"), "arguments": Json()}}
    message = {"role": Value("string"), "content": Value("string"), "tool_calls": List(call_of)}
    features = Features({"messages": List(message), "tools": List(Json())})
    for write in (to_jsonl, to_parquet):
        rows = [*ONE_TOOL, {"messages": [ASKED, said(call("find", q=None))], "tools": [FIND]}]
        assert read(write(rows, tmp_path / "rows", features)) == (meant(rows), {NULL_ARGUMENTS: 2})


@pytest.mark.parametrize("features", [None, JSON])
def test_rows_of_the_hub(features: Features | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ROWS + ONE_TOOL if features else ROWS
    table = datasets.Dataset.from_list(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: table)
    reading = Reading("auto", {}, None, "error")
    split = reading.read("train", "hub", open_source("owner/name", base_folder=tmp_path))
    calls = [[t["tool_calls"] for t in example.messages if t.get("tool_calls")] for example in split.examples]
    assert [[a, b.tools] for a, b in zip(calls, split.examples, strict=True)] == meant(rows)
    assert reading.notices[NULL_ARGUMENTS if features else PADDED] == (1 if features else 3)


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("rows", [ONE_TOOL, ROWS + ONE_TOOL], ids=["one tool", "several"])
def test_nulls_written_by_hand_stay(suffix: str, rows: list[Any], tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_text("\n".join(map(json.dumps, rows)) if suffix == "jsonl" else json.dumps(rows))
    assert read(path) == (meant(rows), {NULL_ARGUMENTS: 1})


def test_nulls_by_hand_stay_where_every_message_has_the_same_keys(tmp_path: Path) -> None:
    """Completions of one tool: nothing but the arguments differs, and that proves nothing."""
    pairs = [
        {"prompt": row["messages"][:1], "completion": row["messages"][1:], "tools": row["tools"]} for row in ONE_TOOL
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs)))
    assert read(path) == (meant(ONE_TOOL), {NULL_ARGUMENTS: 1})


def test_completions_that_datasets_wrote_are_told_by_the_calls_of_other_tools(tmp_path: Path) -> None:
    pairs = [{"prompt": "q", "completion": row["messages"][1:2]} for row in ROWS]
    pairs = [{**pair, "prompt": [ASKED]} for pair in pairs]
    found, notices = read(to_jsonl(pairs, tmp_path / "rows"))
    assert [calls for calls, _ in found] == [[pair["completion"][0]["tool_calls"]] for pair in pairs]
    assert notices == {PADDED: 3}


def test_a_default_that_is_null_stays_by_hand(tmp_path: Path) -> None:
    chosen = tool("pay", amount={"type": ["number", "null"], "default": None})
    rows = [{**row, "tools": [chosen]} for row in ONE_TOOL]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read(path)[0] == meant(rows)


@pytest.mark.parametrize("as_text", [False, True])
def test_a_property_that_is_null_is_no_schema_wherever_it_stands(as_text: bool, tmp_path: Path) -> None:
    filled = tool("pay", amount={"type": "number", "default": None}, q=None)
    filled["function"]["parameters"]["properties"]["properties"] = {"type": "object", "properties": {"a": None}}
    path = tmp_path / "rows.jsonl"
    row = {**ROWS[0], "tools": json.dumps([filled]) if as_text else [filled]}
    path.write_text(json.dumps(row) + "\n" + json.dumps(ROWS[1]))
    found, notices = read(path)
    schema = found[0][1][0]["function"]["parameters"]["properties"]
    assert schema == {
        "amount": {"type": "number", "default": None},
        "properties": {"type": "object", "properties": {}},
    }
    assert notices == {NULL_PROPERTIES: 1}


def test_arguments_as_text_are_never_touched(tmp_path: Path) -> None:
    text = {"type": "function", "function": {"name": "pay", "arguments": '{"amount": null}'}}
    rows = [*ROWS[:1], {"messages": [ASKED, said(text)], "tools": [PAY]}]
    rows = [{**row, "messages": [row["messages"][0], _as_text(row["messages"][1])]} for row in rows]
    found, notices = read(to_jsonl(rows, tmp_path / "rows"))
    assert found[1][0] == [[call("pay", amount=None)]]
    assert notices[NULL_ARGUMENTS] == 1


def _as_text(turn: dict[str, Any]) -> dict[str, Any]:
    calls = [c["function"] for c in turn["tool_calls"]]
    arguments = [c["arguments"] if isinstance(c["arguments"], str) else json.dumps(c["arguments"]) for c in calls]
    texts = [
        {"type": "function", "function": {"name": c["name"], "arguments": a}}
        for c, a in zip(calls, arguments, strict=True)
    ]
    return {**turn, "tool_calls": texts}


def test_text_that_is_not_json_in_a_json_column_is_a_bad_row(tmp_path: Path) -> None:
    metadata = {b"huggingface": b'{"info": {"features": {"messages": {"_type": "Json"}}}}'}
    schema = pa.schema([("messages", pa.string())], metadata)
    pq.write_table(pa.Table.from_pylist([{"messages": "[{"}], schema), tmp_path / "rows.parquet")
    (row,) = read_rows(tmp_path / "rows.parquet")
    assert "not JSON" in str(row.values)


def test_a_map_is_an_object(tmp_path: Path) -> None:
    function = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))])
    message = pa.struct(
        [("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(pa.struct([("function", function)])))]
    )
    calls = [{"function": {"name": "pay", "arguments": [("to", "x"), ("amount", None)]}}]
    turns = [ASKED, {"role": "assistant", "content": "", "tool_calls": calls}]
    table = pa.table({"messages": pa.array([turns], pa.list_(message))})
    pq.write_table(table, tmp_path / "rows.parquet")
    ((calls, _),), _ = read(tmp_path / "rows.parquet")
    assert calls[0][0]["function"]["arguments"] == {"to": "x", "amount": None}
