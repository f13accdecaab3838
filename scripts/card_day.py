#!/usr/bin/env python3
"""What a machine with a card is asked on the day that it can be had: the most useful first, written as it comes.

    .venv/bin/python scripts/card_day.py [--out card-day] [--only PIECE,…] [--minutes 25]

Each piece is a process of its own, of less than ten minutes, and leaves PIECE.json and a line of `table.md` in the
folder as soon as it ends; one that fails or is out of time leaves that. A rerun with the same folder does what is not
there yet, so a machine that is lent for ten minutes at a time is enough. `kernels` needs torch and triton alone.

    kernels   parity of all kernels, a layer's speed against stock, the card's own limits (scripts/gpu_check.py)
    train     the embedded model: the whole job, memory and time beside the plan's
    streams   the same with streamed experts under CUDA's sanitizer: races, and the resident adapter bit by bit
    resume    a run that is stopped and goes on: the adapter bit by bit
    olmoe     a random checkpoint of OLMoE's shape, made here: the recipe's job, memory and time beside the plan's
    profile   one step of that: where the time goes, launches, waits
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
OLMOE = "allenai/OLMoE-1B-7B-0924-Instruct"
MIB = 2**20
LONGEST = 570
"""Seconds of a piece."""
_SHARD = 4 << 30
RESIDENT = ("training.max_steps=6", "data.max_samples=400", "eval.enabled=false")
"""A short run of the quickstart."""
_TRACE = "ONECARD_CARD_DAY_TRACE"
"""Environment variable: where the profile of a run goes."""


class Failed(Exception):
    """A piece did not end well; one line says why."""


@dataclass(frozen=True)
class Day:
    """Where results go, and what overrides every run gets (`training.use_cpu=true` tries the script without a card)."""

    out: Path
    overrides: tuple[str, ...] = ()

    def onecard(self, *words: object, environment: Mapping[str, str] | None = None) -> None:
        """Run the command in a process of its own.

        Raises:
            Failed: with its last line.
        """
        program = [__file__] if environment and _TRACE in environment else ["-m", "toolkit"]
        command = [sys.executable, *program, *map(str, words), *self.overrides]
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": paths, **(environment or {})}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            raise Failed(f"{' '.join(map(str, words[:2]))}: exit code {done.returncode}: {last}")

    def train(self, name: str, recipe: Path, *overrides: str, environment: Mapping[str, str] | None = None) -> Path:
        """A run of its own under `name`; its folder."""
        folder = self.out / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        self.onecard("train", recipe, f"training.output_dir={folder}", *overrides, environment=environment)
        return folder


def kernels(day: Day) -> dict[str, Any]:
    """`gpu_check.py`, whose lines go to a file as they come."""
    report = day.out / "gpu_check.json"
    with (day.out / "gpu_check.txt").open("w", encoding="utf-8") as lines:
        command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), "--json", str(report)]
        code = subprocess.run(command, stdout=lines, stderr=subprocess.STDOUT, check=False).returncode
    if not report.is_file():
        raise Failed(f"gpu_check.py: exit code {code}; {day.out / 'gpu_check.txt'} says more")
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return {
        "ok": found["parity"],
        "parity": found["parity"],
        "limits": found.get("limits"),
        "layers": found.get("layers"),
    }


def figures(run: Path) -> dict[str, Any]:
    """Planned and measured bytes and seconds of a finished run, and what came out of it."""
    summary, plan = (json.loads((run / name).read_text(encoding="utf-8")) for name in ("summary.json", "plan.json"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    results, memory = summary["results"], summary["memory"]
    training = results["training"]
    return {
        "loss": [losses[0], losses[-1]] if losses else None,
        "adapted": results.get("adapted"),
        "steps": training["steps"],
        "seconds_a_step": summary["seconds"]["train"] / max(1, training["steps"]),
        "tokens_a_second": next((line[key] for line in reversed(lines) if (key := "tokens_per_second") in line), None),
        "planned_seconds_a_step": plan["step_seconds"],
        "measured_mib": memory["training"] / MIB,
        "planned_mib": memory["planned"] / MIB,
        "planned_slack_mib": memory["slack"] / MIB,
    }


def train(day: Day) -> dict[str, Any]:
    """The embedded model, as the quickstart has it."""
    return figures(day.train("quickstart", QUICKSTART, "training.logging_steps=1"))


def adapter(run: Path) -> str:
    """SHA-256 of a run's adapter."""
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def streams(day: Day) -> dict[str, Any]:
    """All experts, and then half of them, streamed: races by CUDA's sanitizer, and the adapter of resident experts."""
    resident = adapter(day.train("resident", QUICKSTART, *RESIDENT))
    found: dict[str, Any] = {}
    for name, share in (("all", "1.0"), ("half", "0.5")):
        away = (*RESIDENT, "placement.experts=host", f"placement.share={share}")
        found[f"{name}_equal"] = adapter(day.train(f"streamed-{name}", QUICKSTART, *away)) == resident
    watched = (*RESIDENT, "placement.experts=host", "placement.share=0.5")
    try:
        day.train("watched", QUICKSTART, *watched, environment={"TORCH_CUDA_SANITIZER": "1"})
        found["races"] = 0
    except Failed as failure:
        found["races"] = str(failure)
    return {**found, "ok": found == {"all_equal": True, "half_equal": True, "races": 0}}


def resume(day: Day) -> dict[str, Any]:
    """Stopped after three of six steps, with an 8-bit optimizer."""
    wanted = (*RESIDENT, "training.optim=paged_adamw_8bit", "training.save_steps=3")
    whole = adapter(day.train("whole", QUICKSTART, *wanted))
    folder = day.train("stopped", QUICKSTART, *wanted)
    for path in (folder / "adapter", folder / "checkpoints" / "checkpoint-6"):
        shutil.rmtree(path)
    (folder / "summary.json").unlink()
    day.onecard("train", QUICKSTART, f"training.output_dir={folder}", *wanted)
    equal = adapter(folder) == whole
    return {"equal": equal, "ok": equal}


def random_olmoe(folder: Path) -> Path:
    """A checkpoint of OLMoE's shape with random weights in bf16, and the embedded model's tokenizer."""
    import torch
    from safetensors.torch import save_file

    from tests.harness.published import published_tensors, write_surroundings

    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    index: dict[str, str] = {}
    part: dict[str, Any] = {}

    def write() -> None:
        name = f"model-{len(set(index.values())) + 1:05}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, name))
        part.clear()

    for key, shape in published_tensors(OLMOE).items():
        value = torch.ones(shape) if key.endswith("norm.weight") else torch.randn(shape, device=device) * 0.02
        part[key] = value.to("cpu", torch.bfloat16)
        if sum(tensor.nbytes for tensor in part.values()) > _SHARD:
            write()
    write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}), "utf-8")
    write_surroundings(OLMOE, folder)
    return folder


def large(day: Day, name: str, steps: int, *overrides: str, environment: Mapping[str, str] | None = None) -> Path:
    """OLMoE's recipe over the random checkpoint and the quickstart's data, so many steps of it."""
    data = ROOT / "recipes" / "quickstart" / "data"
    return day.train(
        name,
        ROOT / "recipes" / "olmoe-1b-7b.yaml",
        f"model.model_name_or_path={random_olmoe(day.out / 'olmoe')}",
        f"data.train={data / 'dialog.train.jsonl'}",
        f"data.validation={data / 'dialog.validation.jsonl'}",
        "data.name=null",
        "data.validation_split=null",
        f"training.max_steps={steps}",
        "training.logging_steps=1",
        "eval.max_samples=16",
        *overrides,
        environment=environment,
    )


def olmoe(day: Day) -> dict[str, Any]:
    """Ten steps of the flagship recipe."""
    return figures(large(day, "olmoe", 10))


def profile(day: Day) -> dict[str, Any]:
    """The last of four steps, as torch's profiler sees it: the longest kernels, launches, and the card's idle time."""
    trace = (day.out / "profiled.json").resolve()
    large(day, "profiled", 4, "eval.enabled=false", environment={_TRACE: str(trace)})
    found: dict[str, Any] = json.loads(trace.read_text(encoding="utf-8"))
    return found


def watched_command(trace: Path, words: list[str]) -> None:
    """`onecard` in this process, its last step under torch's profiler."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler
    from transformers import TrainerCallback
    from transformers.trainer import DEFAULT_CALLBACKS

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == state.max_steps - 1:
                on_card = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
                self.profiler = profiler(activities=[ProfilerActivity.CPU, *on_card])
                self.profiler.__enter__()
                self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == state.max_steps:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - self.began
                self.profiler.__exit__(None, None, None)
                trace.write_text(json.dumps(read_profile(self.profiler.key_averages(), seconds)), encoding="utf-8")

    DEFAULT_CALLBACKS.append(Watch)
    from toolkit.cli import main as onecard

    sys.argv = ["onecard", *words]
    onecard()


def read_profile(events: Any, seconds: float) -> dict[str, Any]:
    """Launches, waits and the card's busy share of a step, and the ten events that take longest on it."""
    busy = sum(event.self_device_time_total for event in events) / 1e6
    longest = sorted(events, key=lambda event: -event.self_device_time_total)[:10]
    count = {event.key: event.count for event in events}
    return {
        "seconds": seconds,
        "busy": busy / seconds,
        "launches": sum(number for key, number in count.items() if "LaunchKernel" in key),
        "waits": sum(number for key, number in count.items() if "Synchronize" in key),
        "longest": [[event.key, event.count, event.self_device_time_total / 1e6] for event in longest],
    }


PIECES: Mapping[str, Callable[[Day], dict[str, Any]]] = {
    "kernels": kernels,
    "train": train,
    "streams": streams,
    "resume": resume,
    "olmoe": olmoe,
    "profile": profile,
}


def card() -> str:
    """Name, driver and torch, for the table."""
    import torch

    if not torch.cuda.is_available():
        return f"no card, torch {torch.__version__}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = "?"
    if shutil.which(query[0]):
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()
    return f"{torch.cuda.get_device_name(0)}, driver {driver}, torch {torch.__version__}"


def result(day: Day, name: str) -> dict[str, Any]:
    """A piece's figures, or what went wrong; written at once."""
    began = time.perf_counter()
    try:
        found = {"ok": True, **PIECES[name](day)}
    except Exception as error:  # whatever it is, the others shall run, and the day's table shall say it
        found = {"ok": False, "why": f"{type(error).__name__}: {error}"}
    found |= {"piece": name, "card": card(), "date": time.strftime("%Y-%m-%d"), "took": time.perf_counter() - began}
    (day.out / f"{name}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def row(found: Mapping[str, Any]) -> str:
    """A line of the table."""
    told = {key: value for key, value in found.items() if key not in {"piece", "card", "date", "took", "ok", "longest"}}
    text = json.dumps(told, default=str)
    return f"| {found['piece']} | {found['card']} | {found['date']} | {'ok' if found['ok'] else 'failed'} | {text} |"


def table(out: Path) -> str:
    """All pieces that there are."""
    files = [out / f"{name}.json" for name in PIECES if (out / f"{name}.json").is_file()]
    lines = [row(json.loads(path.read_text(encoding="utf-8"))) for path in files]
    return "\n".join(["| piece | card | date | | figures |", "|---|---|---|---|---|", *lines, ""])


def pieces(text: str) -> list[str]:
    """Names between commas."""
    names = text.split(",")
    if unknown := [name for name in names if name not in PIECES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is no piece; there are {', '.join(PIECES)}")
    return names


def run_within(command: list[str], seconds: float) -> None:
    """Run a command; when its time is over, it and all that it started are killed, and `TimeoutExpired` is raised."""
    with subprocess.Popen(command, start_new_session=True) as child:
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            raise


def main() -> int:
    """Do what is not there yet, each piece in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("card-day"))
    parser.add_argument("--only", type=pieces, default=list(PIECES), metavar="PIECE,…", help="these, in this order")
    parser.add_argument("--minutes", type=float, default=25.0, help="no piece begins after this")
    parser.add_argument("--piece", choices=PIECES, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of every run")
    given = parser.parse_args()
    day = Day(given.out.resolve(), tuple(given.overrides))
    day.out.mkdir(parents=True, exist_ok=True)
    if given.piece:
        return 0 if result(day, given.piece)["ok"] else 1
    until = time.monotonic() + 60 * given.minutes
    for name in given.only:
        path = day.out / f"{name}.json"
        if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["ok"]:
            continue
        left = until - time.monotonic()
        if left <= 0:
            print(f"{name}: no time left; run the same again")
            continue
        command = [sys.executable, __file__, "--out", str(day.out), "--piece", name, *day.overrides]
        try:
            run_within(command, min(LONGEST, left))
        except subprocess.TimeoutExpired:
            late = {"piece": name, "card": card(), "date": time.strftime("%Y-%m-%d"), "ok": False, "why": "out of time"}
            path.write_text(json.dumps(late), encoding="utf-8")
        (day.out / "table.md").write_text(table(day.out), encoding="utf-8")
        print(row(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else f"{name}: ended without a word")
    done = [day.out / f"{name}.json" for name in given.only]
    return 0 if all(path.is_file() and json.loads(path.read_text("utf-8"))["ok"] for path in done) else 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if _TRACE in os.environ:
        watched_command(Path(os.environ[_TRACE]), sys.argv[1:])
    else:
        sys.exit(main())
