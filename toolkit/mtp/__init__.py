"""The multi-token-prediction head: made or found, trained beside the adapter, decoded with, exported."""

__all__: list[str] = []
