#!/usr/bin/env python3
"""Write down what plans of the published models ask most, so that `onecard plan` answers without loading torch.

    .venv/bin/python scripts/record_plans.py [--model WORD] [--check [--sample N]]

Each record (toolkit/plan/published/records) holds a model's shapes and the bytes of its steps, rehearsed one by one: of
its recipe and of a recipe of defaults, over lengths and ranks, on a card and on a CPU. It is used only where torch,
transformers and peft are of versions that it was made with. It is of the installed ones and of those of before: what is
not the same with all stands under `differing`, by versions. `--check` rehearses again and compares with what is said of
the installed versions; `--sample` takes every Nth step alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import astuple
from itertools import islice
from pathlib import Path
from typing import Any

from toolkit.architecture import shared_length
from toolkit.plan.shapes import Shapes, by_versions, published, rehearsal_versions
from toolkit.plan.skeletons import shape_of, shapes_of
from toolkit.plan.steps import StepBytes, StepShape, StepSpec, rehearsed, step_spec
from toolkit.recipe import Recipe, load, parse

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "toolkit" / "plan" / "published" / "records"
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
RANKS = (8, 16, 32, 64)


def recipes(name: str) -> Iterator[Recipe]:
    """The recipe of this repository that names the model, and one that says nothing else, packed where that one is."""
    packs = True
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        found = load(path, note=lambda _: None)
        if found.model.model_name_or_path == name:
            packs = found.training.packing
            yield found
    packing = "" if packs else "training: {packing: false}\n"
    yield parse(f"model: {{model_name_or_path: {name}}}\ndata: {{train: none}}\n{packing}")


def step_specs(name: str) -> dict[str, StepSpec]:
    """All that the record answers, by digest."""
    found: dict[str, StepSpec] = {}
    shared = shared_length(shape_of(name))
    for recipe in recipes(name):
        for length, r, kept, device in _choices(recipe):
            spec = step_spec(
                _changed(recipe, r, length, kept),
                StepShape(length, length - 1),
                device=device,
                dtype="bfloat16" if device == "cuda" else "float32",
                backend="onecard_triton" if device == "cuda" else "onecard_per_expert",
                shared_length=shared,
            )
            found[spec.digest()] = spec
    return found


def _choices(recipe: Recipe) -> Iterator[tuple[int, int, bool, str]]:
    """Length, rank, whether activations are kept, device: the recipe, and what a plan tries where it does not fit."""
    longest, r = int(recipe.training.max_length), int(recipe.lora.r)
    yield from ((length, r, False, "cuda") for length in LENGTHS)
    yield from ((longest, rank, False, "cuda") for rank in RANKS)
    yield from ((LENGTHS[0], rank, False, "cuda") for rank in RANKS if rank <= r)
    yield longest, r, True, "cuda"
    yield longest, r, False, "cpu"


def _changed(recipe: Recipe, r: int, length: int, kept: bool) -> Recipe:
    training = recipe.training.model_copy(update={"max_length": length, "gradient_checkpointing": not kept})
    return recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"r": r}), "training": training})


def answer(name: str, spec: StepSpec) -> StepBytes:
    """Rehearsed now."""
    return rehearsed(shape_of(name, attn_implementation=spec.attn), spec)


def fresh(name: str, every: int = 1) -> dict[str, Any]:
    """A model's record, or only every so many of its steps."""
    shapes: Shapes = shapes_of(shape_of(name))
    steps = {}
    for digest, spec in islice(step_specs(name).items(), 0, None, every):
        steps[digest] = list(astuple(answer(name, spec)))
    return {"versions": [rehearsal_versions()], "shapes": shapes.to_record(), "steps": dict(sorted(steps.items()))}


def main() -> int:
    """Write the records, or compare them."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--sample", type=int, default=1, metavar="N", help="compare every Nth step alone")
    given, wrong = parser.parse_args(), 0
    if given.sample != 1 and not given.check:
        parser.error("a record is written whole: --sample goes with --check")
    for name in published():
        if given.model.lower() not in name.lower():
            continue
        began, record = time.perf_counter(), fresh(name, given.sample)
        path = RECORDS / f"{name.replace('/', '__')}.json"
        known = by_versions(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []
        same = _is_said(record, known)
        if given.check:
            wrong += not same
        else:
            RECORDS.mkdir(exist_ok=True)
            path.write_text(_text(joined(record, known)), encoding="utf-8")
        words = "written" if not given.check else "the same" if same else "DIFFERENT"
        print(f"{name}: {len(record['steps'])} steps in {time.perf_counter() - began:.0f} s, {words}", flush=True)
    return 1 if wrong else 0


def _is_said(record: dict[str, Any], known: list[dict[str, Any]]) -> bool:
    """Whether the file says the same of the installed versions, of a sample about the same steps."""
    (installed,) = record["versions"]
    for each in known:
        if installed in each["versions"]:
            steps = {digest: each["steps"].get(digest) for digest in record["steps"]}
            return each["shapes"] == record["shapes"] and steps == record["steps"]
    return False


def joined(record: dict[str, Any], known: list[dict[str, Any]]) -> dict[str, Any]:
    """A file's content: the record of the installed versions in the place of what was said of them before.

    The versions that stood first stay first.
    """
    (installed,) = record["versions"]
    groups: list[dict[str, Any]] = []
    wholes = [(versions, each) for each in known for versions in each["versions"]]
    if not any(versions == installed for versions, _ in wholes):
        wholes.append((installed, record))
    for versions, each in wholes:
        content = record if versions == installed else each
        for group in groups:
            if (group["shapes"], group["steps"]) == (content["shapes"], content["steps"]):
                group["versions"].append(versions)
                break
        else:
            groups.append({"versions": [versions], "shapes": content["shapes"], "steps": content["steps"]})
    first, *others = groups
    differing = [_difference(first, other) for other in others]
    return {**first, "differing": differing} if differing else first


def _difference(first: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    missing = dict.fromkeys(first["steps"].keys() - other["steps"].keys())
    steps = {digest: held for digest, held in other["steps"].items() if first["steps"].get(digest) != held}
    shapes = {} if other["shapes"] == first["shapes"] else {"shapes": other["shapes"]}
    return {"versions": other["versions"], **shapes, "steps": dict(sorted({**steps, **missing}.items()))}


def _text(record: dict[str, Any]) -> str:
    """JSON with a line for each part."""
    parts = [f"{json.dumps(name)}: {_lines(name, value)}" for name, value in record.items()]
    return "{" + ",\n".join(parts) + "}\n"


def _lines(name: str, value: Any) -> str:
    if name == "differing":
        return "[" + ",\n".join(_text(each).rstrip() for each in value) + "]"
    if name != "steps":
        return json.dumps(value)
    return "{\n" + ",\n".join(f"{json.dumps(digest)}: {json.dumps(held)}" for digest, held in value.items()) + "\n}"


if __name__ == "__main__":
    sys.exit(main())
