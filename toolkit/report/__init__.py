"""What a person sees of a run: `plans` before it, `terminal` beside it; each imported where it is needed."""

__all__: list[str] = []
