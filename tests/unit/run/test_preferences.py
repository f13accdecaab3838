"""A preference run by the command: its figures, its page, its artifact, its fork, and what is refused before work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.conftest import MODEL, QUICKSTART, Run, onecard

__all__ = ["onecard"]

RECIPE = """\
model: {{model_name_or_path: {model}}}
lora: {{r: 2}}
data: {{train: {data}/pairs.train.jsonl, validation: {data}/pairs.validation.jsonl, max_samples: 12}}
training:
  {{method: dpo, output_dir: {place}/run, max_steps: 2, save_steps: 2, eval_steps: 1, learning_rate: 3e-3,
   max_length: 128, use_cpu: true, gradient_checkpointing: false, per_device_train_batch_size: 4, warmup_steps: 0,
   load_best_model_at_end: true}}
dpo: {{loss_type: [sigmoid, sft], beta: 0.2}}
eval: {{metric: rewards/margins, max_samples: 6, max_new_tokens: 4}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    text = RECIPE.format(model=MODEL, data=QUICKSTART / "data", place=folder)
    (folder / "recipe.yaml").write_text(text)
    return folder


def test_a_run_has_its_figures_page_and_artifact_and_a_fork_keeps_the_reference(onecard: Run, place: Path) -> None:
    status, _, err = onecard("train", place / "recipe.yaml")
    assert status == 0, err
    assert "reference: the base; 18 pairs, 18 computed now, 0 read" in err
    assert "best: step" in err
    assert "12 held-out good and bad answers: " in err
    run = place / "run"
    summary = json.loads((run / "summary.json").read_text())
    results = summary["results"]
    assert results["preference"].keys() == {"answers", "rewards/accuracies", "rewards/margins"}
    assert {"preference_accuracy", "logps_chosen", "logps_rejected"} <= results["base"].keys() & results[
        "adapted"
    ].keys()
    moved, adapters = summary["counts"]["adapters moved"]
    assert (moved, results["examples"], results["training"]["examples"]) == (adapters, 6, 12)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(line["eval_rewards/margins"] for line in lines if "eval_rewards/margins" in line)
    assert results["preference"]["rewards/margins"] == pytest.approx(best, abs=1e-4)
    page = (run / "report.html").read_text()
    assert "Pairs rewarded the right way round" in page
    assert "pairs whose chosen answer is more probable" in page
    assert summary["memory"]["training"] <= summary["memory"]["planned"] + summary["memory"]["slack"]
    card = (run / "adapter" / "README.md").read_text()
    assert "| method | direct preference optimisation on pairs of answers, loss sigmoid + sft, beta 0.2 |" in card
    status, _, err = onecard("train", place / "recipe.yaml", "dpo.beta=0.5", "--fork")
    assert status == 0, err
    assert "reference: the base of the run that this is a fork of, not the weights that the fork starts from" in err
    assert "18 pairs, 0 computed now" in err


def test_what_it_cannot_do_is_one_line_before_any_work(onecard: Run, place: Path) -> None:
    rows = place / "rows.jsonl"
    asked = {"role": "user", "content": "which?"}
    same = {"role": "assistant", "content": "this"}
    rows.write_text(json.dumps({"prompt": [asked], "chosen": [same], "rejected": [same]}))
    elsewhere = f"training.output_dir={place}/other"
    status, _, err = onecard("train", place / "recipe.yaml", elsewhere, f"data.train={rows}")
    assert status == 3
    assert f"{rows}:1: chosen and rejected are the same; there is nothing to prefer" in err.splitlines()[-1]
    for override, words in (
        ("training.packing=true", "training.packing: pairs are padded, never packed"),
        ("mtp.enabled=true", "mtp.enabled: a head learns from single answers"),
        ("dpo.loss_type=exo_pair", "dpo: loss_type: exo_pair needs label_smoothing above 0"),
        ("data.train_on=last", "data.train_on: of a pair the answers count"),
        ("training.method=sft", "dpo: is for training.method: dpo; remove it, or set that"),
    ):
        status, out, err = onecard("train", place / "recipe.yaml", elsewhere, override)
        assert (status, out) == (2, ""), err
        assert words in err.splitlines()[-1]
    assert not (place / "other").exists()
