"""Rows as questions: the prompt's tokens as in training on single answers, the answer apart, and room to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.parity.conftest import EMBEDDED
from toolkit.data import Batches, build_batches
from toolkit.errors import DataError

ASK = {"role": "user", "content": "Which is it: oak?"}
ROWS = [
    {"messages": [ASK, {"role": "assistant", "content": "plant"}], "level": 2},
    {"messages": [ASK, {"role": "assistant", "content": "a"}, ASK, {"role": "assistant", "content": "b"}], "level": 3},
]


def build(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Batches:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    given = {"room": 8, "max_length": 96, "shuffle": False, "stop_token_ids": [tokenizer.eos_token_id], **changes}
    return build_batches(tokenizer, train=str(path), **given)


def test_a_question_is_the_prompt_of_single_answers_and_what_was_wanted(tmp_path: Path) -> None:
    made = build(tmp_path, ROWS, kept=["level"], validation_size=1)
    plain = build(tmp_path, ROWS, room=None, validation_size=1)
    assert len(made.questions) == len(made.train) == len(made.held_out_questions) == 1
    every = [*made.questions, *made.held_out_questions]
    assert {question.answer: question.columns for question in every} == {"plant": {"level": 2}, "b": {"level": 3}}
    two = next(question for question in every if question.answer == "b")
    assert two.prompt == ROWS[1]["messages"][:-1]  # type: ignore[index]
    assert two.place.endswith("rows.jsonl:2")
    for question, row in ((made.questions[0], made.train[0]), (made.held_out_questions[0], made.validation[0])):  # type: ignore[index]
        assert tuple(row["input_ids"][: len(question.prompt_ids)]) == question.prompt_ids
    assert [q.prompt_ids for q in made.held_out_questions] == [q.prompt_ids for q in plain.held_out]
    assert plain.questions == ()


def test_plain_text_has_a_prompt_and_no_template(tmp_path: Path) -> None:
    made = build(tmp_path, [{"prompt": "2 + 2 =", "completion": " 4"}])
    assert (made.questions[0].prompt, made.questions[0].answer) == ("2 + 2 =", "4")


@pytest.mark.parametrize("prompt", [[ASK], "2 + 2 ="])
def test_a_row_may_be_a_prompt_alone(prompt: Any, tmp_path: Path) -> None:
    whole = {"prompt": prompt, "completion": [{"role": "assistant", "content": "x"}] if prompt == [ASK] else "x"}
    made, plain = build(tmp_path, [{"prompt": prompt, "level": 3}], kept=["level"]), build(tmp_path, [whole])
    (question,) = made.questions
    assert (question.prompt, question.answer, question.columns) == (prompt, None, {"level": 3})
    assert question.prompt_ids == plain.questions[0].prompt_ids == tuple(made.train[0]["input_ids"])
    assert made.report.splits["train"].trained_tokens == 0
    assert made.form == plain.form


def test_an_answer_beside_a_prompt_is_text_or_a_number(tmp_path: Path) -> None:
    rows = [{"prompt": [ASK], "answer": answer} for answer in ("plant", 4, None, ["plant", "tree"])]
    made = build(tmp_path, rows, kept=["answer"])
    assert [question.answer for question in made.questions] == ["plant", "4", None, None]
    assert made.questions[3].columns == {"answer": ["plant", "tree"]}
    assert sum(count for notice, count in made.report.notices.items() if "neither text nor a number" in notice) == 1


def test_a_prompt_that_leaves_no_room_is_left_out_and_counted(tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "oak " * 30}, {"role": "assistant", "content": "plant"}]}
    made = build(tmp_path, [ROWS[0], long], room=60)
    assert made.report.splits["train"].drops == {"longer than max_length": 1}


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        ([{"prompt": "", "completion": "4"}], {}, "rows.jsonl:1: nothing stands before the answer"),
        ([{"prompt": [ASK, {"role": "assistant", "content": "a"}]}], {}, "prompt ends in an assistant turn"),
        ([{"text": "a text"}], {}, "its columns (text) fit no format"),
        ([{"prompt": [ASK]}], {"room": None}, "such rows are for training.method: grpo; accepted:"),
        ([{"chosen": [ASK], "rejected": [ASK]}], {"room": None}, "learn from both with training.method: dpo"),
        (ROWS, {"kept": ["levle"]}, "rewards.columns: no column 'levle'; did you mean level?"),
    ],
)
def test_what_asks_nothing_is_refused(
    rows: list[dict[str, Any]], changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as failed:
        build(tmp_path, rows, **changes)
    assert words in str(failed.value)
