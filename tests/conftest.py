"""What every test shares: no network, one hypothesis profile, no display. scripts/test.sh exports the same settings."""

from __future__ import annotations

import os

import hypothesis

# Read once at import by the libraries named, so they must be set before a test module imports one of them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
# Kernels run in Triton's interpreter, card or not: parity is then the same everywhere.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Examples are derived from the test itself, so that a failure repeats; a deadline would be a timing in a test.
hypothesis.settings.register_profile("onecard", deadline=None, derandomize=True, max_examples=50, print_blob=True)
hypothesis.settings.load_profile("onecard")
