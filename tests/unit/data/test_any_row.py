"""Whatever stands in the columns that other tools write: a `DataError`, or an example; nulls go by the law alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from toolkit.data.files import read_rows
from toolkit.data.formats import SHAPES
from toolkit.data.reading import Reading
from toolkit.errors import DataError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 2)
    | st.floats()
    | st.sampled_from(["", "a", "[", '{"name": "f"}', "0"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "arguments", "properties", "a"]), inner)
    ),
    max_leaves=8,
)
COLUMNS = (
    *("history", "functions", "tools", "system", "chat_template_kwargs", "weight", "train", "loss", "images"),
    *("rejected", "kto_tag", "label", "input", "other", "session"),
)
SPEAKERS = ("human", "gpt", "function_call", "tool_call", "observation", "system", "developer", 3)
KEYS = (
    *("value", "content", "tool_calls", "function_call", "mask", "loss_mask", "loss_weight", "weight", "train_detail"),
    *("role", "loss"),
)
TURN = st.fixed_dictionaries({"from": st.sampled_from(SPEAKERS)}, optional=dict.fromkeys(KEYS, VALUES))
TURNS = st.lists(TURN, max_size=4)


@given(
    rows=st.lists(
        st.fixed_dictionaries({"conversations": TURNS}, optional=dict.fromkeys(COLUMNS, VALUES))
        | st.fixed_dictionaries(
            {"instruction": VALUES, "output": VALUES, "conversations": TURNS}, optional=dict.fromkeys(COLUMNS, VALUES)
        ),
        min_size=1,
        max_size=3,
    ),
    shape=st.sampled_from(["sharegpt", "alpaca", "auto"]),
    drop=st.sampled_from(["error", "drop"]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_no_columns_raise_anything_but_a_data_error(rows: list[Any], shape: Any, drop: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    try:
        split = Reading(shape, {}, None, drop).read("train", str(path), read_rows(path))
    except DataError as error:
        assert str(error).isprintable()
    else:
        assert split.rows == len(rows) == len(split.examples) + split.drops.total()


@pytest.mark.parametrize("column", ["tools", "history", "other", "chat_template_kwargs", "messages"])
@pytest.mark.parametrize("inner", ["list", "object"])
def test_depth_is_a_bad_row(column: str, inner: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    opened, closed = ("[", "]") if inner == "list" else ('{"properties": ', "}")
    deep = opened * 900 + "null" + closed * 900
    turns = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    rest = "" if column == "messages" else f'"messages": {turns}, '
    path.write_text(f'{{{rest}"{column}": {deep}}}\n' * 2)
    try:
        Reading("messages", {}, None, "error").read("train", str(path), read_rows(path))
    except DataError as error:
        assert ":1: " in str(error)


NAMES = ("pay", "find", "send")
CALLS = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.dictionaries(st.sampled_from(["to", "amount", "note"]), st.integers(0, 3), max_size=3),
    ),
    min_size=1,
    max_size=3,
)


@given(calls=st.lists(CALLS, min_size=1, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_what_datasets_writes_is_read_as_it_was_given(calls: list[Any], tmp_path: Path) -> None:
    """Each function has arguments of its own; JSONL and Parquet alike."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "", "tool_calls": [_call(name, given) for name, given in of_row]},
            ]
        }
        for of_row in calls
    ]
    assume(any(given for of_row in calls for _, given in of_row))  # Parquet has no objects that never have a key
    table = datasets.Dataset.from_list(rows)
    table.to_json(tmp_path / "rows.jsonl")
    table.to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        read = [SHAPES["messages"].parse(row.values) for row in read_rows(tmp_path / name)]  # type: ignore[arg-type]
        assert [_plain(example.messages[1]["tool_calls"]) for example in read] == [
            _plain(row["messages"][1]["tool_calls"]) for row in rows
        ]


@given(calls=st.lists(CALLS, min_size=1, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_what_is_written_by_hand_is_read_as_it_stands(calls: list[Any], tmp_path: Path) -> None:
    """Zero stands for a null that the author wrote."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [_call(name, {k: v or None for k, v in given.items()}) for name, given in of_row],
                },
            ]
        }
        for of_row in calls
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    read = [SHAPES["messages"].parse(row.values) for row in read_rows(path)]  # type: ignore[arg-type]
    assert [example.messages[1]["tool_calls"] for example in read] == [row["messages"][1]["tool_calls"] for row in rows]


def _call(name: str, given: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": given}}


def _plain(calls: list[Any]) -> list[Any]:
    """Arrow makes an object without keys null where no row has a key, and the call is then one without arguments."""
    return [(call["function"]["name"], call["function"].get("arguments") or {}) for call in calls]
