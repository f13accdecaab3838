"""Round trip of every export layout over tiny random checkpoints of every family that transformers has.

    .venv/bin/python scripts/parity/layouts.py [FAMILY …]

For each family an adapter on experts, router and attention (rsLoRA, a rank and an alpha of its own for the experts) is
exported to each format; an export is read back and compared by the exporter itself, with its tokenizer and end tokens.
Prints one line a family and exits with 1 where fewer than twelve families have a layout, or one of those named has not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness.families import build, families, tiny_config
from toolkit.adapters import attach_lora
from toolkit.artifact import write_artifact
from toolkit.checkpoint.identity import identify_base
from toolkit.errors import ModelError, RecipeError
from toolkit.export import FORMATS, TAKES_QUANT
from toolkit.export.write import export_adapter

__all__ = ["family_parser", "main", "make_adapter", "round_trips"]

NANO = Path(__file__).resolve().parents[2] / "recipes/quickstart/nano-qwen3moe-2m"


def family_parser(description: str | None, venv: Path | None = None) -> argparse.ArgumentParser:
    """Takes model types; with `venv`, the default of another environment's folder, also that and a file for figures."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="model types; all by default")
    if venv is not None:
        parser.add_argument("--venv", type=Path, default=venv, help="the other environment")
        parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def make_adapter(model_type: str, scratch: Path, **changed: Any) -> tuple[PeftModel, Path]:
    """A tiny random checkpoint in `scratch/base` in fp32, adapted, and the adapter's artifact.

    `changed` are fields of its config.
    """
    from transformers import AutoTokenizer

    base = scratch / "base"
    config = tiny_config(model_type)
    for field, value in changed.items():
        setattr(config.get_text_config(), field, value)
    build(config).save_pretrained(base)
    model = attach_lora(
        build(config),
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"experts": 3},
        alpha_pattern={"experts": 5},
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    artifact = write_artifact(
        model,
        AutoTokenizer.from_pretrained(NANO),
        scratch / "adapter",
        base=identify_base(str(base)),
        recipe_yaml="",
        results={},
        coverage={},
        chat={"stop_token_ids": [2, 5]},
    )
    return model, artifact


_OF_FLOATS = tuple(name for name in FORMATS if name not in ("merged-source", *TAKES_QUANT))
"""Layouts of a base in floats; those in one type of several have scripts of their own."""


def round_trips(model_type: str, scratch: Path, formats: tuple[str, ...] = _OF_FLOATS) -> dict[str, str]:
    """By format, how far off the export was when read back, or the line that says why there is none."""
    _, artifact = make_adapter(model_type, scratch)
    found = {}
    for layout in formats:
        try:
            found[layout] = f"{export_adapter(artifact, scratch / 'base', layout, scratch / layout).difference:.1e}"
        except (ModelError, RecipeError) as error:
            found[layout] = f"no: {str(error)[:150]}"
        except Exception as error:  # a fault, not a refusal; the table goes on
            found[layout] = f"no: {type(error).__name__}: {str(error)[:150]}"
    return found


def main(names: list[str]) -> int:
    """Print the table; the exit status."""
    warnings.simplefilter("ignore")
    count = dict.fromkeys(_OF_FLOATS, 0)
    wanted = names or [family.model_type for family in families()]
    for name in wanted:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                found = round_trips(name, Path(scratch))
            except Exception as error:  # the table goes on
                found = {"all": f"no: {type(error).__name__}: {str(error)[:150]}"}
        for layout, result in found.items():
            if layout in count and not result.startswith("no"):
                count[layout] += 1
        print(name, found, flush=True)
    print(count)
    return int(min(count.values()) < (len(names) or 12))


if __name__ == "__main__":
    sys.exit(main(family_parser(__doc__).parse_args().families))
