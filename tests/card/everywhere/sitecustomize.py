"""Puts the rehearsed card in place in processes that others start, as a sweep does. Python imports this by its name."""

import sys

if sys.orig_argv[1:3] == ["-m", "toolkit"]:
    from tests.card.command import begin

    begin()
