"""Stock transformers and PEFT, in an environment of their own, on exports of many families: do they get our logits?

    .venv/bin/python scripts/parity/stock_families.py [FAMILY …] [--json FILE]

Each family has a tiny random checkpoint and an adapter on experts, router and attention (rsLoRA, a rank and an alpha of
its own for the experts). Stock PEFT loads the `peft` export on the base, stock transformers the `merged` one, both in
fp32 and from a bf16 checkpoint; the table has the largest differences of the logits from ours. Exits with 1 where an
fp32 one is over 1e-4, or fewer than twelve families, or than those named, were compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "scripts/parity")]

from layouts import family_parser, make_adapter  # noqa: E402
from second_environment import python_with  # noqa: E402

from tests.harness.families import families  # noqa: E402
from toolkit.artifact import read_manifest  # noqa: E402
from toolkit.artifact.manifest import write_json  # noqa: E402
from toolkit.checkpoint.identity import identify_base  # noqa: E402
from toolkit.export.write import export_adapter  # noqa: E402
from toolkit.ops import DEFAULT_BACKEND  # noqa: E402

__all__ = ["main"]

WITHIN = 1e-4
LEAST = 12
IDS = torch.randint(3, 97, (1, 23), generator=torch.Generator().manual_seed(5)).tolist()
COLUMNS = ("adapter", "merged", "bf16 adapter", "bf16 merged")


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status."""
    options = family_parser(__doc__, ROOT / ".venv-parity").parse_args(arguments)
    warnings.simplefilter("ignore")
    python = python_with(options.venv, ("torch", "transformers", "peft"))
    rows: dict[str, dict[str, Any]] = {}
    for name in options.families or [family.model_type for family in families()]:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                rows[name] = _compared(name, Path(scratch), python)
            except Exception as error:  # the table goes on
                rows[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        print(name, rows[name], file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2, sort_keys=True))
    return _printed(rows, len(options.families) or LEAST)


def _compared(name: str, folder: Path, python: str) -> dict[str, Any]:
    """Largest differences of the logits from ours, and how far the adapter moves them."""
    model, artifact = make_adapter(name, folder)
    base = model.get_base_model()
    base.set_experts_implementation(DEFAULT_BACKEND)
    ours = {"adapter": _logits(model)}
    with model.disable_adapter():
        plain = _logits(model)
    ours["merged"] = ours["adapter"]
    sixteen = folder / "bf16" / "base"
    _round(folder / "base", sixteen, base)
    ours["bf16 adapter"] = ours["bf16 merged"] = _logits(model)
    export_adapter(artifact, folder / "base", "peft", folder / "peft")
    export_adapter(artifact, folder / "base", "merged", folder / "merged")
    manifest = read_manifest(artifact)
    manifest["base"]["weights_sha256"] = identify_base(str(sixteen)).weights_sha256
    write_json(artifact / "manifest.json", manifest)
    export_adapter(artifact, sixteen, "merged", folder / "merged16")
    jobs = {
        "adapter": [str(folder / "base"), str(folder / "peft")],
        "merged": [str(folder / "merged"), None],
        "bf16 adapter": [str(sixteen), str(folder / "peft")],
        "bf16 merged": [str(folder / "merged16"), None],
    }
    (folder / "job.json").write_text(json.dumps({"models": jobs, "prompts": IDS, "out": str(folder)}))
    side = Path(__file__).with_name("stock_side.py")
    done = subprocess.run(
        [python, "-I", str(side), str(folder / "job.json")], capture_output=True, text=True, cwd=folder
    )
    if done.returncode:
        raise RuntimeError(([line for line in done.stderr.splitlines() if line.strip()] or ["no message"])[-1])
    report, theirs = json.loads((folder / "report.json").read_text()), load_file(folder / "logits.safetensors")
    found = {column: float((theirs[column] - ours[column]).abs().max()) for column in COLUMNS}
    return {**found, "moved": float((ours["adapter"] - plain).abs().max()), **report}


@torch.no_grad()
def _logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor(IDS)).logits[0].float()
    return found


def _round(source: Path, target: Path, base: torch.nn.Module) -> None:
    """A copy of the base in bf16, and its values in our model too."""
    from transformers import AutoConfig

    from toolkit.architecture import auto_class

    config = AutoConfig.from_pretrained(source)
    auto_class(config).from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)
    again = auto_class(config).from_pretrained(target, dtype=torch.float32).state_dict()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            plain = name.replace(".base_layer", "")
            if plain in again:
                parameter.copy_(again[plain])


def _printed(rows: dict[str, dict[str, Any]], least: int) -> int:
    print(f"| family | {' | '.join(COLUMNS)} | moved by the adapter |\n|---|{'---:|' * (1 + len(COLUMNS))}")
    good, bad = 0, []
    for name, row in rows.items():
        if "error" in row:
            continue
        print(f"| {name} | {' | '.join(f'{row[column]:.1e}' for column in (*COLUMNS, 'moved'))} |")
        holds = max(row["adapter"], row["merged"]) <= WITHIN and not row["missing"] and not row["unexpected"]
        good += holds
        bad += [] if holds else [name]
    print("\n".join(f"- {name}: {row['error']}" for name, row in rows.items() if "error" in row))
    print(f"\n{good} of {len(rows)} families within {WITHIN:.0e} in fp32; over it: {bad or 'none'}")
    return int(bool(bad) or good < least)


if __name__ == "__main__":
    sys.exit(main())
