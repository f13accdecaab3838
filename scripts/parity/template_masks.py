#!/usr/bin/env python3
"""Who trains what on the same rows: our examples against TRL's with `assistant_only_loss`, template by template.

    .venv/bin/python scripts/parity/template_masks.py [TEMPLATE …] [--json OUT]

TRL swaps in a training variant of a template that it knows, tokenises the whole conversation at once and trains what
the variant marks. The rows are those of `templates.py` that a template can render; each side is held against what
inference feeds and the model has to answer. `history` counts turns whose tokens before them are those of inference,
`ender` turns whose last trained token ends generation, `over` trained tokens that are in no answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import trl
from transformers.utils import logging
from trl.chat_template_utils import get_training_chat_template

from scripts.parity.template_cases import CASES, Case
from scripts.parity.template_families import Family, find_families
from scripts.parity.template_judge import (
    UNTRAINED,
    Outcome,
    difference,
    examples_of,
    reference_of,
    renderer_for,
    suited,
    trained_target,
)
from scripts.parity.template_reference import Exact
from scripts.parity.template_renderer import Renderer, frozen_day

__all__ = ["main", "measured", "trl_examples", "trl_families"]

PUBLISHED = Path(trl.__file__).parent / "chat_templates"
SIDE = Path(__file__).resolve().parents[2] / "tests/parity/templates/trl.json"
WHO = ("right", "ours", "TRL")
COLUMNS = ("rows", "turns", "trained", "history", "ender", "over")


def trl_families() -> list[Family]:
    """TRL's copies of published templates, without its training variants."""
    return [family for family in find_families(str(PUBLISHED), SIDE) if not family.name.endswith("_training")]


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("templates", nargs="*")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    print("| template | rows, turns | who | rows taken | trained | history | ender | over |")
    print("|---|---|---|---|---|---|---|---|")
    table = {}
    for family in trl_families():
        if not options.templates or family.name in options.templates:
            table[family.name] = sides = _compared(family)
            _print(family.name, sides)
    if len(table) > 1:
        _print("all", {who: sum((sides[who] for sides in table.values()), Counter()) for who in WHO})
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))
    return 0


def _print(name: str, sides: dict[str, Counter[str]]) -> None:
    right = sides["right"]
    for who in WHO:
        side = sides[who]
        whose = f"{name} | {right['rows']}, {right['turns']}" if who == "right" else " | "
        shown = f"{side['rows']} | {side['trained']} | {side['history']} | {side['ender']} | {side['over']}"
        print(f"| {whose} | {who} | {shown} |", flush=True)


def _compared(family: Family) -> dict[str, Counter[str]]:
    renderer, _ = renderer_for(family)
    renderer.tokenizer.chat_template = family.template
    sides: dict[str, Counter[str]] = {"right": Counter(), "ours": Counter(), "TRL": Counter()}
    for case in (suited(each, renderer) for each in CASES):
        reference = reference_of(renderer, case)
        if not reference.renderable or case.train_on != "all" or case.thoughts != "keep":
            continue
        sides["right"] += measured(reference.forms[0], _as_examples(reference.forms[0]))
        for who, make in (("ours", examples_of), ("TRL", trl_examples)):
            outcome = make(renderer, case)
            same = (form for form in reference.forms if not difference(renderer, form, outcome))
            sides[who] += measured(next(same, reference.forms[0]), outcome)
    return sides


def trl_examples(renderer: Renderer, case: Case) -> Outcome:
    """One row as SFTTrainer tokenises it: all at once, under the training variant where there is one."""
    kwargs = {**renderer.kwargs, **case.kwargs}
    try:
        template = get_training_chat_template(renderer.tokenizer) or renderer.template
        with frozen_day():
            made: Any = renderer.tokenizer.apply_chat_template(
                case.messages if renderer.takes_text else _in_parts(case),
                tools=case.tools,
                chat_template=template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **kwargs,
            )
    except Exception as error:  # a row that it does not take is counted as that
        return Outcome(refusal=str(error))
    ids, mask = tuple(made["input_ids"]), made["assistant_masks"]
    if 1 not in mask:
        return Outcome(refusal="nothing is marked")
    return Outcome(((ids, tuple(token if on else UNTRAINED for token, on in zip(ids, mask, strict=True))),))


def _in_parts(case: Case) -> list[dict[str, Any]]:
    """As TRL hands conversations to a model that sees pictures."""
    texts = [turn.get("content") for turn in case.messages]
    parts = [[{"type": "text", "text": text}] if isinstance(text, str) else text for text in texts]
    return [{**turn, "content": part} for turn, part in zip(case.messages, parts, strict=True)]


def _as_examples(form: Exact) -> Outcome:
    """The right examples, one a turn."""
    turns = [(turn.prompt, turn.targets[0]) for turn in form.turns]
    return Outcome(tuple((p + t, (UNTRAINED,) * len(p) + t) for p, t in turns))


def measured(form: Exact, outcome: Outcome) -> Counter[str]:
    """What a side did with one row."""
    found = Counter(dict.fromkeys(COLUMNS, 0))
    found["turns"] = len(form.turns)
    if outcome.refusal is not None:
        return found
    found["rows"] = 1
    wanted: Counter[int] = Counter()
    ends: Counter[int] = Counter()
    trained: Counter[int] = Counter()
    for _, labels in outcome.examples:
        trained += Counter(label for label in labels if label != UNTRAINED)
    for turn in form.turns:
        target = trained_target(turn, outcome)
        wanted += Counter(target)
        ends[target[-1]] += 1
        start = len(turn.prompt)
        found["history"] += any(ids[:start] == turn.prompt for ids, _ in outcome.examples)
    found["ender"] = sum(min(count, trained[end]) for end, count in ends.items())
    found["trained"] = trained.total()
    found["over"] = (trained - wanted).total()
    return found


if __name__ == "__main__":
    raise SystemExit(main())
