"""What llama.cpp's converter does to a weight on its way into a GGUF file, undone on fp32 rows; pure functions.

Shapes: E experts, O outputs, I inputs. Block types are multiplied out by the `gguf` library, and on a card by the torch
functions of transformers, as Q8_0 is on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers.integrations.gguf.dequant import GGML_NAME, dequantize

from toolkit.checkpoint.formats.gguf_file import library

__all__ = [
    "ON_A_CARD",
    "Numbers",
    "ValueHeads",
    "by_gguf",
    "by_torch",
    "can_multiply_out",
    "gate_and_up",
    "halves",
    "latent",
    "multiply_out",
    "stack",
]

Numbers = Mapping[str, torch.Tensor]


@cache
def can_multiply_out(kind: str) -> bool:
    """Whether the `gguf` library makes fp32 of this type."""
    gguf = library()
    block = gguf.GGMLQuantizationType[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[block][1]), dtype=np.uint8), block)
    except NotImplementedError:
        return False
    return True


def multiply_out(raw: torch.Tensor, kind: str, scale: torch.Tensor | None = None) -> torch.Tensor:
    """fp32 of a raw tensor of type `kind`; `scale` is one number, or one for each element of dimension 0 (NVFP4)."""
    if raw.dtype != torch.uint8:
        numbers = raw.float()
    else:
        is_by_gguf = kind not in ON_A_CARD or (raw.device.type == "cpu" and kind != _FASTER_BY_TORCH)
        numbers = by_gguf(raw, kind) if is_by_gguf else by_torch(raw, kind)
    return numbers if scale is None else numbers * scale.float().reshape(-1, *[1] * (numbers.dim() - 1))


def by_gguf(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    """fp32 of blocks, by the library that says what they are worth; on a CPU, wherever they lie."""
    gguf = library()
    with np.errstate(all="ignore"):  # a scale may be infinite in a damaged file; whoever reads the values looks
        values = gguf.quants.dequantize(blocks.cpu().contiguous().numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(values).to(blocks.device)


def by_torch(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    """The same to the bit for types of `ON_A_CARD`, where the blocks lie."""
    number = next(number for number, name in GGML_NAME.items() if name == kind)
    values: torch.Tensor = dequantize(blocks.contiguous(), number)
    return values.reshape(*blocks.shape[:-1], -1)


ON_A_CARD = frozenset(GGML_NAME.values())
"""Types that transformers multiplies out with torch, so on a card without a way back to the CPU."""
_FASTER_BY_TORCH = "Q8_0"
"""On a CPU, too: four times, and to the bit."""


def stack(part: str, is_transposed: bool) -> Callable[[Numbers], torch.Tensor]:
    """One projection [E, O, I] as the experts module holds it."""
    return lambda it: it[part].transpose(1, 2) if is_transposed else it[part]


def gate_and_up(is_concatenated: bool, is_transposed: bool) -> Callable[[Numbers], torch.Tensor]:
    """`gate` and `up` [E, O, I], or `both` [E, 2·O, I], as one stack: one after the other, or row by row.

    Biases [E, O] too.
    """

    def join(it: Numbers) -> torch.Tensor:
        gate, up = it["both"].chunk(2, dim=1) if "both" in it else (it["gate"], it["up"])
        rows = torch.cat([gate, up], dim=1) if is_concatenated else torch.stack([gate, up], dim=2).flatten(1, 2)
        return rows.transpose(1, 2) if is_transposed else rows

    return join


def latent(it: Numbers) -> torch.Tensor:
    """Latent attention's second projection, of `keys` [heads, rank, size] and `values` [heads, size, rank]."""
    return torch.cat([it["keys"].transpose(1, 2), it["values"]], dim=1).flatten(0, 1)


def halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads·size, …] with pairs that are rotated together side by side, as the halves of each head."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


@dataclass(frozen=True)
class ValueHeads:
    """The heads of linear attention: `keys` of `key_size`, and `per_key` value heads of `value_size` for each.

    The model has value heads grouped by their key head; some architectures are stored with the first of every group,
    then the second of every group, and so on ("tiled").
    """

    keys: int
    per_key: int
    key_size: int
    value_size: int

    @classmethod
    def of(cls, config: Any) -> ValueHeads:
        """From a config of a family with such heads."""
        keys = config.linear_num_key_heads
        return cls(
            keys, config.linear_num_value_heads // keys, config.linear_key_head_dim, config.linear_value_head_dim
        )

    def of_heads(self, rows: torch.Tensor) -> torch.Tensor:
        """Grouped again: one row a value head."""
        return self._grouped(rows, 1)

    def of_values(self, rows: torch.Tensor) -> torch.Tensor:
        """Grouped again: `value_size` rows a value head."""
        return self._grouped(rows, self.value_size)

    def after_keys(self, rows: torch.Tensor) -> torch.Tensor:
        """Queries and keys as they are, then values grouped again."""
        before = 2 * self.keys * self.key_size
        return torch.cat([rows[:before], self.of_values(rows[before:])])

    def columns(self, matrix: torch.Tensor) -> torch.Tensor:
        """The same for inputs."""
        return self.of_values(matrix.T).T

    def joined(self, it: Numbers) -> torch.Tensor:
        """`qkv` (all queries, keys, values) and `z` as one matrix: query, key, values and gates of each key head."""
        q, k, v = it["qkv"].split([self.keys * self.key_size] * 2 + [len(it["z"])])
        return torch.cat([part.reshape(self.keys, -1, part.shape[1]) for part in (q, k, v, it["z"])], dim=1).flatten(
            0, 1
        )

    def _grouped(self, rows: torch.Tensor, size: int) -> torch.Tensor:
        tiled = rows.reshape(self.per_key, self.keys, size, *rows.shape[1:])
        return tiled.transpose(0, 1).reshape(rows.shape)
