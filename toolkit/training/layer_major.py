"""All micro-batches of an optimizer step through a streamed layer before the next, so that each is read twice a step.

Accelerate runs forward and backward of one micro-batch after the other, which would read every streamed layer twice for
each. Here each micro-batch runs in a thread of its own, one at a time, and stops where it asks for a layer that is not
the one everybody is in. That needs no knowledge of the family, and every parameter's gradients are added in the
micro-batches' order, as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Condition, get_ident
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from toolkit.offload.attach import stream_of
from toolkit.offload.stream import ExpertStream

__all__ = ["LayerMajor", "LayerMajorSteps", "layer_major_for"]

Result = TypeVar("Result")


class _Abandoned(BaseException):
    """Unwinds the micro-batches that wait when another one has failed."""


class LayerMajor(Generic[Result]):
    """Runs tasks that use one stream side by side, in layer-major order.

    Args:
        stream: its `gate` is taken while tasks run.
        micro_batches_per_pass: most tasks side by side, whose activations are alive together; the next ones follow.
            None for all.
    """

    def __init__(self, stream: ExpertStream, micro_batches_per_pass: int | None = None) -> None:
        self._stream, self._per_pass = stream, micro_batches_per_pass
        self._turn = Condition()
        self._pool = ThreadPoolExecutor(1)
        self._threads = 1
        self._begin(0)

    def run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """Each task's result, in order. The first failure, in task order, is raised once all have stopped.

        A task runs until it asks for another layer than the current one; when all have come so far, the layer that the
        first of them waits for becomes the current one.
        """
        size = self._per_pass or max(1, len(tasks))
        groups = [tasks[start : start + size] for start in range(0, len(tasks), size)]
        return [result for group in groups for result in self._run(group)]

    def _run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        self._begin(len(tasks))
        if len(tasks) > self._threads:
            self._pool, self._threads = ThreadPoolExecutor(len(tasks), "onecard-micro-batch"), len(tasks)
        threads, self._stream.gate = torch.get_num_threads(), self._reach
        try:
            futures = [self._pool.submit(self._task, number, task, threads) for number, task in enumerate(tasks)]
            failed = [error for future in futures if (error := future.exception()) is not None]
        except BaseException:  # interrupted: whoever waits for a turn will not get it
            self._fail()
            raise
        finally:
            self._stream.gate = None
        for error in sorted(failed, key=lambda error: isinstance(error, _Abandoned)):
            raise error
        return [future.result() for future in futures]

    def _begin(self, count: int) -> None:
        self._numbers: dict[int, int] = {}
        self._wanted: list[str | None] = [None] * count
        self._is_done = [False] * count
        self._running, self._layer, self._failed = 0, None, False

    _layer: str | None

    def _task(self, number: int, task: Callable[[], Result], threads: int) -> Result:
        self._numbers[get_ident()] = number
        with self._turn:
            self._await_turn(number)
        try:
            # As many intra-op threads as the caller has. Backward stays in this thread on every device: a card's own
            # backward thread would serve all micro-batches and could not wait for one of them.
            torch.set_num_threads(threads)
            with torch.autograd.set_multithreading_enabled(False):
                return task()
        except BaseException:
            self._fail()
            raise
        finally:
            with self._turn:
                self._is_done[number] = True
                self._pass_on(number)

    def _reach(self, layer: str) -> None:
        """The stream's gate: returns when this thread's micro-batch may go into `layer`."""
        number = self._numbers.get(get_ident())
        if number is None or layer == self._layer:
            return
        with self._turn:
            self._wanted[number] = layer
            self._pass_on(number)
            self._await_turn(number)
            self._wanted[number] = None

    def _fail(self) -> None:
        with self._turn:
            self._failed = True
            self._turn.notify_all()

    def _await_turn(self, number: int) -> None:
        self._turn.wait_for(lambda: self._running == number or self._failed)
        if self._failed:
            raise _Abandoned

    def _pass_on(self, number: int) -> None:
        """To the next task of this round; when there is none, a new round begins with the first one's layer."""
        waiting = [other for other, is_done in enumerate(self._is_done) if not is_done]
        later = [other for other in waiting if other > number and self._wanted[other] in (None, self._layer)]
        if not later and waiting:
            self._layer = self._wanted[waiting[0]]
            later = [other for other in waiting if self._wanted[other] == self._layer]
        self._running = later[0] if later else -1
        self._turn.notify_all()


class LayerMajorSteps:
    """Mixed into a `transformers.Trainer`: an optimizer step's micro-batches go through `layer_major` where it is set.

    The trainer still calls `training_step` once a micro-batch; the first call of a step runs them all.
    """

    layer_major: LayerMajor[torch.Tensor] | None = None
    _samples: list[Any]
    _losses: Sequence[torch.Tensor] = ()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The trainer's own, remembered: these micro-batches make one optimizer step."""
        self._samples, count = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        return self._samples, count

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one micro-batch, or of all where this is a step's first; gives its loss."""
        step = super().training_step  # type: ignore[misc]
        if self.layer_major is None or len(self._samples) < 2:  # set by `get_batch_samples`
            loss: torch.Tensor = step(model, inputs, *args, **kwargs)
            return loss
        number = next(number for number, sample in enumerate(self._samples) if sample is inputs)
        if number == 0:
            self._losses = self.layer_major.run(
                [partial(step, model, sample, *args, **kwargs) for sample in self._samples]
            )
        return self._losses[number]


def layer_major_for(
    model: nn.Module, arguments: Mapping[str, Any], micro_batches_per_pass: int | None = None
) -> LayerMajor[torch.Tensor] | None:
    """What runs an optimizer step's micro-batches, so many at a time; None where the ordinary order is right.

    That is where nothing is streamed, where there is one micro-batch or more than one process, where activations are
    moved to host memory (by hooks that know one micro-batch), and where dropout or noise is drawn in order.
    """
    stream = stream_of(model)
    is_alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
    pays = stream is not None and arguments["gradient_accumulation_steps"] > 1 and is_alone
    if stream is None or not pays or arguments["activation_offloading"] or _draws_random_numbers(model):
        return None
    return None if micro_batches_per_pass == 1 else LayerMajor(stream, micro_batches_per_pass)


def _draws_random_numbers(model: Any) -> bool:
    """Whether a training forward may draw random numbers: in another order they would be others."""
    layers = (module for module in model.modules() if isinstance(module, nn.Dropout))
    settings = model.config.get_text_config().to_dict().items()
    rates = [value for key, value in settings if "drop" in key or "jitter" in key or "noise" in key]
    return any(layer.p > 0 for layer in layers) or any(isinstance(rate, float) and rate > 0 for rate in rates)
