"""One training step without numbers, and what it would hold in memory at its highest.

The code that runs is the code that trains: the family's own forward, our layers, the loss, autograd. Two depths are
run, and the whole follows: every stretch of a step grows by the same bytes with each further period of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from toolkit.adapters.tokens import token_layers
from toolkit.architecture import describe
from toolkit.ops.document_attention import (
    attend_to_documents,
    attend_to_shared_prompts,
    attend_together,
    can_attend_together,
    per_document_attention,
)
from toolkit.ops.norms import fuse_norms
from toolkit.ops.shared_prompts import WIDE, with_sight
from toolkit.rehearsal.autocast import CardAutocast, run_again
from toolkit.rehearsal.fused_head import gives_own_logits
from toolkit.rehearsal.ledger import Ledger
from toolkit.rehearsal.loss import fake_loss
from toolkit.rehearsal.model import Depths, adapted, decoder_layers, depths_of, truncate

__all__ = ["Step", "fake_model", "rehearse", "run_step"]

_CAUSAL, _TOGETHER = "onecard_rehearsal", "onecard_rehearsal_card"
"""The names under which attention of documents on their own is known to transformers, on a CPU and on a card; the first
is the mark of a causal mask as well."""


@dataclass(frozen=True)
class Step:
    """What a step is made of. B sequences of L tokens, of which `labelled` positions in each carry a label."""

    batch: int
    length: int
    labelled: int
    dtype: torch.dtype
    checkpointing: bool
    balanced: bool
    """Whether the load-balancing loss is computed."""
    on_card: bool
    backend: str = "onecard_per_expert"
    experts: str = "int8"
    linears: str = "int8"
    packed: bool = True
    lora: Mapping[str, Any] = field(default_factory=dict)
    new_tokens: int = 0
    """Tokens whose rows of embedding and head are trained."""
    whole_logits: bool = False
    """Whether the loss takes each label's whole row of logits, on a card too."""
    share: int = 1
    """Answers behind one prompt in each sequence."""
    kind: str = "train"
    """train; or loss or generate: of held-out sequences, or of prompts with the answer's room in the cache."""

    @property
    def trains(self) -> bool:
        """Whether there is a backward."""
        return self.kind == "train"


@dataclass(frozen=True)
class Counted:
    """Highest count of live bytes in each stretch (before the layers, in each layer forward and backward, the loss).

    `bares`: the same, gradients of parameters from before the stretch left out. `waits`: what a micro-batch holds
    without them where it may have to wait for its next experts, in stretches that have such a place.
    """

    peaks: Mapping[str, int]
    bares: Mapping[str, int]
    waits: Mapping[str, int]

    @property
    def peak(self) -> int:
        """The highest of all."""
        return max(self.peaks.values())

    @property
    def bare(self) -> int:
        """The highest of all, beside gradients that were there before."""
        return max(self.bares.values())

    @property
    def saved(self) -> int:
        """The most that is held where it may have to wait."""
        return max(self.waits.values())


def rehearse(model: PreTrainedModel, step: Step) -> tuple[int, int, int]:
    """Most bytes that a step holds beyond parameters, buffers and optimizer, its gradients among them; how much a
    micro-batch holds while others are taken through a streamed layer; and the most beside gradients that are there
    already.

    Args:
        model: a skeleton on meta, which is used up.
    """
    depths, step = depths_of(model), _as_asked(model, step)
    peft_model = fake_model(model, step)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    truncate(peft_model, depths.short + depths.period)
    longer = run_step(peft_model, step, fake_mode)
    if not depths.period:
        return longer.peak, longer.saved, longer.bare
    truncate(peft_model, depths.short)
    short = run_step(peft_model, step, fake_mode)
    both = (short.peaks, longer.peaks), (short.waits, longer.waits), (short.bares, longer.bares)
    highest, saved, bare = (_extrapolated(*each, depths) for each in both)
    return highest, saved, bare


def _as_asked(model: PreTrainedModel, step: Step) -> Step:
    """With whole logits where TRL's head does not give the family's own."""
    return replace(step, whole_logits=step.whole_logits or (step.trains and not gives_own_logits(model)))


def _in_one_row(step: Step) -> Step:
    """TRL puts all packed sequences of a micro-batch into one row."""
    if not step.packed:
        return step
    rows = step.batch
    return replace(step, batch=1, length=rows * step.length, labelled=rows * step.labelled)


def fake_model(model: PreTrainedModel, step: Step) -> PeftModel:
    """The skeleton as the run will have it, on meta still."""
    for parameter in model.parameters():  # buffers keep their own dtype, as they do when weights are loaded
        parameter.data = parameter.data.to(step.dtype)
    if step.on_card:
        fuse_norms(model)
    return adapted(
        model,
        step.lora,
        experts=step.experts,
        linears=step.linears,
        keep_up=step.checkpointing,
        backend=step.backend,
        new_tokens=step.new_tokens,
    )


def run_step(model: PeftModel, step: Step, fake_mode: FakeTensorMode) -> Counted:
    """One step of the model as it stands, counted."""
    step = _in_one_row(step)
    with fake_mode:
        if any(parameter.is_meta for parameter in model.parameters()):
            _empty(model)
        model.train(step.trains)
        if step.checkpointing:
            model.get_base_model().activation_checkpointing_enable(
                {"use_reentrant": False, **({"context_fn": run_again} if step.on_card else {})}
            )
            model.enable_input_require_grads()
        numbers = _documents(step)
        known = [*model.parameters(), *model.buffers(), *numbers.values()]
        ledger = Ledger(known, granule=512 if step.on_card else 1)
        alone = per_document_attention(model, _TOGETHER if step.on_card else _CAUSAL) if _apart(step) else nullcontext()
        lists = CardAutocast() if step.on_card else nullcontext()
        sharing = attend_to_shared_prompts(model) if step.share > 1 else nullcontext(False)
        with alone, sharing as takes_parts, ledger, lists, nullcontext() if step.trains else torch.no_grad():
            _watch_and_run(model, step, ledger, numbers, by_parts=takes_parts and step.length > WIDE)
        ledger.mark("over")
        model.zero_grad(set_to_none=True)
    return Counted(ledger.peaks, ledger.bares, ledger.waits)


def _empty(model: PeftModel) -> None:
    """Give every tensor on meta a fake one; rows that a tied head shares with the embedding take only one."""
    tied = [layer for _, layer in token_layers(model) if layer.tied_adapter is not None]
    for layer in tied:
        del layer.trainable_tokens_delta
    model.to_empty(device="cpu")
    for layer in tied:
        layer.trainable_tokens_delta = layer.tied_adapter.trainable_tokens_delta


def _apart(step: Step) -> bool:
    """Whether packed documents are attended to on their own: on a card in 16 bit alone."""
    return step.packed and (not step.on_card or step.dtype in (torch.bfloat16, torch.float16))


def _documents(step: Step) -> dict[str, torch.Tensor]:
    """The document that each packed token is of, which layers with a running state ask; a few bytes, not counted."""
    return {"seq_idx": torch.zeros((step.batch, step.length), dtype=torch.int32)} if step.packed and step.trains else {}


def _watch_and_run(
    model: PeftModel, step: Step, ledger: Ledger, numbers: Mapping[str, torch.Tensor], *, by_parts: bool
) -> None:
    layers = decoder_layers(model)[2]
    inputs = {**_inputs(step, by_parts=by_parts), **numbers}
    watches = [_Watch(ledger, number, is_last=number == len(layers) - 1) for number in range(len(layers))]
    handles = [layer.register_forward_hook(watch) for layer, watch in zip(layers, watches, strict=True)]
    ledger.left_out = partial(_gradients, model)
    recomputed = [experts.register_forward_pre_hook(partial(_wait, ledger)) for experts in _experts(model)]
    half = step.dtype in (torch.bfloat16, torch.float16)
    try:
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            if step.kind == "generate":
                model(**inputs, use_cache=True, logits_to_keep=1)
                return
            loss = fake_loss(
                model,
                inputs,
                step.labelled,
                balanced=step.balanced,
                on_card=step.on_card,
                trains=step.trains,
                whole_logits=step.whole_logits,
            )
        for handle in handles:
            handle.remove()
        if step.trains:
            loss.backward()
    finally:
        for handle in (*handles, *recomputed):
            handle.remove()


def _experts(model: PeftModel) -> list[nn.Module]:
    base = model.get_base_model()
    return [base.get_submodule(layer.name) for layer in describe(base).layers]


def _gradients(model: nn.Module) -> int:
    return sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)


def _wait(ledger: Ledger, *_: Any) -> None:
    """A micro-batch may wait before any experts, in forward or where forward is computed again."""
    ledger.wait()


class _Watch:
    """Marks where a layer's forward ends, and where its gradient arrives."""

    def __init__(self, ledger: Ledger, number: int, *, is_last: bool) -> None:
        self.ledger, self.number, self.is_last = ledger, number, is_last

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self.ledger.mark("loss" if self.is_last else f"after {self.number}")
        if self.is_last:
            self.ledger.wait()
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self.ledger.mark(f"backward {self.number}"))


def _inputs(step: Step, *, by_parts: bool) -> dict[str, torch.Tensor]:
    shape = (step.batch, step.length)
    ids = torch.zeros(shape, dtype=torch.long)
    inputs = {"input_ids": ids, **({} if step.kind == "generate" else {"labels": ids.clone()})}
    if step.packed or step.share > 1:
        inputs["position_ids"] = torch.arange(step.length).expand(shape).contiguous()
    if not step.packed:
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
    if step.share > 1:
        answers = [step.labelled // step.share + 1] * step.share
        prompt = step.length - sum(answers)
        few = (1, 1, 1, 1) if by_parts else (step.batch, 1, step.length, step.length)
        sees = torch.ones(few, dtype=torch.bool).expand(step.batch, 1, step.length, step.length)
        with_sight(inputs["attention_mask"], sees, [[prompt, prompt, *answers]] * step.batch if by_parts else ())
    return inputs


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' own, with a note on what a run finds by looking at its numbers: it cuts nothing but the future."""
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    window, length = kwargs.get("local_size"), kwargs.get("kv_length", 0)
    if mask is not None and (window is None or window >= length):
        setattr(mask, _CAUSAL, True)
    return mask


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """A sequence as one document, which holds what several do; a mask's mark says whether it is just causal."""
    whole, is_causal = [query.shape[2]], hasattr(attention_mask, _CAUSAL)
    return attend_to_documents(module, query, key, value, attention_mask, whole, lambda _: is_causal, **kwargs)


def _attention_together(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As on a card: all documents in one launch, where torch has a kernel for it."""
    if can_attend_together(query, key, value, kwargs):
        bounds = torch.zeros(2, dtype=torch.int32)
        return attend_together(query, key, value, bounds, query.shape[2], scaling=kwargs.get("scaling")), None
    whole: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return whole


AttentionInterface.register(_CAUSAL, _attention)
AttentionMaskInterface.register(_CAUSAL, _mask)
AttentionInterface.register(_TOGETHER, _attention_together)
AttentionMaskInterface.register(_TOGETHER, sdpa_mask)


def _extrapolated(short: Mapping[str, int], longer: Mapping[str, int], depths: Depths) -> int:
    """The highest of all stretches at full depth. The last period's layers are numbered from the back."""
    highest = 0
    for name, size in short.items():
        word, _, number = name.partition(" ")
        is_last = number and int(number) >= depths.short - depths.period
        same = f"{word} {int(number) + depths.period}" if is_last else name
        highest = max(highest, size + depths.repeats * (longer[same] - size))
    return highest
