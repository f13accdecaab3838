"""Steps whose loss or gradient is not finite: named, left out, and the run ended when they come in a row.

transformers logs such a loss as 0 and hands such a gradient to the optimizer, which never recovers from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset

from toolkit.errors import DivergedError

__all__ = ["StepGuard", "name_examples"]

_MOST_NAMED = 8
_NAMING = ("input_ids", "position_ids", "attention_mask", "asked")
"""What of a batch names its examples."""
_REWARD = "reward "


class StepGuard:
    """Watches one step after another.

    Args:
        most: steps in a row without an update that end the run.
        name: the examples of a batch, for people.
        say: prints a line.
    """

    def __init__(
        self, most: int, name: Callable[[Mapping[str, Any]], list[str]], say: Callable[[str], None] = lambda line: None
    ) -> None:
        self.most, self.name, self.say = most, name, say
        self.in_a_row = self.skipped = self.since_log = self.skipped_since_log = 0
        self._broken: list[tuple[str, Mapping[str, Any]]] = []
        self._seen: list[Mapping[str, Any]] = []
        self._unread: list[tuple[torch.Tensor, Mapping[str, Any]]] = []

    def state(self) -> dict[str, int]:
        """What a resumed run must know."""
        return {key: vars(self)[key] for key in ("in_a_row", "skipped", "since_log", "skipped_since_log")}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on with a `state`, between two steps."""
        vars(self).update(state)
        self._broken, self._seen, self._unread = [], [], []

    def see(self, inputs: Mapping[str, Any], loss: torch.Tensor) -> bool:
        """Note a batch and its loss; whether that is finite."""
        self.note(inputs, loss)
        self._read()
        return not self._broken or self._broken[-1][1] is not self._seen[-1]

    def note(self, inputs: Mapping[str, Any], loss: torch.Tensor) -> None:
        """Note a batch and its loss, which is looked at when the step ends: nobody waits for a card before."""
        batch = {key: inputs[key] for key in _NAMING if key in inputs}
        self._seen.append(batch)
        self._unread.append((loss.float(), batch))

    def refuse(self, inputs: Mapping[str, Any], why: str) -> None:
        """Note a batch that has no loss, so that its step is left out."""
        self._broken.append((why, {key: inputs[key] for key in _NAMING if key in inputs}))

    def _read(self, *more: torch.Tensor) -> list[float]:
        """Look at all losses noted, and at `more`, in one wait."""
        unread, self._unread = self._unread, []
        values = torch.stack([*(loss for loss, _ in unread), *more]).tolist() if unread or more else []
        for value, (_, batch) in zip(values, unread, strict=False):
            if not math.isfinite(value):
                self._broken.append((f"the loss is {value}", batch))
        return values[len(unread) :]

    def settle(self, step: int, norm: torch.Tensor, *, scaled: bool = False) -> bool:
        """End a step with its gradients' norm; whether the optimizer may have them.

        Args:
            norm: a number, wherever it lies.
            scaled: a loss scale is being searched, so that an infinite norm alone is nothing unusual.

        Raises:
            DivergedError: too many steps in a row were not finite.
        """
        [found] = self._read(norm.detach().float().reshape(()))
        if not self._broken and not math.isfinite(found) and not scaled:
            self._broken = [(f"the gradient's norm is {found}", batch) for batch in self._seen]
        broken, self._broken, self._seen = self._broken, [], []
        self.since_log += 1
        if not broken:
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        self.skipped += 1
        self.skipped_since_log += 1
        names = list(dict.fromkeys(name for _, batch in broken for name in self.name(batch)))
        what = f"step {step}: {broken[0][0]} on {_listed(names)}"
        if self.in_a_row >= self.most:
            advice = "lower training.learning_rate or look at these examples"
            advice = "mend the reward" if broken[0][0].startswith(_REWARD) else advice
            raise DivergedError(
                f"{what}; {self.in_a_row} steps in a row gave no finite update: {advice}; the adapter and the last "
                "checkpoint are untouched"
            )
        self.say(f"{what}; the step is skipped")
        return False

    def mean(self, loss: float, steps: int) -> float:
        """The mean loss over the steps that counted, from that over all `steps`; NaN where none did."""
        if not self.skipped:
            return loss
        return loss * steps / (steps - self.skipped) if steps > self.skipped else float("nan")

    def correct(self, logs: dict[str, Any]) -> None:
        """Take the steps left out from a logged mean; a mean over none is not logged."""
        done, left_out = self.since_log - self.skipped_since_log, self.skipped_since_log
        if left_out:
            logs["skipped_steps"] = left_out
            logs["loss"] = logs["loss"] * self.since_log / max(1, done)
            for key in ("loss", "grad_norm"):
                if not done or not torch.isfinite(torch.tensor(float(logs.get(key, 0.0)))):
                    logs.pop(key, None)
        self.since_log = self.skipped_since_log = 0


def name_examples(examples: Dataset, places: Sequence[str], batch: Mapping[str, Any]) -> list[str]:
    """Where each example of a batch came from, packed or not; found by its tokens.

    Args:
        examples: rows of `input_ids`, not packed. places: of each row, `file:line`; may be empty.
        batch: `input_ids` [B, L] with `position_ids` (packed) or `attention_mask`.
    """
    wanted = dict.fromkeys(_documents(batch))
    lengths = {len(ids) for ids in wanted}
    rows: dict[tuple[int, ...], int] = {}
    for row, ids in enumerate(examples["input_ids"]):
        if len(ids) in lengths and tuple(ids) in wanted:
            rows.setdefault(tuple(ids), row)
    return [_place(rows.get(ids), places, ids) for ids in wanted]


def _documents(batch: Mapping[str, Any]) -> Iterator[tuple[int, ...]]:
    for number, row in enumerate(batch["input_ids"]):
        if (positions := batch.get("position_ids")) is not None:
            starts = [*(positions[number] == 0).nonzero().flatten().tolist(), len(row)]
            yield from (tuple(row[a:b].tolist()) for a, b in pairwise(starts))
        else:
            mask = batch.get("attention_mask")
            yield tuple((row if mask is None else row[mask[number] != 0]).tolist())


def _place(row: int | None, places: Sequence[str], ids: tuple[int, ...]) -> str:
    if row is None:
        return f"an example of {len(ids)} tokens"
    return places[row] if row < len(places) else f"example {row + 1}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + (f", … ({len(names)} examples)" if len(names) > _MOST_NAMED else "")
