"""The run's page: one HTML file that opens offline, made of what lies in the run folder and of nothing else.

Trackers draw curves of one service; this says what a run did to its model and how to use it. No script is in it and its
own policy forbids any, so that text from the data cannot run; Jinja escapes that text besides.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from toolkit.artifact import runs_near
from toolkit.durable import write_text
from toolkit.errors import ModelError
from toolkit.report import charts
from toolkit.report.terminal import draft_table
from toolkit.report.titles import titles_of_answers
from toolkit.run_folder import RunFolder
from toolkit.training.callbacks import held_out_scores

__all__ = ["Chart", "render_page", "write_page"]

_ALIVE_SECONDS = 120
_MOST_CELLS = 2048


@dataclass(frozen=True)
class Chart:
    """A picture, what it shows in words, and its numbers as a table: columns and rows."""

    title: str
    text: str
    svg: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]

    @property
    def picture(self) -> Markup:
        """matplotlib's own SVG, which escapes the texts in it."""
        return Markup(self.svg)


def write_page(run: Path, summary: str | None = None) -> Path:
    """Write `report.html` into the run folder and give its path.

    Args:
        summary: JSON of a run that ends now: it has no file yet, which comes last and says that all is there.

    Raises:
        ModelError: there is no run here.
    """
    target = RunFolder(run).report
    write_text(target, render_page(run, summary=summary))
    return target


def render_page(run: Path, refresh_seconds: int | None = None, summary: str | None = None) -> str:
    """The page as it stands; `refresh_seconds` makes an unfinished run's page load itself again.

    Raises:
        ModelError: there is no run here.
    """
    folder = RunFolder(run)
    if not folder.recipe.is_file():
        raise ModelError(
            f"{run}: no run here (no recipe.yaml); give the folder that onecard train wrote{runs_near(run)}"
        )
    metrics, finished = folder.read_metrics(), json.loads(summary) if summary else _read(folder.summary)
    plan, experts = _read(folder.plan), _read(folder.experts)
    environment = Environment(loader=PackageLoader("toolkit.report", "."), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"of": _of, "figure": _figure, "number": lambda value: f"{value:,}", "rewards": _rewards}
    return environment.get_template("page.html.jinja").render(
        name=run.resolve().name,
        run=shlex.quote(str(run)),
        recipe=folder.recipe.read_text(encoding="utf-8"),
        plan=plan,
        finished=finished,
        state=_state(folder, finished, metrics),
        refresh=None if finished else refresh_seconds,
        outcome=_outcome(finished),
        answers=_answers(finished),
        kept=_kept(finished),
        drafts=draft_table(finished.get("results", {}).get("mtp") or {}),
        training=list(_training_charts(metrics, finished)),
        memory=list(_memory_chart(plan, finished, metrics)),
        experts=experts,
        routing=list(_expert_charts(experts)),
        unhit=_unhit(experts),
        quantisation=[*_mixture_chart(finished), *_error_chart(finished)],
        seconds=list(_time_chart(finished)),
    )


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _state(folder: RunFolder, finished: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """In words, the share of the steps that are done where it is known, and the minutes left at the speed so far."""
    if finished:
        return {"word": "finished", "share": 1.0, "step": finished["training"]["steps"], "left": None}
    last = metrics[-1] if metrics else {"step": 0}
    touched = folder.metrics.stat().st_mtime if folder.metrics.is_file() else folder.recipe.stat().st_mtime
    word = "running" if time.time() - touched < _ALIVE_SECONDS else "not finished; the same command resumes it"
    left = _time_left(metrics) if word == "running" else None
    return {"word": word, "share": last.get("progress"), "step": last["step"], "left": left}


def _time_left(metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """At the speed of the lines so far, which hold about equally many tokens each; None before there are two."""
    speeds = [entry["tokens_per_second"] for entry in metrics if entry.get("tokens_per_second")]
    last = next((entry for entry in reversed(metrics) if entry.get("progress") and entry.get("num_tokens")), None)
    if last is None or len(speeds) < 2:
        return None
    tokens_left = last["num_tokens"] / last["progress"] - last["num_tokens"]
    seconds = tokens_left * statistics.mean(1 / speed for speed in speeds)
    if seconds < 5400:
        return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


_SHARES = ("exact_match", "token_f1", "rouge_l", "json_valid", "preference_accuracy")
_NAMES = {
    "perplexity": "perplexity of general text",
    "rouge_l": "ROUGE-L",
    "token_f1": "token F1",
    "preference_accuracy": "pairs whose chosen answer is more probable",
    "logps_chosen": "log-probability of chosen answers, nats",
    "logps_rejected": "log-probability of rejected answers, nats",
}
_BETTER_LOW = ("loss", "perplexity", "logps_rejected")
_OF_PAIRS = {
    "rewards/accuracies": ("Pairs rewarded the right way round", "share"),
    "rewards/margins": ("Reward of the chosen answer over the rejected one", "beta times nats"),
    "logps/chosen": ("Log-probability of chosen answers", "nats"),
    "logps/rejected": ("Log-probability of rejected answers", "nats"),
}
"""Figures that TRL logs of preference pairs: their titles and units."""
_NEITHER = ("answer tokens",)
"""Figures of which neither way is better."""
_CHANGED = {"better": "Answers that became better", "worse": "Answers that became worse"}


def _outcome(finished: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every number that base and adapted model both have, in words, and which way it went."""
    results = finished.get("results", {})
    base, adapted = (_numbers(results.get(who) or {}) for who in ("base", "adapted"))
    found = []
    for name in (name for name in base if name in adapted):
        shown = [f"{100 * value:.1f}%" if name in _SHARES else _figure(value) for value in (base[name], adapted[name])]
        gain = (base[name] - adapted[name]) * (1 if name in _BETTER_LOW else -1)
        went = "better" if gain > 0 else "worse" if gain < 0 else "the same"
        went = "" if name in _NEITHER else went
        words = _NAMES.get(name, name.replace("_", " "))
        found.append({"name": words, "base": shown[0], "adapted": shown[1], "went": went})
    return found


def _answers(finished: Mapping[str, Any]) -> list[tuple[str, list[dict[str, str]]]]:
    """Samples under headings: those that changed, each way with how many there are in all, else the first ones."""
    counts, changed = finished.get("results", {}).get("answers") or {}, finished.get("changed") or {}
    told = [(f"{title}: {counts.get(how, 0):,}", changed.get(how) or []) for how, title in _CHANGED.items()]
    if counts and any(samples for _, samples in told):
        return told
    return [("Answers side by side", list(finished["samples"]))] if finished.get("samples") else []


def _rewards(found: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {_figure(value)}" for name, value in found.items() if value is not None)


def _kept(finished: Mapping[str, Any]) -> str:
    """Which adapter the run ended with, and whether it stopped early; empty where it is simply the last one."""
    training = finished.get("training", {})
    done, planned = training.get("steps", 0), training.get("planned_steps", 0)
    words = [f"Training stopped early, after {done:,} of {planned:,} steps."] if done < planned else []
    if (step := training.get("best_step")) is not None:
        words.append(f"The adapter is that of step {step:,}, the best evaluation.")
    return " ".join(words)


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _points(metrics: Sequence[Mapping[str, Any]], key: str, scale: float = 1.0) -> list[tuple[float, float]]:
    found = [(entry["step"], entry[key] * scale) for entry in metrics if isinstance(entry.get(key), int | float)]
    return [(step, value) for step, value in found if math.isfinite(value)]


def _training_charts(metrics: Sequence[Mapping[str, Any]], finished: Mapping[str, Any]) -> Iterator[Chart]:
    lines = {"training": _points(metrics, "loss"), "held-out": _points(metrics, "eval_loss")}
    given = {label: points for label, points in lines.items() if points}
    of_pairs = any("rewards/margins" in entry for entry in metrics)
    told = _OF_PAIRS if of_pairs else titles_of_answers(metrics)
    if lines["training"]:
        results = {} if told else finished.get("results", {})
        levels = {
            who: results[who]["loss"] for who in ("base", "adapted") if (results.get(who) or {}).get("loss") is not None
        }
        unit = "of preference" if of_pairs else "of rewards" if told else "nats per token"
        yield _curve_chart("Loss", unit, given, "loss", levels)
    for name, (title, unit) in told.items():
        lines = {"training": _points(metrics, name), "held-out": _points(metrics, f"eval_{name}")}
        given = {label: points for label, points in lines.items() if points}
        if given:
            yield _curve_chart(title, unit, given, name.replace("/", "-"), from_zero=False)
    for name in sorted({name for entry in metrics for name in held_out_scores(entry)} - told.keys()):
        if points := _points(metrics, f"eval_{name}"):
            words = name.replace("_", " ")
            yield _curve_chart(f"Held-out {words}, while training", "", {words: points}, f"eval-{name}")
    for title, unit, key, scale in (
        ("Learning rate", "", "learning_rate", 1.0),
        ("Gradient norm", "before clipping", "grad_norm", 1.0),
        ("Speed", "real tokens per second", "tokens_per_second", 1.0),
        ("Memory in use, peak so far", "GiB", "memory_bytes", 2.0**-30),
    ):
        if points := _points([entry for entry in metrics if "loss" in entry], key, scale):
            yield _curve_chart(title, unit, {title.lower(): points}, key)


def _curve_chart(
    title: str,
    unit: str,
    lines: Mapping[str, charts.Points],
    name: str,
    levels: Mapping[str, float] = {},
    *,
    from_zero: bool = True,
) -> Chart:
    first, *_ = lines.values()
    text = f"{title} over {len(first)} logged steps: first {_figure(first[0][1])}, last {_figure(first[-1][1])}"
    text += "".join(f"; {label} model held-out {_figure(level)}" for label, level in levels.items())
    thin = {label: dict(charts.thin_out(points)) for label, points in lines.items()}
    steps = sorted({step for points in thin.values() for step in points})
    rows = [[int(step), *(points.get(step, "") for points in thin.values())] for step in steps]
    svg = charts.curves(name, lines, "step", unit, levels, from_zero=from_zero)
    return Chart(title, text, svg, ("step", *lines), rows)


def _memory_chart(
    plan: Mapping[str, Any], finished: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]
) -> Iterator[Chart]:
    """What was planned by part, the sum, and the peak that was measured; of a finished run both without libraries."""
    planned, measured = _numbers(plan.get("bytes") or {}), finished.get("memory") or {}
    peak = measured.get("measured") or max((m.get("memory_bytes", 0) for m in metrics), default=0)
    if not planned:
        return
    total = planned.pop("total", sum(planned.values()))
    if measured:
        total = measured["planned"]
        planned.pop("libraries", None)
    planned = {name: size for name, size in planned.items() if size}
    sizes = {**planned, "planned, sum": total, **({"measured, peak": peak} if peak else {})}
    mebibytes = {name: size / 2**20 for name, size in sizes.items()}
    text = f"Planned {_figure(total / 2**20)} MiB, measured {_figure(peak / 2**20)} MiB at the peak"
    text += ", both excluding Python and its libraries" if measured.get("libraries") else ""
    rows = [[name, f"{size:,.1f}"] for name, size in mebibytes.items()]
    yield Chart("Memory, MiB", text, charts.bars("memory", mebibytes, "MiB"), ("part", "MiB"), rows)


def _expert_charts(experts: Mapping[str, Any]) -> Iterator[Chart]:
    layers = experts.get("layers") or []
    if not layers:
        return
    shares = {when: [_shares(layer[when]) for layer in layers] for when in ("before", "after")}
    top = max(max(row) for rows in shares.values() for row in rows)
    for when, rows in shares.items():
        low, high = min(map(min, rows)), max(map(max, rows))
        text = f"Load of every expert {when} training, 1 is an even share: from {low:.2f} to {high:.2f}"
        svg = charts.heat_map(f"load-{when}", rows, "times the even share", top)
        yield _expert_chart(f"Load {when} training", text, svg, rows, [layer[when] for layer in layers])
    yield from _entropy_chart(layers)
    if moved := [layer["moved"] for layer in layers if layer["moved"]]:
        text = f"Size of every expert's update |BA|: from {min(map(min, moved)):.3g} to {max(map(max, moved)):.3g}"
        svg = charts.heat_map("moved", moved, "Frobenius norm of B·A")
        yield _expert_chart("How far each expert's adapter moved", text, svg, moved, moved)


def _entropy_chart(layers: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    lines = {
        label: [(float(i), layer[key]) for i, layer in enumerate(layers) if layer[key] is not None]
        for label, key in (("adapted", "entropy_after"), ("base", "entropy_before"))
    }
    if not all(lines.values()):
        return
    even = math.log(max(layer["experts"] for layer in layers))
    means = {label: sum(y for _, y in points) / len(points) for label, points in lines.items()}
    text = f"Router entropy, mean over layers: {means['base']:.3f} nats before, {means['adapted']:.3f} after; at most "
    rows = [[i, layer["entropy_before"], layer["entropy_after"]] for i, layer in enumerate(layers)]
    svg = charts.curves("entropy", lines, "MoE layer", "nats")
    yield Chart("Router entropy", text + f"{even:.3f}", svg, ("layer", "base", "adapted"), rows)


def _expert_chart(
    title: str, text: str, svg: str, shown: Sequence[Sequence[float]], exact: Sequence[Sequence[float]]
) -> Chart:
    """With all numbers while they can be read, else with each layer's ends."""
    if sum(map(len, exact)) <= _MOST_CELLS:
        width = max(map(len, exact))
        return Chart(title, text, svg, ("layer", *map(str, range(width))), [[i, *row] for i, row in enumerate(exact)])
    rows = [[i, min(r), r.index(min(r)), max(r), r.index(max(r))] for i, r in enumerate(map(list, shown))]
    return Chart(title, text, svg, ("layer", "least", "of expert", "most", "of expert"), rows)


def _shares(counts: Sequence[int]) -> list[float]:
    even = sum(counts) / len(counts) or 1.0
    return [count / even for count in counts]


def _unhit(experts: Mapping[str, Any]) -> dict[str, list[str]]:
    """Experts that no token reached, as "layer.expert", before and after."""
    layers = list(enumerate(experts.get("layers") or []))
    return {
        when: [f"{i}.{e}" for i, layer in layers for e, count in enumerate(layer[when]) if count == 0]
        for when in ("before", "after")
    }


def _mixture_chart(finished: Mapping[str, Any]) -> Iterator[Chart]:
    """What each layer gained in int8, where a budget mixed them with int4."""
    if not (mixture := finished.get("mixture")):
        return
    gains, chosen = mixture["gains"], set(mixture["chosen"])
    text = (
        f"Loss on {mixture['tokens']:,} calibration tokens {mixture['loss']:.4f} with all in int4, "
        f"{mixture['mixed']:.4f} with {len(chosen)} of {len(gains)} layers in int8"
    )
    rows = [[name, f"{gain:+.6f}", "int8" if name in chosen else "int4"] for name, gain in gains.items()]
    lines = {"gain": [(float(place), gain) for place, gain in enumerate(gains.values())]}
    svg = charts.curves("mixture", lines, "MoE layer", "loss that int8 takes off", from_zero=False)
    yield Chart("What int8 gains by layer", text, svg, ("layer", "nats a token", "is"), rows)


def _error_chart(finished: Mapping[str, Any]) -> Iterator[Chart]:
    compensation = finished.get("compensation")
    if not compensation:
        return
    names = list(dict.fromkeys(part["layer"] for part in compensation["parts"]))
    means = {
        what: [_mean(part[what] for part in compensation["parts"] if part["layer"] == name) for name in names]
        for what in ("compensated", "rounded")
    }
    lines = {what: [(float(i), 100 * y) for i, y in enumerate(ys)] for what, ys in means.items()}
    text = f"Mean output error {compensation['rounded']:.3%} rounded, {compensation['compensated']:.3%} compensated"
    rows = [
        [name, f"{r:.3%}", f"{c:.3%}"] for name, r, c in zip(names, means["rounded"], means["compensated"], strict=True)
    ]
    svg = charts.curves("quantisation", lines, "decoder layer", "output error, %")
    yield Chart("Error of 8-bit weights by layer", text, svg, ("layer", "rounded", "compensated"), rows)
    if worst := compensation["worst"]:
        left = {f"{each['part']} {each['expert']}": each for each in worst}
        rows = [
            [name, str(each["rows"]), f"{each['rounded']:.3%}", f"{each['compensated']:.3%}"]
            for name, each in left.items()
        ]
        text = f"{rows[0][0]} keeps {rows[0][3]} error; {rows[0][1]} calibration rows reached it"
        svg = charts.bars(
            "worst-experts", {name: 100 * each["compensated"] for name, each in left.items()}, "output error, %"
        )
        yield Chart("Experts with the largest error", text, svg, ("expert", "rows", "rounded", "compensated"), rows)


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _time_chart(finished: Mapping[str, Any]) -> Iterator[Chart]:
    if parts := {name: value for name, value in _numbers(finished.get("seconds") or {}).items() if value >= 0.05}:
        longest = max(parts, key=lambda name: parts[name])
        text = f"{sum(parts.values()):.1f} s in all, mostly: {longest}"
        rows = [[name, f"{value:.1f}"] for name, value in parts.items()]
        yield Chart("Time by part, seconds", text, charts.bars("seconds", parts, "seconds"), ("part", "seconds"), rows)


def _figure(value: Any) -> str:
    """Four digits that count; whole numbers whole."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _of(value: Any) -> str:
    return f"{value[0]:,} of {value[1]:,}" if isinstance(value, list) else _figure(value)
