"""A checkpoint's files, in a folder or on the Hub: headers, shards, formats, identity; no weight is kept."""

__all__: list[str] = []
