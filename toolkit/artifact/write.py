"""Writes the artifact: a PEFT adapter folder with tokenizer, card and manifest, and nothing of this machine.

`PeftModel.save_pretrained` writes the local base path, a placeholder card and an unordered configuration straight into
the target folder. Here PEFT still makes the tensors and the configuration, but the folder appears whole or not at all,
holds listed files only, and equal inputs give equal bytes. The last look, at the bytes that are written, comes after
hours of training; so everything that could stop an artifact and is known before is asked before.
"""

from __future__ import annotations

import copy
import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields, replace
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
from toolkit.artifact.card import model_card
from toolkit.artifact.manifest import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    FORMAT,
    GENERATION_CONFIG,
    MANIFEST,
    MTP_HEAD,
    PICTURES,
    TEMPLATE,
    TOKENIZER_FILES,
    file_entry,
    read_manifest,
    write_json,
)
from toolkit.artifact.privacy import (
    Known,
    base_texts,
    canaries,
    figures,
    finds,
    leaves,
    looked_at,
    portable,
    refuse_canaries,
)
from toolkit.artifact.tokenizer import require_same_tokenizer, write_generation_config, write_tokenizer
from toolkit.checkpoint.identity import BaseIdentity, files_of
from toolkit.durable import staged_folder
from toolkit.errors import ModelError, OnecardError, RecipeError, ResourceError, first_line
from toolkit.recipe import Effect, Recipe, changes, load

__all__ = [
    "FROM_ELSEWHERE",
    "check_folder",
    "remembered",
    "require_packageable",
    "seal",
    "stack_versions",
    "write_artifact",
]

FROM_ELSEWHERE = TOKENIZER_FILES | {GENERATION_CONFIG}
"""Files whose text is the base's, or that of the chat template that the recipe names."""
_METADATA = {"format": "pt"}
_BASE_KEYS = {field.name for field in fields(BaseIdentity)}

_PROSE = "system_prompt"
_TEMPLATE = "data.chat_template_path"


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
    chat: Mapping[str, Any] | None = None,
    base_folder: str | Path | None = None,
    stacks: Mapping[str, str] | None = None,
    new_tokens: Mapping[str, Any] | None = None,
) -> Path:
    """Write the artifact of one run to `folder` and return it; the folder appears whole or not at all.

    An artifact of the same run (same base, same recipe) is replaced; anything else that lies there is left alone.
    `results` and `coverage` are as `model_card` reads them; of `results` only numbers are kept. Tensors keep
    their dtype. `mtp_head` holds the tensors of a trained multi-token-prediction head by name. `rows` are the texts of
    the training data: none of them may be found in the artifact, unless it stands in the base's own files, the recipe
    or the chat template. `pictures` are PNG files by the names of `PICTURES`, `new_tokens` as in a manifest.

    `chat` is how the conversations were written, all keys optional: `form` (`chat`, or `text` for plain prompts),
    `stop_token_ids` (all that end an answer, the base's among them; they go into generation_config.json),
    `chat_template_kwargs`, `date` (of the template, YYYY-MM-DD) and `system_prompt`. `base_folder` is the base's files,
    by default where the model was loaded from. `stacks` are the base's expert stacks, each to what it is in, where the
    recipe's budget chose.

    Raises `ModelError` where `folder` holds something else, the adapter is empty or a row of the data would leave with
    it, `ResourceError` where it cannot be written.
    """
    folder = Path(folder)
    theirs = _base_folder(model, base, base_folder)
    facts = _facts(base, recipe_yaml, results, coverage, chat, stacks, new_tokens)
    facts["versions"] = dict(versions or stack_versions())
    check_folder(folder, base=base, recipe_yaml=recipe_yaml)
    try:
        with staged_folder(folder, replace=True) as staging:
            _write_adapter(model, adapter_name, base, staging)
            write_tokenizer(tokenizer, staging, theirs)
            write_generation_config(staging, facts.get("chat", {}).get("stop_token_ids") or (), theirs)
            if mtp_head:
                save_file({n: _contiguous(mtp_head[n]) for n in sorted(mtp_head)}, staging / MTP_HEAD, _METADATA)
            for name in PICTURES.keys() & (pictures or {}).keys():
                (staging / name).write_bytes((pictures or {})[name])
            known = Known(base_texts(theirs), tuple(leaves(tokenizer.chat_template)))
            seal(staging, {**facts, "looked_at": looked_at(staging, FROM_ELSEWHERE, facts, known)}, license)
            known = replace(known, words=(*known.words, *_words_of(staging, facts, license)))
            refuse_canaries(staging, rows, known, called=folder)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise ResourceError(f"{folder}: cannot write the artifact: {why}; free space or give another folder") from None
    return folder


def _facts(
    base: BaseIdentity,
    recipe_yaml: str,
    results: Mapping[str, Any],
    coverage: Mapping[str, Any],
    chat: Mapping[str, Any] | None,
    stacks: Mapping[str, str] | None,
    new_tokens: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What the manifest says of the run, without secrets and local paths."""
    return {
        "base": asdict(base),
        "recipe": _portable_recipe(recipe_yaml),
        "results": figures(results),
        "coverage": portable(coverage),
        **({"chat": _portable_chat(chat)} if chat else {}),
        **({"stacks": dict(stacks)} if stacks else {}),
        **({"new_tokens": dict(new_tokens)} if new_tokens else {}),
    }


def stack_versions() -> dict[str, str]:
    """Versions of onecard and of the libraries that define the adapter's numbers."""
    return {"onecard": __version__, **{name: version(name) for name in ("peft", "torch", "transformers")}}


def _base_folder(model: PeftModel, base: BaseIdentity, given: str | Path | None) -> Path | None:
    """Where the base's own files lie: given, where the model was loaded from, or in the Hub's cache."""
    return _found(given or getattr(model.get_base_model(), "name_or_path", None), asdict(base))


def _found(place: str | Path | None, base: Mapping[str, Any]) -> Path | None:
    """A folder that holds a checkpoint, or the base's in the Hub's cache."""
    if place and (Path(place).is_file() or (Path(place) / "config.json").is_file()):
        return files_of(str(place))
    return files_of(base["name"], base["revision"]) if base["revision"] else None


def _by_field(recipe: Mapping[str, Any]) -> dict[str, Any]:
    sections = ((name, fields) for name, fields in recipe.items() if isinstance(fields, Mapping))
    return {f"{name}.{field}": value for name, fields in sections for field, value in fields.items()}


def _portable_recipe(recipe_yaml: str) -> dict[str, Any]:
    recipe = YAML(typ="safe").load(io.StringIO(recipe_yaml)) or {}
    kept = {name: portable(section) for name, section in recipe.items()}
    kept.get("training", {}).pop("output_dir", None)  # the same run in another folder is the same run
    return kept


def _portable_chat(chat: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = portable({key: value for key, value in chat.items() if value is not None})
    if stops := chat.get("stop_token_ids"):
        kept["stop_token_ids"] = sorted({int(one) for one in stops})
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


def seal(folder: Path, facts: Mapping[str, Any], license: str | None = None) -> None:
    """Write the card and the manifest of a folder that holds all other files of an artifact.

    `facts` are `base recipe results coverage versions`, already fit to leave the machine; other keys go along.
    """
    (folder / CARD).write_text(_card(folder, facts, license), encoding="utf-8")
    files = {path.name: file_entry(path) for path in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {**facts, "format": FORMAT, "files": files})


def _words_of(folder: Path, facts: Mapping[str, Any], license: str | None = None) -> tuple[str, ...]:
    """What an artifact says that was not read from the data: the recipe, and a card without the texts of `coverage`."""
    card = _card(folder, {**facts, "coverage": figures(facts["coverage"])}, license)
    return (card, *leaves(facts["recipe"]), *leaves(facts.get("chat")))


def remembered(folder: Path) -> Known:
    """What is known of a finished artifact, from its manifest, and from its run and base where these are here."""
    manifest = read_manifest(folder)
    told, recipe = manifest.get("looked_at") or {}, _recipe_of_run(folder.absolute())
    theirs = _found(recipe.model.model_name_or_path if recipe else None, manifest["base"])
    template = Path(recipe.data.chat_template_path) if recipe and recipe.data.chat_template_path else None
    own = [template.read_text(encoding="utf-8", errors="replace")] if template and template.is_file() else []
    try:
        words = _words_of(folder, manifest)
    except (TypeError, ValueError, KeyError, AttributeError):  # a card of somebody else's making
        words = tuple(leaves([manifest["recipe"], manifest.get("chat")]))
    return Known(base_texts(theirs), (*own, *words), frozenset(told.get("strings", ())), told.get("files", {}))


def _recipe_of_run(folder: Path) -> Recipe | None:
    run = folder.parent / "recipe.yaml"
    try:
        return load(run, note=lambda line: None) if folder.name == "adapter" and run.is_file() else None
    except OnecardError:
        return None


def _card(folder: Path, facts: Mapping[str, Any], license: str | None) -> str:
    return model_card(
        base=BaseIdentity(**{key: facts["base"][key] for key in _BASE_KEYS & facts["base"].keys()}),
        adapter_config=json.loads((folder / ADAPTER_CONFIG).read_bytes()),
        results=facts["results"],
        coverage=facts["coverage"],
        versions=facts["versions"],
        recipe=facts["recipe"],
        combined=facts.get("combined", ()),
        pictures=[name for name in PICTURES if (folder / name).is_file()],
        license=license,
        chat=facts.get("chat") or {},
        has_template=(folder / TEMPLATE).is_file(),
        new_tokens=facts.get("new_tokens"),
    )


def require_packageable(
    tokenizer: PreTrainedTokenizerBase, recipe: Mapping[str, Any], base_folder: str | Path | None = None
) -> None:
    """Raise unless tokenizer, chat template and recipe may go into an artifact; needs no model, and takes seconds.

    Args:
        tokenizer: with the recipe's chat template on it. recipe: values by `section.field`.
        base_folder: the base's files; what stands in them is no find.

    Raises:
        RecipeError: a value of the recipe, or the template it names, holds a token or a path of this machine.
        ModelError: the base's tokenizer cannot be written so that it reads back the same.
    """
    known = Known(base_texts(Path(base_folder) if base_folder else None))
    allowed = {find for text in known.base for find, _ in finds(text)}
    for key, value in recipe.items():
        for kind in _told(value, allowed, prose=key.endswith(_PROSE)):
            raise RecipeError(f"{key}: holds {kind}, but the recipe is published with the artifact: remove it")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tokenizer(tokenizer, folder, Path(base_folder) if base_folder else None)
        if found := next(canaries(folder, known=known), None):
            raise _refusal(found, recipe.get(_TEMPLATE), base_folder)
        try:
            require_same_tokenizer(tokenizer, folder)
        except ModelError as error:
            raise ModelError(str(error).replace(str(folder), str(base_folder or "this base"))) from None


def _told(value: Any, allowed: set[str], *, prose: bool) -> Iterator[str]:
    """What is found in a value as it would be published. Paths are cut short there, but prose must stay as it is."""
    for text in leaves(value if prose else portable(value)):
        yield from (kind for find, kind in finds(text) if find not in allowed)
        if prose and portable({_PROSE: text})[_PROSE] != text:
            yield "a folder of this machine, or a login"


def _refusal(found: str, template: str | None, base_folder: str | Path | None) -> RecipeError | ModelError:
    if template:
        return RecipeError(f"{_TEMPLATE}: {template}: {found}, but it is published with the artifact: remove it")
    return ModelError(f"{base_folder or 'this base'}: {found}: remove it from the base's files")
