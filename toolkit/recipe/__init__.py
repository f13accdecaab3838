"""The recipe: YAML in, a frozen and fully validated `Recipe` out. Imports no torch."""

from toolkit.recipe.aliases import ALIASES
from toolkit.recipe.binding import Change, Effect, changes, flat
from toolkit.recipe.methods import PAIR_METRICS, PREFERENCE_METHODS, REFERENCE_FREE, SCHEDULE_FREE
from toolkit.recipe.preference import KtoSection, OrpoSection, SimpoSection
from toolkit.recipe.rollouts import REWARD, ROLLOUTS, RewardFunction, RolloutOptions, keeps_start, rollout_options
from toolkit.recipe.schema import (
    DataSection,
    DpoSection,
    EvalSection,
    GrpoSection,
    HubSection,
    LoraSection,
    ModelSection,
    MtpSection,
    PlacementSection,
    QuantizationSection,
    Recipe,
    RewardsSection,
    RlooSection,
    TrackingSection,
    TrainingSection,
    TrainSource,
)
from toolkit.recipe.source import dump, field_named, field_words, load, parse
from toolkit.recipe.starter import starter

__all__ = [
    "ALIASES",
    "PAIR_METRICS",
    "PREFERENCE_METHODS",
    "REFERENCE_FREE",
    "REWARD",
    "ROLLOUTS",
    "SCHEDULE_FREE",
    "Change",
    "DataSection",
    "DpoSection",
    "Effect",
    "EvalSection",
    "GrpoSection",
    "HubSection",
    "KtoSection",
    "LoraSection",
    "ModelSection",
    "MtpSection",
    "OrpoSection",
    "PlacementSection",
    "QuantizationSection",
    "Recipe",
    "RewardFunction",
    "RewardsSection",
    "RlooSection",
    "RolloutOptions",
    "SimpoSection",
    "TrackingSection",
    "TrainSource",
    "TrainingSection",
    "changes",
    "dump",
    "field_named",
    "field_words",
    "flat",
    "keeps_start",
    "load",
    "parse",
    "rollout_options",
    "starter",
]
