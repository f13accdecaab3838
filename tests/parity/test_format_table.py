"""The table of quantised formats, on one checkpoint that is made here as a package would have written it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.unit.quant.test_foreign_formats import INT4, compressed_int4

ROOT = Path(__file__).parents[2]
SIDES = ROOT / "scripts/parity/format_sides"
NAME = "compressed_tensors/qwen3_moe-int4-group"
PLAIN = "import sys, tiny; from pathlib import Path; tiny.save_plain(Path(sys.argv[1]), tiny.whole_source('qwen3_moe'))"


def table(folder: Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "scripts/parity/format_table.py"
    options = ["--from", str(folder), "--ours", "--markdown", str(folder / "table.md"), NAME]
    return subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, check=False)


def test_a_checkpoint_is_right_or_named(tmp_path: Path) -> None:
    folder = tmp_path / NAME
    folder.mkdir(parents=True)
    subprocess.run([sys.executable, "-c", PLAIN, str(folder)], check=True, cwd=SIDES)
    stored, expected = {}, {}
    for key, weight in load_file(folder / "model.safetensors").items():
        if not key.endswith("_proj.weight"):
            stored[key] = weight
            continue
        parts, expected[key] = compressed_int4(weight.float())
        stored |= {f"{key.removesuffix('.weight')}.{leaf}": part.contiguous() for leaf, part in parts.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    save_file(expected, folder / "expected.safetensors")
    (folder / "expected.json").write_text(json.dumps({"package": "compressed-tensors", "dtype": "float32"}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": INT4}))
    done = table(tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{NAME}: 32/32 values, 4/4 stacks, logits 0e+00; transformers: not asked" in done.stdout
    assert "| compressed_tensors int4-group | 32/32 | 4/4 | 0 | not asked |" in (tmp_path / "table.md").read_text()
    expected["model.layers.0.mlp.experts.1.up_proj.weight"] += torch.eye(32, 64)
    save_file(expected, folder / "expected.safetensors")
    done = table(tmp_path)
    assert done.returncode == 1
    assert f"{NAME}: 31/32 values, 3/4 stacks, logits " in done.stdout
    assert "0 of 1 checkpoints right; wrong: compressed_tensors/qwen3_moe-int4-group" in done.stdout
