"""Verbs that check and hand on what a run made: verify, push."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.options import Json, artifact_of, emit, opened_as, quiet_console
from toolkit.report.hints import next_commands

__all__ = ["push", "verify"]


def verify(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An adapter folder.")],
    base: Annotated[str | None, typer.Option(help="Also check that it fits this base.")] = None,
    json_: Json = False,
) -> None:
    """Layout, hashes, finiteness, whether every adapter moved, and base match."""
    from dataclasses import asdict

    from toolkit.artifact import verify_artifact
    from toolkit.errors import ModelError
    from toolkit.report import terminal as show

    console = quiet_console()
    report = verify_artifact(artifact_of(artifact), base=base)
    show.checks(console, report)
    emit({**asdict(report), "ok": report.ok}, json_)
    if failed := [check for check in report.checks if not check.ok]:
        raise ModelError(f"{artifact}: {len(failed)} of {len(report.checks)} checks failed: {failed[0].detail}")
    next_commands(console, f"chat {opened_as(artifact, base)}", f"push {artifact} OWNER/NAME")


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
        console.print("\n".join(sorted(path.name for path in folder.iterdir())), highlight=False)
    rows = training_answers(folder.parent) if folder.name == "adapter" else []
    url = push_artifact(
        folder, repo_id, private=not public, revision=revision, create_pr=create_pr, tag=tag, dry_run=dry_run, rows=rows
    )
    if json_:
        emit({"url": url, "sent": not dry_run}, json_)
    else:
        print(url)
    where = f"hf://{repo_id}{f'@{revision}' if revision else ''}"
    next_commands(console, f"push {artifact} {repo_id}" if dry_run else f"verify {where}")
