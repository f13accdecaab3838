"""How good one answer is, from 0 to 1: exact match, token F1, ROUGE-L, valid JSON, or a function of the user's.

The packages that have these (rouge-score, evaluate) bring stemmers and download scripts; each is a few lines on words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from toolkit.errors import RecipeError, did_you_mean, first_line
from toolkit.rewards import exact_match, json_valid
from toolkit.rewards.functions import function_of

__all__ = ["BUILT_IN", "LOSS", "Metric", "find_metric", "metrics_for", "score"]

Metric = Callable[[str, str], float]
"""(answer, wanted answer) to a number, better high."""

LOSS = "loss"
"""The one figure that is not about answers, and better low."""


def token_f1(answer: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of words, each counted as often as it stands there (as SQuAD has it)."""
    got, due = _words(answer), _words(wanted)
    return _f1((Counter(got) & Counter(due)).total(), len(got), len(due))


def rouge_l(answer: str, wanted: str) -> float:
    """The same of the longest common subsequence of words (ROUGE-L, Lin 2004)."""
    got, due = _words(answer), _words(wanted)
    lengths = [0] * (len(due) + 1)
    for word in got:
        before = 0
        for index, other in enumerate(due, 1):
            before, lengths[index] = (
                lengths[index],
                before + 1 if word == other else max(lengths[index], lengths[index - 1]),
            )
    return _f1(lengths[-1], len(got), len(due))


BUILT_IN: Mapping[str, Metric] = {metric.__name__: metric for metric in (exact_match, token_f1, rouge_l, json_valid)}


def find_metric(name: str) -> tuple[str, Metric]:
    """The short name and function of a built-in metric, of `module:function`, or of `file.py:function`.

    Raises:
        RecipeError: there is no such metric, file, module or function.
    """
    if name in BUILT_IN:
        return name, BUILT_IN[name]
    if ":" not in name:
        hint = did_you_mean(name, [LOSS, *BUILT_IN]) or f"; known: {', '.join([LOSS, *BUILT_IN])}"
        raise RecipeError(f"eval.metric: no metric {name}{hint}; one of yours is file.py:function or module:function")
    return function_of(name, "eval.metric")


def metrics_for(chosen: str, wanted: Sequence[str]) -> dict[str, Metric]:
    """What is measured on these examples: exact match, F1 and ROUGE-L; JSON where JSON is wanted; what was chosen."""
    names = ["exact_match", "token_f1", "rouge_l"]
    if wanted and all(answer.lstrip()[:1] in ("{", "[") and json_valid(answer, "") for answer in wanted):
        names.append("json_valid")
    found = {name: BUILT_IN[name] for name in names}
    return found if chosen == LOSS else found | dict([find_metric(chosen)])


def score(name: str, metric: Metric, answers: Sequence[str], wanted: Sequence[str]) -> list[float]:
    """The metric of each answer.

    Raises:
        RecipeError: a metric of the user's raised, or gave no number.
    """
    try:
        return [float(metric(answer, due)) for answer, due in zip(answers, wanted, strict=True)]
    except Exception as error:  # the user's code
        raise RecipeError(
            f"eval.metric: {name} failed on an answer: {type(error).__name__}: {first_line(error)}"
        ) from None


def _f1(common: int, got: int, due: int) -> float:
    return 2 * common / (got + due) if got + due else 1.0


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.casefold()).split()
