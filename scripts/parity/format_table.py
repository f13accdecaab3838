"""Quantised checkpoints of many packages read here and by stock transformers: a table of format by family.

    .venv/bin/python scripts/parity/format_table.py [PACKAGE/FAMILY-VARIANT …] [--from FOLDER] [--markdown FILE]

Each checkpoint is one of `format_writers.py`, which writes them where no folder is given. Ours: every stored weight
against the package's own value, bit for bit in the type that the package computes in; expert stacks in int8, with the
bits of the plain twin's; and the logits of the weights multiplied out against that twin's. The twin holds the
package's values under the published names. Beside it, each in a process of its own with a time limit, what
`AutoModelForCausalLM.from_pretrained` makes of the same file, in the package's own environment.

Without names, the main formats of every package that is there. Exits with 1 where one of ours is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts/parity")]

import format_writers  # noqa: E402
from format_twins import family_of, pieces, save_twin  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.utils import logging  # noqa: E402

from toolkit.checkpoint.conversion import Shards  # noqa: E402
from toolkit.checkpoint.files import declared_format  # noqa: E402
from toolkit.checkpoint.weights import Unread  # noqa: E402
from toolkit.quant import load_int8  # noqa: E402
from toolkit.quant.load import read_config  # noqa: E402

__all__ = ["MAIN", "Row", "main"]

FAMILIES = {
    "qwen3_moe": "Qwen3-MoE",
    "mixtral": "Mixtral",
    "deepseek_v2": "DeepSeek-V2",
    "glm4_moe": "GLM-4-MoE",
    "gpt_oss": "gpt-oss",
}
MAIN = {
    "compressed_tensors": (
        *("int4-group", "int4-asym-group", "int8-channel", "w8a8", "fp8-channel", "fp8-block", "nvfp4", "mxfp4"),
        "mixed-bits",
    ),
    "llmcompressor": ("w4a16", "w8a16", "fp8-dynamic", "nvfp4a16"),
    "gptqmodel": ("real-4", "v1-4", "fp8-block"),
    "autoawq": ("gemm",),
    "auto_round": ("4",),
    "bitsandbytes": ("nf4-double", "int8"),
    "modelopt": ("fp8", "nvfp4"),
    "quark": ("fp8", "mxfp4"),
    "mlx": ("affine-4", "mxfp4"),
    "hqq": ("4-axis-1",),
    "torchao": ("int8", "float8"),
    "transformers": ("fp8", "mxfp4"),
}
"""The variants that the table has without names, by package."""
NOT_THEIRS = ("gptqmodel/gpt_oss-v1-4", "gptqmodel/gpt_oss-v1-8")
"""Written by hand with another order of rows than the package's own (`real-4`)."""
ENVIRONMENTS = {
    "autoawq": "gptqmodel",
    "llmcompressor": "compressed_tensors",
    "compressed_tensors_old": "compressed_tensors",
    "mlx": "transformers",
    "modelopt": "transformers",
    "transformers": "torchao",
}
"""Where stock transformers reads a package's files, if not in that package's own: FP8 needs accelerate, too."""
TOKENS = torch.randint(3, 97, (23,), generator=torch.Generator().manual_seed(5)).tolist()
EXACT, CLOSE, FAR = 1e-4, 0.05, 10
"""Difference of logits, as a part of the largest logit: of fp32 in another order, of 16-bit activations."""


@dataclass
class Row:
    """What came of one checkpoint; `theirs` in words, `error` where ours did not load.

    Args:
        equal, weights: stored weights with the package's bits, of all. same, stacks: stacks in int8 with the bits of
            the plain twin's, of all. apart: the largest difference of logits from the twin's.
    """

    name: str
    family: str
    equal: int = 0
    weights: int = 0
    same: int = 0
    stacks: int = 0
    apart: float = float("inf")
    error: str = ""
    theirs: str = "not asked"

    @property
    def is_right(self) -> bool:
        """Ours, in everything."""
        return not self.error and self.equal == self.weights > 0 and self.same == self.stacks > 0 and self.apart == 0


def main(arguments: list[str] | None = None) -> int:
    """Print a line a checkpoint, then the sums; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="PACKAGE/FAMILY-VARIANT", help="checkpoints below the folder")
    parser.add_argument("--from", dest="folder", type=Path, help="where format_writers.py wrote them")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-formats", help="of format_writers.py")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    parser.add_argument("--seconds", type=int, default=120, help="what stock transformers may take for one")
    parser.add_argument("--theirs", type=Path, help="folder for what stock transformers answers, asked once each")
    parser.add_argument("--ours", action="store_true", help="leave stock transformers out")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = options.folder or ROOT / "models/formats"
    if options.folder is None and not options.names:
        format_writers.main(["--out", str(folder), "--environments", str(options.environments)])
    rows, by_package = [], defaultdict[str, list[str]](list)
    for name in options.names or [name for name in _main(folder) if name not in NOT_THEIRS]:
        by_package[name.partition("/")[0]].append(name)
    for package, names in by_package.items():
        with tempfile.TemporaryDirectory() as scratch:
            theirs = None if options.ours else (options.theirs or Path(scratch) / "theirs") / package
            if theirs:
                _stock(folder, package, names, theirs, options)
            for name in names:
                rows.append(row := _compared(folder, name, Path(scratch) / name, theirs))
                ours = f"{row.equal}/{row.weights} values, {row.same}/{row.stacks} stacks, logits {row.apart:.0e}"
                print(f"{name}: {row.error or ours}; transformers: {row.theirs}", flush=True)
        if options.markdown:
            options.markdown.write_text(_table(rows))
    wrong = [row.name for row in rows if not row.is_right]
    print(f"{len(rows) - len(wrong)} of {len(rows)} checkpoints right; wrong: {', '.join(wrong) or 'none'}")
    return int(bool(wrong) or not rows)


def _main(folder: Path) -> list[str]:
    names = [f"{package}/{family}-{what}" for package, of in MAIN.items() for what in of for family in FAMILIES]
    return [name for name in names if (folder / name / "expected.json").is_file()]


def _compared(root: Path, name: str, scratch: Path, theirs: Path | None) -> Row:
    folder, twin = root / name, scratch / "twin"
    row = Row(name, family_of(folder))
    save_twin(folder, twin)
    plain = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32, experts_implementation="eager").eval()
    wanted = _logits(plain)
    try:
        row.equal, row.weights = _values(folder, row.family)
        row.same, row.stacks = _stacks(folder, twin)
        loaded, _ = load_int8(str(folder), experts="none", linears="none", experts_implementation="eager")
        row.apart = float((_logits(loaded) - wanted).abs().max())
    except Exception as error:  # the table goes on
        row.error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if theirs:
        row.theirs = _in_words(theirs, name.partition("/")[2], wanted)
    return row


def _values(folder: Path, family: str) -> tuple[int, int]:
    """Stored weights that are equal to the package's, and all of them."""
    told = json.loads((folder / "expected.json").read_text())
    dtype = getattr(torch, told["dtype"])
    expected = load_file(folder / "expected.safetensors")
    theirs = dict(piece for name, tensor in expected.items() for piece in pieces(name, tensor, family))
    ours: dict[str, torch.Tensor] = {}
    with Shards(str(folder), folder, declared_format(str(folder), read_config(str(folder)))) as shards:
        for key in shards.keys:
            if isinstance(part := shards.slice(key), Unread):
                ours |= pieces(key, part.read(), family)
    equal = [torch.equal(ours[key].to(dtype), tensor.to(dtype)) for key, tensor in theirs.items() if key in ours]
    return sum(equal), len(theirs.keys() | ours.keys())


def _stacks(folder: Path, twin: Path) -> tuple[int, int]:
    """Stacks in int8 whose bits are those of the plain checkpoint's, and all of them."""
    model, coverage = load_int8(str(folder))
    ours, plain = model.state_dict(), load_int8(str(twin))[0].state_dict()
    stacks = [key for key, tensor in ours.items() if tensor.dim() == 3 and tensor.dtype == torch.int8]
    same = [all(torch.equal(ours[part], plain[part]) for part in (key, f"{key}_scale")) for key in stacks]
    return sum(same), coverage.stacks


@torch.no_grad()
def _logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor([TOKENS])).logits[0].float()
    return found


def _stock(root: Path, package: str, names: list[str], out: Path, options: argparse.Namespace) -> None:
    """Let stock transformers load a package's checkpoints: logits or an error of each in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    python = options.environments / ENVIRONMENTS.get(package, package) / "bin/python"
    job = {"tokens": TOKENS, "seconds": options.seconds, "out": str(out.absolute())}
    job["models"] = {name.partition("/")[2]: str((root / name).resolve()) for name in names if not _answered(out, name)}
    (out / "job.json").write_text(json.dumps(job))
    side = Path(__file__).with_name("format_stock_side.py")
    if python.is_file() and job["models"]:
        alone = {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
        command = [str(python.absolute()), "-I", str(side.absolute()), str((out / "job.json").absolute())]
        with tempfile.TemporaryDirectory() as scratch:  # GPTQModel writes a log where it stands
            subprocess.run(command, capture_output=True, check=False, env={**os.environ, **alone}, cwd=scratch)


def _answered(out: Path, name: str) -> bool:
    return any((out / f"{name.partition('/')[2]}.{ending}").is_file() for ending in ("safetensors", "txt"))


def _in_words(out: Path, name: str, wanted: torch.Tensor) -> str:
    """What stock transformers made of a checkpoint, by the median token: a single one may choose another expert."""
    logits, error = out / f"{name}.safetensors", out / f"{name}.txt"
    if not logits.is_file():
        said = error.read_text() if error.is_file() else "not run: no environment of the package"
        return "error: " + shorten(said.partition(". ")[0].replace("`", "'"), 100, placeholder=" …")
    apart = float((load_file(logits)["logits"] - wanted).abs().amax(-1).median() / wanted.abs().max())
    if apart > FAR:  # experts that were left as the memory was
        return f"wrong by more than {FAR:.0%}"
    return "exact" if apart <= EXACT else f"within {apart:.1%}" if apart <= CLOSE else f"wrong by {apart:.0%}"


def _table(rows: list[Row]) -> str:
    """By format: ours summed over families, then transformers' answer a family; its errors below."""
    by_format: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        package, _, rest = row.name.partition("/")
        by_format[f"{package} {rest.removeprefix(f'{row.family}-')}"].append(row)
    lines = [
        f"| format | values | int8 stacks | logits apart | {' | '.join(FAMILIES.values())} |",
        f"|---|---:|---:|---:|{'---|' * len(FAMILIES)}",
    ]
    errors: dict[str, int] = {}
    for name, found in by_format.items():
        theirs = {row.family: row.theirs for row in found}
        cells = []
        for family in FAMILIES:
            said = theirs.get(family, "–")
            if said.startswith("error: "):
                said = f"error {errors.setdefault(said.removeprefix('error: '), len(errors) + 1)}"
            cells.append(said)
        equal, weights, same, stacks = (
            sum(getattr(row, what) for row in found) for what in ("equal", "weights", "same", "stacks")
        )
        apart = max(row.apart for row in found)
        far = f"{apart:.0e}" if apart else "0"
        lines.append(f"| {name} | {equal}/{weights} | {same}/{stacks} | {far} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. `{error}`" for error, number in errors.items())]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
