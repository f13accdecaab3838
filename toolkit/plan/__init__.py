"""Before any weight is read: what a run will load, adapt and need, and what a checkpoint is made of."""

from toolkit.plan.audit import Audit, Part, audit
from toolkit.plan.devices import Device, choose_device, device_memory, free_memory, parse_bytes
from toolkit.plan.fit import Change, nearest_change
from toolkit.plan.make import BACKENDS, ROUNDED_ROWS, Plan, make_plan
from toolkit.plan.memory import Bytes
from toolkit.plan.starting import first_that_fits
from toolkit.plan.steps import StepShape

__all__ = [
    "BACKENDS",
    "ROUNDED_ROWS",
    "Audit",
    "Bytes",
    "Change",
    "Device",
    "Part",
    "Plan",
    "StepShape",
    "audit",
    "choose_device",
    "device_memory",
    "first_that_fits",
    "free_memory",
    "make_plan",
    "nearest_change",
    "parse_bytes",
]
