"""Drafts where things are unusual: many prompts, a window shorter than they are, another base's head, own answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import CONFIG_MAPPING, AutoTokenizer

from tests.harness.families import build
from tests.parity.conftest import COMMON, EMBEDDED, FAMILIES
from toolkit.adapters import attach_lora
from toolkit.evaluate import answer_ids
from toolkit.mtp.build import new_head
from toolkit.mtp.drafts import speculator
from toolkit.mtp.head import MtpHead, Trunk
from toolkit.mtp.own_answers import OwnHidden, _padded, _words, learn_own_answers
from toolkit.mtp.training import HeadTraining
from toolkit.quant import load_int8

PROMPTS = [[5 + (3 * n + k * (1 + n % 4)) % 80 for k in range(14 + n % 7)] for n in range(5)]


def made(family: str, folder: Path, **changes: Any) -> PeftModel:
    """A tiny adapted model whose adapter matters."""
    build(CONFIG_MAPPING[family](**{**COMMON, **FAMILIES[family], **changes})).save_pretrained(folder)
    return adapted(folder)


def adapted(folder: Path) -> PeftModel:
    """The same model and the same adapter each time."""
    torch.manual_seed(0)
    return _moved(attach_lora(load_int8(str(folder))[0], r=2))


@torch.no_grad()
def _moved(model: PeftModel) -> PeftModel:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.05)
    return model.eval()


@torch.no_grad()
def plain(model: PeftModel, prompt: list[int], tokens: int = 12) -> list[int]:
    written = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return written[0, len(prompt) :].tolist()


def taught(model: PeftModel, head: MtpHead, prompts: list[list[int]], tokens: int = 12) -> HeadTraining:
    """The head once it has learned what the model answers."""
    training = HeadTraining(head, model, depth=3, learning_rate=3e-3)
    answers = [plain(model, prompt, tokens) for prompt in prompts]
    for _ in range(4):
        learn_own_answers(training, prompts, answers, tokens=64)
    return training


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"sliding_window": 6}),
        ("gpt_oss", {"sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]}),
    ],
)
def test_prompts_longer_than_the_window(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = made(family, tmp_path, **changes)
    head = taught(model, new_head(model.get_base_model()), PROMPTS).head
    writer = speculator(model, head, count=3, max_new_tokens=12, measured=False)
    # Several prompts at once, of several lengths: each is what it is alone.
    assert writer.generate(PROMPTS) == [plain(model, prompt) for prompt in PROMPTS]
    assert writer.counts.tokens_per_pass > 1.5


def test_a_head_of_another_base_of_the_same_shape_changes_no_text(tmp_path: Path) -> None:
    model = made("qwen3_moe", tmp_path / "one")
    build(CONFIG_MAPPING["qwen3_moe"](**{**COMMON, **FAMILIES["qwen3_moe"]}), seed=7).save_pretrained(tmp_path / "two")
    other = new_head(load_int8(str(tmp_path / "two"))[0])
    writer = speculator(model, other, count=3, max_new_tokens=12, measured=False)
    assert writer.generate(PROMPTS) == [plain(model, prompt) for prompt in PROMPTS]


def test_own_answers_teach_the_head_and_nothing_else() -> None:
    """The same twice, to the bit; the adapter stays; and the model's next answers are guessed far better."""
    prompts, steps = [[5 + (7 * n + k) % 900 for k in range(6 + n % 3)] for n in range(3)], []
    heads, found = [], []
    for _ in range(2):
        model = adapted(EMBEDDED)
        before = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
        answers = [plain(model, prompt, 8) for prompt in prompts]
        training = HeadTraining(new_head(model.get_base_model()), model, depth=2, learning_rate=3e-3)
        untaught = speculator(model, training.head, count=2, max_new_tokens=8, measured=False)
        assert untaught.generate(prompts) == answers
        steps.append(sum(learn_own_answers(training, prompts, answers, tokens=80) for _ in range(3)))
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
        writer = speculator(model, training.head, count=2, max_new_tokens=8, measured=False)
        assert writer.generate(prompts) == answers
        heads.append(training.head.state_dict())
        found.append((untaught.counts.tokens_per_pass, writer.counts.tokens_per_pass))
    assert steps[0] == steps[1] > 0
    assert all(torch.equal(tensor, heads[1][name]) for name, tensor in heads[0].items())
    assert found[0][1] > found[0][0] + 0.5


def test_what_the_model_thought_while_it_wrote_is_what_reading_gives(tmp_path: Path) -> None:
    """Prompts of several lengths in one batch, one answer that ended early; what has no room is read instead."""
    model = made("mixtral", tmp_path, sliding_window=6)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    end = plain(model, PROMPTS[0])[3]
    model.generation_config.eos_token_id = end
    kept, read = OwnHidden(model), OwnHidden(model)
    with kept.writing(PROMPTS) as written:
        answers = answer_ids(model, tokenizer, PROMPTS, max_new_tokens=7, batch_size=2, written=written)
    assert len({*map(len, answers)}) > 1
    texts = [[*prompt, *answer] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    rows = [(text, [0] * len(text)) for text in texts]
    inputs, batch = _padded(rows, torch.device("cpu")), list(range(len(rows)))
    got, expected = kept.of(batch, inputs), read.of(batch, inputs)
    assert not set(batch) - set(kept.kept)
    for number, text in enumerate(texts):
        places = slice(len(text) - 1)
        torch.testing.assert_close(got[number, places], expected[number, places], rtol=1e-4, atol=1e-5)
    heads = []
    for source in (kept, None):
        training = HeadTraining(new_head(model.get_base_model()), model, depth=2, learning_rate=3e-3)
        assert learn_own_answers(training, PROMPTS, answers, tokens=64, source=source) > 0
        heads.append(training.head.state_dict())
    for name, tensor in heads[0].items():
        torch.testing.assert_close(tensor, heads[1][name], rtol=1e-2, atol=1e-3, msg=name)
    full = OwnHidden(model)
    full.room = 0
    torch.testing.assert_close(full.of(batch, inputs), expected, rtol=0, atol=0)
    assert not full.kept


def test_answers_of_one_token_teach_nothing() -> None:
    model = attach_lora(load_int8(str(EMBEDDED))[0], r=2)
    training = HeadTraining(new_head(model.get_base_model()), model)
    assert learn_own_answers(training, [[5, 6, 7]], [[2]], tokens=64) == 0
    assert training.steps == 0


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_among_some_tokens_the_loss_is_that_of_their_logits_alone(kind: str) -> None:
    """Own answers of large vocabularies: what is never written takes no part, and the gradient is autograd's."""
    model = adapted(EMBEDDED)
    base: Any = model.get_base_model()
    words = torch.arange(3, 2048, 5)
    ids = words[torch.randint(len(words), (2, 12), generator=torch.Generator().manual_seed(0))]
    training = HeadTraining(new_head(base), model, kind=kind)
    with training.listen() as hidden, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    with training.among(words):
        training.learn(hidden(), {"input_ids": ids, "labels": ids}, 20)
    got = {name: p.grad.clone() for name, p in training.parameters.items() if p.grad is not None}
    training.head.zero_grad()
    trunk, tokens, positions = Trunk.of(base), ids.roll(-1, 1), torch.arange(1, 13).expand(2, -1)
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    out = training.head.step(trunk, 1, hidden(), tokens, positions, mask)[:, :10]
    student = trunk.logits(out)[..., words].log_softmax(-1)
    if kind == "kl":
        teacher = trunk.logits(hidden()[:, 1:11])[..., words].log_softmax(-1)
        loss = (teacher.exp() * (teacher - student)).sum()
    else:
        loss = -student.gather(-1, torch.searchsorted(words, ids[:, 2:].contiguous())[..., None]).sum()
    (loss / 20).backward()
    for name, grad in got.items():
        torch.testing.assert_close(grad, training.parameters[name].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_large_vocabulary_is_narrowed_to_what_the_model_has_in_mind() -> None:
    model = adapted(EMBEDDED)
    training = HeadTraining(new_head(model.get_base_model()), model)
    rows = {0: ([5, 6, 7, 8, 9], [-100, -100, 7, 8, 9])}
    found = _words(rows, [[0]], OwnHidden(model), training.trunk, torch.Generator().manual_seed(0))
    assert found is None  # 1,024 others are half of what there is
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toolkit.mtp.own_answers._OTHERS", 10)
        found = _words(rows, [[0]], OwnHidden(model), training.trunk, torch.Generator().manual_seed(0))
    assert found is not None
    assert len(found) <= 10 + 3 + 3 * 8
    with torch.no_grad():
        likeliest = model(input_ids=torch.tensor([rows[0][0]])).logits[0, 1:4].argmax(-1)
    assert {7, 8, 9, *likeliest.tolist()} <= set(found.tolist())
    assert bool((found.diff() > 0).all())
