"""A plan and an audit on the terminal: where the bytes go, as a table and a bar, and what would make it fit.

Apart from `toolkit.report.terminal`, so that planning loads neither trainer nor data.
"""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from toolkit.plan import Audit, Plan

__all__ = ["mib", "show_audit", "show_plan", "table_of"]

_WIDTH = 60
_COLORS = (
    "blue",
    "cyan",
    "green",
    "yellow",
    "magenta",
    "bright_magenta",
    "red",
    "bright_blue",
    "white",
    "bright_black",
)


def show_plan(console: Console, made: Plan) -> None:
    """What will be loaded where, its bytes, the step's least time, and whether it fits."""
    layers = made.architecture.layers
    experts = sum(layer.num_experts for layer in layers)
    console.print(
        f"[bold]plan[/bold]  {len(layers)} MoE layers, {experts} experts, on {made.device_name or made.device} in "
        f"{made.dtype}; rank {made.recipe.lora.r}, {made.length} tokens in a sequence"
    )
    table = table_of("in memory", "MiB")
    groups = {name: size for name, size in asdict(made.bytes).items() if size}
    for (name, size), color in zip(groups.items(), _COLORS * 2, strict=False):
        table.add_row(f"[{color}]■[/{color}] {name}", mib(size))
    table.add_row("total", f"{mib(made.bytes.total)} of {mib(made.memory)}")
    console.print(table)
    console.print(_bar(groups, made.memory))
    for line in _lines(made):
        console.print(line, markup=False)


def _lines(made: Plan) -> list[str]:
    lines = [str(made.mixture)] if made.mixture else []
    if away := [place for place in made.placement.values() if place != "resident"]:
        per_pass = made.micro_batches_per_pass
        beside = f", {per_pass} micro-batches per pass" if per_pass > 1 else ""
        lines.append(f"streamed: experts of {len(away)} of {len(made.placement)} layers, from {away[0]}{beside}")
    if time := made.duration:
        which = max(("arithmetic", "memory", "bus"), key=lambda name: getattr(time, name))
        lines.append(
            f"step: at least {time.limit:.2f} s ({which}), likely {time.estimate:.1f} s; from data-sheet rates; "
            "utilisation as others measured it, or assumed"
        )
        if time.beforehand:
            lines.append(f"before the steps: up to {time.beforehand:.0f} s to measure the loss with each layer in int8")
        if time.afterwards:
            lines.append(f"after the steps: up to {time.afterwards:.0f} s to generate answers for the head")
    if made.stored and made.stored.dtypes:
        kinds = (f"{size / 1e9:.2f} in {dtype}" for dtype, size in sorted(made.stored.dtypes.items()))
        lines.append(f"checkpoint, GB: {', '.join(kinds)}{'' if made.stored.is_here else ', to be downloaded'}")
    if any(made.disk.values()):
        sizes = (f"{name} {size / 1e9:.1f}" for name, size in made.disk.items() if size)
        lines.append(f"disk, GB: {', '.join(sizes)}")
    lines += [f"note: {note}" for note in made.notes]
    if not made.fits:
        lines.append("does not fit; cheapest changes that make it fit:" if made.changes else "does not fit")
    lines += [f"  {c.what}  ({c.total / 2**30:.1f} GiB; cost: {c.costs})" for c in made.changes]
    return lines


def _bar(groups: dict[str, int], memory: int) -> Text:
    """A stretch for each group in its colour; the whole is the device's memory, or the need where that is more."""
    whole, bar, shown = max(memory, sum(groups.values()), 1), Text(), 0
    total = 0
    for size, color in zip(groups.values(), _COLORS * 2, strict=False):
        total += size
        width = round(_WIDTH * total / whole) - shown
        bar.append("█" * width, style=color)
        shown += width
    edge = round(_WIDTH * memory / whole)
    bar.append("·" * max(0, edge - shown) + f"| {memory / 2**30:.1f} GiB")
    return bar


def show_audit(console: Console, found: Audit) -> None:
    """What a checkpoint is made of, what becomes int8, what is adapted, what is left."""
    console.print(f"[bold]{escape(found.model)}[/bold]  {found.moe_layers} MoE layers, {found.experts:,} experts")
    table = table_of("part", "tensors", "parameters", "stored", "rounding", "MiB", "LoRA")
    for part in found.parts:
        error = "" if part.rounding is None else f"{part.rounding:.1%}"
        table.add_row(
            part.name, str(part.tensors), f"{part.parameters:,}", part.stored, error, mib(part.bytes), part.adapted
        )
    table.add_row("total", "", f"{found.parameters:,}", "", "", mib(found.bytes), "")
    console.print(table)
    share = found.bytes / (4 * found.parameters)
    console.print(f"{share:.1%} of fp32 ({mib(4 * found.parameters)} MiB), {2 * share:.1%} of bf16")
    console.print(
        f"on disk: {mib(found.checkpoint_bytes)} MiB in {', '.join(found.checkpoint_dtypes)}, "
        f"{found.checkpoint_parameters:,} elements"
    )
    for part in found.parts:
        if part.source:
            kinds = ", ".join(f"{kind} ({count:,})" for kind, count in sorted(part.source.items()))
            console.print(f"  {part.name}: from {kinds}")


def table_of(title: str, *columns: str) -> Table:
    """An empty table without lines, its columns after the first to the right."""
    table = Table(title, box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def mib(size: int) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:,.1f}"
