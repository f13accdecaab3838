"""How other programs store quantised weights: each format as data and a pure function from parts to fp32 rows."""

__all__: list[str] = []
