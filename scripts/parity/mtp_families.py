"""Which families' own multi-token-prediction heads load, train, and come back to stock transformers; one line each.

    .venv/bin/python scripts/parity/mtp_families.py [FAMILY …]

The families are those whose classes in the installed transformers leave such keys out when they load a model. Each gets
a tiny checkpoint with a random head in its layout; then: loaded (every tensor equal to what was written, experts to an
int8 step), trained three steps, written under the same names, and drafted with by stock transformers and by us.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers.utils import logging

from tests.harness.families import Family, families
from tests.harness.native_heads import LAYOUTS, layout_of, native_checkpoint, our_draft, stock, stock_draft, trained
from toolkit.mtp.decode import can_speculate
from toolkit.mtp.head_file import load_native, native_keys, read_head
from toolkit.quant import load_int8

__all__ = ["ignored_keys", "main", "round_trip"]


def ignored_keys(family: Family) -> list[str]:
    """Patterns of a head's keys that the family's class leaves out."""
    module = importlib.import_module(f"transformers.models.{family.folder}.modeling_{family.folder}")
    ignored = getattr(module, family.model_class)._keys_to_ignore_on_load_unexpected or []
    return [pattern for pattern in ignored if "mtp" in pattern or "layers" in pattern]


def round_trip(family: str, layout: str, folder: Path) -> list[str]:
    """What was reached, in order; ends where something failed, with its line."""
    reached: list[str] = []
    try:
        written = native_checkpoint(family, folder / "base", layout)
        model, _ = load_int8(str(folder / "base"))
        keys = native_keys(folder / "base", model.config)
        head = load_native(model, keys)
        reached.append(f"loaded ({len(written)} tensors)")
        state = trained(model, head)
        assert state.keys() == written.keys()
        reached.append("trained, same names")
        reached.append(_drafts(folder, state, keys))
        reached.append("" if can_speculate(model) is None else "no drafts with it: running state")
    except Exception as error:  # a sweep goes on with the next family
        reached.append(f"{type(error).__name__}: {str(error).splitlines()[0][:110] if str(error) else ''}")
    return [line for line in reached if line]


def _drafts(folder: Path, state: dict[str, torch.Tensor], keys: object) -> str:
    merged, artifact = folder / "merged", folder / "artifact"
    for path in (merged, artifact):
        path.mkdir()
    save_file(state, artifact / "mtp_head.safetensors", metadata={"format": "pt"})
    whole = {**load_file(folder / "base" / "model.safetensors"), **state}
    save_file(whole, merged / "model.safetensors", metadata={"format": "pt"})
    (merged / "config.json").write_text((folder / "base" / "config.json").read_text())
    theirs = stock(merged)
    ours = read_head(artifact, theirs, keys)  # type: ignore[arg-type]
    prompts = torch.randint(3, theirs.get_input_embeddings().weight.shape[0], (6, 9), generator=torch.Generator())
    mine = [our_draft(theirs, ours, prompt) for prompt in prompts]
    try:
        same = mine == [stock_draft(theirs, prompt) for prompt in prompts]
    except Exception as error:
        return f"drafts with ours; stock cannot: {str(error).splitlines()[0][:70]}"
    return "stock drafts the same" if same else "STOCK DRAFTS OTHERWISE"


def main() -> None:
    """All families, or those named."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    whole = 0
    for family in families():
        patterns = ignored_keys(family)
        if not patterns or (sys.argv[1:] and family.model_type not in sys.argv[1:]):
            continue
        layout = LAYOUTS.get(family.model_type) or layout_of(patterns)
        with tempfile.TemporaryDirectory() as folder:
            reached = round_trip(family.model_type, layout, Path(folder))
        whole += "stock drafts the same" in reached
        print(f"{family.model_type:18} {layout:7} {'; '.join(reached)}", flush=True)
    print(f"{whole} families come back to stock transformers with the same drafts")


if __name__ == "__main__":
    main()
