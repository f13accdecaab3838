"""Before any weight is read: what a run will load, adapt and need, and what a checkpoint is made of."""

from toolkit.plan.audit import Audit, Part, audit
from toolkit.plan.make import BACKENDS, ROUNDED_ROWS, Bytes, Plan, device_memory, make_plan
from toolkit.plan.starting import first_that_fits

__all__ = [
    "BACKENDS",
    "ROUNDED_ROWS",
    "Audit",
    "Bytes",
    "Part",
    "Plan",
    "audit",
    "device_memory",
    "first_that_fits",
    "make_plan",
]
