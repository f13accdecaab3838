"""Real numbers on a card without kernels: each operator runs on CUDA's own path, then again on a CPU, over its bytes.

CUDA's path checks devices, dtypes and shapes, allocates, and chooses kernels, which do nothing here. The replay is
queued in the stream that the operator ran in and reads and writes the card's memory when its turn comes, so values
depend on events and synchronisations as they do on a card. Memory is found by address alone: what is freed too early is
overwritten.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from tests.card import library
from tests.card.attention import ATTENTION
from tests.card.instead import INSTEAD
from tests.card.library import RehearsalError

__all__ = ["Card", "Place", "at_once", "install", "place", "queue", "seen", "synchronizations"]

seen: Counter[str] = Counter()
"""Operators by name."""
synchronizations: Counter[str] = Counter()
"""Where the host waited for the card because a result's size or value is needed: operator and line of a program."""
at_once: Counter[str] = Counter()
"""Those of them that the library does not see, by operator: what they ask for is computed on the CPU instead."""

_ONLY_MEMORY = {
    "aten::empty", "aten::empty_like", "aten::empty_permuted", "aten::empty_strided", "aten::is_pinned",
    "aten::_pin_memory", "aten::new_empty", "aten::new_empty_strided", "aten::record_stream", "aten::resize_",
    "aten::set_",
}  # fmt: skip
_SIZED_BY_VALUES = {
    "aten::_unique", "aten::_unique2", "aten::bincount", "aten::masked_scatter_backward", "aten::masked_select",
    "aten::nonzero", "aten::unique_consecutive", "aten::unique_dim", "aten::unique_dim_consecutive",
}  # fmt: skip
_WITH_SOLVERS = (
    "aten::cholesky", "aten::linalg_cholesky", "aten::linalg_eigh", "aten::linalg_inv", "aten::linalg_ldl",
    "aten::linalg_lu", "aten::linalg_qr", "aten::linalg_solve", "aten::_linalg_solve", "aten::_linalg_eigh",
    "aten::_linalg_svd", "aten::triangular_solve",
)  # fmt: skip
_MAY_WAIT = {"aten::_grouped_mm"}
"""Operators whose own path waits for values that it does not compute itself: where each group ends."""
_COMPILED = {"aten::digamma", "aten::erfinv", "aten::exp2", "aten::i0", "aten::lgamma", "aten::sinc"}
"""Operators that torch compiles for the card when they are first asked for, as it does all special ones."""
_COPIES = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}


class Place:
    """A tensor's bytes, by address: nothing keeps them alive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.address, self.bytes = storage.data_ptr(), storage.nbytes()
        self.dtype, self.shape, self.stride = tensor.dtype, tensor.shape, tensor.stride()
        self.offset = tensor.storage_offset()

    def view(self) -> torch.Tensor:
        """As a tensor of the CPU."""
        if not self.bytes or not self.address:
            return torch.empty(self.shape, dtype=self.dtype)
        memory = (ctypes.c_char * self.bytes).from_address(self.address)
        storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)


def place(tensor: torch.Tensor | None) -> Place | None:
    """Where a tensor is, None for None."""
    return None if tensor is None else Place(tensor)


def queue(work: Callable[[], None]) -> None:
    """Queue work in the current stream."""
    library.put(torch.cuda.current_stream().cuda_stream, work)


def wait() -> None:
    """All that is queued in the current stream is done when this returns. It is not counted."""
    library.finish(torch.cuda.current_stream().cuda_stream)


def where(deepest: int = 2) -> str:
    """The lines of programs, not of torch's, that led here: the innermost first."""
    frame, found = sys._getframe(1), []
    while frame is not None and len(found) < deepest:
        name = frame.f_code.co_filename
        if "/torch/" not in name and "/tests/card/" not in name and not name.startswith("<"):
            found.append(f"{name.rpartition('/site-packages/')[2].rpartition('/toolkit/')[2]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)


class Card(TorchDispatchMode):
    """The mode; one instance for each thread. `watch` is told of each operator that ran, to look for races."""

    watch: Callable[[Any, Sequence[Any], dict[str, Any], Any], None] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _touches_card(args, kwargs):
            return func(*args, **kwargs)
        library.require_no_failure()
        name = func._schema.name
        seen[name] += 1
        if _is_made_of_others(func):  # below autograd they come whole
            with self:
                return func.decompose(*args, **kwargs)
        if name in OPDEFS:  # written in Python: its own implementation, whose operators come here one by one
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        args = _masks_as_indices(name, args)
        result = self.run(func, name, args, kwargs)
        if Card.watch is not None:
            Card.watch(func, args, kwargs, result)
        return result

    def run(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """On CUDA's path, with its replay queued."""
        if name in _ONLY_MEMORY or func.is_view:
            return func(*args, **kwargs)
        if name == "aten::_local_scalar_dense":
            synchronizations[f"a value at {where()}"] += 1
            value = func(*args, **kwargs)
            library.require_no_failure()
            return value
        if name in _COPIES:
            return self.copied(func, name, args, kwargs)
        if _needs_values(func, name, args, kwargs):
            return _at_once(func, args, kwargs)
        if name.startswith("aten::special_") or name in _COMPILED:
            real = torch.empty_like(args[0])
            self.queued(func, args, kwargs, real, None)
            return real
        drawn, before = _seed(func, args, kwargs), library.waits()
        real = func(*args, **kwargs)
        if library.waits() != before and name not in _MAY_WAIT and not _has_host_tensor(args):
            raise RehearsalError(f"{func} at {where()}: it waits for values that its kernels compute; not rehearsed")
        self.queued(func, args, kwargs, real, drawn)
        return real

    def copied(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """A copy: the library moves bytes itself. What CUDA does in kernels is left, to convert and to rearrange."""
        source = args[1] if name == "aten::copy_" else args[0]
        real = func(*args, **kwargs)
        if source.is_cuda == real.is_cuda:
            self.queued(func, args, kwargs, real, None)
        elif self.converts(source, real):
            there = Place(real)
            given = Place(source) if source.is_cuda else source.detach().clone()
            queue(lambda: there.view().copy_(given.view() if isinstance(given, Place) else given))
            is_asynchronous = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
            if source.is_cuda and not is_asynchronous:
                wait()
        return real

    def queued(self, func: Any, args: Any, kwargs: dict[str, Any], real: Any, seed: int | None) -> None:
        """Queue the replay of an operator that gave `real`."""
        queue(_replay(func, args, kwargs, real, seed))

    def converts(self, source: torch.Tensor, real: torch.Tensor) -> bool:
        """Whether the replay has something to do in a copy between host and card: to convert, or to rearrange."""
        is_plain = source.dtype == real.dtype and source.is_contiguous() and real.is_contiguous()
        return not is_plain and bool(real.numel())


def _touches_card(args: Any, kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "cuda":
        return True
    return any(isinstance(value, torch.Tensor) and value.is_cuda for value in tree_flatten((args, kwargs))[0])


@cache
def _is_made_of_others(func: Any) -> bool:
    keys = torch._C.DispatchKey
    has_own = func.has_kernel_for_dispatch_key(keys.CUDA)  # beside the one that is made of others
    return bool(func.has_kernel_for_dispatch_key(keys.CompositeImplicitAutograd)) and not has_own


def _is_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bool, torch.uint8)


def _masks_as_indices(name: str, args: Any) -> Any:
    """CUDA's own path would look for a mask's places with kernels, and wait; so they are found here, with a wait."""
    if name not in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_") or len(args) < 2:
        return args
    if not any(map(_is_mask, args[1])):
        return args
    found: list[Any] = []
    for index in args[1]:
        found += _at_once(torch.ops.aten.nonzero.default, (index,), {}).unbind(1) if _is_mask(index) else [index]
    return (args[0], found, *args[2:])


def _needs_values(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the host has to know values before it has the result."""
    has_solver = name in _SIZED_BY_VALUES or name.startswith(_WITH_SOLVERS)
    return has_solver or _gives_no_tensor(func) or _repeats(name, args, kwargs)


def _has_host_tensor(args: Any) -> bool:
    """Whether the operator takes something to the card first, which the host waits for."""
    return any(isinstance(leaf, torch.Tensor) and not leaf.is_cuda for leaf in tree_flatten(args)[0])


def _gives_no_tensor(func: Any) -> bool:
    kinds = [str(result.type) for result in func._schema.returns]
    return bool(kinds) and not any("Tensor" in kind for kind in kinds)


def _repeats(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """A repetition by counts on the card, whose sum nobody told."""
    return name == "aten::repeat_interleave" and kwargs.get("output_size") is None and len(args) < 4


def _at_once(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result where the host waits for it: computed on the CPU now, and put on the card."""
    synchronizations[f"{func._schema.name} at {where()}"] += 1
    at_once[func._schema.name] += 1
    wait()
    (there, named) = _on_cpu(args, kwargs)
    with torch.no_grad():
        result = func(*_viewed(there), **_viewed(named))
    leaves, spec = tree_flatten(result)
    return tree_unflatten([_on_card(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec)


def _on_card(result: torch.Tensor) -> torch.Tensor:
    real = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="cuda")
    if result.numel():
        Place(real).view().copy_(result)  # nothing is queued that could write there: its memory is this stream's own
    return real


def _on_cpu(args: Any, kwargs: dict[str, Any], is_shared: bool = False) -> tuple[Any, dict[str, Any]]:
    """Arguments for the CPU: places on the card, copies of what the host gave along, no device and no generator.

    `is_shared`: what the host gave is memory that both sides use.
    """
    named = {name: value for name, value in kwargs.items() if name != "generator"}
    if named.get("device") is not None:
        named["device"] = torch.device("cpu")
    if named.get("pin_memory"):
        named["pin_memory"] = False
    leaves, spec = tree_flatten((args, named))
    return tree_unflatten([_argument(leaf, is_shared) for leaf in leaves], spec)


def _argument(leaf: Any, is_shared: bool) -> Any:
    if isinstance(leaf, torch.Generator):
        return None
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return Place(leaf) if leaf.is_cuda or is_shared else leaf.detach().clone()


def _viewed(tree: Any) -> Any:
    leaves, spec = tree_flatten(tree)
    return tree_unflatten([leaf.view() if isinstance(leaf, Place) else leaf for leaf in leaves], spec)


def _seed(func: Any, args: Any, kwargs: dict[str, Any]) -> int | None:
    """What the CPU's generator is to start from: the card's own seed and offset, which the real path then moves on."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return None
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)]
    generator = given[0] if given else torch.cuda.default_generators[torch.cuda.current_device()]
    mixed = generator.initial_seed() * 0x9E3779B97F4A7C15 + (generator.get_offset() + 1) * 0xBF58476D1CE4E5B9
    return (mixed ^ mixed >> 31) & (2**63 - 1)


def _replay(func: Any, args: Any, kwargs: dict[str, Any], real: Any, seed: int | None) -> Callable[[], None]:
    # bitsandbytes' paged state is managed memory, which torch takes for the host's.
    there, named = _on_cpu(args, kwargs, is_shared=func.namespace == "bitsandbytes")
    results = [
        Place(leaf) if isinstance(leaf, torch.Tensor) and leaf.is_cuda else None for leaf in tree_flatten(real)[0]
    ]
    compute = ATTENTION.get(func._schema.name) or INSTEAD.get(str(func), func)
    line = where()

    def work() -> None:
        try:
            with _drawing(seed):
                computed = compute(*_viewed(there), **_viewed(named))
        except Exception as error:
            raise RehearsalError(f"{func} at {line}: {error}") from error
        if func._schema.is_mutable and not _gives_more(func):
            return
        leaves = tree_flatten(computed)[0]
        for target, value in zip(results, leaves, strict=True):
            if target is not None and isinstance(value, torch.Tensor):
                _store(func, target, value)

    return work


def _gives_more(func: Any) -> bool:
    """Whether an operator that writes into its arguments also gives tensors of its own."""
    return any(result.alias_info is None for result in func._schema.returns)


def _store(func: Any, target: Place, value: torch.Tensor) -> None:
    view = target.view()
    if not view.numel() and not value.numel():
        return
    if view.shape != value.shape:
        raise RehearsalError(f"{func}: {tuple(view.shape)} on the card and {tuple(value.shape)} on the CPU")
    if view.data_ptr() != value.data_ptr():
        view.copy_(value)


class _drawing:
    """The CPU's generator at a seed for the block, and back where it was."""

    lock = threading.RLock()

    def __init__(self, seed: int | None) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        if self.seed is not None:
            self.lock.acquire()
            self.kept = torch.default_generator.get_state()
            torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        if self.seed is not None:
            torch.default_generator.set_state(self.kept)
            self.lock.release()


def install(mode: type[Card] = Card) -> None:
    """The mode in this thread, and in every thread that is started from now on."""

    def begin(frame: object, event: str, argument: object) -> None:
        sys.setprofile(None)
        mode().__enter__()

    threading.setprofile(begin)
    mode().__enter__()
