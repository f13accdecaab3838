"""What a finished run says of itself: `summary.json`, from which its page and the last table are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.data import Batches
from toolkit.plan import Plan
from toolkit.quant.gptq.calibrate import Compensation
from toolkit.run.trained import Trained
from toolkit.steps import seconds_by_part

__all__ = ["summarize"]


def summarize(
    result: Trained,
    made: Plan,
    batches: Batches,
    artifact: Path,
    compensated: Compensation | None = None,
    before: int = 0,
) -> dict[str, Any]:
    """The finished run as JSON: all that `summary` shows. `before`: the process's bytes before anything was loaded."""
    compared = result.comparison
    answers = zip(batches.held_out, compared.base.answers, compared.adapted.answers, strict=False) if compared else ()
    samples = [
        {"prompt": question.prompt_text, "wanted": question.answer, "base": base, "adapted": adapted}
        for question, base, adapted in answers
    ]
    most = made.recipe.eval.num_samples
    changed = {"better": compared.better[:most], "worse": compared.worse[:most]} if compared else {}
    return {
        "artifact": str(artifact),
        "counts": result.counts,
        "results": result.results(),
        "training": vars(result.training),
        "seconds": seconds_by_part(),
        "memory": _memory(result, made, before),
        "compensation": compensated.to_dict() if compensated else None,
        "data": batches.report.to_dict(),
        "samples": samples[:most],
        "changed": {how: [samples[index] for index in indexes] for how, indexes in changed.items()},
    }


def _memory(result: Trained, made: Plan, before: int) -> dict[str, int]:
    """Bytes planned and measured, without what Python and the libraries take; `slack`: the allocator's, as planned."""
    taken = before if made.device == "cpu" else 0
    training, evaluating = result.training.peak_memory - taken, max(0, result.evaluation_peak - taken)
    planned = {"planned": made.bytes.run, "slack": made.bytes.slack, "libraries": taken}
    return {**planned, "measured": max(training, evaluating), "training": training, "evaluating": evaluating}
