"""What a run measured of its drafts, as a table."""

from __future__ import annotations

from typing import Any

from toolkit.report.terminal import draft_table


def measured(tau: float, first: float, speed: float) -> dict[str, Any]:
    return {
        "prompts": 24, "tokens": 400, "tau": tau, "acceptance": {"1": first, "2": first / 2}, "identical": True,
        "tokens_per_second": speed, "plain_tokens_per_second": 20.0,
    }  # fmt: skip


FIGURES = {"base": measured(2.1, 0.7, 30.0), "stale": measured(1.2, 0.2, 15.0), "trained": measured(2.0, 0.65, 28.0)}


def test_base_stale_and_trained_stand_side_by_side() -> None:
    columns, rows = draft_table({"training": {"steps": 3}, **FIGURES})
    assert columns[1:] == ["base", "stale", "trained"]
    found = {row[0]: row[1:] for row in rows}
    assert found["tokens/pass"] == ["2.10", "1.20", "2.00"]
    assert found["draft 1 accepted"] == ["70.0%", "20.0%", "65.0%"]
    assert found["without drafts"] == ["20.0"] * 3
    assert found["faster with drafts"] == ["yes", "no", "yes"]


def test_a_new_head_stands_alone_and_nothing_gives_nothing() -> None:
    columns, rows = draft_table({"trained": FIGURES["trained"]})
    assert columns == ["drafts on held-out prompts", "trained"]
    assert all(len(row) == 2 for row in rows)
    assert draft_table({"training": {"steps": 3}}) == ([], [])
