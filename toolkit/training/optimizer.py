"""bitsandbytes' optimizers, without waiting for the card after each parameter.

Theirs calls `torch.cuda.synchronize` behind every update: 224 times a step for OLMoE's adapters. Updates follow each
other in one stream anyway; only paged state has to be in its place before the host goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["with_one_wait"]


def with_one_wait(optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The same class whose `step` waits once at most; any that is not bitsandbytes' as it is."""
    if not optimizer.__module__.startswith("bitsandbytes."):
        return optimizer
    return type(optimizer.__name__, (_OneWait, optimizer), {"__module__": __name__})


class _OneWait:
    """`step` of `bitsandbytes.optim.optimizer.Optimizer8bit`, which stands behind it, with one wait."""

    @torch.no_grad()
    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        device = None
        for gindex, group in enumerate(self.param_groups):
            for pindex, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                device = parameter.device
                if not self.state[parameter]:
                    self.init_state(group, parameter, gindex, pindex)
                self.prefetch_state(parameter)
                self.update_step(group, parameter, gindex, pindex)
        if self.is_paged and device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        return loss
