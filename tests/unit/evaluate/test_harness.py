"""lm-evaluation-harness on a task of one's own: the adapter is off for the base and on for the adapted figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.faults.conftest import MODEL, QUICKSTART
from tests.unit.serving.test_chat import adapted
from toolkit.errors import RecipeError
from toolkit.evaluate import run_harness

TASK = """\
task: categories
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


@pytest.mark.filterwarnings("ignore")
def test_a_task_of_ones_own_base_and_adapted(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    lines = (QUICKSTART / "data" / "category.validation.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    pairs = [[message["content"] for message in json.loads(line)["messages"]] for line in lines]
    rows = [{"question": q, "choices": [a, "furniture"], "label": 0} for q, a in pairs if a != "furniture"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "categories.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    model = adapted(4, seed=0)
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    found = run_harness(model, tokenizer, ["categories"], folder=tmp_path, batch_size=4)
    accuracies = [found[who]["categories"]["acc,none"] for who in ("base", "adapted")]
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    with model.disable_adapter():
        alone = run_harness(model, tokenizer, ["categories"], folder=tmp_path, batch_size=4, limit=6)
    assert alone["base"] == alone["adapted"], "whoever switched the adapter off has it off"
    with pytest.raises(RecipeError, match="has no task nosuch"):
        run_harness(model, tokenizer, ["nosuch"], folder=tmp_path)
