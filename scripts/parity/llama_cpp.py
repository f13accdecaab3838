"""Does llama.cpp get the same logits from our exports as we do? A GGUF LoRA, and a merged checkpoint that it converts.

    .venv/bin/python scripts/parity/llama_cpp.py [FAMILY …] [--json FILE]

Makes (once) an environment with libllama (the wheel of xllamacpp) and llama.cpp's converter out of the source package
of llama-cpp-python. Each family's tiny random checkpoint gets an adapter on experts, router and attention (rsLoRA, a
rank and an alpha of its own for the experts). llama.cpp converts the base and the merged export and loads the GGUF LoRA
on the base; its logits are compared with ours, in fp32 and over their standard deviation. The column "base" is how far
the two programs differ without any adapter. Exits with 1 where an adapter or a merge is further off than ten times that
and a thousandth.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "scripts/parity")]

from layouts import family_parser, make_adapter  # noqa: E402
from second_environment import python_with  # noqa: E402

from tests.harness.families import families  # noqa: E402
from toolkit.errors import ModelError, RecipeError  # noqa: E402
from toolkit.export.write import export_adapter  # noqa: E402
from toolkit.ops import DEFAULT_BACKEND  # noqa: E402

__all__ = ["PACKAGES", "SPREAD", "TOKENS", "TOLD", "logits_of", "loss_of", "main", "other_side", "quantiser"]

LIBRARY, QUANTISER, SOURCE = "xllamacpp==2026.10.11549", "cyllama==0.2.18", "llama-cpp-python==0.3.36"
PACKAGES = ("torch", "transformers", "numpy", "sentencepiece", LIBRARY, QUANTISER)
"""Of the other environment, beside what is taken out of `SOURCE`."""
TOKENS = [int(token) for token in torch.randint(3, 97, (23,), generator=torch.Generator().manual_seed(5))]
SPREAD = 1e-3
TOLD: dict[str, dict[str, Any]] = {
    "afmoe": {
        "mup_enabled": True,
        "route_norm": True,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    "deepseek_v3": {"scoring_func": "sigmoid"},
    "laguna": {"sliding_window": 0},
    "qwen3_moe": {"norm_topk_prob": True},
    "solar_open": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}},
}
"""What llama.cpp takes for granted of a family, as in its published models, where the config's default is otherwise."""


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status."""
    options = family_parser(__doc__, ROOT / ".venv-llama").parse_args(arguments)
    warnings.simplefilter("ignore")
    python, converter = other_side(options.venv)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        models, ours = {}, {}
        for name in options.families or [family.model_type for family in families()]:
            try:
                models[name], ours[name], rows[name] = _prepared(name, Path(scratch) / name)
            except Exception as error:  # a family that this transformers cannot build; the table goes on
                rows[name] = {"gguf": f"{type(error).__name__}: {error}"}
            print(name, rows[name], file=sys.stderr, flush=True)
        job = {"converter": str(converter), "tokens": TOKENS, "out": scratch, "models": models}
        path = Path(scratch) / "job.json"
        path.write_text(json.dumps(job))
        side = [python, str(Path(__file__).with_name("llama_side.py"))]
        subprocess.run([*side, "convert", str(path)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name in models:
            done = subprocess.run([*side, "run", str(path), name], capture_output=True, text=True, check=False)
            rows[name] |= _compared(Path(scratch), name, ours[name], done)
    return _printed(rows, options.json)


def _prepared(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
    """The files of one family, our logits, and the line that says why there is no GGUF LoRA or merge."""
    folder.mkdir()
    model, artifact = make_adapter(name, folder, **TOLD.get(name, {}))
    model.get_base_model().set_experts_implementation(DEFAULT_BACKEND)
    ours = {"adapter": logits_of(model)}
    with model.disable_adapter():
        ours["base"] = logits_of(model)
    files, refused = {"base": str(folder / "base"), "merged": None, "adapter": None}, {}
    for layout in ("gguf", "merged"):
        try:
            export_adapter(artifact, folder / "base", layout, folder / layout)
        except (ModelError, RecipeError) as error:
            refused[layout] = str(error)
            continue
        if layout == "gguf":
            files["adapter"] = str(folder / "gguf/adapter.gguf")
        else:
            files["merged"] = str(folder / "merged")
    return files, ours, refused


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> np.ndarray:
    """Logits [T, V] of `TOKENS`, fp32."""
    found: np.ndarray = model(torch.tensor([TOKENS])).logits[0].float().numpy()
    return found


def loss_of(logits: np.ndarray, adapted: np.ndarray) -> float:
    """Mean loss of the tokens that the adapted model finds likeliest, in nats; both are logits [T, V]."""
    likeliest = torch.from_numpy(adapted).argmax(-1)
    return float(torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), likeliest))


def _compared(out: Path, name: str, ours: dict[str, np.ndarray], done: Any) -> dict[str, Any]:
    """Largest differences of the logits over their standard deviation, and how far the adapter moves them."""
    row: dict[str, Any] = json.loads((out / f"{name}.json").read_text()) if (out / f"{name}.json").is_file() else {}
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
        return {**row, "base": row.get("base", f"libllama ended with {done.returncode}: {last[0][:200]}")}
    with np.load(out / f"{name}.npz") as theirs:
        spread = float(ours["base"].std())
        for kind in theirs.files:
            row[kind] = float(np.abs(theirs[kind] - ours["base" if kind == "base" else "adapter"]).max()) / spread
    row["moved"] = float(np.abs(ours["adapter"] - ours["base"]).max()) / spread
    return row


def _printed(rows: dict[str, dict[str, Any]], path: Path | None) -> int:
    if path:
        path.write_text(json.dumps(rows, indent=2, sort_keys=True))
    print("| family | base | base + GGUF LoRA | merged | moved by the adapter |\n|---|---:|---:|---:|---:|")
    worse = []
    for name, row in rows.items():
        if isinstance(row.get("base"), float):
            cells = [_cell(row.get(kind)) for kind in ("base", "adapter", "merged", "moved")]
            print(f"| {name} | {' | '.join(cells)} |")
            bound = 10 * row["base"] + SPREAD
            worse += [name for kind in ("adapter", "merged") if isinstance(row.get(kind), float) and row[kind] > bound]
    for kind, what in (("gguf", "no GGUF LoRA"), ("adapter", "LoRA not loaded"), ("base", "base not run")):
        print(f"\n{what}:")
        print("\n".join(f"- {name}: {row[kind]}" for name, row in rows.items() if isinstance(row.get(kind), str)))
    run = [row for row in rows.values() if isinstance(row.get("base"), float)]
    good = sum(isinstance(row.get("adapter"), float) for row in run)
    print(f"\n{len(run)} of {len(rows)} families run, {good} with a GGUF LoRA; too far off: {worse or 'none'}")
    return int(bool(worse))


def _cell(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else "–"


def other_side(folder: Path) -> tuple[str, Path]:
    """The environment's Python, and the folder with llama.cpp's converter."""
    python = python_with(folder, PACKAGES)
    source = folder / "llama.cpp"
    if not (source / "conversion").is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            command = [
                python,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--no-binary",
                ":all:",
                "-d",
                scratch,
                SOURCE,
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
                _unpack(archive, source)
    return python, source


def quantiser(python: str, program: Path) -> str:
    """A program like llama.cpp's llama-quantize, of that environment's library."""
    from toolkit.export import llama_quantize

    side = Path(llama_quantize.__file__).with_name("quantiser_side.py")
    program.write_text(f'#!/bin/sh\nexec "{Path(python).absolute()}" "{side}" "" "$@"\n')
    program.chmod(0o755)
    return str(program)


def _unpack(archive: tarfile.TarFile, folder: Path) -> None:
    for member in archive.getmembers():
        _, _, path = member.name.partition("/vendor/llama.cpp/")
        if path.startswith(("conversion/", "gguf-py/gguf/")):
            member.name = path
            archive.extract(member, folder, filter="data")


if __name__ == "__main__":
    sys.exit(main())
