"""A recipe trained once for every combination of some values, on Ray Tune: trials, their table and their picture."""

from toolkit.sweep.grid import Trial, expand
from toolkit.sweep.picture import draw
from toolkit.sweep.run import Outcome, Sweep, best_first, run_trials

__all__ = ["Outcome", "Sweep", "Trial", "best_first", "draw", "expand", "run_trials"]
