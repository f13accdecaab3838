"""Checks an artifact before anyone relies on it: files, hashes, layout, finiteness, movement, and the base.

PEFT loads an adapter with missing, renamed or all-zero tensors and at most warns. Here each promise of the artifact is
one named check, and the layout on a given base is compared with what stock PEFT itself would create there.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils.other import get_pattern_key, match_target_against_key
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from toolkit.adapters.layouts import MAGNITUDES, PREFIX, ROWS
from toolkit.adapters.tokens import INDICES, make_room, token_ids
from toolkit.artifact.manifest import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST,
    file_entry,
    is_plain,
    load_adapter_config,
    read_manifest,
)
from toolkit.artifact.tokenizer import token_texts
from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.files import read_header
from toolkit.checkpoint.identity import identify_base
from toolkit.errors import ModelError, first_line

__all__ = ["Check", "VerifyReport", "require_base", "verify_artifact"]

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.weight)?")
# What the Hub adds to a downloaded copy.
_HUB_FILES = frozenset({".cache", ".gitattributes"})

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Check:
    """One promise: its name, whether it holds, and one line of detail."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """All checks of one artifact; `moved` of `adapters` LoRA pairs differ from their initial zero; `tensors` in all."""

    folder: str
    checks: tuple[Check, ...]
    tensors: int
    adapters: int
    moved: int

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)


def verify_artifact(
    folder: str | Path, *, base: str | Path | None = None, revision: str = "main", strict: bool = False
) -> VerifyReport:
    """Check an artifact; with `base` (a folder or a cached Hub repository) also that it fits that base.

    Checks: `files`, `hashes`, `config`, `layout`, `finite`, `moved`, `token rows` where it has any, and `base weights`,
    `base layout`. Where `files`
    fails, nothing else is opened. With `strict`, the first failure is raised as `ModelError`. Reads every byte once or
    twice; the base's weights are hashed, never loaded.
    """
    folder = Path(folder)
    checks = [_check("files", lambda: _check_files(folder))]
    facts = _Facts({}, (), ())
    if checks[0].ok:
        checks.append(_check("hashes", lambda: _check_hashes(folder)))
        checks.append(_check("config", lambda: _check_config(folder)))
        checks.append(_check("layout", lambda: _check_layout(folder)))
        try:
            facts = _read_facts(folder)
        except ModelError as error:
            checks.append(Check("tensors", False, str(error)))
        else:
            checks += [_finite(facts), _moved(facts)]
            if any(name.endswith(ROWS) for name in facts.shapes):
                checks.append(_check("token rows", lambda: _check_tokens(folder, facts.shapes)))
        if base is not None:
            checks.append(_check("base weights", lambda: _check_base_weights(folder, str(base), revision)))
            checks.append(_check("base layout", lambda: _check_base_layout(folder, str(base), revision)))
    failed = [check for check in checks if not check.ok]
    if strict and failed:
        raise ModelError(failed[0].detail)
    adapters = [name for name in facts.shapes if _side(name) == "B"]
    return VerifyReport(str(folder), tuple(checks), len(facts.shapes), len(adapters), len(adapters) - len(facts.zero))


def _check(name: str, run: Callable[[], str]) -> Check:
    try:
        return Check(name, True, run())
    except ModelError as error:
        return Check(name, False, str(error))


def _check_files(folder: Path) -> str:
    if not folder.is_dir():
        raise ModelError(f"{folder}: not a folder: give the adapter folder of a run")
    wanted = {*read_manifest(folder)["files"], MANIFEST}
    there = {path.name: path for path in folder.iterdir() if path.name not in _HUB_FILES}
    for name in sorted({ADAPTER_CONFIG, ADAPTER_WEIGHTS} | wanted):
        if name not in there:
            raise ModelError(f"{folder}: {name} is missing: copy or download the artifact again")
        if not is_plain(there[name]):
            raise ModelError(f"{folder / name}: not a plain file: copy the artifact with its links resolved")
    extra = sorted(set(there) - wanted)
    if extra:
        raise ModelError(f"{folder}: {extra[0]!r} is not in {MANIFEST}: remove it, or do not trust this folder")
    return f"{len(wanted)} files, none missing, none extra"


def _check_hashes(folder: Path) -> str:
    files = read_manifest(folder)["files"]
    for name, entry in sorted(files.items()):
        found = file_entry(folder / name)
        for key in ("size", "sha256"):
            if found[key] != entry[key]:
                raise ModelError(f"{folder / name}: {key} is {found[key]}, not {entry[key]}: copy or download it again")
    return f"{len(files)} of {len(files)} files match their SHA-256"


def _check_config(folder: Path) -> str:
    config, base = load_adapter_config(folder), read_manifest(folder)["base"]
    named = (config.get("base_model_name_or_path"), config.get("revision"))
    if named != (base["name"], base["revision"]):
        raise ModelError(f"{folder / ADAPTER_CONFIG}: its base {named[0]!r} is not the manifest's {base['name']!r}")
    return f"LoRA, rank {config['r']}, alpha {config['lora_alpha']:g}, base {base['name']}"


def _check_layout(folder: Path) -> str:
    """Names pair up, and rows follow from the configuration: R for a linear or router, R·E for an expert stack."""
    config, shapes = load_adapter_config(folder), _read_shapes(folder)
    ranks: dict[str, list[int]] = defaultdict(list)
    for wrapped, (a, b) in _pairs(folder, shapes).items():
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not all((*a, *b)):
            raise ModelError(f"{folder / ADAPTER_WEIGHTS}: {wrapped}: A {a} and B {b} do not multiply")
        ranks[wrapped.replace(".base_layer", "")].append(a[0])
    for module, rows in ranks.items():
        if not _fits(config, module, rows):
            raise ModelError(
                f"{folder / ADAPTER_WEIGHTS}: {module[:120]}: {sorted(rows)} rows of A do not fit the ranks"
            )
    _require_magnitudes(folder, bool(config.get("use_dora")), shapes)
    for target in config.get("target_parameters") or []:
        if not any(_holds(module, target) for module in ranks if not _is_linear(config, module)):
            raise ModelError(
                f"{folder / ADAPTER_WEIGHTS}: no tensor for the target {target!r}: the adapter is incomplete"
            )
    return f"{len(shapes)} tensors on {len(ranks)} modules, as the configuration says"


def _require_magnitudes(folder: Path, wanted: bool, shapes: Shapes) -> None:
    """DoRA has a magnitude for each output of each linear, and nothing else has any."""
    found = {name.removesuffix(f".{MAGNITUDES}"): shape for name, shape in shapes.items() if name.endswith(MAGNITUDES)}
    tensors = ((_TENSOR.fullmatch(name), shape) for name, shape in shapes.items())
    outputs = {match["module"]: shape[:1] for match, shape in tensors if match and match["side"] == "B"}
    told = {name.removeprefix(PREFIX): shape for name, shape in found.items()}
    if told != (outputs if wanted else {}):
        raise ModelError(f"{folder / ADAPTER_WEIGHTS}: its magnitudes are not one of each output, as use_dora says")


def _check_tokens(folder: Path, shapes: Shapes) -> str:
    """Rows are those that the configuration names, and the tokenizer beside them has each token."""
    config = load_adapter_config(folder)
    ids, wanted = token_ids(config), config.get(INDICES) or {}
    rows = {name.removesuffix(f".{ROWS}"): shape[0] for name, shape in shapes.items() if name.endswith(ROWS)}
    named = {name: next((len(of) for end, of in wanted.items() if name.endswith(end)), 0) for name in rows}
    if len(rows) != len(wanted) or rows != named:
        raise ModelError(f"{folder / ADAPTER_WEIGHTS}: rows of tokens are not those of {ADAPTER_CONFIG}")
    texts = token_texts(folder, ids)
    if alone := [number for number, text in zip(ids, texts, strict=True) if text is None]:
        raise ModelError(f"{folder}: token {alone[0]} has a row, and the tokenizer beside it has no such token")
    where = " and ".join(name.rpartition(".")[2] for name in rows)
    shown = ", ".join(map(repr, texts[:3])) + (", …" if len(texts) > 3 else "")
    return f"{len(ids)} of {len(ids)} have rows in {where} and a text in the tokenizer: {shown}"


def _pairs(folder: Path, shapes: Shapes) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    sides: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in shapes.items():
        if name.endswith((ROWS, MAGNITUDES)):
            continue
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ModelError(f"{folder / ADAPTER_WEIGHTS}: {name[:120]!r} is no LoRA tensor in PEFT's layout")
        sides[match["module"]][match["side"]] = shape
    alone = next((module for module, found in sides.items() if len(found) != 2), None)
    if alone is not None or not sides:
        what = f"{alone[:120]!r} has only one of A and B" if alone else "no tensors"
        raise ModelError(f"{folder / ADAPTER_WEIGHTS}: {what}: the adapter is incomplete")
    return {module: (found["A"], found["B"]) for module, found in sides.items()}


def _fits(config: Mapping[str, Any], module: str, rows: list[int]) -> bool:
    """Whether `rows`, one number per wrapper that PEFT nests on this module, follow from the configured ranks.

    A target with a path (`experts.down_proj`) belongs to its module for sure, one without (`down_proj`) perhaps. All
    stacks of a module have the same number of experts; a router's weight counts as one.
    """
    if _is_linear(config, module):
        return rows == [_rank(config, module)]
    targets = [t for t in config.get("target_parameters") or [] if _holds(module, t)]
    ranks = {target: _rank(config, f"{module}.{target.rpartition('.')[2]}") for target in targets}
    sure = [rank for target, rank in ranks.items() if "." in target]
    perhaps = [rank for target, rank in ranks.items() if "." not in target]
    if not len(sure) <= len(rows) <= len(ranks):
        return False
    for chosen in itertools.combinations(perhaps, len(rows) - len(sure)):
        expected = sorted([*sure, *chosen])
        experts = sum(rows) // sum(expected)
        if sorted(rows) == [experts * rank for rank in expected]:
            return True
    return False


def _holds(module: str, parameter: str) -> bool:
    """Whether PEFT's target parameter (`mlp.experts.down_proj`, or `down_proj` alone) may lie in this module."""
    owner = parameter.rpartition(".")[0]
    return not owner or module == owner or module.endswith(f".{owner}")


def _is_linear(config: Mapping[str, Any], module: str) -> bool:
    targets = config.get("target_modules") or []
    try:
        return (
            bool(match_target_against_key(targets, module))
            if isinstance(targets, str)
            else any(module == target or module.endswith(f".{target}") for target in targets)
        )
    except re.error as error:
        raise ModelError(f"{ADAPTER_CONFIG}: target_modules: not a regular expression: {error}") from None


def _rank(config: Mapping[str, Any], key: str) -> int:
    patterns = config.get("rank_pattern") or {}
    try:
        return int(patterns.get(get_pattern_key(list(patterns), key), config["r"]))
    except re.error as error:
        raise ModelError(f"{ADAPTER_CONFIG}: rank_pattern: not a regular expression: {error}") from None


@dataclass(frozen=True)
class _Facts:
    shapes: Shapes
    broken: tuple[str, ...]
    zero: tuple[str, ...]


def _read_facts(folder: Path) -> _Facts:
    shapes: Shapes = {}
    broken, zero = [], []
    with _open_weights(folder) as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            tensor = file.get_tensor(name)
            shapes[name] = tuple(tensor.shape)
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                broken.append(name)
            elif _side(name) == "B" and not tensor.any():
                zero.append(name)
    return _Facts(shapes, tuple(broken), tuple(zero))


def _finite(facts: _Facts) -> Check:
    total = len(facts.shapes)
    where = f": {facts.broken[0]} is not: train again with a lower learning rate" if facts.broken else ""
    return Check("finite", not facts.broken, f"{total - len(facts.broken)} of {total} tensors are finite{where}")


def _moved(facts: _Facts) -> Check:
    total = sum(_side(name) == "B" for name in facts.shapes)
    where = f": {facts.zero[0]} is still zero: it was never trained" if facts.zero else ""
    return Check("moved", not facts.zero, f"{total - len(facts.zero)} of {total} adapters moved{where}")


def _side(name: str) -> str:
    match = _TENSOR.fullmatch(name)
    return match["side"] if match else ""


def _read_shapes(folder: Path) -> Shapes:
    return {name: tensor.shape for name, tensor in read_header(folder / ADAPTER_WEIGHTS, "copy it again").items()}


@contextmanager
def _open_weights(folder: Path) -> Iterator[Any]:
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{folder / ADAPTER_WEIGHTS}: not a safetensors file ({first_line(error)[:120]}): copy it again"
        ) from None


def require_base(folder: str | Path, base: str, revision: str = "main") -> None:
    """Raise `ModelError` where an artifact was trained on other weights than those of `base`.

    An adapter without our manifest does not say what it was trained on, and the bytes of our int8 files say nothing of
    the checkpoint they were rounded from, on either side: all of these pass.
    """
    if not (Path(folder) / MANIFEST).is_file():
        return
    if not (identify_base(base, revision).is_int8 or read_manifest(folder)["base"].get("is_int8")):
        _check_base_weights(Path(folder), base, revision)


def _check_base_weights(folder: Path, base: str, revision: str) -> str:
    made_on, given = read_manifest(folder)["base"], identify_base(base, revision)
    if given.weights_sha256 != made_on["weights_sha256"]:
        raise ModelError(
            f"{base}: other weights than the adapter's base {made_on['name']}: give the base it was trained on"
        )
    return f"{given.name} holds the weights the adapter was trained on"


def _check_base_layout(folder: Path, base: str, revision: str) -> str:
    found, expected = _read_shapes(folder), _stock_shapes(folder, base, revision)
    wrong = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"{folder / ADAPTER_WEIGHTS}: {name}: {found.get(name, 'missing')}, where PEFT on {base} has "
            f"{expected.get(name, 'nothing')} ({len(wrong)} of {len(expected)} differ)"
        )
    return f"{len(found)} of {len(expected)} tensors are where stock PEFT puts them on this base"


def _stock_shapes(folder: Path, base: str, revision: str) -> Shapes:
    """Names and shapes of the adapter that stock PEFT creates from this configuration on the base, without weights."""
    try:
        config = read_config(base, revision)
        lora = LoraConfig.from_pretrained(str(folder))
        lora.init_lora_weights = False
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of ranks per parameter as unmatched, though it applies them.
            blank = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            make_room(blank, token_ids(load_adapter_config(folder)))
            model = PeftModel(blank, lora)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG}: PEFT cannot apply it to {base}: {first_line(error)}") from None
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
