"""Copies within and across the splits, and rows that belong together: told, left out on request, never parted."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.data.formats import Example
from toolkit.data.reading import Split
from toolkit.data.selection import set_apart
from toolkit.errors import DataError

COPIES = "examples are copies of others; data.dedupe: true leaves them out"


def pair(prompt: str, completion: str = "yes", **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": f" {completion}", **columns}


ROWS = [pair(f"question {i}:", f"answer {i}") for i in range(10)]


def test_copies_are_told_and_kept(build: Any) -> None:
    report = build([*ROWS, *ROWS[:3], ROWS[0]]).report
    assert report.notices == {COPIES: 4}
    assert report.splits["train"].kept == 14
    assert not build([*ROWS, pair("question 0:", "another answer")]).report.notices


def test_copies_are_left_out_on_request(build: Any) -> None:
    batches = build([*ROWS[:3], *ROWS, pair("question 0:", "another answer")], dedupe=True)
    assert batches.report.notices == {}
    assert batches.report.splits["train"].drops == {"a copy of another example": 3}
    assert batches.report.splits["train"].rows == 14
    assert [place.rpartition(":")[2] for place in batches.places] == [
        "1",
        "2",
        "3",
        "7",
        "8",
        "9",
        "10",
        "11",
        "12",
        "13",
        "14",
    ]


def test_a_copy_may_be_written_in_another_format(build: Any, write: Any, tokenizer: Any) -> None:
    from toolkit.data import build_batches

    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    one = write([chat, {**chat, "tools": [{"type": "function", "function": {"name": "f"}}]}], "one.jsonl")
    two = write([{"instruction": "q", "output": "a"}], "two.jsonl")
    train = [{"path": str(one)}, {"path": str(two)}]
    drops = build_batches(tokenizer, train=train, dedupe=True).report.splits["train"].drops
    assert drops == {"a copy of another example": 1}


def test_a_pair_is_no_copy_of_the_text_that_it_makes(build: Any) -> None:
    assert build([pair("a b", "c"), pair("a", "b c")], dedupe=True).report.splits["train"].kept == 2


def test_held_out_prompts_leave_the_training_data_on_request(build: Any, write: Any) -> None:
    held = str(write([ROWS[0], pair("question 1:", "other"), pair("new")], "held.jsonl"))
    told = build(ROWS, validation=held).report
    assert (told.overlap, told.splits["train"].kept) == (2, 10)
    report = build(ROWS, validation=held, dedupe=True).report
    assert (report.overlap, report.splits["train"].kept) == (0, 8)
    assert report.splits["train"].drops == {"its prompt is held out": 2}
    assert report.splits["validation"].kept == 3


def test_nothing_left_is_refused(build: Any, write: Any) -> None:
    with pytest.raises(DataError, match=r"\(its prompt is held out: 10\); hold out less, or set data.dedupe: false$"):
        build(ROWS, validation=str(write(ROWS, "held.jsonl")), dedupe=True)


SESSIONS = [pair(f"question {i}:", session=i // 4) for i in range(24)]


def sessions(batches: Any, numbers: Any = None) -> set[int]:
    return {(int(place.rpartition(":")[2]) - 1) // 4 for place in batches}


def test_groups_are_never_on_both_sides(build: Any) -> None:
    for seed in range(5):
        batches = build(SESSIONS, validation_size=0.34, group_by="session", seed=seed)
        held = sessions(question.place for question in batches.held_out)
        assert held
        assert not held & sessions(batches.places)
        assert len(batches.validation) == 8
    parted = [build(SESSIONS, validation_size=0.34, seed=seed) for seed in range(3)]
    assert any(sessions(q.place for q in b.held_out) & sessions(b.places) for b in parted)


def test_the_group_is_no_unused_column(build: Any) -> None:
    assert not build(SESSIONS, validation_size=4, group_by="session").report.notices
    assert build(SESSIONS).report.notices == {"column 'session' is not used": 24}


def test_a_missing_group_column_is_one_line(build: Any, write: Any) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl: data\.group_by: no column 'sesion'; did you mean session\?"):
        build(SESSIONS, validation_size=4, group_by="sesion")
    held = write(ROWS, "held.jsonl")
    with pytest.raises(DataError, match=r"held\.jsonl: data\.group_by: no column 'session'"):
        build(SESSIONS, validation=str(held), group_by="session")


def test_groups_on_both_sides_are_told(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "held.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["prompt", "completion", "session"], ["n1", "a", "0"], ["n2", "a", "1.5"], ["n3", "a", "0"]])
    report = build(SESSIONS, validation=str(path), group_by="session").report
    assert report.notices == {"held-out examples whose session is also in the training data": 2}


def test_rows_without_a_group_stand_alone(build: Any) -> None:
    rows = [pair(f"q {i}", session=None if i % 2 else "") for i in range(10)] + SESSIONS
    report = build(rows, validation_size=5, group_by="session").report
    assert report.notices == {"rows without a value of data.group_by stand alone": 10}


def test_one_group_cannot_be_parted(build: Any) -> None:
    rows = [pair(f"q {i}", session=1) for i in range(10)]
    with pytest.raises(DataError, match=r"10 examples with 1 groups that share no prompt and no value"):
        build(rows, validation_size=2, group_by="session")


@given(
    rows=st.lists(st.tuples(st.integers(0, 6), st.none() | st.integers(0, 6)), min_size=2, max_size=30),
    size=st.integers(1, 20),
    seed=st.integers(0, 3),
)
def test_neither_prompt_nor_group_is_on_both_sides(rows: list[tuple[int, int | None]], size: int, seed: int) -> None:
    examples = [
        Example(f"f:{i}", prompt=f"p{p}", text=f"p{p}a", group=None if g is None else bytes([g]))
        for i, (p, g) in enumerate(rows)
    ]
    training = Split("train", "f", rows=len(examples), examples=[*examples])
    try:
        held = set_apart(training, size, seed)
    except DataError:
        return
    assert len(held.examples) <= size
    assert {e.key for e in held.examples}.isdisjoint(e.key for e in training.examples)
    assert {e.group for e in held.examples if e.group}.isdisjoint(e.group for e in training.examples)
    assert len(held.examples) + len(training.examples) == len(examples)


def test_a_group_may_be_any_value(build: Any) -> None:
    rows = [pair(f"q {i}", meta={"b": i // 2, "a": [1]}) for i in range(8)]
    batches = build([json.dumps(row) for row in rows], validation_size=2, group_by="meta")
    first, second = sorted(int(q.place.rpartition(":")[2]) for q in batches.held_out)
    assert second == first + 1 == (first // 2 + 1) * 2
