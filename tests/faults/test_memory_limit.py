"""What the plan says is what a run needs: under a limit of so many bytes it trains, under less it stops before step 1.

The limit is the kernel's (`RLIMIT_DATA`, all anonymous memory that is mapped, touched or not), set on the whole process
after the libraries are there and before the model is loaded. Beside the plan it allows for the stacks of threads.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.faults.conftest import MODEL, QUICKSTART

STACKS = 96 << 20
"""Of the threads that BLAS, autograd and readers start while training: 8 MiB each, of which they touch some kB."""

PROGRAM = """
import contextlib, io, json, resource, sys
from pathlib import Path
from toolkit.run import job
from toolkit.cli import main

stacks, load = int(sys.argv.pop(1)), job.load

def run(allowed):
    def limited(plan):
        held = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (held + stacks + allowed(plan.bytes), resource.RLIM_INFINITY))
        return load(plan)

    job.load, err, code = limited, io.StringIO(), 0
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return [code, err.getvalue()]

too_little = run(lambda b: b.standing + (b.gradients + b.activations) // 2 - stacks)
enough = run(lambda b: b.run + b.run // 20)
print(json.dumps([too_little, enough]))
"""


def test_a_run_needs_what_the_plan_says(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{model_name_or_path: {MODEL}}}\n"
        f"data: {{train: {QUICKSTART}/data/category.train.jsonl, max_samples: 100}}\n"
        f"training: {{output_dir: {tmp_path}/run, max_length: 512, per_device_train_batch_size: 6, max_steps: 1,\n"
        "  gradient_checkpointing: false, use_cpu: true, learning_rate: 1e-3, warmup_steps: 0}\n"
    )
    # Freed memory goes back at once, so that what the process has is what it holds; arenas are few.
    settings = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10), "MALLOC_ARENA_MAX": "2"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")} | settings
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(STACKS), "train", str(recipe)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment, cwd=Path(__file__).parents[2]
    )
    (stopped, why), (trained, told) = json.loads(done.stdout)
    assert stopped == 5
    *_, last = why.strip().splitlines()
    where = r"(longest batch \(30\d\d tokens\)|a look at one example)"
    assert re.match(rf"onecard: out of memory before step 1, {where}; cheapest fix: training", last)
    assert "Traceback" not in why
    assert trained == 0, told
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["training"]["steps"] == 1
