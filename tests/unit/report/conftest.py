"""Run folders as `train` leaves them, large and hostile: a thousand steps, 48 × 128 experts, markup in the data."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from toolkit.report.page import write_page

ATTACK = "<script>window.injected = 1</script><img src=x onerror='window.injected = 1'>{{ 7 * 7 }}"
LAYERS, EXPERTS, STEPS = 48, 128, 1000


def metrics_line(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 2 * math.exp(-step / 200) + 1,
        "grad_norm": 1.0,
        "learning_rate": 1e-4,
        "epoch": step / STEPS,
        "progress": step / STEPS,
        "num_tokens": 4000 * step,
        "memory_bytes": 12 << 30,
        "tokens_per_second": 2000.0,
    }


def experts() -> dict[str, Any]:
    draw = random.Random(0)
    layers = [
        {
            "name": f"model.layers.{index}.mlp.experts",
            "experts": EXPERTS,
            "before": [draw.randrange(1, 100) for _ in range(EXPERTS)],
            "after": [0 if index == 3 and e == 7 else draw.randrange(1, 100) for e in range(EXPERTS)],
            "entropy_before": 4.0,
            "entropy_after": 4.1,
            "moved": [draw.random() for _ in range(EXPERTS)],
        }
        for index in range(LAYERS)
    ]
    return {"held_out": True, "examples": 64, "tokens": 4096, "layers": layers}


def summary() -> dict[str, Any]:
    names = [f"model.layers.{index}" for index in range(LAYERS)]
    expert = {"part": "model.layers.7.mlp.experts.gate_up_proj", "expert": 5, "rows": 31}
    worst = [{**expert, "rounded": 0.02, "compensated": 0.0123}]
    parts = [{"layer": name, "rounded": 0.004, "compensated": 0.002, "experts": 1} for name in names]
    return {
        "artifact": "runs/big/adapter",
        "counts": {"expert stacks int8": [96, 96], "trainable parameters": 1_000_000},
        "results": {
            "examples": 200,
            "base": {"loss": 2.5, "exact_match": 0.1},
            "adapted": {"loss": 1.5, "exact_match": 0.6},
            "answers": {"better": 110, "worse": 7},
        },
        "training": {
            "steps": STEPS,
            "loss": 1.2,
            "seconds": 60.0,
            "tokens": 10**6,
            "peak_memory": 12 << 30,
            "best_step": 900,
            "planned_steps": 2000,
        },
        "compensation": {"rounded": 0.004, "compensated": 0.002, "parts": parts, "worst": worst},
        "seconds": {"calibrate": 0.001, "load": 10.0, "train": 60.0, "evaluate": 20.0},
        "samples": [{"prompt": ATTACK, "wanted": "yes", "base": ATTACK, "adapted": "yes"}],
    }


def write_unfinished(run: Path) -> Path:
    """A run at step 400."""
    run.mkdir()
    (run / "recipe.yaml").write_text(f"data:\n  system_prompt: {json.dumps(ATTACK)}\n")
    plan = {
        "model": "owner/name",
        "device": "cuda",
        "dtype": "bfloat16",
        "bytes": {"experts": 9 << 30, "total": 9 << 30},
    }
    (run / "plan.json").write_text(json.dumps(plan))
    (run / "metrics.jsonl").write_text("".join(json.dumps(metrics_line(step)) + "\n" for step in range(1, 401)))
    return run


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    return write_unfinished(tmp_path / "big")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run at its end; read only."""
    run = write_unfinished(tmp_path_factory.mktemp("runs") / "big")
    scored = {"step": STEPS, "eval_loss": 1.5, "eval_token_f1": 0.25, "eval_runtime": 1.0}
    lines = [*map(metrics_line, range(1, STEPS + 1)), scored]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "experts.json").write_text(json.dumps(experts()))
    (run / "summary.json").write_text(json.dumps(summary()))
    return run


@pytest.fixture(scope="session")
def page(finished: Path) -> Path:
    """Its page."""
    return write_page(finished)
