"""A head taught by what the adapted model itself writes, once the adapter is finished.

Drafts are checked against the model's own choices, on its own text. Training data are others' text: a head that has
seen nothing else knows little of where the model goes. No library distils such heads beside LoRA.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel

from toolkit.labels import IGNORED
from toolkit.mtp.cost import MOST_STATES
from toolkit.mtp.head import Trunk, capture_hidden, every_hidden
from toolkit.mtp.loss import rows_at_once
from toolkit.mtp.training import HeadTraining

__all__ = ["OwnHidden", "learn_own_answers"]

_PASSES = 5
"""Times that each answer is gone through. On the embedded model the third depth still gains from the fifth."""

_WARM_UP = 10
"""Steps over which the learning rate rises: the text is of another kind than that of the steps before."""

_ALIKE = 64
"""Answers among which those of like length are put together."""

_CANDIDATES = 8
"""Likeliest tokens of each place that the head learns to tell apart; of a large vocabulary the rest never comes up."""

_OTHERS = 1024
"""Tokens drawn at random among them, so that the head goes on keeping those low that nobody would write."""

Row = tuple[list[int], list[int]]


def learn_own_answers(
    training: HeadTraining,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    tokens: int,
    seed: int = 0,
    source: OwnHidden | None = None,
) -> int:
    """Train the head on prompts and the model's own greedy answers; gives the number of steps.

    Args:
        tokens: in a step, padding included. seed: of the order, which is the same on every machine.
        source: the model's hidden states of these very answers, kept as they were written or read by another head.
    """
    rows = {
        number: ([*prompt, *answer], [IGNORED] * len(prompt) + list(answer))
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        if len(answer) > 1
    }
    if not rows:
        return 0
    training.model.eval()
    random = torch.Generator().manual_seed(seed)
    passes = [list(_batches(rows, tokens, random)) for _ in range(_PASSES)]
    batches = list(itertools.chain.from_iterable(passes))
    source = source or OwnHidden(training.model)
    with training.among(_words(rows, passes[0], source, training.trunk, random)):
        for done, batch in enumerate(batches):
            inputs = _padded([rows[index] for index in batch], training.base.device)
            training.learn(source.of(batch, inputs), inputs, None, kind="both" if training.kind == "kl" else "ce")
            training.step(min(1.0, (done + 1) / _WARM_UP) * (1.0 - done / len(batches)))
    return len(batches)


@torch.no_grad()
def _words(
    rows: Mapping[int, Row], batches: Sequence[Sequence[int]], source: OwnHidden, trunk: Trunk, random: torch.Generator
) -> torch.Tensor | None:
    """Tokens that the model has in mind somewhere in the answers, and some others; None where that is most of them.

    A pass over 49,152 logits, thrice a place and depth, is what a small model's head mostly does.
    """
    size = trunk.weight.shape[0]
    wanted = torch.zeros(size, dtype=torch.bool)
    wanted[torch.randperm(size, generator=random)[:_OTHERS]] = True
    for batch in batches:
        inputs = _padded([rows[index] for index in batch], trunk.weight.device)
        places = inputs["labels"][:, 1:] != IGNORED
        wanted[inputs["labels"][:, 1:][places].cpu()] = True
        for hidden in source.of(batch, inputs)[:, :-1][places].split(rows_at_once(trunk)):
            wanted[trunk.logits(hidden).topk(min(_CANDIDATES, size)).indices.flatten().cpu()] = True
    words = wanted.nonzero()[:, 0].to(trunk.weight.device)
    return words if 2 * len(words) < size else None


class OwnHidden:
    """The model's hidden states of the rows, kept in the computer's memory where they are few enough.

    What is kept comes from the writing itself, or from reading a row once. A row is a prompt and its answer, known by
    its number among them.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.kept: dict[int, torch.Tensor] = {}
        self.room = MOST_STATES

    @contextmanager
    def writing(self, prompts: Sequence[Sequence[int]]) -> Iterator[Callable[[list[int], list[list[int]], int], None]]:
        """Within the block the model answers them; what it gives is told of each batch, as `answer_ids` tells."""
        parts: list[torch.Tensor] = []

        def written(batch: list[int], answers: list[list[int]], width: int) -> None:
            hidden = torch.cat(parts, dim=1)
            parts.clear()
            for row, number, answer in zip(hidden, batch, answers, strict=True):
                states = row[width - len(prompts[number]) : width + len(answer) - 1]
                # The last token was not read. Nothing follows it that its state could guess.
                self._keep(number, torch.nn.functional.pad(states, (0, 0, 0, 1)))

        with every_hidden(self.model.get_base_model(), lambda hidden: parts.append(hidden.to("cpu", copy=True))):
            yield written

    def of(self, batch: Sequence[int], inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[B, L, H] of a batch's padded inputs; zeros where padding was not read."""
        if any(number not in self.kept for number in batch):
            read, lengths = self._read(inputs), inputs["attention_mask"].sum(1).tolist()
            for row, number, length in zip(read, batch, lengths, strict=True):
                self._keep(number, row[:length])
            return read
        rows = [self.kept[number] for number in batch]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(inputs["input_ids"].device)

    def _keep(self, number: int, hidden: torch.Tensor) -> None:
        if number not in self.kept and hidden.nbytes <= self.room:
            self.room -= hidden.nbytes
            self.kept[number] = hidden.to("cpu", copy=True)

    @torch.no_grad()
    def _read(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with capture_hidden(self.model.get_base_model()) as hidden:
            self.model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
                logits_to_keep=1,
            )
        result: torch.Tensor = hidden()
        return result


def _batches(rows: Mapping[int, Row], tokens: int, random: torch.Generator) -> Iterator[list[int]]:
    """Numbers of rows of like length together, as many as have room, in a new order each time."""
    numbers = list(rows)
    order = [numbers[place] for place in torch.randperm(len(numbers), generator=random).tolist()]
    found: list[list[int]] = []
    for start in range(0, len(order), _ALIKE):
        batch: list[int] = []
        for index in sorted(order[start : start + _ALIKE], key=lambda index: len(rows[index][0])):
            if batch and (len(batch) + 1) * len(rows[index][0]) > tokens:
                found.append(batch)
                batch = []
            batch.append(index)
        found.append(batch)
    for index in torch.randperm(len(found), generator=random).tolist():
        yield found[index]


def _padded(batch: Sequence[Row], device: torch.device) -> dict[str, torch.Tensor]:
    shape = len(batch), max(len(ids) for ids, _ in batch)
    ids, mask = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
    labels = torch.full(shape, IGNORED)
    for number, (row, targets) in enumerate(batch):
        ids[number, : len(row)], labels[number, : len(row)] = torch.tensor(row), torch.tensor(targets)
        mask[number, : len(row)] = 1
    return {"input_ids": ids.to(device), "labels": labels.to(device), "attention_mask": mask.to(device)}
