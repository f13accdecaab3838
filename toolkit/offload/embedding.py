"""The embedding table in host memory beside a card: a step looks up few of its rows, so only those cross the bus."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.errors import RecipeError

__all__ = ["HostEmbedding", "check_table", "keep_on_host"]


class HostEmbedding(nn.Embedding):
    """A frozen embedding [V, H] whose rows stay in host memory; what it gives is on the device of the model.

    `weight` is one number that looks like the whole table: PEFT, accelerate and the trainer read shapes, dtypes and
    devices off parameters. Each call waits for the card once, since it has to know the tokens.
    """

    def __init__(self, table: nn.Embedding, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = table.weight.shape[0], table.weight.shape[1], None
        placeholder = torch.zeros((), dtype=table.weight.dtype, device=device).expand(table.weight.shape)
        self.weight = nn.Parameter(placeholder, requires_grad=False)
        self._rows_VH = table.weight.detach().cpu()
        self.register_state_dict_post_hook(_with_rows)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Token ids [...] to rows [..., H]."""
        device = self.weight.device
        ids_N = input.flatten().to("cpu")
        found_NH = torch.empty(
            (len(ids_N), self.embedding_dim), dtype=self._rows_VH.dtype, pin_memory=device.type == "cuda"
        )
        torch.index_select(self._rows_VH, 0, ids_N, out=found_NH)
        return found_NH.to(device, non_blocking=True).view(*input.shape, self.embedding_dim)


def _with_rows(module: HostEmbedding, state: dict[str, Any], prefix: str, metadata: object) -> None:
    """State dicts hold the table itself."""
    state[f"{prefix}weight"] = module._rows_VH


def check_table(model: PreTrainedModel) -> None:
    """Raise `RecipeError` where the embedding is more than a table of its own. The model may be on meta."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    kind = f"placement.embedding: {type(model).__name__}"
    if type(table) is not nn.Embedding:
        raise RecipeError(f"{kind} does more than look rows up; set placement.embedding=device")
    if model.config.get_text_config().tie_word_embeddings or (head is not None and head.weight is table.weight):
        raise RecipeError(f"{kind} multiplies by the same table in its head; set placement.embedding=device")


def keep_on_host(model: PreTrainedModel, device: torch.device) -> None:
    """Take the embedding table of a frozen model off its device.

    Raises:
        RecipeError: as `check_table`.
    """
    check_table(model)
    model.set_input_embeddings(HostEmbedding(model.get_input_embeddings(), device))
