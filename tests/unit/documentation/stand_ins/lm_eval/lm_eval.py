"""What `toolkit.evaluate.harness` asks of lm-evaluation-harness, on a made-up task: how likely a few words are.

The real one is run by `tests/unit/evaluate/test_harness.py` where it is installed; its own tasks' data are on the Hub.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

WORDS = "Which category is it: oak - a tree?"


class TaskManager:
    def __init__(self, include_path: str | None) -> None:
        own = [path.stem for path in Path(include_path).glob("*.yaml")] if include_path else []
        self.all_tasks = ["arc_easy", "piqa", *own]


class HFLM:
    def __init__(self, *, pretrained: Any, tokenizer: Any, batch_size: int) -> None:
        self.model, self.tokenizer = pretrained, tokenizer


def simple_evaluate(model: HFLM, *, tasks: list[str], limit: int | None, **_: Any) -> dict[str, Any]:
    import torch

    with torch.no_grad():
        ids = model.tokenizer(WORDS, return_tensors="pt")["input_ids"][:, :limit]
        loss = float(model.model(input_ids=ids, labels=ids).loss)
    return {"results": {task: {"alias": task, "loss,none": loss, "loss_stderr,none": 0.0} for task in tasks}}


for name, content in {
    "lm_eval.tasks": {"TaskManager": TaskManager},
    "lm_eval.models": {},
    "lm_eval.models.huggingface": {"HFLM": HFLM},
}.items():
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__dict__.update(content)
