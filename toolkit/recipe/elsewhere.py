"""The sections of a recipe about what leaves the machine: figures for trackers, and the artifact for the Hub."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from toolkit.recipe.bounds import NonEmpty, Section

__all__ = ["HubSection", "TrackingSection"]


class TrackingSection(Section):
    """Metric trackers besides `metrics.jsonl`."""

    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Metric trackers besides `metrics.jsonl`, as transformers names them; each must be installed."""
    run_name: NonEmpty | None = None
    """The run's name there; without it the run folder's name."""
    telemetry: bool = False
    """Let TRL tell the Hub that a training began: versions, device, architecture; never data or names."""


class HubSection(Section):
    """Upload of the finished artifact."""

    push_to_hub: bool = False
    """Push the artifact when training ends."""
    hub_model_id: NonEmpty | None = None
    """`owner/name` of the repository."""
    hub_private_repo: bool = True
    """Create the repository private."""
    license: NonEmpty | None = None
    """The adapter's licence, by its Hub id; without it, that of the base's card."""
    hub_token: NonEmpty | None = None
    """Only as `${NAME}`, an environment variable; without it the Hub's own login is used."""

    @model_validator(mode="after")
    def _target(self) -> HubSection:
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("push_to_hub needs hub_model_id")
        return self
