"""One template and one row, judged: are the examples that `build_batches` makes those that they have to be?

Nothing of how the examples are made is known here; only their tokens and labels, the notices, and the refusals count.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scripts.parity.template_cases import Case
from scripts.parity.template_families import Family, make_tokenizer
from scripts.parity.template_reference import Exact, Reference, Turn, reference_for
from scripts.parity.template_renderer import TODAY, Renderer
from toolkit.data import build_batches
from toolkit.errors import DataError

__all__ = [
    "FAILURES",
    "UNTRAINED",
    "Cell",
    "Outcome",
    "counts",
    "examples_of",
    "judge",
    "judge_family",
    "reference_of",
    "renderer_for",
]

UNTRAINED = -100
FAILURES = ("silent", "crashed")


@dataclass(frozen=True)
class Outcome:
    """What came of a row: examples as (tokens, labels) and notices, or a refusal; `crashed` if it is no DataError."""

    examples: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    notices: tuple[str, ...] = ()
    refusal: str | None = None
    crashed: bool = False


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix. `renderable`: the template can say all that the row says."""

    family: str
    case: str
    status: str
    line: str = ""
    renderable: bool = True
    notices: tuple[str, ...] = ()


def renderer_for(family: Family, folder: Path | None = None) -> tuple[Renderer, str]:
    """The renderer of a family, and what of its tokens had to be guessed."""
    tokenizer = make_tokenizer(family, folder)
    kwargs = family.side.get("kwargs", {})
    if stops := family.side.get("stop_tokens"):
        return Renderer(tokenizer, family.template, tuple(stops), kwargs), ""
    bare = Renderer(tokenizer, family.template, (), kwargs)
    closers = bare.closers
    if family.side.get("eos_token") in closers or tokenizer.eos_token in closers:
        stop = tokenizer.eos_token
    else:
        stop = closers[-1] if closers else tokenizer.eos_token
    if not family.side.get("eos_token") and stop is not None:
        tokenizer.eos_token = stop
    said = f"stops at {stop} (guessed{'' if closers else ': the template closes answers with nothing'})"
    return Renderer(tokenizer, family.template, (stop,), kwargs), said


def examples_of(renderer: Renderer, case: Case) -> Outcome:
    """What `build_batches` makes of the row of `case`."""
    stops = [renderer.tokenizer.convert_tokens_to_ids(stop) for stop in renderer.stops]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.jsonl"
        path.write_text(json.dumps(case.row, ensure_ascii=False) + "\n", "utf-8")
        try:
            batches = build_batches(
                renderer.tokenizer,
                train=str(path),
                chat_template=renderer.template,
                stop_token_ids=stops,
                chat_template_kwargs={**renderer.kwargs, **case.kwargs},
                train_on=case.train_on,
                thoughts=case.thoughts,
                date=TODAY,
                max_length=100_000,
                shuffle=False,
                on_invalid="error",
            )
        except DataError as error:
            return Outcome(refusal=str(error).replace(f"{path}:1: ", "").replace(str(path), "row.jsonl"))
        except Exception as error:  # a crash is one cell's result
            return Outcome(refusal=f"{type(error).__name__}: {error}", crashed=True)
        rows = tuple((tuple(row["input_ids"]), tuple(row["labels"])) for row in batches.train)
    return Outcome(rows, tuple(batches.report.notices))


def reference_of(renderer: Renderer, case: Case) -> Reference:
    """The right forms of the row of `case`."""
    last, thoughts = case.train_on == "last", case.thoughts == "keep"
    return reference_for(renderer, case.messages, case.tools, case.kwargs, last=last, thoughts=thoughts)


def judge_family(
    family: Family,
    cases: Sequence[Case],
    make: Callable[[Renderer, Case], Outcome] = examples_of,
    folder: Path | None = None,
) -> list[Cell]:
    """The cells of one family. A notice that exact rows get too explains no difference."""
    renderer, _ = renderer_for(family, folder)
    cells = []
    for case in (each.with_stop(renderer.stops[0]) for each in cases):
        reference = reference_of(renderer, case)
        cells.append(judge(renderer, case, reference, make(renderer, case), family.name))
    routine = {notice for cell in cells if cell.status == "exact" and not cell.line for notice in cell.notices}
    return [_without_routine(cell, routine) for cell in cells]


def _without_routine(cell: Cell, routine: set[str]) -> Cell:
    if cell.status == "noticed" and cell.renderable and set(cell.notices) <= routine:
        return replace(cell, status="silent", line=f"{cell.line} (every exact row has these notices)")
    return cell


def judge(renderer: Renderer, case: Case, reference: Reference, outcome: Outcome, family: str = "") -> Cell:
    """One cell: `exact`, `refused`, `noticed`, `n/a`, or a failure: `silent`, `crashed`."""

    def cell(status: str, line: str = "") -> Cell:
        return Cell(family, case.name, status, line, reference.renderable, outcome.notices)

    if outcome.crashed or "\n" in (outcome.refusal or ""):
        return cell("crashed", " / ".join(str(outcome.refusal).splitlines()))
    if outcome.refusal is not None:
        return cell("refused" if reference.renderable else "n/a", outcome.refusal)
    said = " | ".join(outcome.notices)
    for form in reference.forms:
        if difference(renderer, form, outcome):
            continue
        untold = [need.what for need in form.needs if not re.search(need.words, said, re.IGNORECASE)]
        if untold:
            return cell("silent", f"no notice tells of: {', '.join(untold)}")
        return cell("noticed" if form.lossy else "exact", said if form.needs else "")
    why = difference(renderer, reference.forms[0], outcome) if reference.forms else reference.why
    return cell("noticed" if said else "silent", f"{why}; notices: {said}" if said else why)


def difference(renderer: Renderer, form: Exact, outcome: Outcome) -> str:
    """How the examples differ from `form`, in one line; nothing where they are the same."""
    seen: list[int] = []
    for ids, labels in outcome.examples:
        spans = [(turn, span) for turn in form.turns if (span := _span(turn, ids))]
        if not spans:
            return _nearest(renderer, form, ids)
        if len(ids) != (end := max(end for _, (_, end) in spans)):
            return f"tokens after the last answer: {_shown(renderer, ids[end:])}"
        # A turn that another example trains stands here as history.
        here = [(turn, span) for turn, span in spans if any(label != UNTRAINED for label in labels[slice(*span)])]
        trained = {at for _, span in here for at in range(*span)}
        wrong = [at for at, label in enumerate(labels) if label != (ids[at] if at in trained else UNTRAINED)]
        if wrong:
            what = "not trained" if wrong[0] in trained else "trained, wrongly"
            return f"{what}: {_shown(renderer, [ids[at] for at in wrong])}"
        seen += [turn.index for turn, _ in here]
    if missing := [turn for turn in form.turns if turn.index not in seen]:
        return f"turn {missing[0].index + 1} is not trained after what inference feeds"
    if twice := [index for index in seen if seen.count(index) > 1]:
        return f"turn {twice[0] + 1} is trained twice"
    if len(outcome.examples) > 1 and _fewest(form) == 1:
        return f"{len(outcome.examples)} examples where one holds the same tokens"
    return ""


def _span(turn: Turn, ids: tuple[int, ...]) -> tuple[int, int] | None:
    start = len(turn.prompt)
    if ids[:start] != turn.prompt:
        return None
    return next(((start, start + len(each)) for each in turn.targets if ids[start : start + len(each)] == each), None)


def _fewest(form: Exact) -> int:
    """How many examples the turns need: one goes on from another where the next prompt begins with both its parts."""
    count = 0
    ends: list[tuple[int, ...]] = []
    for turn in form.turns:
        goes_on = any(turn.prompt[: len(end)] == end for end in ends)
        count += not goes_on
        ends = [turn.prompt + target for target in turn.targets]
    return count


def _nearest(renderer: Renderer, form: Exact, ids: tuple[int, ...]) -> str:
    """Where an example leaves the right one, for the turn with which it goes along furthest."""
    rights = [turn.prompt + target for turn in form.turns for target in turn.targets]
    along = {
        right: next((i for i, (a, b) in enumerate(zip(right, ids, strict=False)) if a != b), None) for right in rights
    }
    right = max(rights, key=lambda each: len(each) if along[each] is None else along[each])
    at = min(len(right), len(ids)) if along[right] is None else along[right]
    assert at is not None
    before = _shown(renderer, ids[max(at - 6, 0) : at])
    return f"after …{before}: {_shown(renderer, ids[at : at + 12])} instead of {_shown(renderer, right[at : at + 12])}"


def _agreement(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens the two begin with alike."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def _shown(renderer: Renderer, ids: Sequence[int]) -> str:
    text = repr(renderer.tokenizer.decode(list(ids)))
    return text if len(text) <= 100 else f"{text[:60]} … {text[-36:]}"


def counts(cells: Sequence[Cell]) -> Mapping[str, int]:
    """Cells by status, with `renderable` and how many of these are exact."""
    every = {status: sum(cell.status == status for cell in cells) for status in sorted({c.status for c in cells})}
    able = [cell for cell in cells if cell.renderable]
    return {**every, "renderable": len(able), "exact of renderable": sum(cell.status == "exact" for cell in able)}
