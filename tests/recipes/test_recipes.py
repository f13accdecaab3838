"""Shipped recipes parse and can be followed; the data is clean; the embedded model has learned, routers and all."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts import make_quickstart_pairs, make_quickstart_thoughts
from toolkit.data import build_batches
from toolkit.data.formats import SHAPES
from toolkit.offload.place import streamed
from toolkit.plan import Plan, choose_device, make_plan
from toolkit.plan.cards import CARDS
from toolkit.plan.shapes import published
from toolkit.recipe import source

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
QUICKSTART = RECIPES / "quickstart"
NAMES = sorted(path.name for path in RECIPES.glob("*.yaml"))
TASKS = ("category", "define", "dialog")
LARGEST_MODEL_BYTES = 10 * 2**20


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(QUICKSTART / "nano-qwen3moe-2m")


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(QUICKSTART / "nano-qwen3moe-2m", dtype=torch.float32)


def rows(task: str, split: str) -> list[dict[str, Any]]:
    lines = (QUICKSTART / "data" / f"{task}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def questions(task: str, split: str) -> set[str]:
    return {row["messages"][0]["content"] for row in rows(task, split)}


def values(name: str) -> list[str]:
    """Every string that the recipe file holds, as it is written there (`source.load` makes paths absolute)."""
    sections = YAML(typ="safe").load((RECIPES / name).read_text(encoding="utf-8"))
    return [value for section in sections.values() for value in section.values() if isinstance(value, str)]


def local_paths(name: str) -> list[str]:
    return [value for value in values(name) if value.startswith(".")]


def test_the_promised_recipes_are_there() -> None:
    promised = {"quickstart", "smollm2-moe", "olmoe-1b-7b", "qwen1.5-moe-a2.7b", "deepseek-v2-lite", "gpt-oss-20b"}
    assert {f"{name}.yaml" for name in promised | {"qwen3-30b-a3b"}} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_opens_with_its_command_and_its_card(name: str) -> None:
    lines = (RECIPES / name).read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"# bash scripts/finetune.sh recipes/{name}"
    assert re.search(r"Fits any (machine|card)|Fits an? \d+ GB card", head(name))


@pytest.mark.parametrize("name", [name for name in NAMES if source.load(RECIPES / name).data.columns])
def test_a_row_with_the_columns_that_a_recipe_renames_is_trained(name: str, tokenizer: Any, tmp_path: Path) -> None:
    data = source.load(RECIPES / name).data
    ours = {*SHAPES[data.format].required, *data.columns}
    row = {column: f"words of {column}" for column in (data.columns.get(column, column) for column in ours)}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    elsewhere = {"train", "validation", "validation_size", "validation_split", "name", "chat_template_path"}
    batches = build_batches(tokenizer, train=str(tmp_path / "rows.jsonl"), **data.model_dump(exclude=elsewhere))
    (example,) = batches.train
    text = tokenizer.decode(example["input_ids"])
    assert batches.form.form == "chat"
    assert all(words in text for words in row.values())
    assert (data.system_prompt or "") in text


def head(name: str) -> str:
    """What stands above a recipe's first section."""
    lines = (RECIPES / name).read_text(encoding="utf-8").splitlines()
    comments = lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.removeprefix("# ") for line in comments)


TASK_RECIPES = {
    "chat": "olmoe-1b-7b", "classification": "classification", "extraction to JSON": "extraction",
    "tool calls": "tool-calls", "text-to-SQL": "text-to-sql", "style": "style", "translation": "translation",
    "code": "code", "continued pre-training": "continued-pretraining", "multi-token prediction": "olmoe-mtp",
    "preferences": "dpo", "rewards": "grpo-math",
}  # fmt: skip
FOR_A_CARD = [name for name in NAMES if "Fits a " in head(name)]


def test_every_task_has_a_recipe_for_a_published_checkpoint() -> None:
    assert {f"{name}.yaml" for name in TASK_RECIPES.values()} <= set(FOR_A_CARD)
    for name in FOR_A_CARD:
        assert source.load(RECIPES / name).model.model_name_or_path in published()


@cache
def planned(card: str, model: str, *sections: str) -> Plan:
    """The plan of a recipe without its data; many share one."""
    name = next(name for name in FOR_A_CARD if planned_by(name) == (model, *sections))
    return make_plan(source.load(RECIPES / name), device=choose_device(card))


def planned_by(name: str) -> tuple[str, ...]:
    """All of a recipe that its plan looks at, as text."""
    recipe = source.load(RECIPES / name)
    used = recipe.training.model_dump(
        include={
            "method",
            "max_length",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "optim",
            "packing",
        }
    )
    return (recipe.model.model_name_or_path, repr(recipe.lora), repr(recipe.mtp), repr(used))


@pytest.mark.parametrize("name", FOR_A_CARD)
def test_what_a_recipe_says_of_data_card_memory_and_time_is_what_is_planned(name: str) -> None:
    text = head(name)
    assert re.search(r"Data: .*(rows|\{)", text), "the shape of a row"
    card = re.search(r"Fits a \d+ GB card \(RTX (\d+)", text)
    figures = re.search(
        r"not measured: ([\d.]+) GiB at the peak, of which ([\d.]+) are int8 experts; ([\d.]+) s per step of ([\d,]+)",
        text,
    )
    assert card is not None
    assert figures is not None
    made = planned(next(each for each in CARDS if each.startswith(f"rtx-{card[1]}")), *planned_by(name))
    assert made.fits
    assert made.duration is not None
    again = "run scripts/recipe_headers.py"
    assert float(figures[1]) == pytest.approx(made.bytes.total / 2**30, abs=0.06, rel=0.01), again
    assert float(figures[2]) == pytest.approx(made.bytes.experts / 2**30, abs=0.06), again
    assert float(figures[3]) == pytest.approx(made.duration.estimate, abs=0.06, rel=0.02), again
    training = source.load(RECIPES / name).training
    sequences = training.per_device_train_batch_size * training.sides * training.gradient_accumulation_steps
    assert figures[4] == f"{sequences * made.length:,}"
    away = re.search(r"Fits a [^.]*experts of (\d+) of", text)
    assert int(away[1] if away else 0) == len(streamed(made.placement)), again


@pytest.mark.parametrize("name", NAMES)
def test_recipe_parses_without_notes(name: str) -> None:
    notes: list[str] = []
    recipe = source.load(RECIPES / name, note=notes.append)
    assert notes == [], "a shipped recipe uses our own names, not aliases"
    assert recipe.training.output_dir == f"runs/{name.removesuffix('.yaml')}"


@pytest.mark.parametrize("name", NAMES)
def test_recipe_has_no_path_of_one_machine_and_no_secret(name: str) -> None:
    assert not [
        value for value in values(name) if value.startswith(("/", "~")) or re.search(r"hf_\w{8}|[A-Z]:\\", value)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_files_that_a_recipe_names_lie_beside_it(name: str) -> None:
    for path in local_paths(name):
        # Only what a script makes first, under models/, may be missing from a fresh clone.
        assert (RECIPES / path).exists() or path.startswith("../models/"), path


def test_quickstart_needs_nothing_from_the_network() -> None:
    recipe = source.load(RECIPES / "quickstart.yaml")
    named = (recipe.model.model_name_or_path, recipe.data.train, recipe.data.validation)
    assert all(path is not None and Path(path).is_relative_to(QUICKSTART) for path in named)


@pytest.mark.parametrize("task", TASKS)
def test_data_are_conversations_with_the_assistant_last(task: str) -> None:
    for row in rows(task, "train") + rows(task, "validation"):
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in row["messages"])


@pytest.mark.parametrize("task", TASKS)
def test_no_question_stands_on_both_sides(task: str) -> None:
    train, validation = questions(task, "train"), questions(task, "validation")
    assert len(train) == len(rows(task, "train"))
    assert not train & validation


@pytest.mark.parametrize("split", make_quickstart_thoughts.COUNTS)
def test_rows_with_thoughts_are_made_of_the_category_rows(split: str) -> None:
    written = (QUICKSTART / "data" / f"thoughts.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert written == list(make_quickstart_thoughts.lines(split)), "run scripts/make_quickstart_thoughts.py"
    assert len(written) == make_quickstart_thoughts.COUNTS[split]
    assert all(json.loads(line)["messages"][1]["reasoning_content"].startswith("It is ") for line in written)


@pytest.mark.parametrize("split", make_quickstart_pairs.COUNTS)
def test_pairs_are_made_of_the_category_rows(split: str) -> None:
    written = (QUICKSTART / "data" / f"pairs.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert written == list(make_quickstart_pairs.lines(split)), "run scripts/make_quickstart_pairs.py"
    answers = [[json.loads(line)[side][0]["content"] for line in written] for side in ("chosen", "rejected")]
    assert all(right != wrong for right, wrong in zip(*answers, strict=True))
    common = max(answers[0], key=answers[0].count)
    assert abs(answers[0].count(common) - answers[1].count(common)) < 0.06 * len(written), "the commoner one wins"


def test_thoughts_are_trained_as_their_recipe_has_them(tokenizer: Any) -> None:
    data = source.load(RECIPES / "thoughts.yaml").data
    assert isinstance(data.train, str)
    assert data.chat_template_path is not None
    template = Path(data.chat_template_path).read_text(encoding="utf-8")
    kept = build_batches(tokenizer, train=data.train, chat_template=template, max_samples=20)
    (row, *_), report = kept.train, kept.report
    told = tokenizer.decode([token for token in row["labels"] if token >= 0])
    assert re.fullmatch(r"It is .+\n</think>\n\n\w+<\|im_end\|>", told)
    assert (report.splits["train"].thoughts, [text for text, rows in report.notices.items() if rows]) == (20, [])
    shut: Any = {"thoughts": "drop", "chat_template_kwargs": {"enable_thinking": False}}
    dropped = build_batches(tokenizer, train=data.train, chat_template=template, max_samples=20, **shut)
    assert all(dropped.train[i]["labels"].count(-100) > 20 for i in range(20))
    assert dropped.report.splits["train"].dropped_thoughts == 20
    assert "<think>\n\n</think>" in tokenizer.decode(dropped.train[0]["input_ids"])


def test_there_is_enough_data() -> None:
    assert len(rows("category", "train")) >= 2000
    assert len(rows("define", "train")) >= 2000
    assert any(len(row["messages"]) > 2 for row in rows("dialog", "train")), "no conversation of several turns"


def test_no_answer_is_so_common_that_guessing_pays() -> None:
    answers = [row["messages"][1]["content"] for row in rows("category", "validation")]
    assert len(answers) == 500
    assert max(answers.count(answer) for answer in set(answers)) < 0.2 * len(answers)


def test_licence_texts_are_shipped() -> None:
    readme = (QUICKSTART / "README.md").read_text(encoding="utf-8")
    for file, sentence in (
        ("WordNet-3.0.txt", "WordNet 3.0 Copyright 2006 by Princeton University."),
        ("chatterbot-corpus-BSD-3-Clause.txt", "Copyright (c) 2017, Gunther Cox"),
    ):
        assert sentence in (QUICKSTART / "licences" / file).read_text(encoding="utf-8")
        assert f"licences/{file}" in readme


def test_model_is_small_enough_for_the_repository() -> None:
    assert sum(file.stat().st_size for file in (QUICKSTART / "nano-qwen3moe-2m").iterdir()) <= LARGEST_MODEL_BYTES


def gloss_ids(tokenizer: Any) -> torch.Tensor:
    """The definitions of held-out words, as token ids (16, 128)."""
    text = "\n".join(row["messages"][1]["content"] for row in rows("define", "validation"))
    ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids
    return ids[0, : 16 * 128].view(16, 128)


@torch.no_grad()
def loss(model: Any, ids: torch.Tensor) -> float:
    return float(model(input_ids=ids, labels=ids).loss)


def routers(model: Any) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]


def test_model_has_learned_english(model: Any, tokenizer: Any) -> None:
    # An untrained model of 2,048 tokens is at ln 2048 = 7.6.
    assert loss(model, gloss_ids(tokenizer)) < 4.5


def test_wrong_experts_cost_more_than_a_nat(model: Any, tokenizer: Any) -> None:
    ids, right = gloss_ids(tokenizer), loss(model, gloss_ids(tokenizer))
    assert len(routers(model)) == model.config.num_hidden_layers
    for weight in routers(model):
        weight.data = weight.data.roll(1, 0)
    wrong = loss(model, ids)
    for weight in routers(model):
        weight.data = weight.data.roll(-1, 0)
    assert wrong > right + 1
    assert loss(model, ids) == right


def test_experts_of_a_layer_differ(model: Any) -> None:
    stacks = [(name, p) for name, p in model.named_parameters() if ".experts." in name]
    assert len(stacks) == 2 * model.config.num_hidden_layers
    for name, stack in stacks:
        flat = torch.nn.functional.normalize(stack.flatten(1), dim=1)
        similarity = flat @ flat.T - torch.eye(len(flat))
        assert similarity.max() < 0.5, f"{name}: two experts are nearly the same"


def test_tokens_are_spread_over_experts(model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        layers = model(input_ids=gloss_ids(tokenizer), output_router_logits=True).router_logits
    for layer in layers:
        shares = layer.topk(2).indices.flatten().bincount(minlength=8) / layer.shape[0]
        assert shares.max() < 0.9, "one expert sees nearly every token"
        assert (shares > 0.01).sum() >= 5, "few experts do all the work"


def test_template_marks_what_the_assistant_says(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "good day<|im_end|>"
