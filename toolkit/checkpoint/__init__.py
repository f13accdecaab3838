"""A checkpoint's files, in a folder or on the Hub: headers, shards, formats, identity; no weight is kept."""

from toolkit.checkpoint.identity import BaseIdentity, config_sha256, files_of, identify_base, license_of

__all__ = ["BaseIdentity", "config_sha256", "files_of", "identify_base", "license_of"]
