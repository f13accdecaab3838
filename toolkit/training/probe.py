"""The longest batch first: what does not fit fails before step 1, in one line, and what fits changes no number.

transformers' `auto_find_batch_size` starts over with smaller batches when memory runs out, wherever in a run that is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from toolkit.data.storage import sequence_lengths
from toolkit.errors import ResourceError

__all__ = ["longest_rows", "out_of_memory", "probe", "same_random_numbers"]


def longest_rows(dataset: Dataset, count: int) -> list[int]:
    """Indices of the `count` longest rows by `input_ids`, longest first."""
    longest: list[int] = np.argsort(-sequence_lengths(dataset), kind="stable")[:count].tolist()
    return longest


def probe(
    step: Callable[[], Any], forget: Callable[[], None], *, tokens: int, held: int, device: Any, advice: str
) -> None:
    """Run a step, drop what it leaves, and put the random numbers back.

    Args:
        step: forward and backward of the longest batch. forget: drops gradients and counts.
        held: bytes that will be held beside, once there is an optimizer. tokens, advice: for the message.

    Raises:
        ResourceError: there is not enough memory.
    """
    with same_random_numbers():
        try:
            room = torch.empty(held, dtype=torch.uint8, device=device)
            step()
            del room
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise ResourceError(
                f"out of memory before step 1, with the longest batch ({tokens} tokens); cheapest: {advice}"
            ) from None
        finally:
            forget()


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused, by a card, by the system to torch, or to Python."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = str(error)
    return "not enough memory" in words or ("alloc" in words.lower() and "memory" in words.lower())


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """The random numbers that are drawn after the block are those that would have been without it."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cards is not None:
            torch.cuda.set_rng_state_all(cards)
