"""Does llama.cpp compute from a merged GGUF file what the adapted model computes?

    .venv/bin/python scripts/parity/merged_gguf.py [FAMILY …] [--json FILE]

Each family's tiny random checkpoint gets an adapter on experts, router and attention. It is exported as GGUF over the
file that llama.cpp's own converter makes of the base (column "over the base's"), and where files of it are written
without one, also from the checkpoint alone, in F32 and Q8_0. Q4_K_M is made by llama.cpp's own quantiser, over the
base's file where there is one. libllama's logits of each are compared with those of the adapted model here, over their
standard deviation; the column "base" is how far the two programs differ on the base. Where weights are rounded, they
are compared with ours of the same file, of short texts: as onecard reads it ("as read"), and with the inputs of matrix
products rounded as ggml rounds them (rounded_inputs.py). Both are middle differences: a value at the border of two
codes falls either way. Its tokens of some awkward texts must be the tokenizer's. What has no file is told with its
line. The second table has the loss of the adapted model's own likeliest tokens: of the base, with the adapter in
floats, and of each file as we read it and as libllama computes it. Exits with 1 where a family has neither file, or one
is further off than ten times the base and a thousandth.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "scripts/parity")]

from gguf_source import OLDER  # noqa: E402
from layouts import NANO, family_parser, make_adapter  # noqa: E402
from llama_cpp import SPREAD, TOKENS, TOLD, logits_of, loss_of, other_side, quantiser  # noqa: E402
from rounded_inputs import rounded_logits  # noqa: E402

from tests.harness.families import tiny_config  # noqa: E402
from toolkit.checkpoint.formats.gguf_config import model_types  # noqa: E402
from toolkit.errors import ModelError, RecipeError  # noqa: E402
from toolkit.export.survival import looked_at, streamed_logits  # noqa: E402
from toolkit.export.write import export_adapter  # noqa: E402
from toolkit.families import GGUF_READ  # noqa: E402
from toolkit.ops import DEFAULT_BACKEND  # noqa: E402

__all__ = ["main"]

TEXT = 4
"""Tokens of a text where weights are rounded: one whose value falls the other way is seen by few others."""
OTHERWISE = 0.05
"""A base that llama.cpp computes otherwise by that much shows nothing of an adapter."""
TEXTS = [
    "Hello, world!  Two spaces,\n\n\ttabs and 12345.67 numbers; it's (un)tokenised_text.",
    "naïve café – “quotes” … 你好，世界 こんにちは مرحبا 🙂",
    "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n",
    " leading",
]
SETTINGS: dict[str, dict[str, Any]] = {
    **TOLD,
    "dots1": {"sliding_window": None, "norm_topk_prob": True, "layer_types": ["full_attention"] * 3},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
    "granitemoehybrid": {"hidden_size": 32},
    "minimax_m2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
}
"""What llama.cpp takes for granted of a family. gpt-oss' stretched rotary embedding it computes otherwise, by 2e-2."""
WIDE = {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 256}
"""As long as a K-quant's block, in configs that have the field."""
LAYOUTS, ROUND = ("f32", "over", "q8_0", "q4_k_m"), ("q8_0", "q4_k_m")
COLUMNS = ("base", "f32", "over", "q8_0 as read", "q8_0", "q4_k_m as read", "q4_k_m", "moved")


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status."""
    options = family_parser(__doc__, ROOT / ".venv-llama").parse_args(arguments)
    warnings.simplefilter("ignore")
    python, converter = other_side(options.venv)
    names = options.families or [name for known in sorted(GGUF_READ) for name in model_types(known)]
    rows: dict[str, dict[str, Any]] = {name: {} for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        models: dict[str, dict[str, Any]] = {}
        job = {"converter": str(converter), "tokens": TOKENS, "out": scratch, "texts": TEXTS, "models": models}
        job["texts of"] = TEXT
        path, side = Path(scratch) / "job.json", [python, str(Path(__file__).with_name("llama_side.py"))]
        ours = {}
        for name in names:
            try:
                ours[name] = _prepared(name, Path(scratch) / name)
            except (ModelError, ValueError) as error:
                rows[name]["over"] = str(error)
                continue
            files = {"base": str(Path(scratch) / name / "base"), "merged": None, "adapter": None}
            models[name] = files | {"settings": OLDER.get(name, {})}
        path.write_text(json.dumps(job))
        _run([*side, "convert", str(path)])
        for name in ours:
            folder = Path(scratch) / name
            rows[name] |= _exported(folder, quantiser(python, Path(scratch) / "llama-quantize"))
            for layout in LAYOUTS:
                if (folder / layout / "model.gguf").is_file():
                    files = {"base": None, "merged": str(folder / layout / "model"), "adapter": None}
                    models[f"{name} {layout}"] = files
        path.write_text(json.dumps(job))
        for name in ours:
            rows[name] |= _compared(partial(_side, side, path), Path(scratch), name, ours[name])
            print(name, rows[name], file=sys.stderr, flush=True)
    return _printed(rows, options.json)


def _prepared(name: str, folder: Path) -> dict[str, np.ndarray]:
    """The base and the adapter of one family; our logits."""
    folder.mkdir()
    text = tiny_config(name).get_text_config()
    wide = {field: size for field, size in WIDE.items() if hasattr(text, field)}
    model, _ = make_adapter(name, folder, vocab_size=2048, **{**wide, **SETTINGS.get(name, {})})
    model.get_base_model().set_experts_implementation(DEFAULT_BACKEND)
    found = {"adapted": logits_of(model)}
    with model.disable_adapter():
        found["base"] = logits_of(model)
    return found


def _exported(folder: Path, llama_quantize: str) -> dict[str, Any]:
    """By layout why there is none, and what Q4_K_M is stored as; the files lie in folders of their names."""
    row, base = dict[str, Any](), folder / "base.gguf"
    over = base if base.is_file() else None
    by_llama_cpp = {"quant": "q4_k_m", "llama_quantize": llama_quantize, "base_gguf": over}
    options = {"f32": {"quant": "f32"}, "q8_0": {"quant": "q8_0"}, "over": {"base_gguf": base}, "q4_k_m": by_llama_cpp}
    for layout, more in options.items():
        try:
            made = export_adapter(
                folder / "adapter", folder / "base", "gguf-merged", folder / layout, texts=[TOKENS], force=True, **more
            )
        except (ModelError, RecipeError) as error:
            row[layout] = str(error)
            continue
        if layout == "q4_k_m":
            row["stored"], row["fell_back"] = dict(made.stored), list(made.fell_back)
    return row


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _side(side: list[str], path: Path, verb: str, name: str) -> bool:
    done = subprocess.run([*side, verb, str(path), name], capture_output=True, text=True, check=False)
    return done.returncode == 0


def _compared(run: Any, out: Path, name: str, ours: dict[str, np.ndarray]) -> dict[str, Any]:
    """Largest differences over the standard deviation of the base's logits, and losses."""
    row: dict[str, Any] = {}
    spread, adapted = float(ours["base"].std()), ours["adapted"]
    row["moved"] = float(np.abs(adapted - ours["base"]).max()) / spread
    row["loss"] = {"base": loss_of(ours["base"], adapted), "adapter": loss_of(adapted, adapted)}
    run("run", name)
    for kind in ("base", *LAYOUTS):
        label, file = (name if kind == "base" else f"{name} {kind}"), out / name / kind / "model.gguf"
        if kind != "base" and not file.is_file():
            continue
        if kind != "base":
            run("run", label)
        if (out / f"{label}.json").is_file():
            row[kind] = "; ".join(json.loads((out / f"{label}.json").read_text()).values())
        elif (out / f"{label}.npz").is_file():
            with np.load(out / f"{label}.npz") as theirs:
                found, apart = theirs.get("base" if kind == "base" else "merged"), theirs.get("merged apart")
            if found is not None and kind == "base":
                row[kind] = float(np.abs(found - ours["base"]).max()) / spread
            elif found is not None:
                read = streamed_logits(file, looked_at([TOKENS])[0]).numpy()
                row["loss"][kind] = [loss_of(read, adapted), loss_of(found, adapted)]
                row |= _of_rounded(kind, file, apart / spread, spread) if kind in ROUND else {}
                row.setdefault(kind, float(np.abs(found - adapted).max()) / spread)
    if isinstance(row.get("f32"), float) and run("words", f"{name} f32"):
        tokenizer = AutoTokenizer.from_pretrained(NANO)
        wanted_words = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
        row["words"] = json.loads((out / f"{name} f32.words.json").read_text()) == wanted_words
    return row


def _of_rounded(kind: str, file: Path, theirs: np.ndarray, spread: float) -> dict[str, Any]:
    """Middle differences of short texts' logits, and of how many tokens all logits are within a thousandth."""
    batch, _ = looked_at([TOKENS[first : first + TEXT] for first in range(0, len(TOKENS), TEXT)])
    as_read, as_ggml = (logits(file, batch).numpy() / spread for logits in (streamed_logits, rounded_logits))
    off = np.abs(theirs - as_ggml)
    row = {f"{kind} as read": float(np.median(np.abs(theirs - as_read))), kind: float(np.median(off))}
    return row | {f"{kind} tokens": int((off.max(-1) <= SPREAD).sum())}


def _printed(rows: dict[str, dict[str, Any]], path: Path | None) -> int:
    if path:
        path.write_text(json.dumps(rows, indent=2, sort_keys=True))
    rounded = "Q8_0, as read | Q8_0 | Q4_K_M, as read | Q4_K_M"
    print(f"| family | base | F32 | over the base's | {rounded} | moved by the adapter | tokens |")
    print(f"|---|{'---:|' * len(COLUMNS)}---|")
    off, alone = [], []
    for name, row in rows.items():
        verdict = _verdict(row)
        off += [name] if verdict == "off" else []
        alone += [name] if verdict == "not run" else []
        cells = [_cell(row.get(kind)) for kind in COLUMNS]
        print(f"| {name} | {' | '.join(cells)} | {'same' if row.get('words') else '–'} |")
    _print_losses(rows)
    for kind in ROUND:
        counts = [
            row[f"{kind} tokens"] for row in rows.values() if f"{kind} tokens" in row and _verdict(row) != "not run"
        ]
        print(f"{kind}: in {sum(counts)} of {len(counts) * len(TOKENS)} tokens no logit is a thousandth off")
    for name, row in rows.items():
        for kind in ("base", *LAYOUTS):
            if isinstance(row.get(kind), str) and "with --base-gguf" not in row[kind]:
                print(f"- {name}, {kind}: {row[kind]}")
    run = len(rows) - len(alone)
    print(f"\n{run - len(off)} of {run} families are the same in llama.cpp, off: {', '.join(off) or 'none'}")
    print(f"{len(alone)} whose tiny base it does not run: {', '.join(alone) or 'none'}")
    return int(bool(off) or not run)


def _print_losses(rows: dict[str, dict[str, Any]]) -> None:
    print("\n| family | base | adapter in floats | F32 | over the base's | Q8_0 | Q4_K_M |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, row in rows.items():
        if (found := row.get("loss", {})).keys() & LAYOUTS:
            files = [" / ".join(f"{loss:.4f}" for loss in found[kind]) if kind in found else "–" for kind in LAYOUTS]
            print(f"| {name} | {found['base']:.4f} | {found['adapter']:.4f} | {' | '.join(files)} |")
    print()
    for name, row in rows.items():
        if "stored" in row:
            told = ", ".join(f"{count} {kind}" for kind, count in row["stored"].items())
            print(f"- {name}, q4_k_m: {told}; {len(row['fell_back'])} kinds of tensors have rows of other lengths")


def _verdict(row: dict[str, Any]) -> str:
    """ "same", "off", or "not run" where llama.cpp has no logits, or other ones for the base already."""
    base = row["base"] if isinstance(row.get("base"), float) else None
    found = {kind: row[kind] for kind in LAYOUTS if isinstance(row.get(kind), float)}
    if not found or (base is not None and base > OTHERWISE):
        return "not run"
    is_near = all(value <= 10 * (base or 0.0) + SPREAD for value in found.values())
    return "same" if is_near and row.get("words", True) and (base is None or "over" in found) else "off"


def _cell(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else "–"


if __name__ == "__main__":
    sys.exit(main())
