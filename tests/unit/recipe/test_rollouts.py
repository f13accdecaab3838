"""Sections of rewards: what they fill in, and what does not fit is one line that names the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.errors import RecipeError
from toolkit.recipe import Recipe, load, parse, rollout_options

PLAIN = """\
model: {model_name_or_path: a/b}
data: {train: x.jsonl}
training: {method: grpo, per_device_train_batch_size: 16}
rewards: {functions: [exact_match, {function: own.py:short, weight: 0.5}]}
"""


def read(*overrides: str) -> Recipe:
    return parse(PLAIN, "r.yaml", overrides)


def test_what_a_method_of_rewards_fills_in() -> None:
    recipe = read()
    assert (recipe.training.packing, recipe.eval.metric, recipe.eval.max_new_tokens) == (False, "reward", 256)
    assert [each.label for each in recipe.rewards.functions] == ["exact_match", "short"]
    assert recipe.rewards.memory == 4 << 30
    assert read("grpo.max_completion_length=32").eval.max_new_tokens == 32
    assert read("eval.max_new_tokens=7").eval.max_new_tokens == 7
    options = rollout_options(recipe)
    assert options is not None
    assert options.at_once(recipe.training) == 16
    again = read("training.method=rloo", "rloo.steps_per_generation=4")
    assert again.rloo.at_once(again.training) == 64
    assert rollout_options(parse("model: {model_name_or_path: a/b}\ndata: {train: x.jsonl}")) is None


def test_files_of_rewards_are_found_beside_the_recipe(tmp_path: Path) -> None:
    for name in ("own.py", "schema.json", "length"):
        (tmp_path / name).write_text("")
    text = PLAIN.replace(
        "exact_match", "{function: json_valid, json_schema: schema.json}, {function: length, tokens: 9}"
    )
    (tmp_path / "r.yaml").write_text(text)
    functions = load(tmp_path / "r.yaml").rewards.functions
    assert functions[0].options == {"json_schema": str(tmp_path / "schema.json")}
    assert [each.function for each in functions] == ["json_valid", "length", f"{tmp_path}/own.py:short"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rewards.functions=[]"], "rewards.functions: grpo learns from rewards; name one"),
        (["rewards.functions=[exact]"], "rewards.functions[0]: no reward exact; did you mean exact_match?"),
        (["rewards.functions=[regex]"], "rewards.functions[0]: regex needs pattern"),
        (["rewards.functions=[{function: number, tokens: 3}]"], "rewards.functions[0]: tokens is for length"),
        (["rewards.functions=[{function: number, weigth: 3}]"], "unknown key; did you mean weight?"),
        (["rewards.functions=[number, number]"], "two rewards are called number; give one of them a name"),
        (["grpo.num_generations=5"], "grpo.num_generations: 16 answers are written at once"),
        (["grpo.num_generations_eval=3"], "training.per_device_eval_batch_size: must be a multiple of grpo.num_gen"),
        (["grpo.max_completion_length=1024"], "training.max_length: tokens of the longest prompt and its answer"),
        (["training.max_length=auto"], "training.max_length: tokens of the longest prompt and its answer"),
        (["training.packing=true"], "training.packing: written answers are padded"),
        (["eval.metric=loss"], "eval.metric: the loss of grpo does not say how good answers are; set reward"),
        (["eval.metric=rewards/margins"], "eval.metric: rewards/margins is for pairs; set reward"),
        (["data.format=text"], "data.format: text has no prompt with one answer"),
        (["data.train_on=last"], "data.train_on: the model writes the last answer itself"),
        (["mtp.enabled=true", "mtp.stage=with"], "mtp.stage: no answers are given that a head could learn from"),
        (["mtp.enabled=true", "mtp.own_answers=0"], "mtp.own_answers: no answers are given"),
        (["rloo.beta=0.1"], "rloo: is for training.method: rloo"),
        (["training.method=dpo"], "rewards: is for training.method: grpo or rloo"),
        (["training.method=sft", "rewards.functions=[]", "eval.metric=reward"], "eval.metric: reward is for"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as failed:
        read(*overrides)
    assert words in str(failed.value)
    assert "\n" not in str(failed.value)
