"""To the Hub and from it: a verified artifact as one commit, private unless told; an adapter's own files only.

huggingface_hub does the transfer, through `create_commit`: its `upload_folder` may split a folder over several commits,
and its `snapshot_download` takes whatever a repository holds. Added here: verification first, only the manifest's
files, no commit on top of one that came in meanwhile, no private artifact into a public repository, one line that says
how to repeat, and a time limit. Its client has none: a server that takes a request and never answers would hold a push,
and the training run before it, for ever. Its seam for clients (`set_client_factory`) takes one with a limit.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from httpx2 import Client, HTTPError, Timeout
from huggingface_hub import CommitOperation, CommitOperationAdd, CommitOperationDelete, HfApi, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from toolkit.artifact.manifest import FILES, MANIFEST, read_manifest
from toolkit.artifact.privacy import refuse_canaries
from toolkit.artifact.verify import verify_artifact
from toolkit.artifact.write import remembered
from toolkit.checkpoint.remote import download
from toolkit.errors import HubError, RecipeError, first_line
from toolkit.steps import part

__all__ = ["PATIENCE", "check_token", "fetch_adapter", "is_remote", "push_artifact"]

PATIENCE = "ONECARD_HUB_TIMEOUT"
"""Seconds without a byte either way, 120 by default; an environment variable, for slow lines and for tests."""

_NAME = re.compile(r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


@cache
def _limit_waiting() -> None:
    """Give huggingface_hub, in this process, a client that stops waiting; once: a change closes the one in use."""
    set_client_factory(_client)


def _client() -> Client:
    client = default_client_factory()
    client.timeout = Timeout(float(os.environ.get(PATIENCE) or 120))
    return client


def check_token(token: str | None = None, *, endpoint: str | None = None) -> str:
    """The user name that `token` (or the Hub's own login) belongs to; ask before a long training, not after it.

    Raises `HubError` where there is no token, the Hub refuses it, it may only read, or the Hub cannot be reached.
    """
    with _one_line("the Hub does not accept the token", "log in with `hf auth login`; nothing has been trained yet"):
        who = HfApi(endpoint=endpoint, token=token).whoami()
    if ((who.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise HubError(f"{who['name']}'s token is read-only: create a write token, then `hf auth login`")
    return str(who["name"])


def push_artifact(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    tag: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    endpoint: str | None = None,
    rows: Iterable[str] = (),
) -> str:
    """Push an artifact to `repo_id` as one commit and return its URL; with `dry_run`, only verify and name the URL.

    `revision` is the branch (made where it is missing); `tag` names the commit once it is there. Files of an earlier
    artifact that this one lacks are deleted in the same commit; other files of the repository stay. Repeating a push
    that succeeded changes nothing.

    `rows` are answers of the training data: none of them may leave, but for what the base's own files, the recipe or
    the chat template say too. Raises `ModelError` where verification fails or a token, a local path or a row is found
    (nothing is sent then) and `HubError` for everything on the Hub's side.
    """
    folder = Path(folder)
    verify_artifact(folder, strict=True)
    refuse_canaries(folder, rows, remembered(folder))
    api = HfApi(endpoint=endpoint, token=token)
    if dry_run:
        return f"{api.endpoint}/{repo_id}"
    options = [*([] if private else ["--public"]), *(["--revision", revision] if revision else [])]
    options += [*(["--create-pr"] if create_pr else []), *(["--tag", tag] if tag else [])]
    command = shlex.join(["onecard", "push", str(folder), repo_id, *options])
    again = f"the artifact in {folder} is whole; repeat with `{command}`"
    with part("upload", drawn=False), _one_line(f"push to {repo_id} failed", again):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=None if create_pr else revision)
        if private and not info.private:
            raise HubError(f"{repo_id}: is public, and a private push was asked for: make it private or push publicly")
        there = {sibling.rfilename for sibling in info.siblings or []}
        commit = api.create_commit(
            repo_id,
            _operations(folder, there),
            commit_message=commit_message or "Upload adapter with onecard",
            revision=None if create_pr else revision,
            create_pr=create_pr,
            parent_commit=info.sha,
        )
        if tag is not None and not create_pr:
            api.create_tag(repo_id, tag=tag, revision=commit.oid, exist_ok=True)
    return str(commit.pr_url or commit.commit_url)


def _operations(folder: Path, there: set[str]) -> list[CommitOperation]:
    names = sorted({*read_manifest(folder)["files"], MANIFEST})
    stale = sorted((FILES & there) - set(names))
    adds = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
    return [*adds, *(CommitOperationDelete(path_in_repo=name) for name in stale)]


@contextmanager
def _one_line(what: str, then: str) -> Iterator[None]:
    """Turn whatever the Hub client raises into one `HubError` line."""
    _limit_waiting()
    try:
        yield
    except (HTTPError, OSError, ValueError, KeyError, RuntimeError) as error:
        # What went wrong with a large file stands behind a RuntimeError that names the file alone.
        causes = [error, *([error.__cause__] if error.__cause__ is not None else [])]
        said = [line for cause in causes for line in (getattr(cause, "server_message", None) or "").split("\n")]
        reason = " ".join(dict.fromkeys([*(first_line(cause).rstrip(".") for cause in causes), *said])).strip()
        status = next((found for cause in causes if (found := _status(cause))), 0)
        advice = "" if "hf auth login" in then else _ADVICE.get(status, "")
        raise HubError(f"{what}: {reason[:300]}; {advice}{then}") from None


_ADVICE = {
    401: "set hub.hub_token, or log in with `hf auth login`; ",
    403: "use a token that may write to this repository; ",
    409: "someone else is pushing there: check the repository first; ",
    412: "someone else committed meanwhile: check the repository first; ",
    429: "wait a few minutes; ",
}


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def is_remote(name: str) -> bool:
    """Whether this is `hf://owner/name[@revision]`, or `owner/name` where no such folder is here."""
    return name.startswith("hf://") or (
        _NAME.fullmatch(name) is not None and name[0] not in "./~" and not Path(name).exists()
    )


def fetch_adapter(name: str) -> Path:
    """The folder of an adapter, downloaded to the Hub's cache where it is a Hub name.

    Raises:
        RecipeError: not a name. HubError: not there, no access, or no connection.
    """
    if not is_remote(name):
        return Path(name)
    match = _NAME.fullmatch(name)
    if match is None:
        raise RecipeError(f"{name}: not an adapter on the Hub; write hf://owner/name or hf://owner/name@revision")
    _limit_waiting()
    try:
        wanted = sorted({*FILES, MANIFEST})
        return download(match["repo"], wanted, revision=match["revision"])
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(
            f"{name}: cannot be downloaded: {first_line(error)}; check the name, or log in with `hf auth login`"
        ) from None
