"""The recipe: YAML in, a frozen and fully validated `Recipe` out. Imports no torch."""

from toolkit.recipe.binding import Change, Effect, changes, flat
from toolkit.recipe.methods import PAIR_METRICS, PREFERENCE_METHODS, REFERENCE_FREE
from toolkit.recipe.preference import KtoSection, OrpoSection, SimpoSection
from toolkit.recipe.schema import (
    DataSection,
    DpoSection,
    EvalSection,
    HubSection,
    LoraSection,
    ModelSection,
    MtpSection,
    PlacementSection,
    QuantizationSection,
    Recipe,
    TrackingSection,
    TrainingSection,
    TrainSource,
)
from toolkit.recipe.source import ALIASES, dump, field_named, field_words, load, parse
from toolkit.recipe.starter import starter

__all__ = [
    "ALIASES",
    "PAIR_METRICS",
    "PREFERENCE_METHODS",
    "REFERENCE_FREE",
    "Change",
    "DataSection",
    "DpoSection",
    "Effect",
    "EvalSection",
    "HubSection",
    "KtoSection",
    "LoraSection",
    "ModelSection",
    "MtpSection",
    "OrpoSection",
    "PlacementSection",
    "QuantizationSection",
    "Recipe",
    "SimpoSection",
    "TrackingSection",
    "TrainSource",
    "TrainingSection",
    "changes",
    "dump",
    "field_named",
    "field_words",
    "flat",
    "load",
    "parse",
    "starter",
]
