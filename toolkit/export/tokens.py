"""What an adapter has beside its pairs, in exports: trained rows of tokens, and DoRA's magnitudes.

Rows are put into a merged checkpoint, and magnitudes into every merge; other layouts have no place for them and say so.

V vocabulary, H hidden, N tokens
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from toolkit.adapters.layouts import PREFIX, ROWS, Factors
from toolkit.adapters.tokens import INDICES, rows_of, token_ids
from toolkit.artifact.manifest import ADAPTER_WEIGHTS, load_adapter_config, write_json
from toolkit.checkpoint.conversion import Shards, targets
from toolkit.checkpoint.files import INDEX, headers_in, write_index
from toolkit.errors import ModelError
from toolkit.quant.source import SourceWeights

__all__ = ["put_rows", "require_carried", "with_weights"]

_CARRY = ("peft", "merged")
"""Layouts that have a place for rows."""
_WITHOUT_LENGTHS = ("per-expert", "gguf", "merged-source")
"""Layouts of pairs alone, and of weights that are not read."""


def require_carried(format: str, artifact: Path) -> None:
    """Raise `ModelError` where a layout has no place for an artifact's rows of tokens or DoRA's magnitudes."""
    config = load_adapter_config(artifact)
    if config.get("use_dora") and format in _WITHOUT_LENGTHS:
        raise ModelError(f"--format {format}: has no place for DoRA's magnitudes; take --format merged, or peft")
    count = len(token_ids(config))
    if count and format not in _CARRY:
        raise ModelError(
            f"--format {format}: has no place for trained rows of tokens ({count}); take --format merged, whose "
            "checkpoint and tokenizer hold them, and convert or quantise that"
        )


def with_weights(adapter: Sequence[Factors], base: Path) -> list[Factors]:
    """The same updates; those with DoRA's magnitudes read the weight that they change from the base, when asked."""
    if all(factors.magnitude is None for factors in adapter):
        return list(adapter)
    source = SourceWeights(str(base))

    def read(parameter: str) -> Tensor:
        with source.layer(parameter.rpartition(".")[0]) as layer:
            return layer[parameter]

    return [replace(factors, weight=partial(read, factors.parameter)) for factors in adapter]


def put_rows(artifact: Path, skeleton: PreTrainedModel, folder: Path) -> None:
    """Write an artifact's rows over those of a merged checkpoint, which grows where it has too few, and compare.

    Args:
        skeleton: the base on meta. folder: the merged checkpoint, whole but for the rows.

    Raises:
        ModelError: the checkpoint has no such table, or does not read back as written.
    """
    ids = token_ids(load_adapter_config(artifact))
    if not ids:
        return
    rows, before = _rows(artifact), rows_of(skeleton)
    after = max(before, max(ids) + 1)
    with Shards(str(folder), folder) as shards:
        parameters = targets(skeleton, get_model_conversion_mapping(skeleton), shards.keys)
    tied = {f"{name}.weight" for name, module in skeleton.named_modules() if module is skeleton.get_output_embeddings()}
    embedding = next(iter(rows))
    wanted = {
        key: rows.get(parameter, rows[embedding])
        for key, parameter in parameters.items()
        if parameter in rows or parameter in tied
    }
    if not rows.keys() <= set(parameters.values()):
        raise ModelError(f"{folder}: holds no {min(rows)} that tokens could be given rows in")
    places = headers_in(folder)
    for path in {places[key].path for key in wanted}:
        tensors = load_file(path)
        for key in wanted.keys() & tensors.keys():
            tensors[key] = _with_rows(tensors[key], ids, wanted[key], after)
        with safe_open(path, framework="pt") as opened:
            told = opened.metadata()
        beside = path.with_suffix(".new")
        save_file(tensors, beside, told)
        del tensors
        beside.replace(path)
    if after > before:
        _tell(folder, before, after)
    _require_written(folder, ids, wanted, after)


def _rows(artifact: Path) -> dict[str, Tensor]:
    """Parameter to the rows of it [N, H] that an adapter holds, in the order of their ids: the embedding first."""
    config, tensors = load_adapter_config(artifact), load_file(artifact / ADAPTER_WEIGHTS)
    found = {}
    for module, ids in config[INDICES].items():
        key = next(name for name in tensors if name.endswith(f"{module}.{ROWS}"))
        order = torch.tensor(ids).argsort()
        found[f"{key.removeprefix(PREFIX).removesuffix(f'.{ROWS}')}.weight"] = tensors[key][order]
    return found


def _with_rows(table_VH: Tensor, ids: list[int], rows_NH: Tensor, after: int) -> Tensor:
    grown = table_VH.new_zeros(after, table_VH.shape[1])
    grown[: len(table_VH)] = table_VH
    grown[ids] = rows_NH.to(table_VH.dtype)
    return grown


def _tell(folder: Path, before: int, after: int) -> None:
    """Say in config.json and the index how large the vocabulary is now."""
    path = folder / "config.json"
    write_json(path, _grown(json.loads(path.read_bytes()), before, after))
    if (folder / INDEX).is_file():
        places = headers_in(folder)
        write_index(folder, {key: at.path.name for key, at in places.items()}, sum(at.bytes for at in places.values()))


def _grown(config: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    told = {**config, "vocab_size": after} if config.get("vocab_size") == before else dict(config)
    return {key: _grown(value, before, after) if key == "text_config" else value for key, value in told.items()}


def _require_written(folder: Path, ids: list[int], wanted: Mapping[str, Tensor], after: int) -> None:
    places = headers_in(folder)
    for key, rows_NH in wanted.items():
        with safe_open(places[key].path, framework="pt") as opened:
            found = opened.get_tensor(key)
        if len(found) != after or not torch.equal(found[ids], rows_NH.to(found.dtype)):
            raise ModelError(f"{folder}: {key} does not read back with the rows of its tokens: not exported")
