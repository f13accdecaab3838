"""The README.md of a merged checkpoint: what was merged into what, and how much of the adapter is left in it.

The artifact's own card says how the adapter was trained, and goes with the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.artifact.manifest import CARD
from toolkit.export.survival import Survival

__all__ = ["put_card"]


def put_card(
    folder: Path,
    merged_into: Mapping[str, Any],
    survival: Survival | None,
    manifest: Mapping[str, Any],
    library: str = "transformers",
) -> None:
    """Write the card of a merged checkpoint, or add to the one that is there.

    Args:
        merged_into: as `Export` has it. manifest: of the artifact. library: what reads it, as the Hub calls that.
    """
    path = folder / CARD
    if not path.is_file():
        path.write_text(
            f"{_metadata(merged_into, library)}\n\n# {merged_into['name']} with an adapter\n", encoding="utf-8"
        )
    trained, commit = manifest["base"], merged_into["revision"]
    lines = [
        f"- merged into: {merged_into['name']}{f' at revision `{commit}`' if commit else ''}, taken as "
        f"{merged_into['as']} (SHA-256 of the weights `{merged_into['weights_sha256']}`)",
        f"- the adapter was trained on: {trained['name']} (`{trained['weights_sha256']}`)",
    ]
    if survival is not None:
        lines += [f"- measured after it was written: {survival}"]
        lines += [f"- {survival.losses}"] if survival.losses else []
    text = "\n".join(["", "## What was merged", "", *lines, ""])
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def _metadata(merged_into: Mapping[str, Any], library: str) -> str:
    tags = ["merged", "moe", "onecard", *([] if library == "transformers" else [library])]
    head: dict[str, Any] = {"library_name": library, "tags": tags}
    if merged_into["revision"]:  # what is no repository the Hub refuses
        head |= {"base_model": merged_into["name"], "base_model_relation": "finetune"}
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---"])
