"""Several data sets: each seen as often as its weight says, mixed evenly, the same from the same seed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.data import build_batches
from toolkit.data.formats import Example
from toolkit.data.reading import DataSource, sources_of
from toolkit.data.selection import draw
from toolkit.errors import DataError


def pairs(name: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{name} {i}:", "completion": f" {name}{i}"} for i in range(count)]


@pytest.fixture
def mix(tokenizer: Any, write: Any) -> Any:
    """Batches of the sets given as name -> (rows, what the item says beside its path)."""

    def run(sets: dict[str, tuple[list[Any], dict[str, Any]]], **options: Any) -> Any:
        train = [{"path": str(write(rows, f"{name}.jsonl")), **item} for name, (rows, item) in sets.items()]
        return build_batches(tokenizer, train=train, **{"shuffle": False, **options})

    return run


def seen(batches: Any) -> Counter[str]:
    return Counter(Path(place).name for place in batches.places)


AB = {"a": (pairs("a", 8), {"weight": 2}), "b": (pairs("b", 10), {"weight": 0.5}), "c": (pairs("c", 4), {})}


def test_a_weight_is_how_often_an_example_is_seen(mix: Any) -> None:
    counts = seen(mix(AB))
    assert [counts[f"a.jsonl:{n}"] for n in range(1, 9)] == [2] * 8
    assert [counts[f"c.jsonl:{n}"] for n in range(1, 5)] == [1] * 4
    assert sorted(counts[f"b.jsonl:{n}"] for n in range(1, 11)) == [0] * 5 + [1] * 5


def test_the_report_says_what_came_of_each_set_and_adds_up(mix: Any) -> None:
    report = mix(AB).report
    told = [(Path(s.path).name, s.weight, s.rows, s.examples, s.seen) for s in report.sources]
    assert told == [("a.jsonl", 2, 8, 8, 16), ("b.jsonl", 0.5, 10, 10, 5), ("c.jsonl", 1, 4, 4, 4)]
    split = report.splits["train"]
    assert sum(s.tokens for s in report.sources) == split.tokens
    assert sum(s.trained_tokens for s in report.sources) == split.trained_tokens
    more = report.notices["examples repeated by the weights of data.train"]
    assert (split.rows, split.kept, more, split.drops) == (22, 25, 8, {"not drawn: weight below 1": 5})
    assert split.rows + more == split.kept + sum(split.drops.values())
    assert json.dumps(report.to_dict())
    assert "a.jsonl, weight 2: an epoch sees 16 of 8 examples in 8 rows" in str(report.sources[0])


def test_sets_are_mixed_evenly_and_each_keeps_its_order(mix: Any) -> None:
    places = [Path(place).name for place in mix({"a": (pairs("a", 9), {}), "b": (pairs("b", 3), {})}).places]
    for third in range(3):
        assert Counter(place[0] for place in places[4 * third : 4 * third + 4]) == {"a": 3, "b": 1}
    assert [place for place in places if place[0] == "a"] == [f"a.jsonl:{n}" for n in range(1, 10)]


def test_the_same_seed_gives_the_same_rows_in_the_same_order(mix: Any) -> None:
    for shuffle in (False, True):
        one, two, other = (mix(AB, seed=seed, shuffle=shuffle) for seed in (1, 1, 2))
        assert one.places == two.places != other.places
        assert one.train[:] == two.train[:]
        assert one.report == two.report
    assert Counter(mix(AB, seed=1).places) == Counter(mix(AB, seed=1, shuffle=True).places)


def test_one_set_as_a_list_is_that_set(mix: Any, tokenizer: Any, write: Any) -> None:
    rows = pairs("a", 30)
    for options in ({}, {"shuffle": True}, {"shuffle": True, "max_samples": 7}, {"validation_size": 5}):
        listed = mix({"a": (rows, {})}, **options)
        plain = build_batches(tokenizer, train=str(write(rows, "a.jsonl")), **{"shuffle": False, **options})
        assert listed.train[:] == plain.train[:]
        assert listed.places == plain.places
        assert plain.report.sources == ()


def test_each_set_has_its_own_format_columns_and_most_samples(mix: Any) -> None:
    chat = [{"talk": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "a"}]} for i in range(6)]
    batches = mix(
        {
            "a": (chat, {"columns": {"messages": "talk"}, "max_samples": 3, "weight": 2}),
            "b": ([{"text": "t", **pairs("b", 1)[0]}], {"format": "text"}),
        }
    )
    assert batches.report.format == "messages, text"
    assert [s.seen for s in batches.report.sources] == [6, 1]
    assert set(seen(batches).values()) == {1, 2}
    assert batches.report.splits["train"].drops == {"beyond max_samples": 3}


def test_a_split_of_each_set(tokenizer: Any, write: Any, tmp_path: Path) -> None:
    for name in ("d", "e"):
        write(pairs(name, 4), f"{name}/train.jsonl")
        write(pairs(f"{name}v", 2), f"{name}/validation.jsonl")
        write(pairs(f"{name}x", 1), f"{name}/extra.jsonl")
    train = [{"path": "d"}, {"path": "e", "split": "extra"}]
    batches = build_batches(tokenizer, train=train, base_folder=tmp_path, validation_split="validation")
    assert {Path(place).relative_to(tmp_path).parts[1].split(":")[0] for place in batches.places} == {
        "train.jsonl",
        "extra.jsonl",
    }
    assert batches.report.splits["validation"].kept == 4


def test_what_is_held_out_of_one_set_is_in_no_other(mix: Any) -> None:
    rows = pairs("same", 20)
    batches = mix({"a": (rows, {"weight": 3}), "b": (rows, {})}, validation_size=0.25)
    assert batches.report.overlap == 0
    assert len(batches.validation) == 10
    assert len(batches.train) == 4 * 15


def test_samples_are_drawn_from_the_mixture(mix: Any) -> None:
    batches = mix(AB, max_samples=11)
    assert len(batches.train) == 11
    split = batches.report.splits["train"]
    more = batches.report.notices.get("examples repeated by the weights of data.train", 0)
    assert split.rows + more == split.kept + sum(split.drops.values())


def test_rows_too_long_are_counted_once_however_often_they_are_drawn(mix: Any) -> None:
    rows = [*pairs("a", 3), {"prompt": "long " * 60, "completion": " x"}]
    report = mix({"a": (rows, {"weight": 3})}, max_length=40).report
    assert report.splits["train"].drops == {"longer than max_length": 1}
    assert report.splits["train"].kept == 9
    assert report.sources[0].seen == 9


def test_a_bad_row_names_its_file(mix: Any) -> None:
    with pytest.raises(DataError, match=r"b\.jsonl:2: completion is empty"):
        mix({"a": (pairs("a", 2), {}), "b": ([*pairs("b", 1), {"prompt": "q", "completion": ""}], {"weight": 2})})


def test_weights_do_not_make_copies(mix: Any) -> None:
    assert not [notice for notice in mix({"a": (pairs("a", 3), {"weight": 3})}).report.notices if "copies" in notice]


@given(
    sets=st.lists(
        st.tuples(st.integers(1, 30), st.floats(0.01, 4), st.none() | st.integers(1, 40)), min_size=1, max_size=4
    ),
    seed=st.integers(0, 3),
)
def test_every_example_is_seen_the_times_below_or_above_its_weight(sets: list[Any], seed: int) -> None:
    sources = [DataSource(f"s{n}", weight=weight, max_samples=most) for n, (_, weight, most) in enumerate(sets)]
    examples = [Example("", text=f"{n}.{i}", source=n) for n, (count, _, _) in enumerate(sets) for i in range(count)]
    drawn, drops = draw(examples, sources, seed)
    times = Counter(drawn)
    assert len(times) + drops.total() == len(examples)
    for number, (count, weight, most) in enumerate(sets):
        used = min(count, most or count)
        of_set = [times[i] for i, example in enumerate(examples) if example.source == number]
        assert abs(sum(of_set) - max(1, weight * used)) <= 0.5 + 1e-9
        assert all(n in (0, int(weight), int(weight) + 1) for n in of_set)
        progress = [at / len(drawn) for at, i in enumerate(drawn) if examples[i].source == number]
        for k, at in enumerate(progress):
            assert abs(at - k / len(progress)) <= len(sets) / len(drawn) + 1 / len(progress)


def test_a_string_is_one_set() -> None:
    assert sources_of("x.jsonl") == [DataSource("x.jsonl")]
