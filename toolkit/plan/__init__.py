"""Before any weight is read: what a run will load, adapt and need, and what a checkpoint is made of."""

from toolkit.plan.audit import Audit, Part, audit
from toolkit.plan.devices import Device, choose_device, device_memory, free_memory, parse_bytes, unusable_card
from toolkit.plan.fit import Change, nearest_change
from toolkit.plan.make import PER_EXPERT, ROUNDED_ROWS, TRITON, Plan, default_backend, default_dtype, make_plan
from toolkit.plan.memory import Bytes
from toolkit.plan.starting import first_that_fits
from toolkit.plan.steps import StepShape

__all__ = [
    "PER_EXPERT",
    "ROUNDED_ROWS",
    "TRITON",
    "Audit",
    "Bytes",
    "Change",
    "Device",
    "Part",
    "Plan",
    "StepShape",
    "audit",
    "choose_device",
    "default_backend",
    "default_dtype",
    "device_memory",
    "first_that_fits",
    "free_memory",
    "make_plan",
    "nearest_change",
    "parse_bytes",
    "unusable_card",
]
