"""Do other programs compute from merged FP8, int8, int4 and MLX checkpoints what we read in them?

    .venv/bin/python scripts/parity/merged_checkpoints.py [FAMILY …] [--only FORMAT …] [--json FILE]

Each family's tiny random checkpoint gets an adapter on experts, router and attention, and is exported as `merged-vllm`
in FP8, int8 and int4, and as `merged-mlx` in 8 and 4 bits. The first three are loaded by stock transformers with the
compressed-tensors package, which vLLM reads such files with, in an environment of its own; the others by mlx-lm on a
CPU. The largest difference of their logits from ours of the same file is printed, over the logits' standard deviation,
and beside it how far rounding moved them. The second table has the loss of the adapted model's own likeliest tokens: of
the base, with the adapter in floats, and of each file as we read it and as the program computes it. What cannot be
exported is told with its line. Exits with 1 where a program does not load a file, or gets other logits than ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "scripts/parity")]

from format_writers import PACKAGES  # noqa: E402
from layouts import family_parser, make_adapter  # noqa: E402
from llama_cpp import TOKENS, logits_of, loss_of  # noqa: E402
from second_environment import python_with  # noqa: E402

from toolkit.errors import ModelError  # noqa: E402
from toolkit.export.survival import looked_at, streamed_logits  # noqa: E402
from toolkit.export.write import export_adapter  # noqa: E402
from toolkit.families import MLX_EXPERTS  # noqa: E402
from toolkit.ops import DEFAULT_BACKEND  # noqa: E402

__all__ = ["main"]

FORMATS = {"merged-vllm": ("fp8", "int8", "int4"), "merged-mlx": ("8bit", "4bit")}
READERS = {"merged-vllm": ("compressed_tensors", "format_stock_side.py"), "merged-mlx": ("mlx", "mlx_read_side.py")}
FAMILIES = [*sorted(MLX_EXPERTS), "ernie4_5_moe", "minimax_m2"]
EXACT = 1e-4
SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"scoring_func": "sigmoid"},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
    "qwen3_moe": {"norm_topk_prob": True},
}
"""What mlx-lm wants to be told. gpt-oss' stretched rotary embedding it computes otherwise, by 2e-2, in its base too."""
TEXTS = [TOKENS, TOKENS[::-1]]
"""For the measurement that rounding to four bits asks for."""


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status."""
    parser = family_parser(__doc__, ROOT / ".venv-formats")
    parser.add_argument("--only", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders: dict[str, dict[str, str]] = {layout: {} for layout in options.only}
        for family in options.families or FAMILIES:
            rows |= _exported(family, Path(scratch) / family, folders)
        for layout, models in folders.items():
            _read(layout, models, Path(scratch), options.venv)
        for models in folders.values():
            for name in models:
                rows[name] |= _compared(Path(scratch), name, rows[name])
    return _printed(rows, options.json)


def _exported(family: str, folder: Path, folders: dict[str, dict[str, str]]) -> dict[str, dict[str, Any]]:
    folder.mkdir()
    model, artifact = make_adapter(family, folder, **SETTINGS.get(family, {}))
    model.get_base_model().set_experts_implementation(DEFAULT_BACKEND)
    adapted, (batch, _) = logits_of(model), looked_at([TOKENS])
    with model.disable_adapter():
        before = {"base": loss_of(logits_of(model), adapted), "adapter": loss_of(adapted, adapted)}
    rows: dict[str, dict[str, Any]] = {}
    for layout, models in folders.items():
        for quant in FORMATS[layout]:
            name, out = f"{family} {quant}", folder / f"{layout}-{quant}"
            try:
                export_adapter(artifact, folder / "base", layout, out, quant=quant, texts=TEXTS, force=True)
            except ModelError as error:
                rows[name] = {"no": str(error)}
                continue
            ours = streamed_logits(out, batch).numpy()
            np.savez(folder.parent / f"ours {name}.npz", logits=ours, adapted=adapted)
            loss = {**before, "ours": loss_of(ours, adapted)}
            rows[name] = {"rounded": float(np.abs(ours - adapted).max() / ours.std()), "loss": loss}
            models[name] = str(out)
    return rows


def _read(layout: str, models: dict[str, str], scratch: Path, environments: Path) -> None:
    """By the program that the files are for, in its environment."""
    package, program = READERS[layout]
    side = PACKAGES[package]
    python = python_with(environments / package, ("torch==2.13.0", *side.packages), pins=None, alone=side.alone)
    job = scratch / f"{layout}.json"
    job.write_text(json.dumps({"tokens": TOKENS, "seconds": 120, "out": str(scratch), "models": models}))
    places = [Path(__file__).with_name(program), Path(__file__).parent / "format_sides" / program]
    command = [str(Path(python).absolute()), str(next(place for place in places if place.is_file())), str(job)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _compared(out: Path, name: str, row: dict[str, Any]) -> dict[str, Any]:
    if (out / f"{name}.txt").is_file():
        return {"error": (out / f"{name}.txt").read_text()}
    npz = out / f"{name}.npz"
    theirs = np.load(npz)["logits"] if npz.is_file() else load_file(out / f"{name}.safetensors")["logits"]
    here = np.load(out / f"ours {name}.npz")
    off = float(np.abs(theirs - here["logits"]).max() / here["logits"].std())
    return {"theirs": off, "loss": {**row["loss"], "theirs": loss_of(theirs, here["adapted"])}}


def _printed(rows: dict[str, dict[str, Any]], path: Path | None) -> int:
    if path:
        path.write_text(json.dumps(rows, indent=2, sort_keys=True))
    print("| family, type | their logits against ours | moved by rounding |\n|---|---:|---:|")
    bad = []
    for name, row in rows.items():
        if "no" not in row:
            bad += [name] if row.get("theirs", np.inf) > EXACT else []
            theirs = f"{row['theirs']:.1e}" if "theirs" in row else "–"
            print(f"| {name} | {theirs} | {row['rounded']:.1e} |")
    _print_losses(rows)
    for name, row in rows.items():
        if why := row.get("no") or row.get("error"):
            print(f"- {name}: {why}")
    made = [name for name, row in rows.items() if "no" not in row]
    print(f"\n{len(made) - len(bad)} of {len(made)} files read alike; not: {', '.join(bad) or 'none'}")
    return int(bool(bad) or not made)


def _print_losses(rows: dict[str, dict[str, Any]]) -> None:
    quants = list(dict.fromkeys(name.split()[1] for name in rows))
    print(f"\n| family | base | adapter in floats | {' | '.join(quants)} |\n|---|---:|---:|{'---:|' * len(quants)}")
    for family in dict.fromkeys(name.split()[0] for name in rows):
        found = {quant: rows.get(f"{family} {quant}", {}).get("loss") for quant in quants}
        if before := next((loss for loss in found.values() if loss), None):
            cells = [
                f"{loss['ours']:.4f} / {loss.get('theirs', np.nan):.4f}" if loss else "–" for loss in found.values()
            ]
            print(f"| {family} | {before['base']:.4f} | {before['adapter']:.4f} | {' | '.join(cells)} |")
    print()


if __name__ == "__main__":
    sys.exit(main())
