"""The artifact: an adapter folder that stock software opens, its card, manifest, checks and upload."""

from toolkit.packaging.artifact import check_folder, stack_versions, write_artifact
from toolkit.packaging.base import BaseIdentity, config_sha256, files_of, identify_base, license_of
from toolkit.packaging.canary import training_answers
from toolkit.packaging.card import model_card
from toolkit.packaging.combine import Combined, combine_adapters
from toolkit.packaging.export import FORMATS, Export, export_adapter
from toolkit.packaging.hub import check_token, push_artifact
from toolkit.packaging.manifest import load_adapter_config, read_manifest
from toolkit.packaging.ready import require_packageable
from toolkit.packaging.remote import fetch_adapter, is_remote
from toolkit.packaging.reopen import base_folder, reopen_recipe, runs_near
from toolkit.packaging.verify import Check, VerifyReport, require_base, verify_artifact

__all__ = [
    "FORMATS",
    "BaseIdentity",
    "Check",
    "Combined",
    "Export",
    "VerifyReport",
    "base_folder",
    "check_folder",
    "check_token",
    "combine_adapters",
    "config_sha256",
    "export_adapter",
    "fetch_adapter",
    "files_of",
    "identify_base",
    "is_remote",
    "license_of",
    "load_adapter_config",
    "model_card",
    "push_artifact",
    "read_manifest",
    "reopen_recipe",
    "require_base",
    "require_packageable",
    "runs_near",
    "stack_versions",
    "training_answers",
    "verify_artifact",
    "write_artifact",
]
