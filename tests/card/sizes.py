"""Real sizes without real values: every operator on CUDA's own path, and only small tensors computed.

Pages that nobody writes take no memory, so a model of any size loads from a file with holes. Numbers that come out of
tensors that were not computed are kept finite, so that a run goes on to its end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from tests.card.replay import Card, Place, queue

__all__ = [
    "LARGEST_COPY",
    "Sizes",
    "begin_with_zeros",
    "computes",
    "know_the_masks",
    "load_first_experts",
    "stream_from_holes",
    "trust_the_fused_head",
]

LARGEST_COPY = 1 << 20
"""Bytes: what is more is counted by the library and not copied."""
_UPDATES = {
    "aten::_fused_adamw_": 0, "aten::_foreach_addcdiv_": 0, "bitsandbytes::optimizer_update_8bit_blockwise": 2,
    "bitsandbytes::optimizer_update_32bit": 2,
}  # fmt: skip
"""Where the last operators of an optimizer have the parameters, whose first elements move: a job asks that of a run."""
_MOST = 300_000
"""Elements of the largest tensor that is computed."""


def computes(*values: Any) -> bool:
    """Whether all tensors in here are small."""
    return all(leaf.numel() <= _MOST for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


class Sizes(Card):
    """The mode for real sizes."""

    def queued(self, func: Any, args: Any, kwargs: dict[str, Any], real: Any, seed: int | None) -> None:
        """The replay where all is small; else only finite results where they are small."""
        results = [leaf for leaf in tree_leaves(real) if isinstance(leaf, torch.Tensor) and leaf.is_cuda]
        is_small = computes(args, kwargs, real) and func.namespace == "aten"
        if is_small and "attention" not in func._schema.name:
            super().queued(func, args, kwargs, real, seed)
            made = [Place(each) for each in results if each.is_floating_point()]
            queue(lambda: [torch.nan_to_num_(each.view(), 0.0, 1.0, -1.0) for each in made])
        else:
            places = [Place(each) for each in results if each.numel() <= _MOST]
            queue(lambda: [_made_up(each.view()) for each in places])
        if (place := _UPDATES.get(func._schema.name)) is not None:
            trained = [Place(each) for each in tree_leaves(args[place])]
            queue(lambda: [each.view().flatten()[:1].fill_(1e-3) for each in trained])

    def copied(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """What is counted and not copied to the host is zeros there, whatever that memory was used for before."""
        real = super().copied(func, name, args, kwargs)
        source = args[1] if name == "aten::copy_" else args[0]
        if source.is_cuda and not real.is_cuda and real.nbytes > LARGEST_COPY and not self.converts(source, real):
            real.zero_()
        return real

    def converts(self, source: torch.Tensor, real: torch.Tensor) -> bool:
        """Whether a copy between host and card is finished by the replay."""
        return computes(source, real) and super().converts(source, real)


def load_first_experts() -> None:
    """Of each stack that loads, round the first expert alone; fetch no page, and multiply nothing out on the CPU.

    The other experts take the same operators and the same room: seconds of a card, and half an hour of this machine.
    """
    from toolkit.checkpoint.weights import PackedSlice
    from toolkit.quant import ahead
    from toolkit.quant.rounding import Workspace

    rounds, reads, seen = Workspace.round, PackedSlice.read, set[tuple[str, int | None]]()

    def rounded(self: Workspace, weight: torch.Tensor, *arguments: Any) -> None:
        name, rows = arguments[2], arguments[3] if len(arguments) > 3 else slice(None)
        if (name, rows.start) in seen:
            self.filled(weight.numel())
            return
        seen.add((name, rows.start))
        rounds(self, weight, *arguments)

    def read(self: PackedSlice, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
        is_here = torch.device(device).type == "cpu"
        return torch.zeros(self.shape, dtype=dtype) if is_here else reads(self, device, dtype)

    Workspace.round, PackedSlice.read = rounded, read  # type: ignore[method-assign]  # the job knows nothing of it
    ahead._touch = lambda chunk: None


def stream_from_holes() -> None:
    """The int8 checkpoint from which layers stream is a hole as well, of its own size; no page of it is fetched."""
    from tests.card.checkpoints import hollow_file
    from toolkit.offload.store import FromFiles, Piece
    from toolkit.quant import save

    names = {torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}

    def saved(tensors: dict[str, torch.Tensor], path: Path) -> None:
        hollow_file(path, {key: (names[value.dtype], tuple(value.shape)) for key, value in sorted(tensors.items())})

    def read(self: FromFiles, memory: memoryview, chunk: Piece) -> int:
        return chunk.size

    save._save, save._refuse_full_disk = saved, lambda workplace, needed: None
    FromFiles._read = read  # type: ignore[method-assign]  # the job knows nothing of it


def _made_up(result: torch.Tensor) -> None:
    """Zeros; but one for a count or an answer, so that trained parameters count as moved."""
    result.fill_(1 if result.numel() == 1 and not result.is_floating_point() else 0)


def begin_with_zeros(model: torch.nn.Module) -> None:
    """Large parameters were not computed: in memory that was used before they are anything, and must be finite."""
    large = [Place(each) for each in model.parameters() if each.requires_grad and each.is_cuda and not computes(each)]
    queue(lambda: [each.view().zero_() for each in large])


def know_the_masks() -> None:
    """What a document's mask is, is looked up in its numbers, which are not computed: its layer says it as well."""
    from toolkit.ops import document_attention

    document_attention._look = lambda mask, size: -1 if size is None else size - 1


def trust_the_fused_head() -> None:
    """TRL's fused head is compared with the model's own logits before step 1, and here neither is computed."""
    from toolkit.training.adapter_steps import AdapterSteps

    look = AdapterSteps.check_fused_head

    def looked(self: AdapterSteps) -> bool:
        look(self)
        self.trusts_fused_head = True
        return True

    AdapterSteps.check_fused_head = looked  # type: ignore[method-assign]
