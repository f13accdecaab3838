"""What befalls a run from outside: a second run, signals, no disk, no memory, numbers that are not finite."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.conftest import Run
from tests.faults.test_wrong_input import fails
from toolkit.errors import DivergedError, InterruptedRunError, PreemptedError, ResourceError
from toolkit.processes import StopRequest, signals_heeded
from toolkit.quant.quantizer import Int8Quantizer
from toolkit.run.folder import LOCK, owned
from toolkit.training.divergence import StepGuard
from toolkit.training.trainer import AdapterTrainer

HOLDER = """
import sys, pathlib
from toolkit.run.folder import owned
with owned(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_in_one_folder_names_the_first(onecard: Run, recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        fails(onecard("train", recipe), 5, f"process {holder.pid} on ", "is training in it")
        holder.kill()
    with owned(tmp_path / "run"):  # left behind by a kill, taken over
        assert (tmp_path / "run" / LOCK).read_text().startswith(f"{os.getpid()} on ")
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_lock_that_a_worker_of_a_dead_run_still_holds_is_taken_over(tmp_path: Path) -> None:
    import fcntl

    descriptor = os.open(tmp_path / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    gone = subprocess.Popen(["true"])
    gone.wait()
    os.write(descriptor, f"{gone.pid} on {os.uname().nodename}\n".encode())
    with owned(tmp_path):
        pass
    os.close(descriptor)


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))


@pytest.mark.usefixtures("small_disk")
def test_too_little_disk_is_refused_with_numbers_before_the_model_is_loaded(onecard: Run, recipe: Path) -> None:
    fails(onecard("train", recipe), 5, "0.00 GB free", "the run writes 0.07 GB", "training.save_total_limit")


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, PreemptedError), (signal.SIGINT, InterruptedRunError)])
def test_a_signal_waits_for_the_step_and_then_leaves(number: int, error: type[Exception]) -> None:
    before = signal.getsignal(number)
    with signals_heeded() as stop, stop.until_saved():
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(error, match="saved at step 3; the same command resumes"):
            stop.leave("saved at step 3")
    assert signal.getsignal(number) is before
    assert (PreemptedError.exit_code, InterruptedRunError.exit_code) == (75, 130)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_second_signal_and_one_outside_of_training_leave_at_once(number: int, code: int) -> None:
    with signals_heeded(), pytest.raises(SystemExit) as end:
        os.kill(os.getpid(), number)
    assert end.value.code == code
    program = f"""
import os
from toolkit.processes import signals_heeded
with signals_heeded() as stop, stop.until_saved():
    os.kill(os.getpid(), {int(number)})
    os.kill(os.getpid(), {int(number)})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "repeat to exit at once" in done.stderr
    assert "exiting at once" in done.stderr


def test_workers_leave_signals_to_their_parent() -> None:
    stop = StopRequest()
    stop._owner = os.getpid() + 1
    stop.heed(signal.SIGTERM, None)
    assert not stop.requested


def in_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Any) -> None:
    """Run `act` before a training step's forward pass."""
    original = AdapterTrainer.training_step

    def training_step(self: AdapterTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step + 1 == step:
            act()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", training_step)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_stop_has_saved_that_step(
    onecard: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    in_step(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    status, out, err = onecard("train", recipe, "training.max_steps=4", "eval.enabled=false")
    assert (status, out) == (code, ""), err
    assert "saved at step 2; the same command resumes" in err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]


def no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(("step", "then"), [(1, "nothing is saved yet"), (3, "checkpoint-2 is kept")])
def test_memory_that_runs_out_is_one_line_with_what_is_kept(
    onecard: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch, step: int, then: str
) -> None:
    in_step(monkeypatch, step, no_memory)
    status, out, err = onecard("train", recipe, "training.save_steps=1", "eval.enabled=false")
    assert (status, out) == (5, "")
    assert f"step {step}: out of memory" in err.splitlines()[-1]
    assert then in err.splitlines()[-1]


def failed_card() -> None:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nSearch for it in CUDA's docs")


def test_a_kernel_that_does_not_compile_is_one_line(
    onecard: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = pytest.importorskip("triton.runtime.errors")

    def fail() -> None:
        raise errors.PTXASError("ptxas fatal: too much shared data\nand more")

    in_step(monkeypatch, 1, fail)
    status, out, err = onecard("train", recipe, "eval.enabled=false")
    assert (status, out) == (5, "")
    assert "a kernel does not compile for this card: PTXAS error: ptxas fatal" in err.splitlines()[-1]
    assert "gpu_check.py" in err.splitlines()[-1]


def test_a_card_that_fails_is_one_line_and_its_run_goes_on(
    onecard: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = ["training.save_steps=1", "training.max_steps=3", "eval.enabled=false"]
    with monkeypatch.context() as broken:
        in_step(broken, 3, failed_card)
        status, out, err = onecard("train", recipe, *quick)
    assert (status, out) == (5, "")
    assert "an illegal memory access was encountered; the same command resumes" in err.splitlines()[-1]
    status, _, err = onecard("train", recipe, *quick)
    assert status == 0, err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]


@pytest.mark.parametrize(("fault", "said"), [(no_memory, "out of memory: CUDA out"), (failed_card, "the card failed")])
def test_what_the_machine_refuses_while_loading_is_not_said_of_the_checkpoint(
    onecard: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[], None], said: str
) -> None:
    monkeypatch.setattr(Int8Quantizer, "update_weight_conversions", lambda *args: fault())
    status, out, err = onecard("train", recipe)
    assert (status, out) == (5, "")
    assert said in err.splitlines()[-1]


def poisoned(monkeypatch: pytest.MonkeyPatch, steps: set[int], where: str, way: str = "_labelled_loss") -> None:
    """Make the loss, or only the gradients, of these steps infinite. `way`: the method that computes it."""
    loss = getattr(AdapterTrainer, way)

    def broken_loss(self: AdapterTrainer, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        found = loss(self, *args, **kwargs)
        if found is None or not self.model.training or self.state.global_step + 1 not in steps:
            return found
        if where == "loss":
            return found * float("inf")
        found.register_hook(lambda gradient: gradient * float("nan"))
        return found

    monkeypatch.setattr(AdapterTrainer, way, broken_loss)


@pytest.mark.parametrize(("where", "what"), [("loss", "the loss is inf"), ("gradient", "the gradient's norm is nan")])
def test_a_step_that_is_not_finite_is_named_and_left_out(
    onecard: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, what: str
) -> None:
    poisoned(monkeypatch, {2}, where)
    status, _, err = onecard("train", recipe, "training.packing=false", "eval.enabled=false")
    assert status == 0, err
    (line,) = [line for line in err.splitlines() if line.startswith("step 2: the ")]
    assert what in line
    assert "category.train.jsonl:" in line
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"skipped_steps": 1' in metrics
    assert "NaN" not in metrics
    assert "Infinity" not in metrics


def test_too_many_such_steps_in_a_row_end_the_run_with_the_last_checkpoint_whole(
    onecard: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, {2, 3}, "loss")
    some = ["training.max_nonfinite_steps=2", "training.save_steps=1", "eval.enabled=false"]
    status, out, err = onecard("train", recipe, *some)
    assert (status, out) == (6, "")
    assert "2 steps in a row gave no finite update" in err.splitlines()[-1]
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(names) == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / "run" / "adapter").exists()


def test_losses_that_are_looked_at_late_end_the_same_steps(
    onecard: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card, where nobody waits for a micro-batch's loss; played on this CPU."""
    monkeypatch.setattr(AdapterTrainer, "_would_wait", staticmethod(lambda tensor: True))
    monkeypatch.setattr(AdapterTrainer, "_pays_to_keep_logits", lambda self, labels: False)
    poisoned(monkeypatch, {2}, "loss", "_fused_loss")
    status, _, err = onecard("train", recipe, "training.max_steps=3", "eval.enabled=false")
    assert status == 0, err
    assert "step 2: the loss is inf on " in err
    assert "the step is skipped" in err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 3]
    assert all(math.isfinite(line["entropy"]) for line in lines if "loss" in line)


def test_the_guard_counts_in_a_row_and_forgives_a_scale_search() -> None:
    guard = StepGuard(2, lambda batch: ["x"])
    for finite in (False, True, False, True):
        guard.see({}, torch.tensor(1.0 if finite else float("nan")))
        assert guard.settle(1, torch.tensor(1.0)) is finite
    guard.see({}, torch.tensor(1.0))
    assert guard.settle(1, torch.tensor(torch.inf), scaled=True)
    guard.see({}, torch.tensor(1.0))
    assert not guard.settle(1, torch.tensor(torch.inf))
    guard.see({}, torch.tensor(1.0))
    with pytest.raises(DivergedError, match="on x; 2 steps in a row"):
        guard.settle(1, torch.tensor(torch.inf))


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from toolkit.training.callbacks import MetricsLog

    log = MetricsLog(tmp_path / "gone" / "metrics.jsonl", "cpu")
    with pytest.raises(ResourceError, match="rerun the same command"):
        log.on_log(None, SimpleNamespace(global_step=1, max_steps=2), None, logs={"loss": 1.0})  # type: ignore[arg-type]


def test_what_a_kill_leaves_before_the_recipe_is_there_is_no_obstacle(tmp_path: Path) -> None:
    from toolkit.errors import RecipeError
    from toolkit.run.folder import check_folder_is_ours

    (tmp_path / LOCK).touch()
    (tmp_path / ".recipe.yaml.tmp").touch()
    check_folder_is_ours(tmp_path)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(RecipeError, match="not empty and not a run"):
        check_folder_is_ours(tmp_path)
