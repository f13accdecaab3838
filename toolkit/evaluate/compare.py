"""Base against adapted on the same held-out examples: loss of the answer's tokens, and exact match of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolkit.data import HeldOut
from toolkit.evaluate.generate import answer
from toolkit.training.labelled import labelled_logits

__all__ = ["Comparison", "Measured", "compare", "held_out_loss", "measure"]


@dataclass(frozen=True)
class Measured:
    """Loss in nats per answer token, share of exact answers (None where nothing is asked), and the answers."""

    loss: float
    exact_match: float | None
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """The same examples before and after."""

    examples: int
    base: Measured
    adapted: Measured

    def to_dict(self) -> dict[str, Any]:
        """JSON-able figures, answers left out."""
        figures = {
            who: {k: v for k, v in asdict(getattr(self, who)).items() if k != "answers"} for who in ("base", "adapted")
        }
        return {"examples": self.examples, **figures}


def compare(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Dataset,
    questions: Sequence[HeldOut],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 32,
) -> Comparison:
    """Measure the base (adapter switched off) and the adapted model.

    Args:
        sequences: rows of `input_ids` and `labels`, for the loss.
        questions: prompts and answers wanted, for exact match; they may be fewer.
        max_new_tokens: longest answer.
        batch_size: prompts, or sequences, at a time.
    """
    model.eval()
    model.config.use_cache = True
    with model.disable_adapter():
        base = measure(model, tokenizer, sequences, questions, max_new_tokens=max_new_tokens, batch_size=batch_size)
    adapted = measure(model, tokenizer, sequences, questions, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return Comparison(len(questions), base, adapted)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Dataset,
    questions: Sequence[HeldOut],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> Measured:
    """Loss and exact match of the model as it stands."""
    answers = answer(
        model, tokenizer, [q.prompt_ids for q in questions], max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    exact = [_normal(got) == _normal(q.answer) for got, q in zip(answers, questions, strict=True)]
    share = sum(exact) / len(exact) if exact else None
    return Measured(held_out_loss(model, sequences, batch_size), share, tuple(answers))


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, sequences: Dataset, batch_size: int) -> float:
    """Mean loss in nats of every labelled token."""
    total, count = 0.0, 0
    order = sorted(sequences, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(row["input_ids"]) for row in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.long, device=model.device)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for index, row in enumerate(batch):
            length = len(row["input_ids"])
            ids[index, :length], labels[index, :length] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            mask[index, :length] = 1
        given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        logits, targets, _ = labelled_logits(model, given, labels)
        total += float(functional.cross_entropy(logits.float(), targets, reduction="sum"))
        count += len(targets)
    return total / max(1, count)


def _normal(text: str) -> str:
    return text.strip().casefold().rstrip(".")
