"""What the trainer leaves out of a step's work without changing what is reported."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Trainer

from toolkit.training.trainer import AdapterTrainer


def test_operations_are_those_of_transformers_and_the_parameters_are_counted_once() -> None:
    class Model(nn.Module):
        counted = 0

        def num_parameters(self, exclude_embeddings: bool) -> int:
            self.counted += 1
            return 7

    trainer = AdapterTrainer.__new__(AdapterTrainer)
    trainer.model = Model()
    for tokens in (5, 3):
        batch = {"input_ids": torch.zeros(1, tokens)}
        assert trainer.floating_point_ops(batch) == Trainer.floating_point_ops(trainer, batch) == 6 * 7 * tokens
    assert trainer.floating_point_ops({}) == 0
    assert trainer.model.counted == 3, "twice by transformers, once by ours"
