"""What every test shares: no network, one hypothesis profile, no display. scripts/test.sh exports the same settings."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile

import hypothesis
import pytest

# Read once at import by the libraries named, so they must be set before a test module imports one of them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
gc.set_threshold(10_000)  # as a command has it: millions of objects are only ever added
# What is remembered between plans is nobody's but this run's; its workers share it.
if "ONECARD_CACHE" not in os.environ:
    os.environ["ONECARD_CACHE"] = tempfile.mkdtemp(prefix="onecard-tests-")
    atexit.register(shutil.rmtree, os.environ["ONECARD_CACHE"], ignore_errors=True)
# Kernels run in Triton's interpreter, card or not: parity is then the same everywhere.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Examples are derived from the test itself, so that a failure repeats; a deadline would be a timing in a test.
hypothesis.settings.register_profile("onecard", deadline=None, derandomize=True, max_examples=50, print_blob=True)
hypothesis.settings.load_profile("onecard")

LONGEST = (
    "documentation/test_commands.py",
    "sweep/test_sweep.py",
    "parity/test_template_runs.py",
    "faults/test_kill_points.py",
    "faults/test_moved_base.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of the longest tests first: no worker is left alone with one at the end."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))
