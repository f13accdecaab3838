"""Which checkpoint a run goes on from, and whether it may: a change that matters is refused with a diff.

transformers resumes under any recipe, data and base, without a word. Here a checkpoint's manifest says what it was
trained with, and everything that differs now is either refused or listed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from toolkit import __version__
from toolkit.errors import ModelError
from toolkit.recipe import Change, Effect, changes
from toolkit.training.checkpoint import Checkpoint, Resume, clear_leftovers, newest_checkpoint

__all__ = ["bind", "data_sha256", "find_resume", "refuse_changes", "tokenizer_sha256", "versions"]

_LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
"""A first or second number of theirs that differs may change what is learnt; a third one is listed."""

_WHAT: Mapping[str, str] = {
    "data": "the training examples are other ones",
    "base": "the base's weights are other ones",
    "config": "the base's config.json says something else",
    "compensated": "the base's compensated integers are other ones",
    "tokenizer": "the tokenizer or its chat template is another one",
    "device": "it ran elsewhere",
    "dtype": "it computed in another dtype",
    "backend": "another expert backend computed",
}
_FORK = "undo the change, or add --fork to start a new run from its weights"


def bind(resume: Resume, note: Callable[[str], None], **facts: Any) -> None:
    """Bind a run to more facts, by the keys of a manifest: `recipe` (flat), `versions`, and those of `_WHAT`.

    Raises:
        ModelError: the checkpoint was trained with something else that matters; the message has the diff.
    """
    if resume.checkpoint:
        run = resume.checkpoint.path.parents[1]
        if "recipe" in facts:
            refuse_changes(run, changes(resume.checkpoint.facts["recipe"], facts["recipe"]), note)
        _refuse_other_facts(resume.checkpoint, facts)
        _refuse_other_versions(run, resume.checkpoint.facts["versions"], facts.get("versions", {}), note)
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
        raise ModelError(f"{run}: holds the run of another recipe ({shown}); {_FORK}")
    for change in found:
        note(f"changed, and allowed: {change} ({change.effect.value})")


def _refuse_other_facts(found: Checkpoint, facts: Mapping[str, Any]) -> None:
    for key, sentence in _WHAT.items():
        if key in facts and found.facts.get(key) != facts[key]:
            shown = f"{key}: {str(found.facts.get(key))[:24]} -> {str(facts[key])[:24]}"
            before = found.facts.get("commit")
            now = facts.get("commit", before)
            moved = f"; the Hub's commit moved: {before} -> {now}" if before != now else ""
            raise ModelError(f"{found.path}: {sentence} ({shown}{moved}); {_FORK}")


def _refuse_other_versions(
    run: Path, before: Mapping[str, str], now: Mapping[str, str], note: Callable[[str], None]
) -> None:
    for name in sorted(now):
        old, new = str(before.get(name)), now[name]
        if old.split(".")[:2] != new.split(".")[:2]:
            raise ModelError(
                f"{run}: was trained with {name} {old}, here is {new}; install {name}=={old}, or add --fork to "
                "start a new run from its weights"
            )
        if old != new:
            note(f"changed, and allowed: {name} {old} -> {new}")


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
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash over vocabulary, rules, special tokens and chat template; padding and truncation are the batch's."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    whole = [kept, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()
