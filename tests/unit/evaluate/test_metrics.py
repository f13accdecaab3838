"""The metrics on answers worked out by hand, and a user's own by file and by module."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import RecipeError
from toolkit.evaluate.metrics import BUILT_IN, find_metric, metrics_for, score


@pytest.mark.parametrize(
    ("name", "answer", "wanted", "value"),
    [
        ("exact_match", " Animal.", "animal", 1.0),
        ("exact_match", "animals", "animal", 0.0),
        ("token_f1", "the cat sat", "the cat sat down", 6 / 7),
        ("token_f1", "the the the", "the cat", 2 / 5),
        ("token_f1", "", "cat", 0.0),
        ("token_f1", "", "", 1.0),
        # c a b against a b c: two words in order, all three as a bag.
        ("rouge_l", "c a b", "a b c", 2 / 3),
        ("token_f1", "c a b", "a b c", 1.0),
        ("rouge_l", "a x b y c", "a b c", 6 / 8),
        ("json_valid", '{"a": [1, 2]}', "", 1.0),
        ("json_valid", "{'a': 1}", "", 0.0),
    ],
)
def test_worked_examples(name: str, answer: str, wanted: str, value: float) -> None:
    assert BUILT_IN[name](answer, wanted) == pytest.approx(value)


words = st.lists(st.sampled_from("abcd"), max_size=8).map(" ".join)


@given(words, words)
def test_order_can_only_cost(answer: str, wanted: str) -> None:
    ordered, bag = (BUILT_IN[name](answer, wanted) for name in ("rouge_l", "token_f1"))
    assert 0 <= ordered <= bag + 1e-12 <= 1 + 1e-12
    assert ordered == pytest.approx(BUILT_IN["rouge_l"](wanted, answer))


def test_json_is_measured_where_json_is_wanted() -> None:
    assert "json_valid" in metrics_for("loss", ['{"a": 1}', "[]"])
    assert "json_valid" not in metrics_for("loss", ['{"a": 1}', "3"])
    assert "json_valid" not in metrics_for("loss", [])
    assert "json_valid" in metrics_for("json_valid", ["text"])


def test_a_metric_of_the_users(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def shorter(answer, wanted):\n    return len(answer) <= len(wanted)\n\ndef broken(a, w):\n    1 / 0\n"
    )
    name, metric = find_metric(f"{file}:shorter")
    assert name == "shorter"
    assert score(name, metric, ["a", "abc"], ["ab", "ab"]) == [1.0, 0.0]
    assert find_metric("operator:eq")[1]("x", "x")
    with pytest.raises(RecipeError, match=r"broken failed on an answer: ZeroDivisionError"):
        score(*find_metric(f"{file}:broken"), ["a"], ["a"])


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("rouge", "did you mean rouge_l"),
        ("nowhere_at_all:f", "cannot be imported"),
        ("operator:equ", "no function equ; did you mean eq"),
        ("/nowhere/m.py:f", "cannot be imported"),
    ],
)
def test_what_is_no_metric(name: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        find_metric(name)
