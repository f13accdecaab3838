"""Trials on Ray Tune. Each is `onecard train` in a process of its own, so a trial is a run like any other.

Ray gives each trial its card and its turn, here or on a cluster. What a finished trial knows lies in its run folder, so
a rerun of the sweep takes finished trials as they are and lets `onecard train` resume the others.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from toolkit.errors import RecipeError
from toolkit.recipe import dump, load
from toolkit.run_folder import RunFolder
from toolkit.sweep.grid import Trial

__all__ = ["Outcome", "Sweep", "best_first", "run_trials"]

_FAILED_SAYING_NOTHING = "the process was killed, possibly out of memory"


@dataclass(frozen=True)
class Outcome:
    """How one trial ended: the adapted model's figures by name, or why there are none. `seconds` are this call's."""

    trial: Trial
    run: Path
    figures: dict[str, float]
    seconds: float
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        ended = {"figures": self.figures, "seconds": self.seconds, "error": self.error}
        return {"trial": self.trial.name, "values": self.trial.values, "run": str(self.run), **ended}


@dataclass(frozen=True)
class Sweep:
    """What is tried: a recipe file, the trials, the folder of their runs, and where relative paths in recipes start."""

    recipe: Path
    trials: tuple[Trial, ...]
    folder: Path
    working_folder: Path = field(default_factory=Path.cwd)

    def run_of(self, trial: Trial) -> Path:
        """The trial's run folder."""
        return self.folder / trial.name

    def overrides_of(self, trial: Trial) -> list[str]:
        """The trial's overrides, its run folder among them."""
        return [*trial.overrides, f"training.output_dir={self.run_of(trial)}"]

    def check(self) -> None:
        """Parse every trial's recipe, so that a mistake costs nothing. Raises `RecipeError`."""
        for trial in self.trials:
            load(self.recipe, self.overrides_of(trial))


def run_trials(
    sweep: Sweep,
    *,
    at_once: int,
    cards: int = 0,
    address: str | None = None,
    told: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Train every trial; one that fails is an `Outcome` with an error, and the others go on.

    Args:
        at_once: trials that run together. cards: cards that each of them gets.
        address: of a Ray cluster, whose machines see `sweep.folder` and have onecard; without it, this machine.
        told: is called with each trial as it ends.

    Raises:
        RecipeError: Ray Tune is not installed, or a trial's recipe is wrong.
    """
    if not find_spec("ray"):
        raise RecipeError('sweep: needs Ray Tune; pip install "onecard[sweep]"')
    sweep.check()
    done = {trial.name: found for trial in sweep.trials if (found := finished(sweep, trial))}
    for outcome in done.values():
        told(outcome)
    due = [trial for trial in sweep.trials if trial.name not in done]
    if due:
        done |= {outcome.trial.name: outcome for outcome in _on_ray(sweep, due, at_once, cards, address, told)}
    return [done[trial.name] for trial in sweep.trials]


def finished(sweep: Sweep, trial: Trial) -> Outcome | None:
    """The trial's outcome where its run is finished already, under this very recipe."""
    run = RunFolder(sweep.run_of(trial))
    summary = run.read_summary()
    if summary is None or run.recipe.read_text(encoding="utf-8") != dump(load(sweep.recipe, sweep.overrides_of(trial))):
        return None
    return Outcome(trial, run.path, _figures(summary), 0.0)


def train_trial(sweep: Sweep, trial: Trial) -> Outcome:
    """`onecard train` of one trial, with its output in `logs/NAME.txt`."""
    run, began = sweep.run_of(trial), time.monotonic()
    command = [sys.executable, "-m", "toolkit", "train", str(sweep.recipe), *sweep.overrides_of(trial)]
    log = sweep.folder / "logs" / f"{trial.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as stream:
        # Ray runs trials in a folder of its own.
        done = subprocess.run(command, cwd=sweep.working_folder, stdout=stream, stderr=subprocess.STDOUT, check=False)
    seconds = time.monotonic() - began
    if done.returncode == 0 and (summary := RunFolder(run).read_summary()):
        return Outcome(trial, run, _figures(summary), seconds)
    said = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("onecard: ")]
    return Outcome(trial, run, {}, seconds, said[-1].removeprefix("onecard: ") if said else _FAILED_SAYING_NOTHING)


def best_first(outcomes: Sequence[Outcome], metric: str) -> list[Outcome]:
    """Sorted by the figure, failures last. A loss or perplexity is better low, everything else high."""
    sign = 1 if metric.endswith(("loss", "perplexity")) else -1

    def rank(outcome: Outcome) -> float:
        value = outcome.figures.get(metric, math.nan)
        return math.inf if math.isnan(value) else sign * value

    return sorted(outcomes, key=rank)


def _figures(summary: Mapping[str, Any]) -> dict[str, float]:
    """The adapted model's figures on held-out examples; the training loss where none are held out."""
    results = summary["results"]
    measured = results.get("adapted") or {"loss": results["training"]["loss"]}
    measured = {**measured, **results.get("preference", {})}
    return {name: float(value) for name, value in measured.items() if isinstance(value, int | float)}


def _on_ray(
    sweep: Sweep,
    due: Sequence[Trial],
    at_once: int,
    cards: int,
    address: str | None,
    told: Callable[[Outcome], None],
) -> list[Outcome]:
    _prepare_ray()
    import ray
    import torch
    from ray import tune

    by_name = {trial.name: trial for trial in due}

    class Told(tune.Callback):  # type: ignore[misc]
        """Tells of each trial as it ends."""

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            told(_outcome(sweep, by_name[trial.config["trial"]], trial.last_result))

        def __reduce__(self) -> tuple[type, tuple[()]]:
            """Ray saves callbacks to take up a sweep again, which our run folders do; a console cannot be saved."""
            return object, ()

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            told(_outcome(sweep, by_name[trial.config["trial"]], None))

    def trainable(config: dict[str, Any]) -> None:
        outcome = train_trial(sweep, by_name[config["trial"]])
        tune.report({"outcome": {"figures": outcome.figures, "seconds": outcome.seconds, "error": outcome.error}})

    ray.init(
        address=address,
        include_dashboard=False if address is None else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
        # A trial takes one of so many places; the threads that it computes with are torch's own affair.
        num_cpus=at_once if address is None else None,
        # Ray would ask NVML, which a container may lack where torch sees the cards; then no trial would ever begin.
        num_gpus=(torch.cuda.device_count() if cards else 0) if address is None else None,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}} if address is None else None,
    )
    try:
        results = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1, "gpu": cards}),
            param_space={"trial": tune.grid_search(list(by_name))},
            tune_config=tune.TuneConfig(max_concurrent_trials=at_once),
            run_config=tune.RunConfig(
                name="ray", storage_path=str(sweep.folder.resolve()), callbacks=[Told()], verbose=0
            ),
        ).fit()
        ended = {result.config["trial"]: result.metrics for result in results}
    finally:
        ray.shutdown()
    return [_outcome(sweep, trial, ended.get(trial.name)) for trial in due]


def _outcome(sweep: Sweep, trial: Trial, reported: Mapping[str, Any] | None) -> Outcome:
    """What Ray says of a trial; a trial that reported nothing died with its worker."""
    found = (reported or {}).get("outcome")
    if found is None:
        return Outcome(trial, sweep.run_of(trial), {}, 0.0, _FAILED_SAYING_NOTHING)
    return Outcome(trial, sweep.run_of(trial), **found)


def _prepare_ray() -> None:
    """No telemetry, no loggers beside our table, patience. Ray reads these when it is imported and started.

    A machine that was asleep, or busy for a minute, has missed the heartbeats after which Ray gives it up for dead.
    """
    os.environ.setdefault("RAY_health_check_failure_threshold", "100000")
    os.environ.setdefault("RAY_health_check_timeout_ms", "3600000")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_AIR_NEW_OUTPUT", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        os.environ.setdefault(name, "0")
