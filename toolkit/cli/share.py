"""Verbs that check and hand on what a run made: verify, push, export, combine."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.cli.options import Base, Json, RunPath, artifact_of, emit, next_commands, opened_as, quiet_console

if TYPE_CHECKING:
    from rich.console import Console

    from toolkit.export import Export

__all__ = ["combine", "export", "push", "verify"]


def verify(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An adapter folder.")],
    base: Annotated[str | None, typer.Option(help="Also check that it fits this base.")] = None,
    json_: Json = False,
) -> None:
    """Layout, hashes, finiteness, whether every adapter moved, and base match.

    Of an adapter that another toolkit wrote: which experts of which layers it moves, whether it is of the base, and
    what servers would drop.
    """
    from dataclasses import asdict

    from toolkit.artifact import verify_artifact
    from toolkit.artifact.manifest import ADAPTER_CONFIG, MANIFEST
    from toolkit.errors import ModelError
    from toolkit.report import terminal as show

    console = quiet_console()
    folder = artifact_of(artifact)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / MANIFEST).is_file():
        _verify_foreign(console, folder, base, json_)
        return
    report = verify_artifact(folder, base=base)
    show.checks(console, report)
    emit({**asdict(report), "ok": report.ok}, json_)
    if failed := [check for check in report.checks if not check.ok]:
        raise ModelError(f"{artifact}: {len(failed)} of {len(report.checks)} checks failed: {failed[0].detail}")
    next_commands(console, ["chat", *opened_as(artifact, base)], ["push", artifact, "OWNER/NAME"])


def _verify_foreign(console: Console, folder: Path, base: str | None, json_: bool) -> None:
    """Of an adapter without our manifest."""
    from toolkit.adapters.untrusted import read_adapter_config
    from toolkit.artifact.manifest import ADAPTER_CONFIG
    from toolkit.errors import ModelError, RecipeError
    from toolkit.export import verify_foreign
    from toolkit.report import terminal as show

    named = base or read_adapter_config(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise RecipeError(f"{folder}: does not name its base; give it with --base FOLDER, whose config.json is enough")
    report = verify_foreign(folder, named)
    show.foreign(console, report)
    emit(report.to_dict(), json_)
    if report.problem:
        raise ModelError(f"{folder}: {report.problem}")


def push(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An adapter folder or a run.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name on the Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Create the repository public.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    tag: Annotated[str | None, typer.Option(help="Tag of the new commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Verify and list the files, send nothing.")] = False,
    json_: Json = False,
) -> None:
    """Upload an artifact in one commit; the repository is private unless told."""
    from toolkit.artifact import push_artifact, training_answers
    from toolkit.errors import RecipeError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise RecipeError(f"{repo_id}: not a repository; write OWNER/NAME")
    console = quiet_console()
    folder = artifact_of(artifact)
    if dry_run:
        console.print("\n".join(sorted(path.name for path in folder.iterdir())), highlight=False, markup=False)
    rows = training_answers(folder.parent) if folder.name == "adapter" else []
    url = push_artifact(
        folder, repo_id, private=not public, revision=revision, create_pr=create_pr, tag=tag, dry_run=dry_run, rows=rows
    )
    if json_:
        emit({"url": url, "sent": not dry_run}, json_)
    else:
        print(url)
    where = f"hf://{repo_id}{f'@{revision}' if revision else ''}"
    next_commands(console, ["push", artifact, repo_id] if dry_run else ["verify", where])


def export(
    run: RunPath,
    format: Annotated[
        str,
        typer.Option(
            help="peft, per-expert, merged, merged-source, merged-int8, gguf; ready to run: gguf-merged, merged-vllm, "
            "merged-mlx."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="New folder; beside the adapter where none is given.")] = None,
    base: Base = None,
    merge_base: Annotated[
        str | None, typer.Option(help="The original of a quantised base, in 16 bit, instead of model.merge_base.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Rows to measure on what is left of the adapter; else what was held out.")
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(help="What weights are stored as: q8_0, q4_k_m, bf16 and others; fp8, int8, int4; 8bit, 4bit."),
    ] = None,
    base_gguf: Annotated[
        Path | None, typer.Option(help="A GGUF file of the base: gguf-merged keeps its metadata and tokenizer.")
    ] = None,
    llama_quantize: Annotated[
        str | None, typer.Option(help="llama.cpp's program that makes K-quants, where it is not on PATH.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also where less than 90% of its effect is left.")] = False,
    json_: Json = False,
) -> None:
    """The adapter in another program's layout, read back and compared before it is called done."""
    from toolkit.artifact import base_folder
    from toolkit.errors import RecipeError
    from toolkit.export import TAKES_QUANT, export_adapter, is_rounded_again, require_quant
    from toolkit.run.merging import merge_base_of, texts_for, texts_if_any

    console = quiet_console()
    folder = artifact_of(run)
    target = out or folder.parent / f"export-{format}"
    trained_on, is_merge = base_folder(run, base), format in ("merged", "merged-int8", *TAKES_QUANT)
    if merge_base and not is_merge:
        raise RecipeError(f"--merge-base: --format {format} does not start from the original; leave it out")
    stored: dict[str, Any] = {"quant": quant, "base_gguf": base_gguf, "llama_quantize": llama_quantize}
    require_quant(format, **stored)
    original = merge_base_of(run, base, merge_base) if is_merge else None
    is_needed = data is not None or is_rounded_again(original or trained_on, format, quant)
    wanted = format in TAKES_QUANT
    texts, labels = texts_for(run, folder, base, data) if is_needed else texts_if_any(run, folder, base, wanted=wanted)
    made = export_adapter(
        folder, trained_on, format, target, merge_base=original, texts=texts, labels=labels, force=force, **stored
    )
    _say(console, made)
    after = [made.folder if word == "{0}" else word for word in _AFTER.get(format, ())]
    next_commands(console, *([after] if after else []), ["push", run, "OWNER/NAME"])
    emit(made.to_dict(), json_)


def _say(console: Console, made: Export) -> None:
    """What was written, how near it is, what was measured of it, and who opens it."""
    from toolkit.artifact import load_adapter_config, served_rank
    from toolkit.checkpoint.unused import unused_lines
    from toolkit.export import TAKES_QUANT

    console.print(
        f"{made.folder}: {made.format}, read back and compared ({made.compared}): off by {made.difference:.3g}, "
        f"at most {made.bound:.3g}",
        markup=False,
    )
    if made.merged_into:
        console.print(f"merged into {made.merged_into['name']}, taken as {made.merged_into['as']}", markup=False)
    if made.head:
        console.print(f"multi-token-prediction head: {made.head}", highlight=False, markup=False)
    for line in unused_lines(made.kept, made.left_out):
        console.print(line, highlight=False, markup=False)
    if made.stored:
        console.print(f"stored as {', '.join(f'{count} {kind}' for kind, count in made.stored.items())}")
    if made.fell_back:
        console.print("rows of no multiple of 256, which no K-quant holds, are of another type:", highlight=False)
        console.print("".join(f"  {line}\n" for line in made.fell_back), end="", highlight=False, markup=False)
    if made.survival:
        console.print(f"as written: {made.survival}")
        console.print(str(made.survival.losses or "none of these tokens is of an answer, so there is no loss of one"))
    elif made.format in TAKES_QUANT:
        console.print("its loss was not measured: the run held no rows out; give some with --data FILE")
    for server, problems in made.servers.items():
        console.print(f"{server}, by the rules in its sources: {'not accepted' if problems else 'accepted'}")
        console.print("".join(f"  {problem}\n" for problem in problems[:5]), end="", highlight=False, markup=False)
    rank = served_rank(load_adapter_config(made.folder)) if made.format == "per-expert" else None
    for line in _USED_BY[made.format]:
        console.print(line.format(made.folder, rank, shlex.quote(made.folder)), markup=False)


_USED_BY = {
    "peft": ("PeftModel.from_pretrained(base, {0!r}) opens it",),
    "per-expert": ("vllm serve BASE --enable-lora --max-lora-rank {1} --lora-modules mine={2}",),
    "merged": ("vllm serve {2}, or AutoModelForCausalLM.from_pretrained({0!r})",),
    "merged-source": ("whatever loads the base loads {0} in its place",),
    "merged-int8": ("AutoModelForCausalLM.from_pretrained({0!r}) after `toolkit.register()`",),
    "gguf": ("llama-server -m BASE.gguf --lora {2}/adapter.gguf",),
    "merged-vllm": ("vllm serve {2}",),
    "merged-mlx": ("mlx_lm.chat --model {2}",),
    "gguf-merged": ("llama-server -m {2}/model.gguf --jinja", "ollama create NAME -f {2}/Modelfile"),
}
"""Who opens a layout, with its folder, the rank to serve, and the folder as a shell takes it."""
_AFTER = {
    "peft": ("verify", "{0}"),
    **dict.fromkeys(
        ("merged", "merged-source", "merged-int8", "gguf-merged", "merged-vllm", "merged-mlx"),
        ("plan", "{0}", "--audit"),
    ),
}


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
    console.print(
        f"{out}: rank {made.rank}, {made.adapters} pairs, off by {made.error:.3g} of the exact sum", markup=False
    )
    next_commands(console, ["verify", out], ["chat", out, "--base", "BASE"], ["push", out, "OWNER/NAME"])
    emit(made.to_dict(), json_)
