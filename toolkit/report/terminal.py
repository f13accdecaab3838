"""Tables and lines on the terminal: the data, coverage, and a finished run's summary."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from toolkit.artifact import VerifyReport
from toolkit.data import DataReport
from toolkit.export import ForeignReport
from toolkit.export.foreign import LayerMoved
from toolkit.plan.stacks import Mixture
from toolkit.quant.gains import Gains
from toolkit.quant.gptq.calibrate import Compensation
from toolkit.report.plans import mib, table_of

__all__ = [
    "benchmarks",
    "checks",
    "comparison",
    "compensation",
    "data",
    "draft_table",
    "foreign",
    "mixture",
    "reached",
    "requantised",
    "summary",
]

_WORST_SHOWN = 3
_LAYERS_SHOWN = 8
_HEADS = ("base", "stale", "trained")


_DRAFT_FIGURES = (
    ("tokens/pass", "tau", "{:.2f}"),
    ("tokens/s", "tokens_per_second", "{:.1f}"),
    ("without drafts", "plain_tokens_per_second", "{:.1f}"),
)
_SHARES = {"exact_match", "token_f1", "rouge_l", "json_valid", "preference_accuracy"}


def data(console: Console, report: DataReport) -> None:
    """One line a split, and what deserves a look."""
    for name, split in report.splits.items():
        dropped = ", ".join(f"{count} {reason}" for reason, count in split.drops.items()) or "none"
        console.print(
            f"[bold]data[/bold]  {name}: {split.kept} of {split.rows} examples, {split.tokens} tokens, "
            f"{split.trained_tokens} trained; dropped: {dropped}"
        )
    for source in report.sources:
        console.print(f"[bold]data[/bold]  {escape(str(source))}")
    if report.overlap:
        console.print(f"[yellow]note[/yellow]  {report.overlap} held-out prompts are also training prompts")
    for notice, count in report.notices.items():
        console.print(f"[yellow]note[/yellow]  {escape(notice)}: {count}")


def compensation(console: Console, found: Compensation) -> None:
    """Output errors before and after error compensation by layer, and the experts with the largest, worst first."""
    console.print(
        f"[bold]compensated[/bold]  {len(found.parts)} parts on {found.examples} examples, {found.tokens} tokens; mean "
        f"output error {found.rounded:.3%} rounded, {found.compensated:.3%} compensated"
    )
    table = table_of("output error", "linears", "after", "experts", "after", "experts without rows")
    for layer in dict.fromkeys(part.layer for part in found.parts):
        linears = [part for part in found.parts if part.layer == layer and part.experts == 1]
        stacks = [part for part in found.parts if part.layer == layer and part.experts > 1]
        means = [_mean(parts, what) for parts in (linears, stacks) for what in ("rounded", "compensated")]
        table.add_row(layer, *means, str(sum(part.unseen for part in stacks)) if stacks else "")
    console.print(table)
    for expert in found.worst[:_WORST_SHOWN]:
        console.print(
            f"  {expert.part}, expert {expert.expert}: {expert.rounded:.3%} rounded, {expert.compensated:.3%} "
            f"compensated, {expert.rows} rows",
            markup=False,
        )


def mixture(console: Console, made: Mixture | None, found: Gains) -> None:
    """What the stacks are in, what that costs, and the layers that gain most in int8."""
    console.print(
        f"[bold]mixture[/bold]  {made}; loss on {found.tokens} tokens {found.loss:.4f} with all in int4, "
        f"{found.mixed:.4f} so"
    )
    table = table_of("layer", "gain in int8, nats a token", "is")
    ordered = sorted(found.gains.items(), key=lambda pair: -pair[1])
    for name, gain in ordered[:_LAYERS_SHOWN]:
        table.add_row(name, f"{gain:+.6f}", "int8" if name in found.chosen else "int4")
    console.print(table)


def requantised(console: Console, found: Mapping[str, Any]) -> None:
    """What a checkpoint was quantised as, and what rounding adds to that: relative errors, measured while it loaded."""
    formats = "; ".join(f"{name} ({count:,})" for name, count in found["formats"].items())
    console.print(
        f"[bold]requantised[/bold]  from {escape(formats)}; rounding adds {found['weights']:.2%} to the weights, "
        f"{found['outputs']:.2%} to outputs of random inputs ({found['matrices']} matrices compared)"
    )
    if zeros := found["zero_experts"]:
        console.print(
            f"[yellow]note[/yellow]  {zeros} projections of experts are all zeros: what quantised this checkpoint "
            "never reached those experts"
        )


def reached(console: Console, counts: Mapping[str, Any]) -> None:
    """Coverage, N of N."""
    console.print("[bold]coverage[/bold]  " + ", ".join(f"{name} {_of(value)}" for name, value in counts.items()))


_BEYOND = "; on a CPU, heap kept from tokenising and modules loaded since count too"


def summary(console: Console, finished: Mapping[str, Any]) -> None:
    """Coverage, base against adapted, sample answers, and where the adapter lies."""
    reached(console, finished["counts"])
    if mixed := finished.get("mixture"):
        console.print(
            f"[bold]mixture[/bold]  {len(mixed['chosen'])} of {len(mixed['gains'])} layers in int8; loss on examples "
            f"{mixed['loss']:.4f} with all in int4, {mixed['mixed']:.4f} so"
        )
    if compensated := finished.get("compensation"):
        console.print(
            f"[bold]compensated[/bold]  mean output error {compensated['rounded']:.3%} rounded, "
            f"{compensated['compensated']:.3%} compensated"
        )
    training, memory = finished["training"], finished["memory"]
    console.print(
        f"[bold]trained[/bold]  {training['steps']} steps, {training['tokens']} tokens in {training['seconds']:.0f} s, "
        f"peak {mib(memory['measured'])} MiB (plan: {mib(memory['planned'])} + {mib(memory['slack'])} slack"
        f"{_BEYOND if memory['measured'] > memory['planned'] + memory['slack'] else ''})"
    )
    if "base" in finished["results"]:
        comparison(console, finished["results"])
    if mtp := finished["results"].get("mtp"):
        drafting(console, mtp)
    for sample in _telling(finished):
        console.print(_line(sample["prompt"]), style="dim", markup=False)
        wanted, base, adapted = (_line(sample[who]) for who in ("wanted", "base", "adapted"))
        console.print(f"  {f'wanted {wanted!r}, ' * bool(wanted)}base {base!r}, adapted {adapted!r}", markup=False)
    artifact = Path(finished["artifact"])
    console.print(f"[bold]adapter[/bold]  {escape(str(artifact))}")
    console.print(f"[bold]page[/bold]     {escape(str(artifact.parent))}/report.html")


def _telling(finished: Mapping[str, Any]) -> list[dict[str, str]]:
    """The samples to show: answers that got better and worse, where there are such."""
    changed = finished.get("changed") or {}
    found: list[dict[str, str]] = [*changed.get("better", []), *changed.get("worse", [])]
    return found or list(finished["samples"])


def comparison(console: Console, results: Mapping[str, Any]) -> None:
    """Base against adapted on held-out examples."""
    table = table_of(f"{results['examples']} held-out examples", "base", "adapted")
    if results["adapted"]["loss"] is not None:
        table.add_row("loss", *(f"{results[who]['loss']:.4f}" for who in ("base", "adapted")))
    for name, value in results["adapted"].items():
        if name != "loss" and value is not None:
            both = (results[who][name] for who in ("base", "adapted"))
            shares = name in _SHARES
            table.add_row(name.replace("_", " "), *(f"{each:.1%}" if shares else f"{each:.4f}" for each in both))
    console.print(table)
    if judged := results.get("preference"):
        console.print(
            f"{judged['answers']} held-out good and bad answers: {judged['rewards/accuracies']:.1%} rewarded the right "
            f"way round, mean margin {judged['rewards/margins']:.4f}"
        )
    if changed := results.get("answers"):
        console.print(f"answers: {changed['better']} better than the base's, {changed['worse']} worse")


def benchmarks(console: Console, found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """lm-eval's figures, base against adapted."""
    table = table_of("task", "metric", "base", "adapted")
    for task, metrics in found["adapted"].items():
        for name, value in metrics.items():
            table.add_row(task, name.removesuffix(",none"), f"{found['base'][task][name]:.4f}", f"{value:.4f}")
    console.print(table)


def drafting(console: Console, figures: Mapping[str, Any]) -> None:
    """Drafts of a multi-token-prediction head: as the base had it, left as it was, trained."""
    columns, rows = draft_table(figures)
    if not rows:
        return
    table = table_of(*columns)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def checks(console: Console, report: VerifyReport) -> None:
    """What `verify` found."""
    for check in report.checks:
        console.print(f"{'ok    ' if check.ok else 'FAILED'}  {check.name}: {check.detail}", markup=False)
    if report.tensors:
        console.print(f"{report.tensors} tensors, {report.moved} of {report.adapters} adapters moved")


def foreign(console: Console, report: ForeignReport) -> None:
    """What `verify` found in an adapter without a manifest: one page, layers that are alike in one line."""
    say = partial(console.print, markup=False, highlight=False)
    fitting, tensors = report.fitting
    say(f"{report.folder}, on {report.base}")
    say(f"of this base: {fitting:,} of {tensors:,} tensors have their place and shape there")
    for line in report.misfits[:5]:
        say(f"  {line}")
    moved, every = report.slots
    how = f", as {' and '.join(report.layouts)}" if report.layouts else ""
    say(f"experts: {moved:,} of {every:,} projections moved{how}")
    for names, layer in _alike(report.layers):
        partly = f", {layer.partly} more on some projections only" if layer.partly else ""
        say(f"  {names}: {layer.moved} of {layer.experts} experts moved{partly}")
    say(f"routers: {report.routers[0]} of {report.routers[1]} moved")
    say(f"other linears: {report.linears[0]} of the {report.linears[1]} in the adapter moved")
    for line in report.beside:
        say(f"beside A and B: {line}")
    for server, problems in report.servers.items():
        say(f"{server}, by the rules in its sources: {f'{len(problems):,} problems' if problems else 'accepted'}")
        for line in problems[:3]:
            say(f"  {line}")


def _alike(layers: Sequence[LayerMoved]) -> Iterator[tuple[str, LayerMoved]]:
    """Layers in a row with the same figures, as first and last."""
    for _, group in itertools.groupby(layers, lambda layer: (layer.experts, layer.moved, layer.partly)):
        found = list(group)
        yield found[0].name + (f" to {found[-1].name}" if len(found) > 1 else ""), found[0]


def _mean(parts: list[Any], what: str) -> str:
    return f"{sum(getattr(part, what) for part in parts) / len(parts):.3%}" if parts else ""


def _of(value: Any) -> str:
    return f"{value[0]} of {value[1]}" if isinstance(value, list) else f"{value:,}"


def _line(text: str, width: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def draft_table(figures: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A run's `mtp` figures as a table: columns, and rows of text; none where nothing was drafted.

    `base` is the checkpoint's own head on its own model, `stale` the same head once the adapter is on, `trained` the
    head that was trained along.
    """
    measured = {name: found for name in _HEADS if (found := figures.get(name))}
    if not measured:
        return [], []
    rows = [[what, *(form.format(found[key]) for found in measured.values())] for what, key, form in _DRAFT_FIGURES[:1]]
    places = sorted({place for found in measured.values() for place in found["acceptance"]}, key=int)
    for place in places:
        shares = [found["acceptance"].get(place) for found in measured.values()]
        rows.append([f"draft {place} accepted", *("" if share is None else f"{share:.1%}" for share in shares)])
    rows += [
        [what, *(form.format(found[key]) for found in measured.values())] for what, key, form in _DRAFT_FIGURES[1:]
    ]
    pays = ["yes" if f["tokens_per_second"] > f["plain_tokens_per_second"] else "no" for f in measured.values()]
    return ["drafts on held-out prompts", *measured], [*rows, ["faster with drafts", *pays]]
