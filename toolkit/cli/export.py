"""Verbs that write an adapter anew: export to another layout, combine several into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.options import Base, Json, RunPath, artifact_of, emit, quiet_console
from toolkit.report.hints import next_commands

__all__ = ["combine", "export"]


def export(
    run: RunPath,
    format: Annotated[str, typer.Option(help="peft, per-expert, merged, merged-int8 or gguf.")],
    out: Annotated[Path | None, typer.Option(help="New folder; beside the adapter where none is given.")] = None,
    base: Base = None,
    json_: Json = False,
) -> None:
    """The adapter in another program's layout, read back and compared before it is called done."""
    from toolkit.artifact import base_folder
    from toolkit.export import export_adapter

    console = quiet_console()
    folder = artifact_of(run)
    target = out or folder.parent / f"export-{format}"
    made = export_adapter(folder, base_folder(run, base), format, target)
    console.print(
        f"{made.folder}: {made.format}, read back and compared ({made.compared}): off by {made.difference:.3g}, "
        f"at most {made.bound:.3g}"
    )
    for server, problems in made.servers.items():
        console.print(f"{server}, by the rules in its sources: {'takes it' if not problems else 'does not take it'}")
        console.print("".join(f"  {problem}\n" for problem in problems[:5]), end="", highlight=False, markup=False)
    for line in _USED_BY[format]:
        console.print(line.format(made.folder), markup=False)
    next_commands(console, *(each.format(made.folder) for each in _AFTER.get(format, ())), f"push {run} OWNER/NAME")
    emit(made.to_dict(), json_)


_USED_BY = {
    "peft": ("PeftModel.from_pretrained(base, {0!r}) opens it",),
    "per-expert": ("vllm serve BASE --enable-lora --lora-modules mine={0}",),
    "merged": ("vllm serve {0}, or AutoModelForCausalLM.from_pretrained({0!r})",),
    "merged-int8": ("AutoModelForCausalLM.from_pretrained({0!r}) after `toolkit.register()`",),
    "gguf": ("llama-server -m BASE.gguf --lora {0}/adapter.gguf",),
}
"""Who opens a layout, with the folder to come."""
_AFTER = {"peft": ("verify {0}",), "merged": ("plan {0} --audit",), "merged-int8": ("plan {0} --audit",)}


def combine(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new adapter folder.")],
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER=WEIGHT...", help="Adapter folders and weights.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Reduce to this rank by SVD; its error is printed.")] = None,
    json_: Json = False,
) -> None:
    """A weighted sum of adapters of one base, exact unless a rank is given."""
    from toolkit.artifact import combine_adapters
    from toolkit.errors import RecipeError

    console = quiet_console()
    weights: dict[str, float] = {}
    for given in adapters:
        name, _, weight = given.rpartition("=")
        try:
            weights[str(artifact_of(Path(name)))] = float(weight)
        except ValueError:
            raise RecipeError(f"{given}: not ADAPTER=WEIGHT, as in runs/a=0.7") from None
    made = combine_adapters(weights, out, rank=rank)
    console.print(f"{out}: rank {made.rank}, {made.adapters} pairs, off by {made.error:.3g} of the exact sum")
    next_commands(console, f"verify {out}", f"chat {out} --base BASE", f"push {out} OWNER/NAME")
    emit(made.to_dict(), json_)
