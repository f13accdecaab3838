"""A run that learns from rewards, by the command: its figures, its page, its artifact, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers

from tests.faults.conftest import MODEL, QUICKSTART, Run, onecard
from toolkit import load_recipe, make_plan
from toolkit.mtp.cost import drafting_bytes

__all__ = ["onecard"]

RECIPE = """\
model: {{model_name_or_path: {model}}}
lora: {{r: 2}}
data: {{train: {data}/category.train.jsonl, validation: {data}/category.validation.jsonl, max_samples: 12}}
training:
  {{method: grpo, output_dir: {place}/run, max_steps: 2, save_steps: 2, eval_steps: 1, learning_rate: 3e-3,
   max_length: 128, use_cpu: true, gradient_checkpointing: false, per_device_train_batch_size: 4, warmup_steps: 0,
   load_best_model_at_end: true}}
rewards:
  functions: [exact_match, {{function: own.py:vowels, weight: 0.5}}]
  columns: [task]
grpo: {{num_generations: 2, max_completion_length: 4}}
eval: {{max_samples: 6}}
"""
OWN = """\
def vowels(completions, answer, task, **columns):
    assert task == ["category"] * len(answer)
    return [sum(turns[0]["content"].count(letter) for letter in "aeiou") for turns in completions]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "recipe.yaml").write_text(RECIPE.format(model=MODEL, data=QUICKSTART / "data", place=folder))
    (folder / "own.py").write_text(OWN)
    return folder


def test_a_run_has_its_figures_page_and_artifact(onecard: Run, place: Path) -> None:
    status, _, err = onecard("train", place / "recipe.yaml")
    assert status == 0, err
    assert "best: step" in err
    run = place / "run"
    summary = json.loads((run / "summary.json").read_text())
    results = summary["results"]
    assert {"reward", "reward exact_match", "reward vowels", "answer tokens"} <= results["adapted"].keys()
    assert results["base"]["reward vowels"] * 0.5 == pytest.approx(results["base"]["reward"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all("eval_kl" in line for line in lines if "eval_reward" in line)
    page = (run / "report.html").read_text()
    assert "Reward of written answers" in page
    for sample in summary["samples"]:
        for who in ("base", "adapted"):
            found = sample["rewards"][who]
            assert found.keys() == {"exact_match", "vowels"}
            assert f"exact_match {found['exact_match']:g}, vowels {found['vowels']:.4g}" in page
    assert summary["memory"]["training"] <= summary["memory"]["planned"] + summary["memory"]["slack"]
    card = (run / "adapter" / "README.md").read_text()
    assert "| method | group relative policy optimisation, rewards exact_match + 0.5 vowels |" in card
    assert f"{place}" not in card
    (place / "own.py").write_text(OWN.replace("aeiou", "aeiouy"))
    (run / "summary.json").unlink()
    status, _, err = onecard("train", place / "recipe.yaml")
    (place / "own.py").write_text(OWN)
    assert status == 4
    assert "the rewards' files or the columns that they see differ" in err.splitlines()[-1]


def test_a_run_near_the_adapter_it_starts_from_resumes_to_the_same_bits(
    onecard: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, start = place / "near", place / "start"
    shutil.copytree(place / "run" / "adapter", start)
    asked = [f"training.output_dir={run}", f"lora.adapter_name_or_path={start}", "grpo.beta=0.1"]
    asked += ["training.save_steps=1", "training.load_best_model_at_end=false", "training.eval_steps=0.9"]
    status, _, err = onecard("train", place / "recipe.yaml", *asked)
    assert status == 0, err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert next(line["kl"] for line in lines if "kl" in line) == pytest.approx(0.0, abs=1e-4)
    whole = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    for path in (run / "adapter", max((run / "checkpoints").iterdir(), key=lambda path: path.name)):
        shutil.rmtree(path)
    (run / "summary.json").unlink()
    with monkeypatch.context() as seen:
        seen.setattr(transformers.trainer_utils.logger, "warning_once", pytest.fail)  # that intervals differ
        status, _, err = onecard("train", place / "recipe.yaml", *asked)
    assert status == 0, err
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    (run / "summary.json").unlink()
    shutil.rmtree(start)
    shutil.copytree(run / "adapter", start)
    status, _, err = onecard("train", place / "recipe.yaml", *asked)
    assert status == 4
    assert "the adapter that training started from, its reference, differs" in err.splitlines()[-1]


def test_the_plan_counts_the_adapter_that_is_the_reference(place: Path) -> None:
    start = f"lora.adapter_name_or_path={place}/run/adapter"
    plain, near = (
        make_plan(load_recipe(place / "recipe.yaml", [start, f"grpo.beta={beta}"])).bytes for beta in (0, 0.1)
    )
    assert near.adapter == 2 * plain.adapter


def test_the_plan_counts_a_head_and_what_it_adds_to_writing(place: Path) -> None:
    kept = {"lora.r": 2, "grpo.max_completion_length": 64, "training.max_length": 256}
    plain, drafted, further = (
        make_plan(load_recipe(place / "recipe.yaml", [*(f"{key}={value}" for key, value in kept.items()), *more]))
        for more in ([], ["mtp.enabled=true"], ["mtp.enabled=true", "mtp.depth=3"])
    )
    assert drafted.bytes.mtp > plain.bytes.mtp == 0
    assert further.bytes.total >= drafted.bytes.total > plain.bytes.total
    asked = 4 * 4 * (2048 * 4 + 100 * 128 * 2)  # logits of four places, keys and values of one layer, for four rows
    assert drafting_bytes(128, 2048, rows=4, length=100, count=3) >= asked


def test_prompts_alone_are_learnt_from_and_have_no_loss(onecard: Run, place: Path) -> None:
    rows = (QUICKSTART / "data" / "category.train.jsonl").read_text().splitlines()[:12]
    asked = [{"prompt": json.loads(row)["messages"][:-1], "task": "category"} for row in rows]
    (place / "prompts.jsonl").write_text("\n".join(map(json.dumps, asked)))
    given = [
        "data.train=prompts.jsonl",
        "data.validation=null",
        "data.validation_size=4",
        f"training.output_dir={place}/alone",
    ]
    status, _, err = onecard("train", place / "recipe.yaml", *given)
    assert status == 2
    assert "rewards.functions: exact_match compares with a wanted answer" in err.splitlines()[-1]
    status, _, err = onecard("train", place / "recipe.yaml", *given, "rewards.functions=[own.py:vowels]")
    assert status == 0, err
    results = json.loads((place / "alone" / "summary.json").read_text())["results"]
    assert results["adapted"]["loss"] is results["adapted"]["exact_match"] is None
    assert "reward" in results["adapted"]
    assert "wanted" not in err


def test_what_cannot_be_rewarded_is_one_line_before_any_work(onecard: Run, place: Path) -> None:
    elsewhere = f"training.output_dir={place}/other"
    for status, override, words in (
        (2, "rewards.functions=[own.py:vowel]", "own.py has no function vowel; did you mean vowels?"),
        (3, "rewards.columns=[task, tsk]", "rewards.columns: no column 'tsk'; did you mean task?"),
        (2, "grpo.num_generations=3", "grpo.num_generations: 4 answers are written at once"),
    ):
        found, out, err = onecard("train", place / "recipe.yaml", elsewhere, override)
        assert (found, out) == (status, ""), err
        assert words in err.splitlines()[-1]
    start = f"lora.adapter_name_or_path={place}/run/adapter"
    recipe = (place / "recipe.yaml").read_text().replace("grpo", "rloo")
    (place / "rloo.yaml").write_text(recipe)
    found, _, err = onecard("train", place / "rloo.yaml", elsewhere, "rloo.beta=0.1", start)
    assert found == 2
    assert "rloo.beta: the reference is the base, and this run starts from an adapter" in err.splitlines()[-1]
    found, _, err = onecard("train", place / "recipe.yaml", elsewhere, "grpo.beta=0.1", start, "--fork")
    assert found == 2
    assert "grpo.beta: the run's reference is the adapter that it began from" in err.splitlines()[-1]
    assert not (place / "other").exists()
