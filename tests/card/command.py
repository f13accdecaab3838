"""`onecard` on the rehearsed card: `python -m tests.card.command train RECIPE …`, with what was counted at the end.

The library must be preloaded (`tests.card.machine` says how). REHEARSED_CARD_REPORT names a JSON file for the counts;
REHEARSED_CARD_RACES=1 looks for races, REHEARSED_CARD_SIZES=1 computes small tensors only, REHEARSED_CARD_UNTIL=attach
ends the program after that part.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.card import library


def _is_on(name: str) -> bool:
    return os.environ.get(f"REHEARSED_CARD_{name}") == "1"


def begin() -> Callable[[], dict[str, Any]]:
    """Put the card in place; what to ask for its report."""
    from tests.card import kernels, replay, sizes
    from tests.card.course import Course

    races = None
    if _is_on("RACES"):
        from tests.card.races import Races

        races = Races()
        replay.Card.watch = staticmethod(races.operator)
    if _is_on("SIZES"):
        sizes.load_first_experts()
        sizes.stream_from_holes()
        sizes.know_the_masks()
        sizes.trust_the_fused_head()
    replay.install(sizes.Sizes if _is_on("SIZES") else replay.Card)
    kernels.install(replays=not _is_on("SIZES"), watch=races.launch if races else None)
    until = os.environ.get("REHEARSED_CARD_UNTIL")
    course = Course(sizes.begin_with_zeros, until) if _is_on("SIZES") else Course(until=until)

    def report() -> dict[str, Any]:
        course.note("the end")
        return {
            "counts": asdict(library.counts()),
            "parts": course.parts,
            "steps": course.steps,
            "races": None if races is None else dict(races.found),
            "first_races": None if races is None else races.first,
            "synchronizations": dict(replay.synchronizations.most_common()),
            "operators": dict(replay.seen.most_common()),
            "triton": dict(kernels.launches.most_common()),
        }

    return report


def main() -> None:
    """Run the command with the card in place."""
    if library.is_loaded():  # CUDA is not touched: the command says first which cards it may see
        report, path = begin(), os.environ.get("REHEARSED_CARD_REPORT")
        if path:
            atexit.register(lambda: Path(path).write_text(json.dumps(report(), indent=1), encoding="utf-8"))
    from toolkit.cli import main as command

    command()
    library.require_no_failure()


if __name__ == "__main__":
    main()
