"""A run's folder: one owner, what it must not hold, and going on with the run in it, or starting another from it.

flock alone tells a second run only that somebody is there. It also lives on in worker processes that outlast a killed
parent for some seconds, so a lock whose named process is gone counts as left behind and is replaced. transformers
resumes under any recipe, data and base, without a word. Here a checkpoint's manifest says what it was trained with, and
everything that differs now is either refused with a diff or listed. `--fork` starts a new run from the weights of one
whose recipe has changed too much; optimizer, schedule and place in the data stay behind.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from toolkit import __version__
from toolkit.data.storage import are_pairs, desirable
from toolkit.durable import staged_folder, write_text
from toolkit.errors import ModelError, OnecardError, RecipeError, ResourceError
from toolkit.recipe import Change, Effect, Recipe, changes, dump, flat, parse
from toolkit.run_folder import RunFolder
from toolkit.training.checkpoint import Checkpoint, Resume, clear_leftovers, every_checkpoint, newest_checkpoint

__all__ = [
    "LOCK",
    "bind",
    "check_folder_is_ours",
    "check_writable",
    "copy_start",
    "data_sha256",
    "find_resume",
    "fork_recipe",
    "open_run",
    "owned",
    "refuse_changes",
    "require_disk",
    "tokenizer_sha256",
    "versions",
    "with_decided",
]

LOCK = ".lock"
_MOST_TRIES = 20

_FIRST = {LOCK, ".recipe.yaml.tmp"}
"""What lies in a run folder before its recipe does; a kill may leave it there."""

_LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
"""A first or second number of theirs that differs may change what is learnt: it must be allowed. A third is listed."""

_WHAT: Mapping[str, str] = {
    "data": "the training examples differ",
    "base": "the base's weights differ",
    "config": "the base's config.json differs",
    "compensated": "the base's compensated integers differ",
    "stacks": "the layers in int8 differ",
    "rewards": "the rewards' files or the columns that they see differ",
    "start": "the adapter that training started from, its reference, differs",
    "tokenizer": "the tokenizer or its chat template differs",
    "device": "the device differs",
    "dtype": "the dtype differs",
    "backend": "the expert backend differs",
}
_FORK = "undo the change, or add --fork to start a new run from its weights"

_ADAPTER = ("adapter_model.safetensors", "adapter_config.json")


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold the run folder, which is made where it is missing.

    Raises:
        ResourceError: another process holds it, named by its PID; or the folder cannot be written.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(folder, path)
    except OSError as error:
        raise ResourceError(
            f"training.output_dir: {folder} cannot be written ({error.strerror}); give another"
        ) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(folder: Path, path: Path) -> int:
    for _ in range(_MOST_TRIES):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
            os.close(descriptor)
            if not _is_gone(owner):
                raise ResourceError(
                    f"{folder}: process {owner or 'of another onecard'} is training in it; wait for it, or give "
                    "another training.output_dir"
                ) from None
            path.unlink(missing_ok=True)  # held by a worker that outlived it
            continue
        if _is_same(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)  # somebody removed it between our two calls
    raise ResourceError(f"{folder}: its lock keeps changing hands; give another training.output_dir")


def _is_gone(owner: str) -> bool:
    """Whether the lock names a process of this machine that no longer runs."""
    pid, _, host = owner.partition(" on ")
    if not pid.isdigit() or host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def check_writable(path: Path) -> None:
    """Raise `ResourceError` unless a run folder can be made or written at `path`. Leaves nothing behind."""
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ResourceError(f"training.output_dir: {parent} is a file; give a folder")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ResourceError(
            f"training.output_dir: {parent} cannot be written ({error.strerror}); give another"
        ) from None


def require_disk(path: Path, needed: int) -> None:
    """Raise `ResourceError` unless `needed` bytes more than what the run holds already fit on its disk."""
    there = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0
    parent = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed - there > free:
        raise ResourceError(
            f"training.output_dir: {parent} has {free / 1e9:.2f} GB free, the run writes {(needed - there) / 1e9:.2f} "
            "GB; free space, lower training.save_total_limit or lora.r, or give a folder on another disk"
        )


def check_folder_is_ours(path: Path) -> None:
    """Raise `RecipeError` where the folder holds something that is no run."""
    run = RunFolder(path)
    if not run.recipe.is_file() and path.is_dir() and any(each.name not in _FIRST for each in path.iterdir()):
        raise RecipeError(f"training.output_dir: {path} is not empty and not a run; give another folder")


def open_run(path: Path, recipe: Recipe, note: Callable[[str], None] = lambda line: None) -> RunFolder:
    """Create the run folder, or go on with the run in it; what changed and is allowed is noted.

    A finished run whose end is moved is no longer finished.

    Raises:
        RecipeError: the folder holds something that is not a run.
        ModelError: it holds the run of a recipe that differs in something that matters.
        ResourceError: it cannot be written.
    """
    run = RunFolder(path)
    check_folder_is_ours(path)
    found = changes(flat(_read_recipe(run.recipe)), flat(recipe)) if run.recipe.is_file() else []
    try:
        if _has_started(run):
            refuse_changes(path, found, note)
            if any(change.effect is Effect.LENGTH for change in found):
                run.summary.unlink(missing_ok=True)
        elif found:  # integers compensated on another recipe's examples
            run.compensated.unlink(missing_ok=True)
        path.mkdir(parents=True, exist_ok=True)
        write_text(run.recipe, dump(recipe))
        run.checkpoints.mkdir(exist_ok=True)
    except OSError as error:
        raise ResourceError(f"training.output_dir: {path} cannot be written ({error.strerror})") from None
    return run


def with_decided(recipe: Recipe) -> Recipe:
    """The recipe with what its run has decided for `auto` when it began: other memory may be free today."""
    run = RunFolder(Path(recipe.training.output_dir))
    if not (run.recipe.is_file() and _has_started(run)):
        return recipe
    before = _read_recipe(run.recipe)
    if recipe.lora.r == "auto":
        recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"r": before.lora.r})})
    if recipe.training.max_length == "auto":
        length = {"max_length": before.training.max_length}
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update=length)})
    return recipe


def _has_started(run: RunFolder) -> bool:
    return run.adapter.exists() or any(every_checkpoint(run.checkpoints))


def _read_recipe(path: Path) -> Recipe:
    """The recipe of a run folder. Raises `ModelError` where it is damaged."""
    try:
        return parse(path.read_text(encoding="utf-8"), str(path), note=lambda line: None)
    except (OnecardError, OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: damaged or of another version ({error}); move the run folder away") from None


def bind(resume: Resume, note: Callable[[str], None], *, other_versions: bool = False, **facts: Any) -> None:
    """Bind a run to more facts, by the keys of a manifest: `recipe` (flat), `versions`, and those of `_WHAT`.

    `other_versions`: whatever versions it began with, it goes on under those of `facts`.

    Raises:
        ModelError: the checkpoint was trained with something else that matters; the message has the diff.
    """
    if resume.checkpoint:
        run = resume.checkpoint.path.parents[1]
        if "recipe" in facts:
            refuse_changes(run, changes(resume.checkpoint.facts["recipe"], facts["recipe"]), note)
        _refuse_other_facts(resume.checkpoint, facts)
        changed = _changed_versions(resume.checkpoint.facts["versions"], facts.get("versions", {}))
        if not other_versions:
            _refuse_other_versions(run, changed)
        for name, (old, new) in changed.items():
            note(f"allowed change: {name} {old} -> {new}")
    resume.facts |= facts


def find_resume(folder: Path, note: Callable[[str], None]) -> Resume:
    """The newest valid checkpoint in `folder`, a run's checkpoints; what is skipped is noted with the reason."""
    clear_leftovers(folder)
    return Resume({}, newest_checkpoint(folder, lambda reason: note(f"checkpoint skipped: {reason}")))


def refuse_changes(run: Path, found: list[Change], note: Callable[[str], None]) -> None:
    """List harmless changes of a recipe.

    Raises:
        ModelError: one of them changes what is learnt; the message has the diff.
    """
    if binding := [change for change in found if change.effect is Effect.BINDS]:
        shown = "; ".join(map(str, binding[:5])) + ("; …" if len(binding) > 5 else "")
        raise ModelError(f"{run}: was started from another recipe ({shown}); {_FORK}")
    for change in found:
        note(f"allowed change: {change} ({change.effect.value})")


def _refuse_other_facts(found: Checkpoint, facts: Mapping[str, Any]) -> None:
    for key, sentence in _WHAT.items():
        if key in facts and found.facts.get(key) != facts[key]:
            shown = f"{key}: {str(found.facts.get(key))[:24]} -> {str(facts[key])[:24]}"
            shown += _rows_told(found.facts, facts) if key == "data" else ""
            before = found.facts.get("commit")
            now = facts.get("commit", before)
            moved = f"; the Hub's commit moved: {before} -> {now}" if before != now else ""
            raise ModelError(f"{found.path}: {sentence} ({shown}{moved}); {_FORK}")


def _rows_told(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How many examples there were and are; checkpoints of older versions do not say."""
    old, new = before.get("examples"), now.get("examples")
    if not isinstance(old, int) or not isinstance(new, int):
        return ""
    change = f"{new - old} more" if new > old else f"{old - new} fewer" if new < old else "as many, but others"
    return f"; examples: {old} -> {new}, {change}"


def _changed_versions(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Name to the version there was and the one there is, of what is not the same."""
    both = {name: (str(before.get(name)), now[name]) for name in sorted(now)}
    return {name: (old, new) for name, (old, new) in both.items() if old != new}


def _refuse_other_versions(run: Path, changed: Mapping[str, tuple[str, str]]) -> None:
    """Raise `ModelError` where one of them differs in its first or second number."""
    apart = {name: pair for name, pair in changed.items() if len({tuple(v.split(".")[:2]) for v in pair}) > 1}
    if apart:
        old, new = (", ".join(f"{name} {pair[which]}" for name, pair in apart.items()) for which in (0, 1))
        raise ModelError(
            f"{run}: was trained with {old}, found {new}; install what it was trained with, or add --other-versions to "
            "go on with what is here, or --fork to start a new run from its weights"
        )


def versions() -> dict[str, str]:
    """Versions of everything whose numbers the run depends on."""
    found = {"onecard": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return found


def data_sha256(examples: Dataset) -> str:
    """A hash over tokens and labels of every example in order, however they are stored."""
    table, digest = examples.with_format("arrow")[:], hashlib.sha256()
    for name in ("input_ids", "labels"):
        values, lengths = hashlib.sha256(), hashlib.sha256()
        for chunk in table.column(name).chunks:
            values.update(np.ascontiguousarray(chunk.flatten().to_numpy(zero_copy_only=False).astype(np.int32)).data)
            lengths.update(np.ascontiguousarray(chunk.value_lengths().to_numpy(zero_copy_only=False)).data)
        digest.update(values.digest() + lengths.digest())
    if not are_pairs(examples):
        digest.update(desirable(examples).tobytes())
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash over vocabulary, rules, special tokens and chat template; padding and truncation are the batch's."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    whole = [kept, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


def fork_recipe(recipe: Recipe) -> Recipe:
    """The recipe of a fork: in a folder beside the run, from its weights. The same recipe gives the same fork again.

    Raises:
        RecipeError: there is no run to fork, or the recipe changes the adapter itself.
    """
    run = RunFolder(Path(recipe.training.output_dir))
    if not run.recipe.is_file():
        raise RecipeError(f"{run.path}: no run to fork; omit --fork")
    other = [c for c in changes(flat(_read_recipe(run.recipe)), flat(recipe)) if c.field.startswith("lora.")]
    if other:
        raise RecipeError(f"{other[0]}: a fork keeps the run's adapter as it is; undo that or start a new run")
    number = 1
    while True:
        name = f"{run.path.name}-fork" + (f"-{number}" if number > 1 else "")
        fork = _started_from(recipe, run.path.with_name(name))
        folder = RunFolder(Path(fork.training.output_dir))
        if not folder.path.exists() or (folder.recipe.is_file() and _is_same_recipe(_read_recipe(folder.recipe), fork)):
            return fork
        number += 1


def copy_start(run: RunFolder, source: RunFolder) -> None:
    """Copy newest weights and reference of `source` to where the fork `run` starts from, unless they are there.

    Raises:
        RecipeError: the source has none.
    """
    if run.start.exists():
        return
    checkpoint = newest_checkpoint(source.checkpoints)
    weights = checkpoint.path if checkpoint else source.adapter
    if not all((weights / name).is_file() for name in _ADAPTER):
        raise RecipeError(f"{source.path}: has no weights to fork; omit --fork and give another output_dir")
    with staged_folder(run.start) as staging:
        for name in _ADAPTER:
            shutil.copyfile(weights / name, staging / name)
        if source.reference.is_file():
            shutil.copyfile(source.reference, staging / source.reference.name)


def _started_from(recipe: Recipe, folder: Path) -> Recipe:
    start = str(RunFolder(folder).start.absolute())
    return recipe.model_copy(
        update={
            "lora": recipe.lora.model_copy(update={"adapter_name_or_path": start}),
            "training": recipe.training.model_copy(update={"output_dir": str(folder)}),
        }
    )


def _is_same_recipe(one: Recipe, other: Recipe) -> bool:
    return all(change.effect is not Effect.BINDS for change in changes(flat(one), flat(other)))
