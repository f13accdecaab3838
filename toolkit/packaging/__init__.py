"""The artifact: an adapter folder that stock software opens, its card, manifest, checks and upload."""

from toolkit.packaging.artifact import check_folder, stack_versions, write_artifact
from toolkit.packaging.base import BaseIdentity, identify_base
from toolkit.packaging.card import model_card
from toolkit.packaging.hub import check_token, push_artifact
from toolkit.packaging.manifest import load_adapter_config, read_manifest
from toolkit.packaging.reopen import reopen_recipe
from toolkit.packaging.verify import Check, VerifyReport, verify_artifact

__all__ = [
    "BaseIdentity",
    "Check",
    "VerifyReport",
    "check_folder",
    "check_token",
    "identify_base",
    "load_adapter_config",
    "model_card",
    "push_artifact",
    "read_manifest",
    "reopen_recipe",
    "stack_versions",
    "verify_artifact",
    "write_artifact",
]
