"""What a person sees of a run: `plans` before it, `terminal` beside it, its `page` after it."""

__all__: list[str] = []
