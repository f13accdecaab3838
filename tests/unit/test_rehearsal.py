"""A step without numbers against the same step with them: the ledger's bytes, and few layers for many."""

from __future__ import annotations

import warnings
from functools import partialmethod
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import layer_norm
from transformers import CONFIG_MAPPING, PreTrainedModel

from tests.harness.families import tiny_config
from tests.parity.conftest import COMMON, FAMILIES
from toolkit.adapters import attach_lora
from toolkit.architecture import auto_class
from toolkit.ops.document_attention import per_document_attention
from toolkit.rehearsal import Step, fake_model, rehearse, run_step
from toolkit.rehearsal.autocast import NORMS, CardAutocast
from toolkit.rehearsal.fused_head import gives_own_logits
from toolkit.rehearsal.ledger import Ledger
from toolkit.rehearsal.model import decoder_layers, depths_of


def test_the_ledger_counts_what_is_held_and_forgets_what_is_not() -> None:
    with Ledger() as ledger:
        kept = torch.ones(1000)
        view = kept[10:20]
        passing = torch.ones(500) + 1
        del passing
    assert (ledger.live, ledger.peak) == (4000, 4000 + 2 * 2000)
    del view, kept
    assert ledger.live == 0


def test_what_is_known_before_is_not_counted() -> None:
    weight = torch.ones(1000)
    with Ledger([weight], granule=512) as ledger:
        weight[:5].add_(1)
        made = weight + 1
    assert ledger.live == 4096
    del made


def tiny(family: str, device: str, **sizes: Any) -> PreTrainedModel:
    config = CONFIG_MAPPING[family](**{**COMMON, **FAMILIES[family], **sizes})
    with torch.device(device):
        model: PreTrainedModel = auto_class(config).from_config(config)
    return model


def skeleton(family: str, **sizes: Any) -> PreTrainedModel:
    return tiny(family, "meta", **sizes)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("family", "checkpointing"), [("qwen3_moe", False), ("deepseek_v2", True), ("gpt_oss", True)])
def test_a_few_layers_tell_all(family: str, checkpointing: bool) -> None:
    step = Step(1, 48, 20, torch.float32, checkpointing, True, False)
    model = skeleton(family, num_hidden_layers=10)
    assert depths_of(model).short + depths_of(model).period < 10
    whole = run_step(fake_model(model, step), step, FakeTensorMode(allow_non_fake_inputs=True))
    assert rehearse(skeleton(family, num_hidden_layers=10), step) == (whole.peak, whole.saved, whole.bare)
    assert 0 < whole.saved < whole.bare <= whole.peak


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("backend", ["onecard_per_expert", "onecard_triton"])
def test_a_card_is_rehearsed_without_one(backend: str) -> None:
    pytest.importorskip("triton")
    steps = [Step(1, length, length - 1, torch.bfloat16, True, True, True, backend) for length in (64, 128)]
    (short, *_), (long, *_) = (rehearse(skeleton("qwen3_moe"), step) for step in steps)
    assert short < long


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_layer_norms_leave_hidden_states_in_fp32_on_a_card() -> None:
    """What checkpointing keeps of a further layer is as wide, and few layers tell it; a CPU's autocast keeps 16 bit."""
    pytest.importorskip("triton")
    config, kept = tiny_config("phimoe"), []
    config.num_hidden_layers = 6
    for on_card, backend in ((False, "onecard_per_expert"), (True, "onecard_triton")):
        step = Step(1, 64, 20, torch.bfloat16, True, False, on_card, backend)
        with torch.device("meta"):
            few, all_of_them = (auto_class(config).from_config(config) for _ in range(2))
        whole = run_step(fake_model(all_of_them, step), step, FakeTensorMode(allow_non_fake_inputs=True))
        assert rehearse(few, step) == (whole.peak, whole.saved, whole.bare)
        kept.append((whole.waits["backward 4"] - whole.waits["backward 3"]) / 64 / config.hidden_size)
    assert kept == [2, 4]


def test_norms_are_what_a_card_takes_to_fp32_and_a_cpu_does_not() -> None:
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    with CardAutocast():
        assert layer_norm(x, (8,)).dtype is torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert layer_norm(x, (8,), torch.ones(8, dtype=torch.bfloat16)).dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer_norm(x, (8,)).dtype is torch.bfloat16
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in NORMS:
        assert [has(f"aten::{name}", key) for key in ("AutocastCUDA", "AutocastCPU")] == [True, False]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_fake_experts_hold_what_real_ones_do() -> None:
    """The engine's own storages, with numbers and without, for a layer that autograd keeps."""
    from toolkit.ops import split_int8 as digits
    from toolkit.ops import stack
    from toolkit.ops.experts import ExpertStack, ExpertWeights
    from toolkit.ops.int8 import quantize
    from toolkit.ops.per_expert import expert_layer

    def held(fake: bool) -> int:
        torch.manual_seed(0)
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else warnings.catch_warnings():
            stacks = [torch.randn(4, 32, 16), torch.randn(4, 16, 16)]
            parts = [(s.to(torch.int8), s[:, :, 0].contiguous()) if fake else quantize(s) for s in stacks]
            up, down = (ExpertStack(*part, None, False) for part in parts)
            weights = ExpertWeights(up, down, lambda y: y[:, :16] * y[:, 16:])
            x = torch.randn(64, 16).requires_grad_()
            index = torch.randint(0, 4, (64, 2))
            weight = torch.rand(64, 2)
            expert_layer(x, index, weight, weights, keep_up=True)  # a thread's buffer is made once and kept
            rooms = [room for kept in (stack._kept, digits._kept) for room in vars(kept).values()]
            with Ledger([*rooms, x, index, weight, *(t for p in parts for t in p)]) as ledger:
                output = expert_layer(x, index, weight, weights, keep_up=True)
                kept = ledger.live
            del output
        return kept

    assert held(True) == held(False)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_fake_attention_holds_what_documents_one_by_one_do(family: str) -> None:
    """No mask is kept for backward and no head repeated, since the run finds that each document's mask is causal."""
    lengths, sizes = (200, 184), {"num_key_value_heads": 2, "max_position_embeddings": 512}
    step = Step(1, sum(lengths), 20, torch.float32, False, False, False, experts="none", linears="none")
    nothing = fake_model(skeleton(family, **sizes), step)
    fake = run_step(nothing, step, FakeTensorMode(allow_non_fake_inputs=True))

    model = tiny(family, "cpu", **sizes).requires_grad_(False)
    model.set_experts_implementation("onecard_per_expert")
    adapted = attach_lora(model).train()
    inputs = {
        "input_ids": torch.zeros(1, step.length, dtype=torch.long),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": torch.tensor([0, lengths[0], step.length]),
    }
    ledger = Ledger([*adapted.parameters(), *adapted.buffers()])
    decoder_layers(adapted)[2][-1].register_forward_hook(lambda *_: ledger.wait())
    with per_document_attention(adapted) as can, ledger:
        assert can
        adapted(**inputs, use_cache=False)
    (held,) = ledger.waits.values()
    assert abs(fake.saved - held) <= 0.01 * held


def test_a_tile_is_as_large_as_in_trls_fused_head() -> None:
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    from toolkit.rehearsal import loss

    assert (loss._TILE_TOKENS, loss.TILE_WORDS) == (
        chunked_logprob.TOKEN_CHUNK_SIZE,
        utils._CHUNKED_LOGPROB_CHUNK_SIZE,
    )


def heads(family: str, **changes: Any) -> PreTrainedModel:
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    return auto_class(config).from_config(config, dtype=torch.float32)


@pytest.mark.parametrize(
    ("family", "changes", "wanted"),
    [
        ("qwen3_moe", {}, True),
        ("granitemoe", {"logits_scaling": 4.0}, True),
        ("inkling_text", {}, False),
    ],
)
def test_the_plan_asks_of_the_head_what_the_trainer_does(family: str, changes: Any, wanted: bool) -> None:
    """Without weights and layers it is what TRL's head gives of the whole model."""
    from trl.trainer.utils import add_fused_lm_head

    model = heads(family, **changes)
    with torch.device("meta"):
        assert gives_own_logits(heads(family, **changes)) == wanted
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        own = model.eval()(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        add_fused_lm_head(model)
        theirs = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    off = own.gather(-1, ids[:, 1:, None])[..., 0] - theirs
    assert bool(off.abs().max() < 1e-2) == wanted


def test_a_plan_counts_whole_logits_where_trls_head_is_refused() -> None:
    vocabulary, tokens = 1 << 17, 256
    held = []
    for scale in (None, 3.0):
        model = skeleton("qwen3_moe", vocab_size=vocabulary, max_position_embeddings=512)
        kind = type(model)
        if scale is not None:  # a family that multiplies its logits, and says so nowhere
            model.__class__ = type("Scaled", (kind,), {"forward": partialmethod(_scaled, kind, scale)})
        step = Step(1, tokens, tokens - 1, torch.bfloat16, True, False, True, experts="none", linears="none")
        held.append(rehearse(model, step)[0])
    # In fp32 they and their gradient; TRL's tiles hold a quarter of the one in bf16.
    assert held[1] - held[0] > tokens * vocabulary * 6


def _scaled(self: Any, kind: type, scale: float, *args: Any, **kwargs: Any) -> Any:
    outputs = kind.forward(self, *args, **kwargs)
    outputs.logits = outputs.logits * scale
    return outputs
