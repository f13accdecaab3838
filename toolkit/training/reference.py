"""The reference of a preference run: two log-probabilities a pair, computed once before the first step and kept.

The reference is the model as it is before the first step: the base, or the base with the adapter that training starts
from. TRL caches its own among the user's data sets, by a hash over every weight. Here the file lies in the run folder;
each pair is found by a hash of its tokens, and the checkpoints are bound to what the training pairs were given. A fork
keeps the reference of the run that it comes from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from toolkit.durable import replaced_file
from toolkit.errors import ModelError, RecipeError
from toolkit.processes import first_one_first
from toolkit.steps import advance, part
from toolkit.training.adapter_steps import Preference
from toolkit.training.checkpoint import Resume
from toolkit.training.preference import Pairs, PreferenceSteps

__all__ = ["START", "kept_logps", "take_reference"]

START = "start"
"""The fact that names the adapter which training started from, by its hash; empty for the base."""
_KEYS, _LOGPS, _DIGEST = "pairs", "logps", 16

Known = Mapping[bytes, tuple[float, float]]


def take_reference(trainer: PreferenceSteps, wanted: Preference, resume: Resume, say: Callable[[str], None]) -> None:
    """Give every pair of the trainer its reference: the kept one, or what is computed now; and bind the run to it.

    Args:
        trainer: its model is the reference as it stands.
        resume: what checkpoints are bound to. say: prints a line.

    Raises:
        ModelError: the run was trained with another reference. RecipeError: a fork's reference is lost.
    """
    with part("reference"), first_one_first():  # the others read what it has written
        parts = [pairs for pairs in (trainer.pairs, trainer.held_out_pairs) if pairs is not None]
        keys = [_keys(pairs) for pairs in parts]
        start, forked = _origin(wanted)
        facts = {**wanted.facts, START: start}
        own = _read(wanted.kept, facts)
        known = {**forked, **own}
        lacking = [[n for n, key in enumerate(each) if key not in known] for each in keys]
        if any(lacking):
            _compute(trainer, parts, keys, lacking, known, wanted, start)
        if any(key not in own for each in keys for key in each):
            _write(wanted.kept, known, facts)
        _tell(say, wanted, start, trainer.pairs.what, sum(map(len, keys)), sum(map(len, lacking)))
        for pairs, each in zip(parts, keys, strict=True):
            pairs.reference = [known[key] for key in each]
    _bind(resume, trainer.pairs)


def _origin(wanted: Preference) -> tuple[str, Known]:
    """The adapter that the reference has, by its hash, and what a forked run knew of it."""
    if wanted.forked is None:
        return wanted.facts[START], {}
    start = _facts(wanted.forked).get(START)
    if start is None:
        raise ModelError(f"{wanted.forked}: damaged; remove the fork's folder and fork again")
    return start, _read(wanted.forked, {**wanted.facts, START: start})


def _compute(
    trainer: PreferenceSteps,
    parts: Sequence[Pairs],
    keys: Sequence[Sequence[bytes]],
    lacking: Sequence[Sequence[int]],
    known: dict[bytes, tuple[float, float]],
    wanted: Preference,
    start: str,
) -> None:
    """Add to `known` what is lacking. Of a fork only the base can still be asked, with the adapter switched off.

    No batch has more tokens than a step's longest, which holds gradients besides.
    """
    if wanted.forked is not None and start:
        raise RecipeError(
            f"data.train: {sum(map(len, lacking))} {trainer.pairs.what} are new to this fork, and the run's reference "
            "was another adapter, which is not here; use the run's data, or start a new run from its adapter"
        )
    most = trainer.args.per_device_train_batch_size * int(trainer.pairs.lengths.max())
    done, total = 0, sum(map(len, lacking))
    asked: AbstractContextManager[object] = trainer.model.disable_adapter() if wanted.forked else nullcontext()
    trainer.model.eval()
    with asked:
        for pairs, names, numbers in zip(parts, keys, lacking, strict=True):
            groups = pairs.groups(numbers, most)
            together = trainer.args.gradient_accumulation_steps if trainer.layer_major else 1
            for at in range(0, len(groups), together):
                tasks = [partial(trainer.reference_of, pairs, group) for group in groups[at : at + together]]
                found = trainer.layer_major.run(tasks) if trainer.layer_major else [task() for task in tasks]
                for group, values in zip(groups[at : at + together], found, strict=True):
                    known |= {names[n]: (one, other) for n, (one, other) in zip(group, values.tolist(), strict=True)}
                    done += len(group)
                advance(done, total, trainer.pairs.what)


def _tell(say: Callable[[str], None], wanted: Preference, start: str, what: str, count: int, computed: int) -> None:
    who = "the adapter that training started from" if start else "the base"
    if wanted.forked is not None:
        say(f"reference: {who} of the run that this is a fork of, not the weights that the fork starts from")
    say(f"reference: {who}; {count} {what}, {computed} computed now, {count - computed} read from {wanted.kept.name}")


def _bind(resume: Resume, pairs: Pairs) -> None:
    """Write the reference's hash into the run's checkpoints; a resumed run must have the same."""
    found = hashlib.sha256(np.asarray(pairs.reference, dtype=np.float32).tobytes()).hexdigest()
    before = resume.checkpoint.facts.get("reference") if resume.checkpoint else None
    if resume.checkpoint and before != found:
        raise ModelError(
            f"{resume.checkpoint.path}: the reference differs (reference: {str(before)[:24]} -> {found[:24]}); undo "
            "the change, or add --fork to start a new run from its weights"
        )
    resume.facts |= {"reference": found}


def _keys(pairs: Pairs) -> list[bytes]:
    """A hash of each pair: tokens and labels of both sequences."""
    found = []
    for number in range(len(pairs)):
        digest = hashlib.blake2b(digest_size=_DIGEST)
        for side in pairs.sides:
            row = pairs.sequence(number, side)
            for name in ("input_ids", "labels"):
                digest.update(len(row[name]).to_bytes(8, "little") + np.asarray(row[name], dtype=np.int32).tobytes())
        found.append(digest.digest())
    return found


def kept_logps(path: Path, pairs: Pairs) -> list[tuple[float, float]] | None:
    """What the reference that a run keeps at `path` gave each of these pairs, or None where it does not hold all."""
    known, keys = _read(path, _facts(path)), _keys(pairs)
    return [known[key] for key in keys] if all(key in known for key in keys) else None


def _read(path: Path, facts: Mapping[str, str]) -> Known:
    """What a file holds by the pairs' hashes; nothing where it is missing, damaged, or of other facts."""
    if not path.is_file() or not facts or _facts(path) != dict(facts):
        return {}
    with safe_open(path, "pt") as file:
        keys, logps = file.get_tensor(_KEYS).numpy(), file.get_tensor(_LOGPS).tolist()
    return {key.tobytes(): (chosen, rejected) for key, (chosen, rejected) in zip(keys, logps, strict=True)}


def _facts(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def _write(path: Path, known: Known, facts: Mapping[str, str]) -> None:
    keys = np.frombuffer(b"".join(known), dtype=np.uint8).reshape(-1, _DIGEST)
    tensors = {_KEYS: torch.from_numpy(keys.copy()), _LOGPS: torch.tensor(list(known.values()), dtype=torch.float32)}
    with replaced_file(path) as temporary:
        save_file(tensors, temporary, metadata=dict(facts))
