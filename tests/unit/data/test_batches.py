"""Splits, draws, lengths, the report and its picture."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from trl import pack_dataset

from toolkit.data import render_preview
from toolkit.data.formats import Example
from toolkit.data.reading import Split
from toolkit.data.report import length_bins
from toolkit.data.selection import set_apart
from toolkit.errors import DataError


def pair(prompt: str, completion: str = "yes") -> dict[str, str]:
    return {"prompt": prompt, "completion": f" {completion}"}


ROWS = [pair(f"question {i}:", f"answer {i}") for i in range(40)]


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(build: Any) -> None:
    options: dict[str, Any] = {"shuffle": True, "validation_size": 0.25, "max_samples": 20}
    one, two, other = (build(ROWS, seed=seed, **options) for seed in (1, 1, 2))
    assert one.train[:] == two.train[:] != other.train[:]
    assert list(one.held_out) == list(two.held_out) != list(other.held_out)
    assert one.report == two.report


def test_shuffling_moves_rows_and_loses_none(build: Any) -> None:
    plain, shuffled = build(ROWS), build(ROWS, shuffle=True)
    assert plain.train[:] != shuffled.train[:]
    assert sorted(plain.train["input_ids"]) == sorted(shuffled.train["input_ids"])
    assert [place.rpartition(":")[2] for place in plain.report.examples] == ["1", "2", "3"]


def test_samples_are_drawn_and_stay_in_order_without_shuffling(build: Any) -> None:
    whole, some = list(build(ROWS).train["input_ids"]), list(build(ROWS, max_samples=7).train["input_ids"])
    positions = [whole.index(ids) for ids in some]
    assert len(positions) == 7
    assert positions == sorted(positions) != list(range(7))
    assert build(ROWS, max_samples=7).report.splits["train"].drops == {"beyond max_samples": 33}
    assert len(build(ROWS, max_samples=99).train) == 40


def test_drawn_samples_make_up_for_those_too_long(build: Any) -> None:
    rows = [pair("long " * 60)] * 20 + ROWS
    split = build(rows, max_samples=30, max_length=40).report.splits["train"]
    assert split.kept == 30
    assert sum(split.drops.values()) == 30


@given(
    st.lists(st.integers(0, 12), min_size=2, max_size=40),
    st.one_of(st.floats(0.01, 0.9), st.integers(1, 20)),
    st.integers(0, 3),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_prompt_stands_on_both_sides(prompts: list[int], size: float | int, seed: int) -> None:
    examples = [Example(f"f:{i}", prompt=f"p{p}", text=f"p{p}a{i}") for i, p in enumerate(prompts)]
    training = Split("train", "f", rows=len(examples), examples=list(examples))
    try:
        held = set_apart(training, size, seed)
    except DataError:
        target = size if isinstance(size, int) else max(1, round(size * len(prompts)))
        assert target >= len(prompts) or len(set(prompts)) == 1 or min(map(prompts.count, prompts)) > target
        return
    assert not {e.key for e in held.examples} & {e.key for e in training.examples}
    assert sorted(e.place for e in held.examples + training.examples) == sorted(e.place for e in examples)
    assert held.examples
    assert training.examples
    assert len(held.examples) <= (size if isinstance(size, int) else max(1, round(size * len(prompts))))


@pytest.mark.parametrize(("size", "kept"), [(8, 8), (0.25, 10), (1, 1)])
def test_validation_size_is_a_count_or_a_share(size: float | int, kept: int, build: Any) -> None:
    batches = build(ROWS, validation_size=size)
    assert (len(batches.validation), len(batches.held_out), len(batches.train)) == (kept, kept, 40 - kept)
    assert batches.report.overlap == 0


def test_a_validation_size_that_leaves_nothing_is_refused(build: Any) -> None:
    for rows, size in ((ROWS, 40), ([pair("same")] * 5, 2)):
        with pytest.raises(DataError, match="both sides need some"):
            build(rows, validation_size=size)


def test_two_ways_to_hold_out_exclude_each_other(build: Any) -> None:
    with pytest.raises(DataError, match="exclude each other"):
        build(ROWS, validation="x.jsonl", validation_size=2)


def test_validation_prompts_that_are_trained_on_are_counted(build: Any, write: Any) -> None:
    held = write([*ROWS[:3], pair("a new one")], "held.jsonl")
    assert build(ROWS, validation=str(held)).report.overlap == 3


def test_folders_hold_out_their_own_split(tokenizer: Any, tmp_path: Any, write: Any) -> None:
    from toolkit.data import build_batches

    write(ROWS[:5], "d/x.train.jsonl")
    write(ROWS[5:7], "d/x.test.jsonl")
    batches = build_batches(tokenizer, train="d", validation_split="test", base_folder=tmp_path)
    assert (len(batches.train), len(batches.validation)) == (5, 2)


def test_long_examples_are_dropped_or_cut(build: Any, write: Any, trained: Any) -> None:
    rows = [pair("short:", "a"), pair("cut:", "word " * 50), pair("no answer left: " + "x " * 60)]
    held = str(write(rows, "held.jsonl"))
    dropped = build(rows, max_length=20, validation=held)
    assert dropped.report.splits["train"].drops == {"longer than max_length": 2}
    cut = build(rows, max_length=20, truncation="keep_start", validation=held)
    assert cut.report.splits["train"].drops == {"answer beyond max_length": 1}
    assert [len(row["input_ids"]) for row in cut.train][1] == 20
    assert not trained(cut, 1)[-1].endswith("<|im_end|>")
    assert [len(one.answer.split()) for one in cut.held_out] == [1, 50]


def test_nothing_left_is_refused_with_the_reasons(build: Any) -> None:
    for truncation, said in (
        ("drop", r"\(longer than max_length: 40\); raise training.max_length or set data.truncation: keep_start$"),
        ("keep_start", r"\(answer beyond max_length: 40\); raise training.max_length$"),
    ):
        with pytest.raises(DataError, match=f": no example left for train of 40 rows {said}"):
            build(ROWS, max_length=3, truncation=truncation)
    stopped = {"role": "assistant", "content": "a<|im_end|>b"}
    for turns, said in (
        ([{"role": "user"}], r"no usable example in 1 rows \(no content: 1\)"),
        ([{"role": "user", "content": "q"}, stopped], r"no example left .* \(stops inside an answer: 1\)"),
    ):
        with pytest.raises(DataError, match=f": {said}; data.on_invalid: error names the first$"):
            build([{"messages": turns}], on_invalid="drop")
    with pytest.raises(
        DataError, match=r"every answer is cut before its end-of-turn token; raise training\.max_length"
    ):
        build([pair("a", "word " * 50)], max_length=20, truncation="keep_start")
    with pytest.raises(DataError, match=r"no usable example in 2 rows \(empty answer: 2\)"):
        build([pair("a", "")] * 2, on_invalid="drop")


def test_the_report_adds_up_and_is_json(build: Any) -> None:
    batches = build([*ROWS, pair("empty", "")], validation_size=5, on_invalid="drop")
    report = json.loads(json.dumps(batches.report.to_dict()))
    assert report["format"] == "prompt-completion"
    for name, data in (("train", batches.train), ("validation", batches.validation)):
        split = report["splits"][name]
        assert split["rows"] == split["kept"] + sum(split["drops"].values())
        assert split["kept"] == len(data) == sum(each["count"] for each in split["lengths"])
        assert split["tokens"] == sum(map(len, data["input_ids"]))
        assert split["trained_tokens"] == sum(label != -100 for labels in data["labels"] for label in labels)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50))
def test_length_bins_hold_every_length_once(lengths: list[int]) -> None:
    bins = length_bins(lengths)
    assert len(bins) <= 10
    assert [each.count for each in bins] == [sum(b.low <= n <= b.high for n in lengths) for b in bins]
    assert sum(each.count for each in bins) == len(lengths)


def test_packing_keeps_ids_and_labels_together(build: Any) -> None:
    batches = build(ROWS, max_length=64)
    packed = pack_dataset(batches.train, 64)
    ids = [token for row in packed for token in row["input_ids"]]
    labels = [label for row in packed for label in row["labels"]]
    assert len(ids) == batches.report.splits["train"].tokens
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


def show(batches: Any, tokenizer: Any, **console: Any) -> str:
    stream = io.StringIO()
    render_preview(Console(file=stream, width=100, **console), batches, tokenizer, count=2)
    return stream.getvalue()


def test_the_preview_shows_masks_without_colour(build: Any, tokenizer: Any) -> None:
    rows = [pair("ring \x1b[31m \x07 \u202e:", "ünï [bold] code"), *ROWS, pair("empty", "")]
    shown = show(build(rows, on_invalid="drop", validation_size=3), tokenizer)
    assert "« ünï [bold] code<|im_end|>»" in shown
    assert "\\x1b[31m \\x07 \\u202e" in shown
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    assert "empty answer: 1" in shown
    assert "validation" in shown
    assert "█" in shown
    assert "example 3" not in shown


def test_the_preview_colours_trained_tokens(build: Any, tokenizer: Any) -> None:
    shown = show(build(ROWS), tokenizer, force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b[32m answer 0\x1b[0m\x1b[1;36m<|im_end|>\x1b[0m" in shown
    assert "«" not in shown


def test_a_tokenizer_that_cannot_end_or_place_text_is_refused(build: Any, tokenizer_with: Any) -> None:
    endless = tokenizer_with()
    endless.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        build(ROWS, tok=endless)
