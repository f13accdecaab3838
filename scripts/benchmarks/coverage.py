"""What becomes int8 and what LoRA reaches, family by family: onecard against stock bitsandbytes and PEFT.

    .venv/bin/python scripts/benchmarks/coverage.py [--json] [MODEL_TYPE ...]

Builds a tiny random checkpoint of every MoE family in the installed transformers (as tests/parity does), loads it both
ways and counts. Stock is `BitsAndBytesConfig(load_in_8bit=True)` and `LoraConfig(target_modules="all-linear")`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the families are built by the tests' own module
os.environ.setdefault("HF_HUB_OFFLINE", "1")

__all__ = ["Row", "main", "row", "totals"]

Count = tuple[int, int]


@dataclass(frozen=True)
class Row:
    """One family: (reached, all) of each part, None where the side could not do it at all, and why not."""

    family: str
    int8: Count | None = None
    experts: Count | None = None
    routers: Count | None = None
    stock_int8: Count | None = None
    stock_experts: Count | None = None
    stock_routers: Count | None = None
    refused: str = ""
    stock_refused: str = ""


def row(family: str, folder: Path) -> Row:
    """Both sides of one family, on a checkpoint made in `folder`."""
    from tests.harness.families import build, tiny_config
    from toolkit.errors import OnecardError

    build(tiny_config(family)).save_pretrained(folder)
    try:
        int8, experts, routers = _ours(str(folder))
    except OnecardError as error:
        return Row(family, refused=str(error))
    stock_int8, no_int8 = _attempt(_stock_int8, str(folder))
    reached, no_lora = _attempt(_stock_lora, str(folder))
    stock_experts, stock_routers = reached or (None, None)
    failed = "; ".join(reason for reason in (no_int8, no_lora) if reason)
    return Row(family, int8, experts, routers, stock_int8, stock_experts, stock_routers, stock_refused=failed)


def _ours(folder: str) -> tuple[Count, Count, Count]:
    from toolkit.adapters import adapter_coverage, attach_lora
    from toolkit.quant import load_int8

    model, stored = load_int8(folder)
    peft_model = attach_lora(model, r=2)
    _forward(peft_model)
    adapted = adapter_coverage(peft_model)
    return (
        (stored.stacks_int8, stored.stacks),
        (adapted.stacks, adapted.stacks_all),
        (adapted.routers, adapted.routers_all),
    )


def _stock_int8(folder: str) -> Count:
    from transformers import BitsAndBytesConfig

    from toolkit.quant import measure

    stored = measure(_stock(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True)))
    return stored.stacks_int8, stored.stacks


def _stock_lora(folder: str) -> tuple[Count, Count]:
    from peft import LoraConfig, get_peft_model

    from toolkit.adapters import adapter_coverage

    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(_stock(folder), config)
    _forward(peft_model)
    reached = adapter_coverage(peft_model)
    return (reached.stacks, reached.stacks_all), (reached.routers, reached.routers_all)


def _forward(model: Any) -> None:
    """An adapter that cannot run reaches nothing."""
    import torch

    with torch.no_grad():
        model(input_ids=torch.arange(3, 35).view(2, 16))


def _stock(folder: str, **arguments: Any) -> Any:
    import torch
    from transformers import AutoConfig

    from toolkit.architecture import auto_class

    loader = auto_class(AutoConfig.from_pretrained(folder))
    return loader.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"}, **arguments)


def _attempt(side: Callable[[str], Any], folder: str) -> tuple[Any, str]:
    """What `side` counts, or why it cannot: stock software may fail in any way, and that is a result here."""
    try:
        return side(folder), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}"


def totals(rows: Sequence[Row]) -> dict[str, int]:
    """Families in which every part was reached."""
    kinds = ("int8", "experts", "routers", "stock_int8", "stock_experts", "stock_routers")
    counts = {kind: sum(_whole(getattr(r, kind)) for r in rows) for kind in kinds}
    both = sum(_whole(r.stock_experts) and _whole(r.stock_routers) for r in rows)
    refused = sum(bool(r.refused) for r in rows)
    return {"families": len(rows), **counts, "stock_experts_and_routers": both, "refused": refused}


def _whole(count: Count | None) -> bool:
    return count is not None and count[0] == count[1] > 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="only these families")
    parser.add_argument("--json", action="store_true", help="rows and totals as JSON on stdout")
    options = parser.parse_args(arguments)
    from tests.harness.families import families

    wanted = options.model_types or [family.model_type for family in families()]
    _quiet()
    rows = []
    for family in wanted:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(family, Path(folder)))
        if not options.json:
            print(_line(rows[-1]) if len(rows) > 1 else f"{_HEADER}\n{_line(rows[-1])}", flush=True)
    summary = totals(rows)
    if options.json:
        print(json.dumps({"totals": summary, "rows": [asdict(r) for r in rows]}, indent=1))
    else:
        print("\nfamilies with every part reached: " + ", ".join(f"{key} {value}" for key, value in summary.items()))
    return 0


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


_HEADER = f"{'family':24} | ours: int8 experts router | stock: int8 experts router | why not"


def _line(r: Row) -> str:
    ours = f"{_cell(r.int8):>10} {_cell(r.experts):>7} {_cell(r.routers):>6}"
    stock = f"{_cell(r.stock_int8):>11} {_cell(r.stock_experts):>7} {_cell(r.stock_routers):>6}"
    return f"{r.family:24} | {ours} | {stock} | {r.refused or (r.stock_refused and 'stock: ' + r.stock_refused)}"


def _cell(count: Count | None) -> str:
    return "-" if count is None else f"{count[0]}/{count[1]}"


if __name__ == "__main__":
    sys.exit(main())
