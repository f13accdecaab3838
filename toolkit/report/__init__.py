"""What a person sees of a run: tables on the terminal."""

from toolkit.report import terminal

__all__ = ["terminal"]
