"""Does vLLM's own loader take our per-expert exports? Its configuration checks, key rules and packing, without a GPU.

    .venv/bin/python scripts/parity/vllm_loader.py --python PYTHON [FAMILY …]

PYTHON is one where `import vllm.lora.lora_model` works: where vLLM is installed, or, on a machine without a GPU, an
environment with torch after `pip install --no-deps vllm==0.33.0` and whatever small packages that import then asks for.
Each family's tiny random checkpoint gets an adapter on experts, router and attention, and vLLM reads its export. The
last line plants a fault, an expert that is missing, which vLLM must refuse. Exits with 1 where anything is otherwise.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts/parity")]

from layouts import make_adapter  # noqa: E402

from toolkit.export.write import export_adapter  # noqa: E402

__all__ = ["main"]

FAMILIES = (
    "qwen3_moe qwen2_moe mixtral olmoe granitemoe deepseek_v2 deepseek_v3 gpt_oss dots1 glm4_moe lfm2_moe minimax_m2 "
    "hunyuan_v1_moe ernie4_5_moe"
)
EXPERTS = "8"


def main(arguments: list[str] | None = None) -> int:
    """Print a line an export; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"model types, by default {FAMILIES}")
    parser.add_argument("--python", required=True, help="a Python that can import vLLM's loader")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    names = options.families or FAMILIES.split()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [_exported(name, Path(scratch)) for name in names]
        folders.append(_without_an_expert(folders[0], Path(scratch) / "planted"))
        pairs = [part for folder in folders for part in (str(folder), EXPERTS)]
        command = [options.python, str(Path(__file__).with_name("vllm_side.py")), *pairs]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for name, line in zip([*names, "planted fault"], lines, strict=False):
        print(name, {key: value for key, value in line.items() if key != "folder"})
    if len(lines) != len(folders):
        print(done.stderr[-500:], file=sys.stderr)
        return 1
    return int(any("error" in line for line in lines[:-1]) or "error" not in lines[-1])


def _exported(name: str, scratch: Path) -> Path:
    (scratch / name).mkdir()
    _, artifact = make_adapter(name, scratch / name)
    export_adapter(artifact, scratch / name / "base", "per-expert", scratch / name / "per-expert")
    return scratch / name / "per-expert"


def _without_an_expert(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "adapter_model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if ".experts.3.up_proj." not in key}
    assert len(kept) < len(tensors)
    save_file(kept, target / "adapter_model.safetensors")
    return target


if __name__ == "__main__":
    sys.exit(main())
