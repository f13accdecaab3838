"""Error compensation: rounding that knows which inputs a weight will meet (GPTQ)."""

__all__: list[str] = []
