"""Packing: a document sees nothing of its neighbours, and the loss is that of the documents alone.

To the last bit where only the mask can matter. The engine computes an expert's rows together, and a BLAS may round a
row otherwise among more rows: there a neighbour's change may show as rounding, of which a leak is a thousand times.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from transformers import AutoTokenizer, DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.harness.families import tiny_config
from tests.parity.conftest import EMBEDDED
from toolkit.adapters import attach_lora
from toolkit.architecture import auto_class, cache_name
from toolkit.errors import ModelError
from toolkit.ops import document_attention, reference
from toolkit.ops.document_attention import _attention, keep_lengths, per_document_attention
from toolkit.ops.experts import ExpertWeights
from toolkit.ops.registry import _forward_with
from toolkit.quant import load_int8
from toolkit.recipe import TrainingSection
from toolkit.training.adapter_steps import RunContext
from toolkit.training.packing import isolate_documents
from toolkit.training.train import sft_config
from toolkit.training.trainer import AdapterTrainer

LENGTHS = (23, 31, 9, 40)


def documents(seed: int) -> list[list[int]]:
    """Random token ids, one list a document."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in LENGTHS]


def packed_batch(model: PeftModel, rows: list[list[int]], folder: Path) -> dict[str, Any]:
    """The batch that the trainer itself would make of these documents."""
    arguments = TrainingSection(max_length=128, gradient_checkpointing=False, use_cpu=True).model_dump()
    del arguments["output_dir"]
    context = RunContext(
        folder=folder,
        metrics=folder / "metrics.jsonl",
        arguments={**arguments, "report_to": []},
        device="cpu",
        dtype="float32",
        console=Console(quiet=True),
    )
    trainer = AdapterTrainer(
        context,
        model=model,
        args=sft_config(context, train_router=False, evaluates=False),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        eval_dataset=None,
        processing_class=AutoTokenizer.from_pretrained(EMBEDDED),
    )
    (batch,) = list(trainer.get_train_dataloader())
    return dict(batch)


def spans(batch: dict[str, Any]) -> list[tuple[int, int]]:
    """Where each document lies in the packed row."""
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    return list(zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True))


@pytest.fixture
def adapted(checkpoint: Path, randomize: Callable[[torch.nn.Module], None]) -> PeftModel:
    model, _ = load_int8(str(checkpoint))
    result = attach_lora(model, r=3)
    randomize(result)
    isolate_documents(result)
    return result.eval()


def forward_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What the model is called with, for logits alone."""
    return {**{key: value for key, value in batch.items() if key != "labels"}, "use_cache": False}


def change_by_neighbours(model: PeftModel, inputs: dict[str, Any], places: list[tuple[int, int]]) -> float:
    """The most that a logit of a document changes when another document does: each is changed in turn."""
    with torch.no_grad():
        before, found = model(**inputs).logits, []
        for first, last in places:
            changed = inputs["input_ids"].clone()
            changed[:, first:last] = (changed[:, first:last] + 17) % 90 + 3
            difference = (model(**{**inputs, "input_ids": changed}).logits - before).abs()
            assert difference[:, first:last].max() > 0.01, "the changed document's own logits are the same"
            difference[:, first:last] = 0
            found.append(difference.max())
    return float(torch.stack(found).max())


def every_expert_on_every_token(
    x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor, weights: ExpertWeights, *rest: Any, **_: Any
) -> torch.Tensor:
    """The law with products of one shape, whatever the routing: on no machine can a row's kernel depend on others'."""
    experts = weights.up.weight.shape[0]
    share_TE = weight_TK.new_zeros(len(x_TH), experts).scatter_(1, index_TK, weight_TK)
    output_TH, ones_T1 = torch.zeros_like(x_TH), x_TH.new_ones(len(x_TH), 1)
    for expert in range(experts):
        everyone_T1 = torch.full((len(x_TH), 1), expert)
        alone_TH = reference.expert_layer(x_TH, everyone_T1, ones_T1, weights, *rest)
        output_TH += share_TE[:, expert, None] * alone_TH
    return output_TH


def test_logits_of_a_document_do_not_change_by_a_bit_when_another_changes(
    adapted: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks, positions and attention as in training; the experts in shapes that no routing changes."""
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "onecard_reference", _forward_with(every_expert_on_every_token))
    batch = packed_batch(adapted, documents(0), tmp_path)
    inputs, places = forward_inputs(batch), spans(batch)
    assert len(places) == len(LENGTHS)
    engine = adapted(**inputs).logits.detach()
    adapted.set_experts_implementation("onecard_reference")
    torch.testing.assert_close(adapted(**inputs).logits.detach(), engine, rtol=1e-4, atol=1e-4)
    assert change_by_neighbours(adapted, inputs, places) == 0
    assert change_by_neighbours(adapted, in_one_document(inputs), places) > 0


def in_one_document(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same tokens where every one sees all before it: what a leak would be."""
    ids = inputs["input_ids"]
    return {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None], "use_cache": False}


def test_with_the_engine_a_neighbour_changes_rounding_alone(adapted: PeftModel, tmp_path: Path) -> None:
    batch = packed_batch(adapted, documents(0), tmp_path)
    inputs, places = forward_inputs(batch), spans(batch)
    change, leak = (change_by_neighbours(adapted, each, places) for each in (inputs, in_one_document(inputs)))
    adapted.set_experts_implementation("onecard_reference")
    with torch.no_grad():
        rounded = adapted(**inputs).logits
        truth = adapted.double()(**inputs).logits
    lost = float((rounded - truth).abs().max())
    assert 0 < lost < 1e-4
    # The true logits before and after are the same, so what differs is two roundings. The law's own is one draw of it:
    # errors of n terms add up as √n by chance and as n at worst, and no sum here has more than 64 terms.
    allowed = 2 * 8 * lost
    assert change <= allowed
    assert leak > 1000 * allowed


def test_packed_loss_is_the_loss_of_the_documents_alone(adapted: PeftModel, tmp_path: Path) -> None:
    batch = packed_batch(adapted, documents(1), tmp_path)
    with torch.no_grad():
        logits = adapted(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[0]
        packed = torch.nn.functional.cross_entropy(logits[:-1], batch["labels"][0, 1:], reduction="sum")
        alone = torch.tensor(0.0)
        for row in documents(1):
            ids = torch.tensor([row])
            single = adapted(input_ids=ids, use_cache=False).logits[0, :-1]
            alone += torch.nn.functional.cross_entropy(single, ids[0, 1:], reduction="sum")
    assert abs(packed - alone) <= 1e-5 * alone


def test_attending_document_by_document_changes_no_number(adapted: PeftModel, tmp_path: Path) -> None:
    batch = packed_batch(adapted, documents(2), tmp_path)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    factors = [parameter for parameter in adapted.parameters() if parameter.requires_grad]

    def outcome() -> list[torch.Tensor]:
        logits = adapted(**inputs, use_cache=False).logits
        probe = torch.linspace(-1, 1, logits.numel()).view_as(logits).sin()
        return [logits.detach(), *torch.autograd.grad((logits * probe).sum(), factors)]

    whole, implementation = outcome(), adapted.config._attn_implementation
    with per_document_attention(adapted) as can:
        assert can == (implementation == "sdpa")
        apart = outcome()
    assert adapted.config._attn_implementation == implementation
    for ours, wanted in zip(apart, whole, strict=True):
        assert (ours - wanted).norm() <= 1e-5 * wanted.norm().clamp(min=1e-3)


def test_a_model_whose_documents_are_kept_apart_reads_on_from_a_cache(adapted: PeftModel) -> None:
    """It reads prompts and writes answers while it trains: no mask of documents is made without the tokens it keeps."""
    ids = torch.tensor([documents(4)[1]])
    with torch.no_grad():
        whole = adapted(input_ids=ids, use_cache=False).logits
        kept = DynamicCache(config=adapted.config)
        for piece in torch.arange(ids.shape[1]).split(8):
            given = {cache_name(): kept, "position_ids": piece[None], "use_cache": True}
            logits = adapted(input_ids=ids[:, piece], **given).logits
            torch.testing.assert_close(logits, whole[:, piece], rtol=1e-4, atol=1e-4)
    assert kept.get_seq_length() == ids.shape[1]


def test_sparse_attention_that_asks_for_sdpa_by_name_stays_sparse() -> None:
    """Under our name it would see every token, not only those that its indexer picks."""
    config = tiny_config("deepseek_v32")
    config.index_topk = 4
    model = auto_class(config).from_config(
        config, attn_implementation="sdpa", experts_implementation="onecard_per_expert"
    )
    adapted = attach_lora(model, r=2)
    ids = torch.tensor([documents(3)[1]])
    sparse = adapted(input_ids=ids, use_cache=False).logits
    with per_document_attention(adapted) as can:
        assert not can
        assert torch.equal(adapted(input_ids=ids, use_cache=False).logits, sparse)
    model.set_attn_implementation("onecard_documents")
    assert not torch.allclose(adapted(input_ids=ids, use_cache=False).logits, sparse), "nothing would have been lost"


def test_each_document_is_really_attended_to_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []

    def attention(module: Any, query: torch.Tensor, *rest: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        seen.append((query.shape[2], rest[2] is not None))
        return query.transpose(1, 2), None

    for room in ("document_attention", "few_queries"):
        monkeypatch.setattr(f"toolkit.ops.{room}.sdpa_attention_forward", attention)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    narrow = causal & torch.ones(6, 6, dtype=torch.bool).triu(-1)
    query = torch.randn(1, 2, 6, 4)
    for mask in (None, causal, narrow):
        output, _ = _attention(torch.nn.Module(), query, query, query, mask, cu_seq_lens_q=torch.tensor([0, 4, 6]))
        assert output.equal(query.transpose(1, 2))
    # A sliding window keeps its mask where it cuts something off.
    assert seen == [(4, False), (2, False), (4, False), (2, False), (4, True), (2, False)]
    seen.clear()
    _attention(torch.nn.Module(), query, query, query, causal, cu_seq_lens_q=torch.tensor([0, 6]))
    _attention(torch.nn.Module(), query, query, query, causal)
    assert seen == [(6, True), (6, True)]


def varlen_of_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, *rest: Any,
                    scale: float | None, window_size: tuple[int, int], enable_gqa: bool) -> torch.Tensor:  # fmt: skip
    """What torch's kernel computes on a card, in plain fp32: [L, heads, d] of documents between `bounds`."""
    assert rest[1:] == (int(bounds.diff().max()),) * 2
    outputs = []
    for start, end in itertools.pairwise(bounds.tolist()):
        q, k, v = (part[start:end].transpose(0, 1)[None].float() for part in (query, key, value))
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        seen = seen if window_size[0] < 0 else seen.triu(-window_size[0])
        attend = torch.nn.functional.scaled_dot_product_attention
        outputs.append(attend(q, k, v, seen, scale=scale, enable_gqa=enable_gqa)[0].transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)


@pytest.fixture
def card_like(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Attention as on a card, with its kernel played on the CPU; grows by the window of each launch."""
    windows: list[int] = []

    def launch(*args: Any, **kwargs: Any) -> torch.Tensor:
        windows.append(kwargs["window_size"][0])
        return varlen_of_torch(*args, **kwargs)

    monkeypatch.setattr(document_attention, "varlen_attn", launch)
    monkeypatch.setattr(document_attention, "_takes_one_by_one", lambda query: False)
    return windows


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("heads", "width"), [((4, 4), (16, 16)), ((4, 2), (24, 16)), ((2, 2), (12, 12))])
def test_documents_in_one_launch_are_what_the_mask_makes_of_them(
    card_like: list[int], window: int | None, heads: tuple[int, int], width: tuple[int, int]
) -> None:
    """Equal heads, grouped ones with narrower values as in latent attention, and a width no kernel takes."""
    lengths, generator = [5, 9, 2], torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, 5, 14, 16], dtype=torch.int32)
    query, key, value = (
        torch.randn(1, each, 16, wide, generator=generator).bfloat16()
        for each, wide in zip((heads[0], heads[1], heads[1]), (width[0], width[0], width[1]), strict=True)
    )
    mask = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool().tril()[None, None]
    mask = mask if window is None else mask & torch.ones(16, 16, dtype=torch.bool).triu(-(window - 1))
    module = torch.nn.Module()
    module.num_key_value_groups = heads[0] // heads[1]
    given = {"cu_seq_lens_q": bounds, "sliding_window": window, "scaling": 0.2}
    ours, _ = _attention(module, query, key, value, mask, **given)
    wanted, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.2)
    assert ours.shape == wanted.shape
    assert (ours - wanted).abs().max() < 0.02
    fits = width[0] % 8 == 0
    assert card_like == ([-1 if window is None else window - 1] if fits else [])


def test_a_mask_is_looked_at_once_for_each_longer_document(
    card_like: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    is_causal = document_attention._is_causal

    def look(mask: torch.Tensor, window: int | None = None) -> bool:
        looked.append(mask.shape[-1])
        return is_causal(mask, window)

    monkeypatch.setattr(document_attention, "_is_causal", look)
    module = torch.nn.Module()
    part = torch.randn(1, 2, 12, 8).bfloat16()

    def attend(*lengths: int, mask: torch.Tensor) -> None:
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        _attention(module, part, part, part, mask, cu_seq_lens_q=bounds, sliding_window=4)

    narrow = torch.ones(12, 12, dtype=torch.bool).tril().triu(-3)[None, None]
    attend(3, 3, 3, 3, mask=narrow)  # no document is longer than the window yet
    attend(2, 2, 4, 4, mask=narrow)
    attend(4, 4, 4, mask=narrow)
    assert (looked, card_like) == ([3, 4], [-1, -1, -1])
    attend(5, 7, mask=narrow)
    attend(6, 6, mask=narrow)
    assert looked == [3, 4, 7, 7]
    assert card_like[3:] == [3, 3]
    other = narrow.clone()
    other[..., 1] = False
    attend(10, 2, mask=other)  # neither form: the whole row goes by its mask, from now on
    attend(2, 10, mask=other)
    assert len(card_like) == 5


def test_lengths_stay_on_the_host() -> None:
    """A batch that tells them is never asked for numbers that lie on a card."""
    bounds = torch.tensor([0, 3, 8], dtype=torch.int32)
    keep_lengths({"cu_seq_lens_q": bounds}, [3, 5])
    assert document_attention._lengths(bounds) == [3, 5]
    bounds.diff = lambda: pytest.fail("asked")  # type: ignore[method-assign]
    assert document_attention._lengths(bounds) == [3, 5]


class _Recurrent(torch.nn.Module):
    """A stand-in for a model whose state runs through the whole row, whatever mask it is given."""

    def __init__(self, inner: torch.nn.Module, strength: float) -> None:
        super().__init__()
        self.inner, self.strength = inner, strength

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden: torch.Tensor = self.inner(*args, **kwargs)
        return hidden + hidden.cumsum(1) * self.strength


def recurrent(checkpoint: Path, strength: float) -> PeftModel:
    model, _ = load_int8(str(checkpoint))
    model.base_model.norm = _Recurrent(model.base_model.norm, strength)
    return attach_lora(model, r=2)


def test_a_model_that_no_mask_can_isolate_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match=r"set training\.packing=false"):
        isolate_documents(recurrent(checkpoint, 0.01))


def test_what_rounding_may_do_is_no_leak(checkpoint: Path) -> None:
    """As much as was seen of rounding, tenfold."""
    isolate_documents(recurrent(checkpoint, 5e-6))
