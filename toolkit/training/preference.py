"""Direct preference optimisation: TRL's `DPOTrainer` with its own losses, on pairs that come tokenised and a reference
that is known before the first step.

TRL copies the adapter to have a reference of one that was trained, or runs the model a second time in every step. Here
each pair brings the reference's two log-probabilities (`toolkit.training.reference`), so that a step costs one pass,
nothing is held twice, and streamed layers see micro-batches in any order. TRL would also tokenise text by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn
from trl import DPOConfig, DPOTrainer

from toolkit.data.storage import prompts_and_answers, sequence_lengths
from toolkit.labels import IGNORED
from toolkit.ops.label_logits import padded
from toolkit.ops.token_scores import each_token
from toolkit.training.adapter_steps import RunContext
from toolkit.training.scores import ScoredSteps

__all__ = ["Pairs", "PreferenceSteps", "PreferenceTrainer", "Scored", "dpo_config", "without_noise"]

_OF_EACH = ("rewards/", "logps/")
"""Beginnings of the figures that TRL has as means over a batch's pairs, or its good or bad answers."""
_NOISE = ("dropout", "_drop", "jitter", "noise")


class Pairs:
    """Chosen and rejected answers, and what the reference gives them.

    Args:
        table: rows of `input_ids` and `labels`; rows 2n and 2n+1 are the chosen and the rejected answer of pair n.
    """

    what = "pairs"
    """What messages call them."""

    def __init__(self, table: Dataset) -> None:
        self.table = table
        self.rows = table.with_format("numpy")
        self.sides: tuple[int, ...] = (0, 1)
        """Which sequences of a pair there are."""
        self.reference: Sequence[tuple[float, float]] = ()
        """Of each pair: log-probabilities in nats of the chosen and of the rejected answer."""

    def __len__(self) -> int:
        return len(self.table) // 2

    def sequence(self, number: int, side: int) -> Mapping[str, Any]:
        """`input_ids` and `labels` of a pair's chosen (0) or rejected (1) answer."""
        row: Mapping[str, Any] = self.rows[2 * number + side]
        return row

    def numbers(self, *, held_out: bool) -> Dataset:
        """The rows that the trainer draws from: each is a pair's number, which the collator looks up."""
        return Dataset.from_dict({"pair": list(range(len(self))), "held_out": [held_out] * len(self)})

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each pair's longer side, prompt included (pairs,)."""
        found: NDArray[np.int64] = sequence_lengths(self.table).reshape(-1, 2).max(1)
        return found

    def longest(self, count: int, share: int = 1) -> list[int]:
        """Numbers of the `count` pairs that take most tokens: each answer padded to the longer, or `share` of them
        behind one prompt."""
        widths = self.lengths if share == 1 else sum(prompts_and_answers(self.table))
        found: list[int] = np.argsort(-widths, kind="stable")[:count].tolist()
        return found

    def groups(self, numbers: Sequence[int], tokens: int) -> list[list[int]]:
        """These pairs in batches of about equal length, long ones first.

        A batch's pairs times its longest side are at most `tokens`; a pair that is longer stands alone.
        """
        found: list[list[int]] = []
        for number in sorted(numbers, key=lambda number: -int(self.lengths[number])):
            if found and (len(found[-1]) + 1) * self.lengths[found[-1][0]] <= tokens:
                found[-1].append(number)
            else:
                found.append([number])
        return found


class _Collator:
    """Pairs to TRL's preference batch: all chosen answers, then all rejected ones, padded on the right."""

    def __init__(self, train: Pairs, held_out: Pairs | None, pad_token_id: int) -> None:
        self.train, self.held_out, self.pad_token_id = train, held_out, pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        found = [(self.held_out if row["held_out"] else self.train, row["pair"]) for row in rows]
        sequences = [pairs.sequence(number, side) for side in (0, 1) for pairs, number in found if pairs is not None]
        ids, mask, labels = padded(sequences, self.pad_token_id)
        batch = {"input_ids": ids, "attention_mask": mask, "completion_mask": (labels != IGNORED).long()}
        if all(pairs is not None and pairs.reference for pairs, _ in found):
            known = torch.tensor([pairs.reference[number] for pairs, number in found if pairs is not None])
            batch |= {"ref_chosen_logps": known[:, 0].clone(), "ref_rejected_logps": known[:, 1].clone()}
        return batch


class _Unasked(nn.Module):
    """Stands where TRL wants a reference model, so that it copies no adapter. Every pair's reference is known."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self) -> None:
        """Never computed."""
        raise AssertionError("the reference is known before the first step")


class PreferenceSteps(ScoredSteps):
    """What every method has that learns from preferences; put before a trainer of TRL's, whose loss it is.

    Scores come from the model's own logits on a CPU, and from TRL's fused head on a card where it computes the same.
    """

    needs_reference = True
    """Whether the reference must be set in the pairs before a step is taken or an evaluation made."""
    collator: type = _Collator
    """Made of the training pairs, the held-out ones and the padding token."""
    pairs: Pairs
    held_out_pairs: Pairs | None

    def __init__(self, context: RunContext, *, train: Pairs, held_out: Pairs | None, **trl: Any) -> None:
        """`trl`: what TRL's trainer takes beside the data."""
        self.pairs, self.held_out_pairs = train, held_out
        without_noise(trl["model"])
        super().__init__(
            context,
            **trl,
            ref_model=_Unasked(trl["model"].config),
            data_collator=self.collator(train, held_out, _pad_token_of(trl["processing_class"])),
            train_dataset=train.numbers(held_out=False),
            eval_dataset=held_out.numbers(held_out=True) if held_out else None,
        )
        self.precompute_ref_logps = True

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        """Rows come tokenised."""
        return dataset

    def _longest_batch(self) -> dict[str, Any]:
        longest = self.pairs.longest(self.args.per_device_train_batch_size, self.share)
        return self.data_collator([{"pair": number, "held_out": False} for number in longest])

    def _head_probe(self) -> tuple[torch.Tensor, torch.Tensor]:
        row = self.pairs.sequence(0, 0)
        return torch.as_tensor(row["input_ids"]), torch.as_tensor(row["labels"])

    @torch.no_grad()
    def reference_of(self, pairs: Pairs, numbers: Sequence[int]) -> torch.Tensor:
        """What the model as it stands gives both sequences of some pairs, in nats: chosen and rejected [pairs, 2]."""
        held_out = pairs is not self.pairs
        batch = self.data_collator([{"pair": number, "held_out": held_out} for number in numbers])
        inputs = self._prepare_inputs(batch)
        found = self.compute_ref_log_probs(Scored(self, self.model), inputs)
        one, other = (torch.zeros(len(numbers)) if logps is None else logps.float().cpu() for logps in found)
        return torch.stack([one, other], dim=1)

    def _own_loss(self, model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor | None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        before = {name: len(values) for name, values in metrics.items()}
        loss = self._loss_of_answers(model, inputs)
        for name, values in metrics.items():
            if not self.model.training and name.startswith(_OF_EACH):  # a mean of all, however they fall into batches
                values += values[before.get(name, 0) :] * (self._count(inputs, name) - 1)
        return loss

    def _count(self, inputs: Mapping[str, Any], figure: str) -> int:
        """Of how many pairs or answers of a batch TRL's figure is the mean."""
        raise NotImplementedError

    def _loss_of_answers(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss, which logs its figures."""
        raise NotImplementedError


def _pad_token_of(tokenizer: Any) -> int:
    """What sequences are padded with; it is never read."""
    pad: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return pad


class PreferenceTrainer(PreferenceSteps, DPOTrainer):  # type: ignore[misc]
    """TRL's preference losses of pairs."""

    def _count(self, inputs: Mapping[str, Any], figure: str) -> int:
        return len(inputs["input_ids"]) // 2

    def may_share(self) -> int:
        """As there."""
        return 2

    def longest_to_share(self) -> tuple[int, list[list[int]]]:
        """As there."""
        sizes, _ = prompts_and_answers(self.pairs.table)
        prompts = [self.pairs.sequence(number, 0)["input_ids"][: sizes[number]] for number in (0, len(sizes) - 1)]
        return int(self.pairs.lengths.max()), [list(map(int, prompt)) for prompt in prompts]

    def scores(self, model: nn.Module, inputs: dict[str, Any], labels: torch.Tensor, *, balanced: bool) -> Any:
        """As there; a pair's answers are put beside each other while their prompt is shared."""
        if self.share == 1:
            return super().scores(model, inputs, labels, balanced=balanced)
        order = torch.arange(len(labels), device=labels.device).view(2, -1).T.flatten()
        paired = {name: value[order] for name, value in inputs.items()}
        found, back = super().scores(model, paired, labels[order], balanced=balanced), order.argsort()
        return each_token(found, lambda values: values[back])

    def _loss_of_answers(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        loss: torch.Tensor = DPOTrainer.compute_loss(self, Scored(self, model), inputs)
        return loss


class Scored:
    """A model to TRL's loss: called like one with a fused head, it gives the trainer's own scores."""

    def __init__(self, trainer: PreferenceSteps, model: nn.Module) -> None:
        self.trainer, self.model = trainer, model

    def __call__(self, **given: Any) -> Any:
        """The scores of the labels given."""
        balanced = given.pop("output_router_logits", False)
        inputs = {key: given[key] for key in given.keys() - {"labels", "fused_lm_head", "use_cache"}}
        return self.trainer.scores(self.model, inputs, given["labels"], balanced=balanced)


def without_noise(model: nn.Module) -> None:
    """Switch dropout and the routers' noise off: policy and reference would draw theirs apart, which is no preference.

    TRL's `disable_dropout` knows `nn.Dropout`; many families keep a rate as a plain number of a module or the config.
    """
    for module in (*model.modules(), model.config.get_text_config()):  # type: ignore[operator,union-attr]
        for name, rate in vars(module).items():
            if isinstance(rate, float) and rate and any(word in name for word in _NOISE):
                setattr(module, name, 0.0)


def dpo_config(context: RunContext, common: Mapping[str, Any]) -> DPOConfig:
    """TRL's configuration; `common` are the arguments that every method has. Another loss's options are not DPO's."""
    assert context.preference is not None
    return DPOConfig(
        **common,
        **(context.preference.options if context.preference.method == "dpo" else {}),
        max_length=None,
        remove_unused_columns=False,
        precompute_ref_log_probs=False,
    )
