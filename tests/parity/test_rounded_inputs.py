"""Our reading of a GGUF file with the inputs of matrix products rounded, against the formulas of ggml's products."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from scripts.parity.rounded_inputs import _Matrix, _Rounding, as_ggml_rounds, rounded_logits
from tests.harness.as_gguf import tiny, write_gguf
from toolkit.export.survival import looked_at, streamed_logits

ROWS = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))


def test_rows_are_rounded_in_blocks_of_the_weights_type() -> None:
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    known = gguf.quants.dequantize(gguf.quants.quantize(ROWS.numpy(), q8_0), q8_0)
    assert np.array_equal(as_ggml_rounds(ROWS, "Q5_0").numpy(), known)
    blocks = ROWS.unflatten(-1, (-1, 256))
    rounded, largest = as_ggml_rounds(ROWS, "Q4_K").unflatten(-1, (-1, 256)), blocks.abs().amax(-1, keepdim=True)
    assert ((rounded - blocks).abs() <= largest / 254 + 1e-6).all()
    assert ((rounded / largest * 127).round() - rounded / largest * 127).abs().max() < 1e-4
    assert rounded.abs().amax(-1, keepdim=True) == pytest.approx(largest)
    assert torch.equal(as_ggml_rounds(torch.zeros(1, 256), "Q6_K"), torch.zeros(1, 256))
    assert as_ggml_rounds(ROWS, "F32") is ROWS


def test_a_product_with_minima_has_the_rounded_sums_of_its_rows() -> None:
    kind = gguf.GGMLQuantizationType.Q5_1
    raw = gguf.quants.quantize(torch.randn(6, 512, generator=torch.Generator().manual_seed(2)).numpy() + 1, kind)
    weight = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    step, minimum = np.moveaxis(raw.reshape(6, 16, 24)[..., :4].copy().view(np.float16).astype(np.float64), -1, 0)
    codes = np.round((weight.numpy().reshape(6, 16, 32) - minimum[..., None]) / step[..., None])
    blocks = ROWS.numpy().reshape(4, 16, 32)
    scale = np.abs(blocks).max(-1) / np.float32(127)
    inputs = np.round(blocks / scale[..., None])
    sums = (scale * inputs.sum(-1)).astype(np.float16).astype(np.float64)
    whole = np.einsum("obk,rbk->rob", codes, inputs) * step * scale.astype(np.float16).astype(np.float64)[:, None]
    wanted = (whole + minimum * sums[:, None]).sum(-1)
    minima = torch.from_numpy(minimum).float().repeat_interleave(32, dim=1)
    with _Rounding({weight.untyped_storage().data_ptr(): _Matrix("Q5_1", minima, {})}):
        found = linear(ROWS, weight)
    assert np.abs(found.numpy() - wanted).max() < 1e-4 < np.abs(linear(ROWS, weight).numpy() - wanted).max()
    with _Rounding({weight.untyped_storage().data_ptr(): _Matrix("Q5_1", None, {})}):
        assert np.abs(linear(ROWS, weight).numpy() - wanted).max() > 1e-3


def test_latent_attention_without_keys_and_values_is_the_same(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tiny("deepseek_v3"))
    batch, _ = looked_at([[5, 9, 23, 4], [7, 8]])
    found = rounded_logits(tmp_path / "model.gguf", batch)
    assert (found - streamed_logits(tmp_path / "model.gguf", batch)).abs().max() < 1e-4
