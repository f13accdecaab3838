"""Tables and lines on the terminal: the plan, the data, coverage, and a finished run's summary."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from toolkit.data import Batches, DataReport
from toolkit.flow import Trained
from toolkit.packaging import VerifyReport, stack_versions
from toolkit.plan import Audit, Plan, device_memory
from toolkit.quant.calibrate import Compensation

__all__ = [
    "audit",
    "checks",
    "comparison",
    "compensation",
    "data",
    "facts",
    "machine",
    "plan",
    "reached",
    "summarize",
    "summary",
]

_WORST_SHOWN = 3


def plan(console: Console, made: Plan) -> None:
    """What will be loaded where, and its bytes."""
    layers = made.architecture.layers
    experts = sum(layer.num_experts for layer in layers)
    console.print(f"[bold]plan[/bold]  {len(layers)} MoE layers, {experts} experts, on {made.device} in {made.dtype}")
    table = _table("in memory", "MiB")
    for name, size in vars(made.bytes).items():
        table.add_row(name, _mib(size))
    table.add_row("total, activations on top", f"{_mib(made.bytes.total)} of {_mib(made.memory)}")
    console.print(table)


def audit(console: Console, found: Audit) -> None:
    """What a checkpoint is made of, what becomes int8, what is adapted, what is left."""
    console.print(f"[bold]{found.model}[/bold]  {found.moe_layers} MoE layers, {found.experts:,} experts")
    table = _table("part", "tensors", "parameters", "stored", "MiB", "LoRA")
    for part in found.parts:
        table.add_row(part.name, str(part.tensors), f"{part.parameters:,}", part.stored, _mib(part.bytes), part.adapted)
    table.add_row("total", "", f"{found.parameters:,}", "", _mib(found.bytes), "")
    console.print(table)
    share = found.bytes / (4 * found.parameters)
    console.print(f"{share:.1%} of fp32 ({_mib(4 * found.parameters)} MiB), {2 * share:.1%} of bf16")
    console.print(
        f"on disk: {_mib(found.checkpoint_bytes)} MiB in {', '.join(found.checkpoint_dtypes)}, "
        f"{found.checkpoint_parameters:,} elements"
    )


def data(console: Console, report: DataReport) -> None:
    """One line a split, and what deserves a look."""
    for name, split in report.splits.items():
        dropped = ", ".join(f"{count} {reason}" for reason, count in split.drops.items()) or "none"
        console.print(
            f"[bold]data[/bold]  {name}: {split.kept} of {split.rows} examples, {split.tokens} tokens, "
            f"{split.trained_tokens} trained; dropped: {dropped}"
        )
    if report.overlap:
        console.print(f"[yellow]note[/yellow]  {report.overlap} held-out prompts are also training prompts")
    for notice, count in report.notices.items():
        console.print(f"[yellow]note[/yellow]  {notice}: {count}")


def compensation(console: Console, found: Compensation) -> None:
    """Output errors before and after error compensation by layer, and the experts with the largest, worst first."""
    console.print(
        f"[bold]compensated[/bold]  {len(found.parts)} parts on {found.examples} examples, {found.tokens} tokens; mean "
        f"output error {found.rounded:.3%} rounded, {found.compensated:.3%} compensated"
    )
    table = _table("output error", "linears", "after", "experts", "after", "experts without rows")
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


def reached(console: Console, counts: Mapping[str, Any]) -> None:
    """Coverage, N of N."""
    console.print("[bold]coverage[/bold]  " + ", ".join(f"{name} {_of(value)}" for name, value in counts.items()))


def summarize(
    result: Trained, made: Plan, batches: Batches, artifact: Path, compensated: Compensation | None = None
) -> dict[str, Any]:
    """The finished run as JSON: all that `summary` shows."""
    compared = result.comparison
    answers = zip(batches.held_out, compared.base.answers, compared.adapted.answers, strict=False) if compared else ()
    samples = [
        {"prompt": question.prompt_text, "wanted": question.answer, "base": base, "adapted": adapted}
        for question, base, adapted in answers
    ]
    return {
        "artifact": str(artifact),
        "counts": result.counts,
        "results": result.results(),
        "training": vars(result.training),
        "planned_bytes": made.bytes.total,
        "compensation": compensated.to_dict() if compensated else None,
        "data": batches.report.to_dict(),
        "samples": samples[: made.recipe.eval.num_samples],
    }


def summary(console: Console, finished: Mapping[str, Any]) -> None:
    """Coverage, base against adapted, sample answers, where the adapter lies, and what to type next."""
    reached(console, finished["counts"])
    if compensated := finished.get("compensation"):
        console.print(
            f"[bold]compensated[/bold]  mean output error {compensated['rounded']:.3%} rounded, "
            f"{compensated['compensated']:.3%} compensated"
        )
    training = finished["training"]
    console.print(
        f"[bold]trained[/bold]  {training['steps']} steps, {training['tokens']} tokens in {training['seconds']:.0f} s, "
        f"peak {_mib(training['peak_memory'])} MiB (planned {_mib(finished['planned_bytes'])} before activations)"
    )
    if "base" in finished["results"]:
        comparison(console, finished["results"])
    if mtp := finished["results"].get("mtp"):
        drafting(console, mtp)
    for sample in finished["samples"]:
        console.print(_line(sample["prompt"]), style="dim", markup=False)
        wanted, base, adapted = (_line(sample[who]) for who in ("wanted", "base", "adapted"))
        console.print(f"  wanted {wanted!r}, base {base!r}, adapted {adapted!r}", markup=False)
    artifact = finished["artifact"]
    run = str(Path(artifact).parent)
    console.print(f"[bold]adapter[/bold]  {artifact}")
    console.print("[bold]next[/bold]")
    name = "onecard" if shutil.which("onecard") else os.path.relpath(sys.argv[0])
    for command in (f"verify {artifact}", f"chat {run}", f"eval {run}", f"push {artifact} OWNER/NAME"):
        console.print(f"  {name} {command}", markup=False)


def comparison(console: Console, results: Mapping[str, Any]) -> None:
    """Base against adapted on held-out examples."""
    table = _table(f"{results['examples']} held-out examples", "base", "adapted")
    table.add_row("loss", *(f"{results[who]['loss']:.4f}" for who in ("base", "adapted")))
    if results["base"]["exact_match"] is not None:
        table.add_row("exact match", *(f"{results[who]['exact_match']:.1%}" for who in ("base", "adapted")))
    console.print(table)


def drafting(console: Console, figures: Mapping[str, Any]) -> None:
    """Drafts of a multi-token-prediction head: as the base had it, left as it was, trained."""
    measured = {name: found for name in ("base", "stale", "trained") if (found := figures.get(name))}
    if not measured:
        return
    table = _table("drafts on held-out prompts", *measured)
    table.add_row("tokens a pass", *(f"{found['tau']:.2f}" for found in measured.values()))
    for place in next(iter(measured.values()))["acceptance"]:
        table.add_row(f"draft {place} accepted", *(f"{f['acceptance'].get(place, 0):.1%}" for f in measured.values()))
    for name, key in (("tokens a second", "tokens_per_second"), ("without drafts", "plain_tokens_per_second")):
        table.add_row(name, *(f"{found[key]:.1f}" for found in measured.values()))
    console.print(table)


def checks(console: Console, report: VerifyReport) -> None:
    """What `verify` found."""
    for check in report.checks:
        console.print(f"{'ok    ' if check.ok else 'FAILED'}  {check.name}: {check.detail}", markup=False)
    console.print(f"{report.tensors} tensors, {report.moved} of {report.adapters} adapters moved")


def machine() -> dict[str, Any]:
    """What this machine has: card, memory and disk in bytes, versions."""
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "cards": [
            {"name": card.name, "memory": card.total_memory, "sm": f"{card.major}{card.minor}"} for card in cards
        ],
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory": device_memory("cpu"),
        "disk_free": shutil.disk_usage(".").free,
        "versions": stack_versions(),
    }


def facts(console: Console, found: Mapping[str, Any]) -> None:
    """`machine`, as lines."""
    cards = [f"{card['name']} ({card['memory'] / 2**30:.0f} GiB, sm_{card['sm']})" for card in found["cards"]]
    console.print(f"card      {', '.join(cards) or 'none: training runs on the CPU, in float32'}")
    console.print(f"cores     {found['cores']}, {found['threads']} threads")
    console.print(f"memory    {found['memory'] / 2**30:.1f} GiB")
    console.print(f"disk      {found['disk_free'] / 2**30:.1f} GiB free here")
    console.print(f"python    {found['python']}; " + ", ".join(f"{k} {v}" for k, v in found["versions"].items()))


def _table(title: str, *columns: str) -> Table:
    table = Table(title, box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _mean(parts: list[Any], what: str) -> str:
    return f"{sum(getattr(part, what) for part in parts) / len(parts):.3%}" if parts else ""


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def _of(value: Any) -> str:
    return f"{value[0]} of {value[1]}" if isinstance(value, list) else f"{value:,}"


def _line(text: str, width: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
