"""Kills and disk errors at every change of a file: saving, rotating, packaging, quantising, pushing, a whole run.

    python -m scripts.faults.kill_points [SCENARIO …] [--most N] [--fault kill|ENOSPC|EIO]

After each fault the state must be the old or the new one, and doing the work again must end as if nothing had happened:
the same files, and for a whole run the same losses. Prints a line a scenario and fault; exits with 1 where one fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from tests.harness.faulty import FAULTS, Scenario, preloaded, try_every

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart"
MODEL = QUICKSTART / "nano-qwen3moe-2m"
EXPORTS = ("peft", "per-expert", "merged", "merged-int8", "gguf")
_INSIDE = "ONECARD_PRELOADED"
_VARYING = {"memory_bytes", "tokens_per_second", "train_runtime", "eval_runtime"}


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, hidden leftovers too."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@cache
def _trained() -> Any:
    from scripts.faults.resume_matrix import Case, train

    folder = Path(tempfile.mkdtemp())
    train(Case("small", {"packing": False, "save_total_limit": 9, "max_steps": 8}), folder)
    return folder / "checkpoints"


def _parts(step: int) -> dict[str, Any]:
    from toolkit.training.checkpoint import open_checkpoint, read_tensors

    found = open_checkpoint(_trained() / f"checkpoint-{step}")
    tensors = {path.name: read_tensors(path) for path in found.path.glob("*.safetensors")}
    texts = {path.name: path.read_text() for path in found.path.glob("*.json") if path.name != "manifest.json"}
    return {"tensors": tensors, "texts": texts, "facts": found.facts}


def _checkpoints_before(place: Path) -> None:
    for step in (2, 4, 6):
        shutil.copytree(_trained() / f"checkpoint-{step}", place / f"checkpoint-{step}")


def _save(place: Path) -> None:
    from toolkit.training.checkpoint import clear_leftovers, newest_checkpoint, rotate, write_checkpoint

    clear_leftovers(place)
    newest = newest_checkpoint(place)
    if newest is None or newest.step < 8:
        write_checkpoint(place, 8, **_parts(8))
    rotate(place, 2, set())


def _a_checkpoint_is_there(place: Path) -> None:
    from toolkit.training.checkpoint import every_checkpoint, newest_checkpoint, open_checkpoint

    newest = newest_checkpoint(place)
    assert newest
    assert newest.step in (6, 8)
    for path in every_checkpoint(place):  # whatever has the name of one is one
        open_checkpoint(path)
    assert len(list(every_checkpoint(place))) >= 2


@cache
def _adapted() -> Any:
    from transformers import AutoTokenizer

    from toolkit.adapters import attach_lora
    from toolkit.quant import load_int8

    model, _ = load_int8(str(MODEL))
    return attach_lora(model, r=1), AutoTokenizer.from_pretrained(MODEL)


def _package(place: Path) -> None:
    from toolkit.artifact import write_artifact
    from toolkit.checkpoint.identity import identify_base

    model, tokenizer = _adapted()
    write_artifact(
        model,
        tokenizer,
        place / "adapter",
        base=identify_base(str(MODEL)),
        recipe_yaml="lora: {r: 1}",
        results={"training": {"loss": 1.0}},
        coverage={},
    )


def _artifact_is_whole(place: Path) -> None:
    from toolkit.artifact import verify_artifact

    failed = [check for check in verify_artifact(place / "adapter").checks if not check.ok and check.name != "moved"]
    assert not failed, failed


def _artifact_if_any(place: Path) -> None:
    if (place / "adapter").exists():
        _artifact_is_whole(place)


def moved_artifact(place: Path) -> None:
    """An artifact whose adapters are no longer zero, as `export` wants it."""
    import torch

    model, _ = _adapted()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    _package(place)


def _export(layout: str, place: Path) -> None:
    from toolkit.export import export_adapter

    if not (place / "out").exists():
        export_adapter(place / "adapter", MODEL, layout, place / "out")


def _export_if_any(place: Path) -> None:
    from toolkit.artifact.manifest import file_entry

    if (place / "out").exists():
        listed = json.loads((place / "out" / "export.json").read_text())["files"]
        assert listed.keys() | {"export.json"} == contents(place / "out").keys()
        assert all(file_entry(place / "out" / name) == entry for name, entry in listed.items())


def _quantize(place: Path) -> None:
    from toolkit.quant import quantize_checkpoint

    if not (place / "int8").exists():
        quantize_checkpoint(str(MODEL), place / "int8")


def _int8_if_any(place: Path) -> None:
    if (place / "int8").exists():
        assert (place / "int8" / "config.json").is_file()
        assert (place / "int8" / "model.safetensors").is_file()


def _nothing(place: Path) -> None:
    pass


RECIPE = """\
model: {{model_name_or_path: {model}}}
lora: {{r: 2}}
data: {{train: {place}/train.jsonl, validation: {place}/validation.jsonl}}
training:
  {{output_dir: {place}/run, max_steps: 3, save_steps: 1, learning_rate: 1e-3, max_length: 96, use_cpu: true,
   packing: false}}
eval: {{max_samples: 2, max_new_tokens: 1}}
"""


def write_recipe(place: Path) -> Path:
    """A small recipe whose run lies in `place`, and its data."""
    for split, count in (("train", 24), ("validation", 4)):
        rows = (QUICKSTART / "data" / f"category.{split}.jsonl").read_text().splitlines()[:count]
        (place / f"{split}.jsonl").write_text("\n".join(rows))
    path = place / "recipe.yaml"
    path.write_text(RECIPE.format(model=MODEL, place=place))
    return path


def spare_pictures() -> None:
    """Let this process and its forks draw nothing into page and card, which takes most of a small run's time.

    Drawing opens no file; page, card and pictures are written as ever.
    """
    from toolkit.report import charts

    charts._svg = lambda name, axes: "<svg/>"
    charts._png = lambda figure: b"a picture"


def command(*arguments: str) -> None:
    """The command in this process; raises `SystemExit`."""
    from toolkit.cli import main

    sys.argv = ["onecard", *arguments]
    main()


def train_run(place: Path, *overrides: str) -> None:
    """`onecard train`, quietly; raises `SystemExit` unless all went well."""
    try:
        command("train", str(write_recipe(place)), *overrides)
    except SystemExit as end:
        if end.code:
            raise


def train_pairs(place: Path) -> None:
    """As `train_run`, by DPO: its reference is written, too."""
    for split, count in (("train", 12), ("validation", 4)):
        rows = (QUICKSTART / "data" / f"pairs.{split}.jsonl").read_text().splitlines()[:count]
        (place / f"pairs.{split}.jsonl").write_text("\n".join(rows))
    data = [f"data.train={place}/pairs.train.jsonl", f"data.validation={place}/pairs.validation.jsonl"]
    train_run(place, "training.method=dpo", *data)


def run_results(place: Path) -> dict[str, Any]:
    """What a run's results are: its logged numbers, its adapter, its figures."""
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in _VARYING and "per_second" not in k} for line in lines]
    adapter = {name: found for name, found in contents(place / "run" / "adapter").items() if name != "README.md"}
    return {"metrics": kept, "adapter": adapter, "left": sorted(p.name for p in (place / "run").iterdir())}


def _start_run(place: Path) -> None:
    """A run cut off after two steps of three."""
    train_run(place, "training.max_steps=2", "training.lr_scheduler_type=constant", "training.warmup_steps=0")


def _go_on(place: Path) -> None:
    train_run(place, "training.lr_scheduler_type=constant", "training.warmup_steps=0")


class _Hub:
    """A Hub on localhost that the forks talk to."""

    def __init__(self) -> None:
        from tests.harness.hub_stand_in import HubStandIn

        self.server = HubStandIn()
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def clear(self, place: Path) -> None:
        """An empty Hub, and an artifact to push."""
        for record in (self.server.repositories, self.server.commits, self.server.created, self.server.blobs):
            record.clear()
        _package(place)

    def push(self, place: Path) -> None:
        """Push the artifact, whatever was sent before."""
        from unittest import mock

        from toolkit.artifact import hub, push_artifact

        with mock.patch.object(hub, "verify_artifact"):  # an untrained adapter has not moved
            push_artifact(place / "adapter", "me/model", token="good", endpoint=self.server.url)

    def whole_or_absent(self, place: Path) -> None:
        """Commits are one whole adapter each."""
        assert len(self.server.commits) <= 1

    def files(self, place: Path) -> Any:
        """What lies on the Hub."""
        there: dict[str, str] = {}
        for commit in self.server.commits:
            there |= {name: hashlib.sha256(content).hexdigest() for name, content in commit["files"].items()}
        return there, self.server.repositories["me/model"]["private"]


def scenarios() -> dict[str, Scenario]:
    """By name."""
    hub = _Hub()
    spare_pictures()
    found = [
        Scenario("save and rotate", _checkpoints_before, _save, _a_checkpoint_is_there, contents),
        Scenario("package", _nothing, _package, _artifact_if_any, contents),
        Scenario("package again", _package, _package, _artifact_is_whole, contents),
        *(
            Scenario(
                f"export {layout}",
                moved_artifact,
                partial(_export, layout),
                _export_if_any,
                contents,
                prepared_once=True,
            )
            for layout in EXPORTS
        ),
        Scenario("quantize", _nothing, _quantize, _int8_if_any, contents),
        Scenario("push", hub.clear, hub.push, hub.whole_or_absent, hub.files, lambda place: "net"),
        Scenario("run", _nothing, train_run, _nothing, run_results, lambda place: str(place / "run")),
        Scenario("run of pairs", _nothing, train_pairs, _nothing, run_results, lambda place: str(place / "run")),
        Scenario("resume", _start_run, _go_on, _nothing, run_results, lambda place: str(place / "run"), True),
    ]
    return {each.name: each for each in found}


def spread(most: int) -> Callable[[int], Iterator[int]]:
    """At most `most` of the numbers 1 … n, evenly spread, the last one among them."""

    def points(changes: int) -> Iterator[int]:
        count = min(most, changes)
        yield from sorted({changes - (changes - 1) * k // max(1, count - 1) for k in range(count)})

    return points


def main() -> int:
    """Run the chosen scenarios in a preloaded process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scenarios", nargs="*")
    parser.add_argument("--most", type=int, default=1 << 30, help="points a scenario and fault")
    parser.add_argument("--fault", choices=[fault.name for fault in FAULTS], action="append")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--progress", action="store_true", help="a line every ten points")
    options = parser.parse_args()
    if _INSIDE not in os.environ:
        # The Hub of `push` is this machine's own.
        os.environ |= {_INSIDE: "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        with tempfile.TemporaryDirectory() as folder:
            again = ["-W", "ignore", "-m", "scripts.faults.kill_points", *sys.argv[1:]]
            return preloaded(again, Path(folder)).returncode
    return _measure(options)


def _tell(name: str, fault: str, tally: Any) -> None:
    if tally.struck % 10 == 0:
        print(f"{name} {fault}: {tally.struck} of {tally.changes}, {len(tally.failures)} failures", flush=True)


def _measure(options: argparse.Namespace) -> int:
    failed = 0
    if not options.json:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the command's own lines, hundreds of times
    faults = [fault for fault in FAULTS if not options.fault or fault.name in options.fault]
    chosen = [each for each in scenarios().values() if not options.scenarios or each.name in options.scenarios]
    for scenario in chosen:
        name = scenario.name
        for fault in faults:
            if name == "push" and fault.name != "kill":  # no disk takes part in it
                continue
            with tempfile.TemporaryDirectory() as folder:
                told = partial(_tell, name, fault.name) if options.progress else lambda tally: None
                tally = try_every(scenario, fault, Path(folder), spread(options.most), told)
            failed += bool(tally.failures)
            recovered = tally.struck - len({line.partition(": ")[2].partition(": ")[0] for line in tally.failures})
            line = {"scenario": name, "fault": fault.name, **vars(tally), "recovered": recovered}
            text = f"{name:16} {fault.name:7} {tally.changes:4} changes, {recovered} of {tally.struck} recover"
            print(json.dumps(line) if options.json else "\n  ".join([text, *tally.failures[:5]]), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
