"""Adapters that other toolkits trained themselves, on a CPU: does `verify` say which experts they moved?

    .venv/bin/python scripts/parity/foreign_toolkits.py [TOOLKIT …] [--families FAMILY …] [--json FILE]

Makes (once) an environment for each toolkit with a pinned release from PyPI. Its own command trains two steps on a tiny
random checkpoint: once asked for all linears, as its pages show, and once for the experts by name where it takes them.
LLaMA-Factory imports torchaudio, whose wheel needs CUDA: an empty module stands for it. Of KTransformers its buffers,
its saving and its converter are run: see `foreign_side.py`.

What moved is found by the toolkit's own PEFT, which merges the adapter into its base. `verify` must say the same of
every layer, router and linear; and one projection less where one B of an adapter is set to zero. Exits with 1 where it
does not, or where nothing was trained.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "scripts/parity")]

from foreign_commands import EXPERTS, LINEARS, SIDE, TOOLKITS, Toolkit, command  # noqa: E402
from second_environment import python_with  # noqa: E402

from tests.harness.families import build, tiny_config  # noqa: E402
from toolkit.architecture import describe  # noqa: E402
from toolkit.checkpoint.config import skeleton  # noqa: E402
from toolkit.errors import ModelError  # noqa: E402
from toolkit.export import ForeignReport, verify_foreign  # noqa: E402
from toolkit.export.foreign import FUSED  # noqa: E402

__all__ = ["Row", "changed_as_counts", "main", "with_a_hole"]

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v2", "glm4_moe", "gpt_oss")
NANO = ROOT / "recipes/quickstart/nano-qwen3moe-2m"
ROWS = ROOT / "recipes/quickstart/data/dialog.train.jsonl"
STEPS, RANK, LENGTH, RATE, SECONDS = 2, 2, 64, 0.01, 600
COUNT = 8
"""Experts of a layer of the tiny checkpoints."""
WEIGHTS = "adapter_model.safetensors"


@dataclass
class Row:
    """An adapter: projections that the merge moves and `verify` tells, of all; what is wrong; why there is none."""

    toolkit: str
    family: str
    asked: str
    layout: str = "–"
    merged: int = 0
    told: int = 0
    every: int = 0
    router: str = ""
    linears: str = ""
    dropped: dict[str, int] = field(default_factory=dict)
    wrong: str = ""
    refused: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("toolkits", nargs="*", metavar="TOOLKIT", help="beginnings of their names; all by default")
    parser.add_argument("--families", nargs="+", metavar="FAMILY", default=list(FAMILIES), help="model types")
    parser.add_argument("--asked", nargs="+", choices=(LINEARS, EXPERTS), default=[LINEARS, EXPERTS], help="for what")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-toolkits", help="folder for them")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    wanted = tuple(name.lower() for name in options.toolkits)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, toolkit in TOOLKITS.items():
            if wanted and not name.lower().startswith(wanted):
                continue
            python = _environment(options.environments / name.partition(" ")[0].lower(), toolkit)
            for family in options.families:
                for asked in (each for each in toolkit.asked if each in options.asked):
                    rows += _rows(name, family, asked, python, Path(scratch))
                    print(rows[-1], file=sys.stderr, flush=True)
                    if options.json:
                        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))
    return _printed(rows)


def _environment(folder: Path, toolkit: Toolkit) -> str:
    python = python_with(folder, toolkit.packages, None, toolkit.alone)
    if any(package.startswith("llamafactory") for package in toolkit.alone):
        packages = next((folder / "lib").glob("python*/site-packages"))
        (packages / "torchaudio.py").write_text('"""No sound is read."""\n')
    return python


def _rows(name: str, family: str, asked: str, python: str, scratch: Path) -> Iterator[Row]:
    folder = Path(tempfile.mkdtemp(dir=scratch))
    base = scratch / "bases" / family
    if not base.is_dir():
        _save_base(family, base)
    job = _job(base, folder, asked)
    row = Row(name, family, asked)
    words = command(name, python, job, folder)
    if problem := _run(words, python, scratch):
        row.refused = problem
        yield row
        return
    adapter = next((path for path in (folder / "adapter/checkpoint-2", folder / "adapter") if path.is_dir()), folder)
    if not Path(job["changed"]).is_file():
        (folder / "job.json").write_text(json.dumps(job | {"out": str(adapter)}))
        if problem := _run([python, SIDE, "merged", str(folder / "job.json")], python, scratch):
            row.refused = f"its own PEFT does not merge it: {problem}"
            yield row
            return
    changed = json.loads(Path(job["changed"]).read_text())
    yield _compared(row, adapter, base, changed)
    if (converted := folder / "adapter-sglang").is_dir():
        yield _compared(Row(f"{name}, for SGLang", family, asked), converted, base, changed)


def _save_base(family: str, folder: Path) -> None:
    """A tiny random checkpoint with the quickstart's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    config = tiny_config(family)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = type(config)(**{**config.to_dict(), **ids, "vocab_size": len(tokenizer)})
    build(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _job(base: Path, folder: Path, asked: str) -> dict[str, Any]:
    """What every toolkit is asked for; eight rows of the quickstart beside it."""
    layer = describe(skeleton(str(base))).layers[-1]
    inside = [stack.split(".", 3)[3] for stack in layer.stacks]
    router = [] if layer.router_is_linear else [f"{layer.router}.weight".split(".", 3)[3]]
    rows = [{"messages": json.loads(line)["messages"]} for line in ROWS.read_text().splitlines()[:8]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "base": str(base),
        "out": str(folder / "adapter"),
        "rows": str(folder / "rows.jsonl"),
        "changed": str(folder / "changed.json"),
        "experts": [*inside, *router] if asked == EXPERTS else [],
        "rank": RANK,
        "steps": STEPS,
        "length": LENGTH,
        "rate": RATE,
    }


def _run(words: list[str], python: str, scratch: Path) -> str:
    """The last line that it said, where it failed."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    caches = {"HF_HOME": str(scratch / "hub"), "MODELSCOPE_CACHE": str(scratch / "modelscope")}
    quiet = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}
    path = {"PATH": f"{Path(python).parent}:{os.environ['PATH']}"}
    try:
        done = subprocess.run(
            words,
            env=mine | caches | quiet | path,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            cwd=scratch,
        )
    except subprocess.TimeoutExpired:
        return f"not done within {SECONDS} s"
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return (lines or ["no message"])[-1][:120] if done.returncode else ""


def _compared(row: Row, adapter: Path, base: Path, changed: Mapping[str, Any]) -> Row:
    """`verify` of it, against what the toolkit's merge changes; and of a copy with a hole."""
    try:
        report = verify_foreign(adapter, str(base))
        hole = verify_foreign(with_a_hole(adapter), str(base))
    except ModelError as error:
        row.wrong = f"refused: {error}"
        return row
    expected, found = changed_as_counts(base, changed), _counts(report)
    row.layout = ", ".join(report.layouts) or "no experts"
    row.merged, row.told, row.every = expected["slots"], *report.slots
    row.router, row.linears = ("{} of {}".format(*pair) for pair in (report.routers, report.linears))
    row.dropped = {server: len(problems) for server, problems in report.servers.items()}
    less = sum(report.slots[:1] + report.linears[:1]) - sum(hole.slots[:1] + hole.linears[:1])
    if report.misfits:
        row.wrong = report.misfits[0]
    elif expected != found:
        row.wrong = f"its merge changes {expected}, verify says {found}"
    elif less != 1:
        row.wrong = f"{less} less where one B is zero"
    return row


def changed_as_counts(base: Path, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that a merge changed, and of stacks their experts, as a report of `verify` counts them."""
    layers = [layer for layer in describe(skeleton(str(base))).layers if layer.sees_text]
    stacks = [tuple(set(changed.get(stack, ())) for stack in layer.stacks) for layer in layers]
    known = {name for layer in layers for name in (*layer.stacks, f"{layer.router}.weight")}
    return {
        "slots": sum(2 * len(up) + len(down) for up, down in stacks),
        "layers": [len(up & down) for up, down in stacks],
        "routers": sum(f"{layer.router}.weight" in changed for layer in layers),
        "linears": sum(name not in known for name in changed),
    }


def _counts(report: ForeignReport) -> dict[str, Any]:
    return {
        "slots": report.slots[0],
        "layers": [layer.moved for layer in report.layers],
        "routers": report.routers[0],
        "linears": report.linears[0],
    }


def with_a_hole(adapter: Path) -> Path:
    """A copy with one B of an expert's down projection set to zero; of another linear where none is there."""
    copy = adapter.with_name(f"{adapter.name}-hole")
    shutil.copytree(adapter, copy)
    file = copy / (FUSED if (copy / FUSED).is_file() else WEIGHTS)
    tensors = load_file(file)
    moved = sorted(key for key, tensor in tensors.items() if "lora_b" in key.lower() and tensor.any())
    experts = [key for key in moved if key.endswith("experts.lora_B.weight") or (".experts." in key and "down" in key)]
    key = (experts or [key for key in moved if "attn" in key])[0]
    B = tensors[key]
    if B.dim() == 3:
        B[int(B.flatten(1).any(1).nonzero()[0])] = 0
    elif key.endswith("experts.lora_B.weight"):
        each = B.view(len(B), -1, COUNT)
        each[..., int(each.any(0).any(0).nonzero()[0])] = 0
    else:
        B.zero_()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return copy


def _printed(rows: list[Row]) -> int:
    servers = next((", ".join(row.dropped) for row in rows if row.dropped), "servers")
    print(f"| toolkit | asked for | family | projections of experts | routers | linears | objections of {servers} |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        dropped = ", ".join(map(str, row.dropped.values()))
        told = f"{row.told} of {row.every}, {row.layout}" if row.every else row.refused or row.wrong
        print(f"| {row.toolkit} | {row.asked} | {row.family} | {told} | {row.router} | {row.linears} | {dropped} |")
    read = [row for row in rows if not row.refused]
    wrong = [row for row in read if row.wrong]
    for row in wrong:
        print(f"{row.toolkit}, {row.family}, {row.asked}: {row.wrong}")
    right = len(read) - len(wrong)
    print(f"{right} of {len(read)} adapters: verify says what the toolkit's merge changes, and sees a hole")
    print(f"{len(rows) - len(read)} not trained")
    return int(bool(wrong) or not read)


if __name__ == "__main__":
    sys.exit(main())
