"""Rewards by hand, and what a reward that raises, hangs, eats memory or gives no number costs: one line."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import RecipeError
from toolkit.rewards import Asked, Judge, Reward, Scores
from toolkit.rewards.measures import last_number

OWN = """
import time

def lengths(prompts, completions, completion_ids, answer, **columns):
    columns["log_metric"]("asked", float(len(prompts[0])))
    print("a print does no harm")
    assert columns["solution"] == answer and columns["trainer_state"].global_step == 7
    return [len(turns[0]["content"]) for turns in completions]

def second_only(completions): return [None, 1]
async def later(completions, **_): return [0.5, 0.25]
def raises(completions, **_): raise ValueError("no\\nway")
def hangs(completions, **_): time.sleep(1e6)
def eats(completions, **_): return [len(bytearray(10 << 30))]
def nan(completions, **_): return [1.0, float("nan")]
def word(completions, **_): return [1.0, "1"]
def few(completions, **_): return [1.0]
def leaves(completions, **_): __import__("os")._exit(3)
"""
ASKED = Asked(
    prompts=[[{"role": "user", "content": "q"}]] * 2,
    completions=[[{"role": "assistant", "content": text}] for text in ("ab", "c")],
    completion_ids=[[1, 2], [3, 4, 5]],
    texts=["ab", '{"n": 1,234.50}'],
    answer=["AB. ", "so 1234.5"],
    trainer_state={"global_step": 7, "max_steps": 9, "epoch": 0.5},
)


def judge(folder: Path, *functions: str | Reward, **changes: Any) -> Judge:
    (folder / "own.py").write_text(OWN)
    rewards = [each if isinstance(each, Reward) else Reward(each, f"{folder}/own.py:{each}", 2.0) for each in functions]
    return Judge(rewards, **{"seconds": 20.0, "memory": 1 << 30, **changes})


def test_rewards_that_come_with_the_package(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "required": ["n"]}))
    made = judge(
        tmp_path,
        Reward("exact", "exact_match"),
        Reward("number", "number"),
        Reward("json", "json_valid"),
        Reward("schema", "json_valid", options={"json_schema": str(schema)}),
        Reward("regex", "regex", options={"pattern": r"^\w+$"}),
        Reward("length", "length", options={"tokens": 2}),
    )
    scores = made.score(ASKED)
    assert scores.values == ((1, 0), (None, 1), (0, 0), (0, 0), (1, 0), (1, 0.5))
    objects = Asked(**{**vars(ASKED), "texts": ['{"n": 1}', "{}"]})
    assert made.score(objects).values[2:4] == ((1, 1), (1, 0))
    made.close()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12 apples, 3", "3"), ("so: -7.", "-7"), ("5-3", "3"), ("1,234,567.5 in all", "1234567.5"), ("$.50", "0.5"),
        ("1e3", "1000"), ("v2 x86", None), ("none", None), ("1,2", "2"),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    found = last_number(text)
    assert found == (None if number is None else Decimal(number))


def test_functions_of_ones_own_have_trls_signature_and_weights(tmp_path: Path) -> None:
    made = judge(tmp_path, "lengths", "second_only", "later")
    made.start()
    scores = made.score(ASKED)
    assert scores == Scores(((2, 1), (None, 1), (0.5, 0.25)), {"asked": 1.0}, ())
    assert made.total(scores) == [2 * 2.5, 2 * 2.25]
    assert made.total(Scores(((None,), (None,), (None,)), {}, ())) == [None]
    made.close()


def test_what_fails_is_named_in_one_line_and_the_others_go_on(tmp_path: Path) -> None:
    made = judge(tmp_path, "raises", "eats", "nan", "hangs", "word", "few", "leaves", "later", seconds=0.5)
    made.start()
    first = made._process
    scores = made.score(ASKED)
    assert scores.values == ((None, None),) * 7 + ((0.5, 0.25),)
    assert list(scores.failures) == [
        "reward raises: raised ValueError: no",
        "reward eats: took more than its memory, rewards.memory_limit",
        "reward nan: gave nan for completion 2 of its batch, no finite number",
        "reward hangs: took longer than 0.5 s, rewards.time_limit",
        "reward word: gave 1 for completion 2 of its batch, no finite number",
        "reward few: gave 1 rewards for 2 completions",
        "reward leaves: its process ended with status 3",
    ]
    assert first is not None
    assert first.poll() is not None, "what hangs is ended"
    last = made._process
    made.close()
    assert last is not None
    with pytest.raises(ProcessLookupError):
        os.kill(last.pid, 0)


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        ("own.py:later_", {}, "own.py has no function later_; did you mean later?"),
        ("none.py:later", {}, "none.py cannot be imported"),
        ("regex", {"pattern": "("}, "rewards.functions: regex: raised error: missing )"),
        ("json_valid", {"json_schema": "none.json"}, "rewards.functions: json_valid: raised FileNotFoundError"),
    ],
)
def test_what_cannot_be_loaded_is_told_at_the_start(
    tmp_path: Path, function: str, options: dict[str, Any], words: str
) -> None:
    place = f"{tmp_path}/{function}" if ".py:" in function else function
    with pytest.raises(RecipeError) as failed:
        judge(tmp_path, Reward("own", place, options=options)).start()
    assert words in str(failed.value)
    assert "\n" not in str(failed.value)


def test_an_argument_that_nothing_gives_is_told_at_the_start(tmp_path: Path) -> None:
    own = tmp_path / "needs.py"
    own.write_text("def level(completions, answer, level, note=None): return [float(each) for each in level]\n")
    reward = Reward("level", f"{own}:level")
    with pytest.raises(RecipeError, match=r"needs.py:level needs level; name that column in rewards.columns"):
        judge(tmp_path, reward, columns=["lvl"]).start()
    made = judge(tmp_path, reward, columns=["level"])
    made.start()
    made.close()


def test_without_a_wanted_answer_nothing_compares_with_it(tmp_path: Path) -> None:
    asked = replace(ASKED, answer=[None, "c"], texts=["ab", "c"])
    made = judge(
        tmp_path,
        Reward("exact", "exact_match"),
        Reward("number", "number"),
        Reward("any", "regex", options={"pattern": "b"}),
    )
    assert made.score(asked).values == ((None, 1.0), (None, None), (1.0, 0.0))
    made.close()
