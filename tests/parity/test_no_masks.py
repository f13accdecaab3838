"""On a card no mask is built for packed documents where it is known what each layer's is; a kernel stands in here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.test_packing import documents, packed_batch, varlen_of_torch
from toolkit.adapters import attach_lora
from toolkit.ops import document_attention
from toolkit.ops.document_attention import NoMasks, per_document_attention
from toolkit.quant import load_int8


def test_no_mask_is_built_where_each_layers_is_known(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before as long a document was looked at, in this mode of the layers; and the logits are the same."""
    masked: list[bool] = []
    window = document_attention._window

    def look(known: Any, module: Any, mask: Any, *rest: Any) -> int | None:
        masked.append(mask is not None)
        return window(known, module, mask, *rest)

    adapted = attach_lora(load_int8(str(checkpoint))[0], r=3)
    monkeypatch.setattr(document_attention, "_window", look)
    monkeypatch.setattr(document_attention, "varlen_attn", varlen_of_torch)
    monkeypatch.setattr(document_attention, "_takes_one_by_one", lambda query: False)
    monkeypatch.setattr(document_attention, "can_attend_together", lambda *args: True)
    batch = packed_batch(adapted, documents(6), tmp_path)
    inputs = {key: value for key, value in batch.items() if key != "labels"}

    @torch.no_grad()
    def logits() -> torch.Tensor:
        masked.clear()
        return adapted(**inputs, use_cache=False).logits

    with per_document_attention(adapted.eval()) as can:
        if not can:
            return
        bare = NoMasks(adapted)
        assert not bare.is_on, "on a CPU"
        bare.is_on = True
        with bare:
            first = logits()
            assert all(masked)
            assert torch.equal(logits(), first)
            assert not any(masked)
            adapted.train()
            assert torch.equal(logits(), first)
            assert all(masked), "dropout may be on in training, and the mask is needed with it"
            logits()
            assert not any(masked)
            bare.is_on = False
            logits()
            assert all(masked)
        assert adapted.config._attn_implementation == "onecard_documents"
