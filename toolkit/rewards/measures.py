"""Rewards that come with the package: each is a number from 0 to 1, or None where it does not apply to an answer.

TRL's own are for mathematics in LaTeX and for thoughts in tags; both need packages that are not here. A function of
TRL's works under its name, `trl.rewards:accuracy_reward`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from toolkit.errors import RecipeError
from toolkit.rewards.programs import require_confinement, share_that_passes

__all__ = ["BUILT_IN", "COMPARING", "TESTS", "Measure", "exact_match", "json_valid", "last_number"]

TESTS = "tests"
"""The reward that runs an answer's code."""

Measure = Callable[[str, "str | None", int, Mapping[str, Any]], "float | None"]
"""(answer, wanted answer or None, the answer's tokens, options) to a reward."""

_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3})?|(?<!\w)-?\.\d+")


def exact_match(answer: str, wanted: str) -> float:
    """1 where they are the same but for case, outer spaces and a final full stop."""
    return float(_normal(answer) == _normal(wanted))


def json_valid(answer: str, wanted: str) -> float:
    """1 where the answer parses as JSON, whatever is wanted."""
    return float(_parsed(answer) is not None)


def last_number(text: str) -> Decimal | None:
    """The number that stands last in a text, its thousands with or without commas; None where there is none."""
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def _exact(answer: str, wanted: str | None, tokens: int, options: Mapping[str, Any]) -> float | None:
    return None if wanted is None else exact_match(answer, wanted)


def _number(answer: str, wanted: str | None, tokens: int, options: Mapping[str, Any]) -> float | None:
    due = None if wanted is None else last_number(wanted)
    return None if due is None else float(last_number(answer) == due)


def _json(answer: str, wanted: str | None, tokens: int, options: Mapping[str, Any]) -> float:
    parsed = _parsed(answer)
    if parsed is None or not options.get("json_schema"):
        return float(parsed is not None)
    return float(_validator(options["json_schema"]).is_valid(parsed[0]))


def _pattern(answer: str, wanted: str | None, tokens: int, options: Mapping[str, Any]) -> float:
    return float(re.search(options["pattern"], answer) is not None)


def _length(answer: str, wanted: str | None, tokens: int, options: Mapping[str, Any]) -> float:
    most = int(options["tokens"])
    return min(1.0, max(0.0, (2 * most - tokens) / most))


def _parsed(text: str) -> list[Any] | None:
    """The value in a list of one, since null is a value."""
    try:
        return [json.loads(text)]
    except (ValueError, RecursionError):
        return None


_validators: dict[str, Any] = {}


def _validator(path: str) -> Any:
    """What checks a value by the JSON Schema in a file, which is read once."""
    if path not in _validators:
        if not find_spec("jsonschema"):
            raise RecipeError('rewards.functions: json_schema needs jsonschema; pip install "onecard[rewards]"')
        import jsonschema

        schema = json.loads(Path(path).read_text(encoding="utf-8"))
        kind = jsonschema.validators.validator_for(schema)
        kind.check_schema(schema)
        _validators[path] = kind(schema)
    return _validators[path]


def _normal(text: str) -> str:
    return text.strip().casefold().rstrip(".")


def prepare(function: str, options: Mapping[str, Any]) -> None:
    """Fail now where a measure would fail on every answer: a pattern or a schema that cannot be read."""
    if function == "regex":
        re.compile(options["pattern"])
    if function == "json_valid" and options.get("json_schema"):
        _validator(options["json_schema"])
    if function == TESTS:
        require_confinement()


COMPARING = ("exact_match", "number")
"""Those that need the wanted answer."""
BUILT_IN: Mapping[str, Measure] = {
    "exact_match": _exact,
    "number": _number,
    "json_valid": _json,
    "regex": _pattern,
    "length": _length,
}
"""By name: the same text; the same last number; JSON, and of a schema; a regular expression that is found; 1 up to a
number of tokens, and from there in a straight line to 0 at twice as many."""


def measured(function: str, options: Mapping[str, Any], batch: Mapping[str, Any]) -> list[float | None]:
    """The rewards of a batch: its `texts`, the wanted `answer` of each, `completion_ids`, and its `columns`."""
    if function == TESTS:
        return share_that_passes(batch["texts"], batch["columns"][options["column"]], options.get("seconds"))
    each = zip(batch["texts"], batch["answer"], batch["completion_ids"], strict=True)
    return [BUILT_IN[function](text, wanted, len(ids), options) for text, wanted, ids in each]
