"""The artifact: an adapter folder that stock software opens, its card, manifest, checks and upload."""

from toolkit.artifact.card import model_card
from toolkit.artifact.combine import Combined, combine_adapters
from toolkit.artifact.hub import check_token, fetch_adapter, is_remote, push_artifact
from toolkit.artifact.manifest import load_adapter_config, read_manifest
from toolkit.artifact.privacy import training_answers
from toolkit.artifact.reopen import base_folder, reopen_recipe, runs_near
from toolkit.artifact.usage import served_rank
from toolkit.artifact.verify import Check, VerifyReport, require_base, verify_artifact
from toolkit.artifact.write import check_folder, require_packageable, stack_versions, write_artifact

__all__ = [
    "Check",
    "Combined",
    "VerifyReport",
    "base_folder",
    "check_folder",
    "check_token",
    "combine_adapters",
    "fetch_adapter",
    "is_remote",
    "load_adapter_config",
    "model_card",
    "push_artifact",
    "read_manifest",
    "reopen_recipe",
    "require_base",
    "require_packageable",
    "runs_near",
    "served_rank",
    "stack_versions",
    "training_answers",
    "verify_artifact",
    "write_artifact",
]
