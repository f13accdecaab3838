"""Preference rows: the same law as for single answers, one prompt for both, and nothing cut until both are equal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from toolkit.data import render_preview
from toolkit.errors import DataError

ASK = [{"role": "user", "content": "which colour is grass?"}]
GOOD, BAD = [{"role": "assistant", "content": "green"}], [{"role": "assistant", "content": "red"}]
ROW: dict[str, Any] = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
FORMS = {
    "prompt apart": ROW,
    "prompt in both": {"chosen": ASK + GOOD, "rejected": ASK + BAD},
    "prompt as text, answers alone": {**ROW, "prompt": ASK[0]["content"]},
    "prompt as text, and in both": {"prompt": ASK[0]["content"], "chosen": ASK + GOOD, "rejected": ASK + BAD},
    "prompt in all three": {"prompt": ASK, "chosen": ASK + GOOD, "rejected": ASK + BAD},
}


def ids(batches: Any, index: int) -> list[int]:
    found: list[int] = batches.train[index]["input_ids"]
    return found


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS.keys())
def test_each_side_is_what_a_single_answer_would_be(row: dict[str, Any], build: Any, trained: Any) -> None:
    batches = build([row], pairs=True)
    alone = [build([{"prompt": ASK, "completion": answer}]) for answer in (GOOD, BAD)]
    assert batches.pairs
    assert [batches.train[side] for side in (0, 1)] == [single.train[0] for single in alone]
    assert [trained(batches, side) for side in (0, 1)] == [["green<|im_end|>"], ["red<|im_end|>"]]
    assert batches.places[0] == batches.places[1]
    assert batches.form.form == "chat"


def test_text_is_text_without_a_template(build: Any, trained: Any) -> None:
    row = {"prompt": "grass is", "chosen": " green", "rejected": " red"}
    batches = build([row], pairs=True)
    assert [build([{"prompt": "grass is", "completion": row[side]}]).train[0] for side in ("chosen", "rejected")] == [
        batches.train[side] for side in (0, 1)
    ]
    assert batches.form.form == "text"


def test_tools_and_system_turns_stand_before_both(build: Any, tokenizer: Any) -> None:
    batches = build([{**ROW, "system": "be short"}], pairs=True)
    texts = [tokenizer.decode(ids(batches, side)) for side in (0, 1)]
    assert all("be short" in text for text in texts)
    assert texts[0].replace("green", "red") == texts[1]


def test_an_answer_of_several_turns_counts_its_own_turns_alone(build: Any, trained: Any) -> None:
    more = [*GOOD, {"role": "user", "content": "and blood?"}, {"role": "assistant", "content": "red"}]
    batches = build([{**ROW, "chosen": more}], pairs=True)
    assert trained(batches, 0) == ["green<|im_end|>", "red<|im_end|>"]
    assert trained(batches, 1) == ["red<|im_end|>"]


SAME = {**ROW, "rejected": GOOD}
REFUSED = {
    "the same": (SAME, "chosen and rejected are the same; there is nothing to prefer"),
    "the same as written": (
        {**ROW, "rejected": [{**GOOD[0], "name": "x"}]},
        "as the chat template writes them, chosen and rejected are the same",
    ),
    "no prompt": ({"chosen": GOOD, "rejected": BAD}, "no turn in common; add a prompt"),
    "text without a prompt": ({"chosen": "green", "rejected": "red"}, "nobody can tell where the answers begin"),
    "mixed": ({**ROW, "chosen": "green"}, "must all be text, or all lists of messages"),
    "mixed prompt": ({"prompt": ASK, "chosen": "green", "rejected": "red"}, "must all be text"),
    "other questions": (
        {"chosen": [*ASK, *GOOD], "rejected": [{"role": "user", "content": "and blood?"}, *BAD]},
        "no turn in common",
    ),
    "another turn than the prompt": (
        {"prompt": "and blood?", "chosen": ASK + GOOD, "rejected": ASK + BAD},
        "begin with another turn than the prompt",
    ),
    "a question after the prompt": ({**ROW, "chosen": ASK + GOOD, "prompt": GOOD}, "chosen: after the prompt comes"),
    "no answer": ({**ROW, "chosen": ASK}, "chosen: no answer after the prompt"),
    "empty": ({"prompt": "grass is", "chosen": " ", "rejected": " red"}, "chosen is empty"),
    "one side": ({"prompt": ASK, "chosen": GOOD}, "rejected"),
    "tools beside text": (
        {"prompt": "grass is", "chosen": " green", "rejected": " red", "tools": TOOLS},
        "plain text has no place for tools",
    ),
}


@pytest.mark.parametrize(("row", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_pair_is_refused_with_its_place(row: dict[str, Any], words: str, build: Any) -> None:
    filler = {key: value for key, value in ROW.items() if key in {*row, "prompt"}}
    with pytest.raises(DataError) as refused:
        build([{**filler, **ROW}, row] if "rejected" in row else [row], pairs=True)
    message = str(refused.value)
    assert words in message
    assert "\n" not in message
    if "rejected" in row:
        assert "data.jsonl:2: " in message
        kept = build([ROW, row], pairs=True, on_invalid="drop")
        assert len(kept.train) == 2
        assert sum(kept.report.splits["train"].drops.values()) == 1


def test_pairs_are_dropped_whole_where_a_side_is_too_long(build: Any) -> None:
    long = {**ROW, "rejected": [{"role": "assistant", "content": "red " * 80}]}
    batches = build([long, ROW], pairs=True, max_length=64)
    assert batches.report.splits["train"].drops == {"longer than max_length": 1}
    assert len(batches.train) == 2


def test_no_pair_is_cut_until_both_sides_are_equal(build: Any) -> None:
    sides = {side: [{"role": "assistant", "content": "word " * 60 + end}] for side, end in
             (("chosen", "green"), ("rejected", "red"))}  # fmt: skip
    batches = build([{**ROW, **sides}, ROW], pairs=True, max_length=48, truncation="keep_start")
    assert batches.report.splits["train"].drops == {"chosen and rejected are the same up to max_length": 1}
    assert len(batches.train) == 2
    cut = build([{**ROW, "chosen": sides["chosen"]}], pairs=True, max_length=48, truncation="keep_start")
    assert (len(ids(cut, 0)), len(ids(cut, 1)) < 48) == (48, True)


def test_several_rejected_answers_are_no_copies_and_stay_on_one_side(build: Any) -> None:
    rows = [{**ROW, "rejected": [{"role": "assistant", "content": word}]} for word in ("red", "blue", "red")]
    other = {"prompt": [{"role": "user", "content": "and snow?"}], "chosen": GOOD, "rejected": BAD}
    batches = build([*rows, other], pairs=True, validation_size=1)
    assert sum(n for text, n in batches.report.notices.items() if "copies" in text) == 1
    assert len(batches.validation) == 2
    assert (batches.report.overlap, len(batches.held_out)) == (0, 1)
    assert batches.held_out[0].answer == "green"
    assert build(rows, pairs=True, dedupe=True).report.splits["train"].kept == 2


def test_the_method_says_which_rows_are_read(build: Any) -> None:
    with pytest.raises(DataError, match=r"learn from both with training.method: dpo"):
        build([{"messages": ASK + GOOD, "rejected": BAD}])
    with pytest.raises(DataError, match=r"fit no format.*preference: chosen, rejected"):
        build([{"messages": ASK + GOOD}], pairs=True)
    with pytest.raises(DataError, match=r"data.format: messages is not for this training.method"):
        build([ROW], pairs=True, format="messages")


def test_the_preview_shows_the_prompt_once_and_what_counts(build: Any, tokenizer: Any) -> None:
    shown = io.StringIO()
    render_preview(Console(file=shown, width=120), build([ROW], pairs=True), tokenizer)
    text = shown.getvalue()
    assert text.count("which colour is grass?") == 1
    assert "chosen: «green<|im_end|>»" in text
    assert "rejected: «red<|im_end|>»" in text
    assert "data.jsonl:1): prompt " in text
    assert "2 answers count in 2 examples" in text


JUDGED = [{"prompt": ASK, "completion": GOOD, "label": True}, {"prompt": ASK, "completion": BAD, "label": "false"}]


def test_answers_are_judged_one_by_one(build: Any, write: Any, tokenizer: Any, trained: Any) -> None:
    """Written as single answers are; nobody is asked for the bad one."""
    both = build(JUDGED, pairs=True, unpaired=True)
    assert (both.judged, both.pairs, both.report.format) == (True, False, "unpaired")
    assert both.train["desirable"] == [True, False]
    assert [trained(both, row) for row in (0, 1)] == [["green<|im_end|>"], ["red<|im_end|>"]]
    alone = build([{"prompt": ASK, "completion": BAD}])
    assert both.train[1]["input_ids"] == alone.train[0]["input_ids"]
    held = build(JUDGED[:1], pairs=True, unpaired=True, validation=str(write(JUDGED, "held.jsonl")))
    assert [question.answer for question in held.held_out] == ["green"]
    shown = io.StringIO()
    render_preview(Console(file=shown, width=120), both, tokenizer)
    assert "example 1 (" in shown.getvalue()
    assert "), bad: " in shown.getvalue()


def test_what_is_no_judged_answer_is_refused_with_its_place(build: Any, write: Any) -> None:
    for row, words in (
        ({**JUDGED[0], "label": "maybe"}, "label is 'maybe'; true (a good answer) or false (a bad one) is expected"),
        ({"prompt": ASK, "completion": GOOD, "label": None}, "label is null; fill it in"),
        ({**JUDGED[0], "completion": ASK}, "no assistant turn"),
    ):
        with pytest.raises(DataError) as refused:
            build([*JUDGED, row], pairs=True, unpaired=True)
        assert words in str(refused.value)
        assert "data.jsonl:3: " in str(refused.value)
    with pytest.raises(DataError, match=r"pairs and answers that are judged one by one; give rows of one format"):
        build([ROW], pairs=True, unpaired=True, validation=str(write(JUDGED, "held.jsonl")))
    with pytest.raises(DataError, match=r"label marks the answer as bad; learn from it with training.method: kto"):
        build([{"prompt": ASK, "completion": BAD, "label": False}])
