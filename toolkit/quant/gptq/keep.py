"""The compensated integers of a run in one file, so that a resume, `eval` and `chat` compute on exactly the same base.

Only what is int8 is written, with its scales and the report; all else comes from the checkpoint as ever. `safetensors`
writes tensors, but neither whole-or-nothing nor into a model that is loaded already.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from toolkit.checkpoint.files import read_header
from toolkit.durable import replaced_file
from toolkit.errors import ModelError, ResourceError, first_line
from toolkit.quant.gptq.calibrate import Compensation, ExpertError, PartError
from toolkit.quant.stored import rounded_in

__all__ = ["int8_state", "read_compensated", "write_compensated"]


_ABOUT = "onecard"
"""The key of a file's metadata that says what it is of."""


def int8_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A bare model's rounded weights and what is beside them, by parameter name; nothing is copied."""
    state = model.state_dict()
    return {key: state[key] for keys in rounded_in(state).values() for key in keys}


def write_compensated(model: nn.Module, report: Compensation, path: Path, base: str) -> None:
    """Write a model's integers, scales and report; the file appears whole or not at all.

    `base` is a hash of the weights they were rounded from, which `read_compensated` asks for again.

    Raises:
        ResourceError: the disk is full or cannot be written.
    """
    tensors = {name: value.cpu().contiguous() for name, value in int8_state(model).items()}
    try:
        with replaced_file(path) as temporary:
            # One key: safetensors writes several in another order each time, and equal files should be equal bytes.
            about = json.dumps({"base": base, "report": report.to_dict()})
            save_file(tensors, temporary, metadata={_ABOUT: about})
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"{path}: cannot be written: {first_line(error)}; free space on the disk") from None


@torch.no_grad()
def read_compensated(model: nn.Module, path: Path, base: str) -> Compensation:
    """Put the integers of `write_compensated` into a bare model of the same shape; gives the report back.

    Raises:
        ModelError: the file is damaged, or of another model, of other weights (`base`) or another choice of what is
            int8; the model is untouched.
    """
    targets = int8_state(model)
    shapes = {name: tensor.shape for name, tensor in read_header(path, "remove it to compensate again").items()}
    if shapes != {name: tuple(value.shape) for name, value in targets.items()}:
        raise ModelError(f"{path}: of another model than the one loaded; remove it to compensate again")
    try:
        with safe_open(path, framework="pt") as file:
            about = _about(file.metadata())
            if about["base"] != base:
                raise ModelError(
                    f"{path}: rounded from other weights than the base that is loaded; give the base of this run, or "
                    "remove it to compensate again"
                )
            for name, value in targets.items():
                value.copy_(file.get_tensor(name))
            return _report(about["report"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ModelError(f"{path}: damaged: {first_line(error)}; remove it to compensate again") from None


def _about(metadata: dict[str, str]) -> dict[str, Any]:
    """Base and report; files of before December 2026 have a key for each."""
    if _ABOUT in metadata:
        found: dict[str, Any] = json.loads(metadata[_ABOUT])
        return found
    return {"base": metadata["base"], "report": json.loads(metadata["report"])}


def _report(found: dict[str, Any]) -> Compensation:
    return Compensation(
        examples=found["examples"],
        tokens=found["tokens"],
        parts=tuple(PartError(**part) for part in found["parts"]),
        worst=tuple(ExpertError(**expert) for expert in found["worst"]),
    )
