"""What becomes of the multi-token-prediction head when an adapter is merged into its base.

A head that the base carries is written into the base's own tensors, which transformers' `use_mtp` and servers read. A
new head would be keys that no loader of that family knows; it becomes a draft folder of its own, where servers have a
block that can hold it. config.json says how many layers there are, 0 where there are none.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from toolkit.artifact.manifest import write_json
from toolkit.checkpoint.files import headers_in
from toolkit.errors import ModelError
from toolkit.export.merge import overwrite
from toolkit.mtp.draft_folder import draft_config, draft_tensors
from toolkit.mtp.head_file import config_with_head, merged_head_state
from toolkit.mtp.native import native_keys

__all__ = ["DRAFT_FOLDER", "stitch_head"]

DRAFT_FOLDER = "draft"


def stitch_head(artifact: Path, skeleton: PreTrainedModel, folder: Path) -> str:
    """Put an artifact's head where it belongs in a merged checkpoint; gives one line about it.

    Args:
        skeleton: the base on meta. folder: the merged checkpoint, whole but for its head.

    Raises:
        ModelError: the head is not of this base.
    """
    state = merged_head_state(artifact)
    native = native_keys(folder, skeleton.config)
    layers = native.layers if native else 0
    if not state:
        _declare(folder, layers)
        return "no head was trained; the checkpoint's own one is as it was" if native else "no head"
    if native and state.keys() <= native.files.keys():
        _write_into(folder, state)
        _declare(folder, layers)
        return f"{len(state)} tensors of the checkpoint's own head replaced"
    _declare(folder, layers)
    try:
        return _write_draft(folder, skeleton, state)
    except ModelError as error:
        return f"left out: {error}"


def _write_into(folder: Path, state: dict[str, Tensor]) -> None:
    """Over the base's tensors of the same names, in their dtype."""
    places = headers_in(folder)
    for name, tensor in state.items():
        path = places[name].path
        with safe_open(path, framework="pt") as opened:
            before = opened.get_tensor(name)
        if before.shape != tensor.shape:
            raise ModelError(f"{path}: {name} is {tuple(before.shape)}, in the head {tuple(tensor.shape)}")
        with path.open("r+b") as file:
            overwrite(file, places[name].offset, tensor.to(before.dtype))


def _declare(folder: Path, layers: int) -> None:
    """Say in config.json how many layers the head has; what says so already stays as it is, to the byte."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    told = config_with_head(text, layers) if layers else _none_declared(text)
    if told != text:
        write_json(path, told if text is config else {**config, "text_config": told})


def _none_declared(config: dict[str, object]) -> dict[str, object]:
    names = [name for name in ("num_mtp_layers", "mtp_num_hidden_layers") if config.get(name)]
    return {**config, **dict.fromkeys(names, 0), "num_nextn_predict_layers": 0}


def _write_draft(folder: Path, skeleton: PreTrainedModel, state: dict[str, Tensor]) -> str:
    """A folder that servers take as the draft model beside the merged one."""
    tensors, off = draft_tensors(skeleton, state)
    draft = folder / DRAFT_FOLDER
    draft.mkdir()
    save_file({**tensors, **_ends(skeleton, folder)}, draft / "model.safetensors", {"format": "pt"})
    write_json(draft / "config.json", draft_config(skeleton.config, state))
    return f"{DRAFT_FOLDER}/ holds the head for servers, off by {off:.1g} of its largest output"


def _ends(skeleton: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Embedding and output head of the merged checkpoint, under the names that the draft's loader knows."""
    places = headers_in(folder)
    names = {id(module): name for name, module in skeleton.named_modules()}
    found = {}
    wanted = {"model.embed_tokens": skeleton.get_input_embeddings(), "lm_head": skeleton.get_output_embeddings()}
    for ours, module in wanted.items():
        key = f"{names[id(module)]}.weight"
        if key not in places:  # tied to the embedding
            key = f"{names[id(wanted['model.embed_tokens'])]}.weight"
        with safe_open(places[key].path, framework="pt") as opened:
            found[f"{ours}.weight"] = opened.get_tensor(key).clone()
    return found
