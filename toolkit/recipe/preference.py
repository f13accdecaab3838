"""Sections of the other methods that learn from preferences, by TRL's names: KTO, ORPO and SimPO.

Defaults are TRL's, but SimPO's: those of TRL belong to its other losses, and its page on SimPO asks for the paper's.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from toolkit.recipe.bounds import Section

__all__ = ["KtoSection", "OrpoSection", "SimpoSection"]


class KtoSection(Section):
    """Kahneman-Tversky optimisation, for `training.method: kto`; TRL's names and meanings."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How close the model stays to its reference: higher is closer."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """The loss. `apo_zero_unpaired` compares with the reference alone, without a pass for the mean distance from it."""
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of good answers; with fewer of them than bad ones, raise it."""
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of bad answers."""


class OrpoSection(Section):
    """Odds-ratio preference optimisation, for `training.method: orpo`; TRL's names and meanings."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """Weight of the odds ratio beside the chosen answer's own loss; λ in the paper."""


class SimpoSection(Section):
    """Simple preference optimisation, for `training.method: simpo`; TRL's names (of its CPO trainer) and meanings."""

    beta: Annotated[float, Field(gt=0)] = 2.0
    """Scale of the difference of mean log-probabilities."""
    simpo_gamma: Annotated[float, Field(ge=0)] = 1.0
    """The margin by which a chosen answer shall be better, after `beta`."""
    cpo_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen answer's own loss beside it (CPO-SimPO)."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of pairs that are thought to be the wrong way round."""
    alpha: float = 0.0
    """Shape of the reward (AlphaPO); 0 is the log-probability itself."""
