"""Writes the artifact: a PEFT adapter folder with tokenizer, card and manifest, and nothing of this machine.

`PeftModel.save_pretrained` writes the local base path, a placeholder card and an unordered configuration straight into
the target folder. Here PEFT still makes the tensors and the configuration, but the folder appears whole or not at all,
holds listed files only, and equal inputs give equal bytes.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from ruamel.yaml import YAML
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from toolkit import __version__
from toolkit.durable import staged_folder
from toolkit.errors import ModelError, ResourceError, first_line
from toolkit.packaging.base import BaseIdentity
from toolkit.packaging.canary import refuse_canaries
from toolkit.packaging.card import model_card
from toolkit.packaging.manifest import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    FORMAT,
    MANIFEST,
    MTP_HEAD,
    PICTURES,
    TOKENIZER_FILES,
    file_entry,
    read_manifest,
    write_json,
)
from toolkit.packaging.portable import figures, portable
from toolkit.recipe import Effect, changes

__all__ = ["check_folder", "seal", "stack_versions", "write_artifact"]

# What transformers writes into tokenizer_config.json about where and how the tokenizer was loaded here.
_LOADING_KEYS = frozenset({"auto_map", "cache_dir", "is_local", "local_files_only", "name_or_path", "use_auth_token"})
_METADATA = {"format": "pt"}


def check_folder(folder: str | Path, *, base: BaseIdentity, recipe_yaml: str) -> None:
    """Raise `ModelError` unless an artifact of this run may be written to `folder`; cheap, so ask before training.

    It may where nothing lies, or an artifact of the same base and of a recipe that differs in nothing that binds a run.
    """
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        there = read_manifest(folder)
    except ModelError:
        there = {"base": {}, "recipe": {}}
    before, now = _by_field(there["recipe"]), _by_field(_portable_recipe(recipe_yaml))
    same_run = bool(before) and all(change.effect is not Effect.BINDS for change in changes(before, now))
    # A commit that moved for another file's sake, and a copy under another name, are the same base.
    if there["base"].get("weights_sha256") != base.weights_sha256 or not same_run:
        raise ModelError(
            f"{folder}: holds something other than this run's artifact: move it away or choose another folder"
        )


def write_artifact(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    base: BaseIdentity,
    recipe_yaml: str,
    results: Mapping[str, Any],
    coverage: Mapping[str, Any],
    versions: Mapping[str, str] | None = None,
    license: str | None = None,
    adapter_name: str = "default",
    mtp_head: Mapping[str, Tensor] | None = None,
    rows: Iterable[str] = (),
    pictures: Mapping[str, bytes] | None = None,
) -> Path:
    """Write the artifact of one run to `folder` and return it; the folder appears whole or not at all.

    An artifact of the same run (same base, same recipe) is replaced; anything else that lies there is left alone.
    `results` and `coverage` are as `model_card` reads them; of `results` only numbers are kept. Tensors keep
    their dtype. `mtp_head` holds the tensors of a trained multi-token-prediction head by name. `rows` are the texts of
    the training data: none of them may be found in the artifact. `pictures` are PNG files by the names of `PICTURES`.

    Raises `ModelError` where `folder` holds something else, the adapter is empty or a row of the data would leave with
    it, `ResourceError` where it cannot be
    written.
    """
    folder = Path(folder)
    facts = {
        "base": asdict(base),
        "recipe": _portable_recipe(recipe_yaml),
        "results": figures(results),
        "coverage": portable(coverage),
        "versions": dict(versions or stack_versions()),
    }
    check_folder(folder, base=base, recipe_yaml=recipe_yaml)
    try:
        with staged_folder(folder, replace=True) as staging:
            _write_adapter(model, adapter_name, base, staging)
            _write_tokenizer(tokenizer, staging)
            if mtp_head:
                save_file({n: _contiguous(mtp_head[n]) for n in sorted(mtp_head)}, staging / MTP_HEAD, _METADATA)
            for name in PICTURES.keys() & (pictures or {}).keys():
                (staging / name).write_bytes((pictures or {})[name])
            seal(staging, facts, license)
            refuse_canaries(staging, rows)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ResourceError(
            f"{folder}: cannot write the artifact: {reason}; free space or choose another folder"
        ) from None
    return folder


def stack_versions() -> dict[str, str]:
    """Versions of onecard and of the libraries that define the adapter's numbers."""
    return {"onecard": __version__, **{name: version(name) for name in ("peft", "torch", "transformers")}}


def _by_field(recipe: Mapping[str, Any]) -> dict[str, Any]:
    sections = ((name, fields) for name, fields in recipe.items() if isinstance(fields, Mapping))
    return {f"{name}.{field}": value for name, fields in sections for field, value in fields.items()}


def _portable_recipe(recipe_yaml: str) -> dict[str, Any]:
    recipe = YAML(typ="safe").load(io.StringIO(recipe_yaml)) or {}
    kept = {name: portable(section) for name, section in recipe.items()}
    kept.get("training", {}).pop("output_dir", None)  # the same run in another folder is the same run
    return kept


def _write_adapter(model: PeftModel, adapter_name: str, base: BaseIdentity, folder: Path) -> None:
    if adapter_name not in model.peft_config:
        raise ModelError(f"adapter {adapter_name!r}: not in this model; there is {', '.join(model.peft_config)}")
    # Without the flag PEFT looks the base up on the Hub to decide whether to save a resized vocabulary.
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    if not state:
        raise ModelError(
            f"adapter {adapter_name!r}: has no tensors: nothing was attached, so there is nothing to package"
        )
    save_file({name: _contiguous(state[name]) for name in sorted(state)}, folder / ADAPTER_WEIGHTS, _METADATA)
    config = copy.deepcopy(model.peft_config[adapter_name])
    config.base_model_name_or_path = base.name
    config.revision = base.revision
    config.inference_mode = True
    config.save_pretrained(str(folder))
    data = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    # Sets inside PEFT: their order changes from process to process.
    for key in ("target_modules", "target_parameters", "exclude_modules"):
        if isinstance(data.get(key), list):
            data[key] = sorted(data[key])
    write_json(folder / ADAPTER_CONFIG, data)


def _contiguous(tensor: Tensor) -> Tensor:
    """A copy: safetensors refuses views and shared memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    clean = copy.deepcopy(tokenizer)
    backend = getattr(clean, "backend_tokenizer", None)
    if backend is not None:
        # The last batch's padding and truncation stick to the tokenizer and would be saved with it.
        backend.no_padding()
        backend.no_truncation()
    with tempfile.TemporaryDirectory() as scratch:
        clean.save_pretrained(scratch)
        saved = {path.name: path for path in Path(scratch).iterdir() if path.name in TOKENIZER_FILES}
        if "tokenizer.json" not in saved:
            raise ModelError(f"{type(tokenizer).__name__}: writes no tokenizer.json: use a base with a fast tokenizer")
        for name, path in saved.items():
            shutil.copyfile(path, folder / name)
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    kept = {k: v for k, v in config.items() if k not in _LOADING_KEYS and not k.endswith("_file")}
    write_json(folder / "tokenizer_config.json", portable(kept))


def seal(folder: Path, facts: Mapping[str, Any], license: str | None = None) -> None:
    """Write the card and the manifest of a folder that holds all other files of an artifact.

    `facts` are `base recipe results coverage versions`, already fit to leave the machine; other keys go along.
    """
    text = model_card(
        base=BaseIdentity(**facts["base"]),
        adapter_config=json.loads((folder / ADAPTER_CONFIG).read_bytes()),
        results=facts["results"],
        coverage=facts["coverage"],
        versions=facts["versions"],
        recipe=facts["recipe"],
        combined=facts.get("combined", ()),
        pictures=[name for name in PICTURES if (folder / name).is_file()],
        license=license,
    )
    (folder / CARD).write_text(text, encoding="utf-8")
    files = {path.name: file_entry(path) for path in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {**facts, "format": FORMAT, "files": files})
