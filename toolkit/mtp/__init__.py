"""The multi-token-prediction head: made or found, trained beside the adapter, decoded with, exported."""

from toolkit.mtp.build import new_head
from toolkit.mtp.cost import MOST_ANSWERS, most_answers
from toolkit.mtp.decode import Counts, Speculator, can_speculate
from toolkit.mtp.draft_folder import draft_config, draft_tensors
from toolkit.mtp.drafts import HeadDrafter, LookupDrafter
from toolkit.mtp.export import HEAD_FILE, config_with_head, head_state, merged_head_state, read_head
from toolkit.mtp.head import MtpHead, Trunk
from toolkit.mtp.measure import Drafting, draft_table, measure_drafts, speculator
from toolkit.mtp.native import load_native, native_keys
from toolkit.mtp.own_answers import OwnHidden, learn_own_answers
from toolkit.mtp.training import HeadResult, HeadTraining

__all__ = [
    "HEAD_FILE",
    "MOST_ANSWERS",
    "Counts",
    "Drafting",
    "HeadDrafter",
    "HeadResult",
    "HeadTraining",
    "LookupDrafter",
    "MtpHead",
    "OwnHidden",
    "Speculator",
    "Trunk",
    "can_speculate",
    "config_with_head",
    "draft_config",
    "draft_table",
    "draft_tensors",
    "head_state",
    "learn_own_answers",
    "load_native",
    "measure_drafts",
    "merged_head_state",
    "most_answers",
    "native_keys",
    "new_head",
    "read_head",
    "speculator",
]
