#!/usr/bin/env python3
"""Are the training examples what inference feeds and the model has to answer, under any chat template? A matrix.

    .venv/bin/python scripts/parity/templates.py FOLDER_OR_PACKAGE … [--side FILE] [--tokenizer FOLDER] [--json OUT]

Every `.jinja` file and every `chat_template` in a JSON file there meets some thirty conversations. A reference that
knows nothing of ours renders each and works out the tokens and labels; `build_batches` has to make the same, or to
refuse in a line, or to tell in a notice what is otherwise. A side file (`templates.json` in the folder) names special
tokens, bos, eos, stop tokens and template options; without it they are read off the template, and printed.

Exits with 1 where a row differs without a word, or fewer than 95% of what a template can render is exact.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers.utils import logging

from scripts.parity.template_cases import CASES, Case
from scripts.parity.template_families import find_families
from scripts.parity.template_judge import FAILURES, Cell, counts, judge_family, renderer_for

__all__ = ["LEAST", "main", "passes"]

LEAST = 0.95
_SIGNS = {"exact": "+", "refused": "R", "noticed": "n", "silent": "SILENT", "n/a": "·", "crashed": "CRASH"}


def main(arguments: list[str] | None = None) -> int:
    """Print the matrix; the exit status."""
    options = _parser().parse_args(arguments)
    logging.set_verbosity_error()
    cases = [case for case in CASES if not options.case or case.name in options.case]
    cells: list[Cell] = []
    for source in options.sources:
        for family in find_families(source, options.side):
            if options.only and family.name not in options.only:
                continue
            _, guessed = renderer_for(family, options.tokenizer)
            judged = judge_family(family, cases, folder=options.tokenizer)
            cells += judged
            print(f"{family.name:34} {_tally(judged)}{f'   {guessed}' if guessed else ''}", flush=True)
            for cell in judged:
                if cell.status != "exact" and (options.all or cell.status != "n/a"):
                    print(f"    {cell.case}: {cell.status}: {cell.line}", flush=True)
    print(_matrix(cells, cases))
    print("; ".join(f"{count} {name}" for name, count in counts(cells).items()))
    if options.json:
        options.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1, ensure_ascii=False))
    return 0 if passes(cells) else 1


def passes(cells: Sequence[Cell]) -> bool:
    """No silent difference, and at least 95% of the renderable cells exact."""
    tally = counts(cells)
    return not any(cell.status in FAILURES for cell in cells) and (
        tally["exact of renderable"] >= LEAST * tally["renderable"]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="a folder, a template or an installed package")
    parser.add_argument("--side", type=Path, help="what is known of the templates: name to tokens and options")
    parser.add_argument("--tokenizer", type=Path, help="a folder with the tokenizer to use for every template")
    parser.add_argument("--only", nargs="+", help="names of templates")
    parser.add_argument("--case", nargs="+", help="names of conversations")
    parser.add_argument("--all", action="store_true", help="print rows that a template cannot render, too")
    parser.add_argument("--json", type=Path, help="write every cell there")
    return parser


def _tally(cells: Sequence[Cell]) -> str:
    statuses = [cell.status for cell in cells]
    return ", ".join(f"{statuses.count(status)} {status}" for status in _SIGNS if status in statuses)


def _matrix(cells: Sequence[Cell], cases: Sequence[Case]) -> str:
    """Rows are cases, columns families by number: names are long and there are many."""
    names = list(dict.fromkeys(cell.family for cell in cells))
    signs = {(cell.family, cell.case): _SIGNS[cell.status][:1] for cell in cells}
    lines = [f"{index + 1:4} {name}" for index, name in enumerate(names)]
    lines.append(" " * 22 + "".join(f"{index + 1:>3}" for index in range(len(names))))
    lines += [f"{case.name:22}" + "".join(f"{signs.get((name, case.name), ''):>3}" for name in names) for case in cases]
    return "\n".join([*lines, "+ exact, R refused, n noticed, S silent, C crashed, · the template cannot render it"])


if __name__ == "__main__":
    raise SystemExit(main())
