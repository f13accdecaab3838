"""A new head: what it learns, that the adapter does not notice, and that drafts change no text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import set_seed

from tests.parity.conftest import EMBEDDED
from tests.parity.test_training import train_adapted
from toolkit.adapters import attach_lora
from toolkit.errors import ModelError
from toolkit.mtp.build import new_head
from toolkit.mtp.decode import Draft, Speculator
from toolkit.mtp.drafts import HeadDrafter, measure_drafts, speculator
from toolkit.mtp.head import MtpHead, Trunk, capture_hidden
from toolkit.mtp.head_file import head_state, read_head
from toolkit.mtp.loss import Rows, head_loss
from toolkit.mtp.training import HeadTraining
from toolkit.quant import load_int8


def rows(count: int = 12) -> Dataset:
    """Counting sequences of several lengths, the first tokens of each not trained."""
    sequences = [[3 + (start + step) % 90 for step in range(20 + start % 5)] for start in range(count)]
    labels = [[-100] * (5 + start % 3) + row[5 + start % 3 :] for start, row in enumerate(sequences)]
    return Dataset.from_dict({"input_ids": sequences, "labels": labels})


def adapted() -> PeftModel:
    model, _ = load_int8(str(EMBEDDED))
    set_seed(0)
    return attach_lora(model, r=2)


def train(folder: Path, *, with_head: bool, steps: int = 4, stage: str = "with", **changes: Any) -> Any:
    """The adapter's tensors and the head's training after a few packed steps."""
    model = adapted()
    head = HeadTraining(new_head(model.get_base_model()), model, depth=2, learning_rate=3e-3) if with_head else None
    train_adapted(model, folder, rows(), max_steps=steps, head=head, head_stage=stage, **changes)
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}, head, model


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("mtp")
    return {
        "without": train(folder / "without", with_head=False),
        "with": train(folder / "with", with_head=True),
        "after": train(folder / "after", with_head=True, stage="after"),
    }


@pytest.mark.parametrize("stage", ["with", "after"])
def test_the_adapter_is_the_same_bits_with_a_head_and_without(runs: dict[str, Any], stage: str) -> None:
    plain, beside = runs["without"][0], runs[stage][0]
    assert plain.keys() == beside.keys()
    assert all(torch.equal(tensor, beside[name]) for name, tensor in plain.items())
    assert runs[stage][1].steps == 4
    fresh = new_head(adapted().get_base_model()).state_dict()
    moved = runs[stage][1].head.state_dict()
    assert all(not torch.equal(moved[name], tensor) for name, tensor in fresh.items())


def test_a_resumed_head_is_the_same_bits(tmp_path: Path, runs: dict[str, Any]) -> None:
    folder = tmp_path / "resumed"
    train(folder, with_head=True, save_steps=2)
    newest = max((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    _, head, _ = train(folder, with_head=True, save_steps=2)
    for name, tensor in runs["with"][1].head.state_dict().items():
        assert torch.equal(head.head.state_dict()[name], tensor), name


def batch(model: PeftModel, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two packed rows of three documents each, some tokens not trained."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 2000, (2, 30), generator=random)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=random) < 0.3, -100)
    positions = torch.cat([torch.arange(n) for n in (9, 4, 17)]).expand(2, -1)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


@torch.no_grad()
def hidden_of(model: PeftModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with capture_hidden(model.get_base_model()) as hidden:
        model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)
    return hidden()


@pytest.mark.parametrize("kind", ["kl", "ce", "both"])
def test_the_chunked_loss_is_the_plain_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against autograd over whole logits, document by document: nothing leaks, no target crosses a border."""
    model = adapted().eval()
    base, inputs = model.get_base_model(), batch(adapted())
    head, trunk, hidden = new_head(base), Trunk.of(base), hidden_of(model, inputs)
    monkeypatch.setattr("toolkit.mtp.loss._CHUNK_BYTES", {"cpu": 4 * 2048 * 7})  # seven rows at a time
    loss, _ = head_loss(head, trunk, hidden, Rows.of(inputs), depth=1, kind=kind)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in head.named_parameters()}
    head.zero_grad()
    total = hidden.new_zeros(())
    for row in range(2):
        for start, stop in ((0, 9), (9, 13), (13, 30)):
            part = slice(start, stop)
            total = total + _plain_loss(
                head, trunk, hidden[row, part], inputs["input_ids"][row, part], inputs["labels"][row, part], kind
            )
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-4)
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


def _plain_loss(
    head: MtpHead, trunk: Trunk, hidden: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor, kind: str
) -> torch.Tensor:
    count = len(ids) - 2
    positions = torch.arange(1, count + 1)[None]
    mask = torch.ones(count, count, dtype=torch.bool).tril()[None, None]
    out = head.step(trunk, 1, hidden[None, :count], ids[None, 1 : count + 1], positions, mask)[0]
    student = trunk.logits(out).log_softmax(-1)
    trained = labels[2:] != -100
    if kind == "ce":
        return -student.gather(1, ids[2:, None]).squeeze(1)[trained].sum()
    teacher = trunk.logits(hidden[1 : count + 1]).log_softmax(-1)
    if kind == "both":
        likeliest = torch.nn.functional.one_hot(teacher.argmax(-1), teacher.shape[-1])
        teacher = (0.5 * teacher.exp() + 0.5 * likeliest).log()
    return (teacher.exp() * (teacher - student)).sum(-1)[trained].sum()


def test_what_is_trained_at_depth_three_is_what_drafts_at_decoding() -> None:
    """The training pass over a whole row gives, at each place, the drafts that decoding gives there."""
    model = adapted().eval()
    base = model.get_base_model()
    head, trunk = new_head(base).eval(), Trunk.of(base)
    ids = torch.randint(5, 2000, (1, 14), generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(14)[None]}
    hidden, place = hidden_of(model, inputs), 9
    from toolkit.mtp.loss import Chain

    chain, current, expected = Chain(head, trunk, Rows.of(inputs), 3), hidden, []
    with torch.no_grad():
        for depth in (1, 2, 3):
            current = chain.step(depth, current)
            expected.append(trunk.logits(current[0, place]))
        followed = iter([*ids[0, place + 2 : place + 4].tolist(), 0])
        got: list[torch.Tensor] = []

        def pick(_: list[int], logits: torch.Tensor) -> tuple[int, None]:
            got.append(logits)
            return next(followed), None

        HeadDrafter(head, trunk).draft(hidden[0, : place + 1], ids[0, : place + 2].tolist(), 3, pick)
    for theirs, ours in zip(expected, got, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


PROMPTS = [[5 + (3 * n + k * (1 + n % 4)) % 900 for k in range(3 + n % 7)] for n in range(8)]


def test_greedy_text_is_that_of_generate(runs: dict[str, Any]) -> None:
    _, head, model = runs["with"]
    model.eval()
    for prompt in PROMPTS[:6]:
        plain = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=14, do_sample=False, pad_token_id=0)
        text = plain[0, len(prompt) :].tolist()
        # The head itself, which seldom agrees after four steps; and drafts that are right until they are not.
        writer = speculator(model, head.head, count=3, max_new_tokens=14, measured=False)
        assert writer.generate([prompt]) == [text]
        assert writer.counts.proposed[1] >= 1
        oracle = _Follower(text, len(prompt))
        knowing = Speculator(model, lambda oracle=oracle: oracle, count=4, max_new_tokens=14, measured=False)
        assert knowing.generate([prompt]) == [text]
        assert knowing.counts.accepted[1] > knowing.counts.accepted.get(4, 0)
        assert knowing.counts.tokens_per_pass > 2.0


def test_a_near_tie_is_decided_as_plain_decoding_does(runs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.mtp.decode._MARGIN", 1e6)  # every choice counts as one
    _, head, model = runs["with"]
    writer = speculator(model, head.head, count=3, max_new_tokens=12, measured=False)
    plain = speculator(model, head.head, count=0, max_new_tokens=12)
    assert writer.generate(PROMPTS[:4]) == plain.generate(PROMPTS[:4])
    assert writer.counts.replayed > 0


class _Oracle:
    """Proposes given tokens, whatever the model says; as a draft that ends in the middle, or a bad one."""

    def __init__(self, proposed: list[int], shares: torch.Tensor | None = None) -> None:
        self.proposed, self.shares = proposed, shares

    def draft(self, hidden_mH: torch.Tensor, tokens: list[int], count: int, pick: Any) -> Draft:
        chosen = self.proposed[:count]
        return Draft(chosen, [self.shares] * len(chosen))


class _Follower:
    """Proposes the right tokens, each fourth one spoilt."""

    def __init__(self, text: list[int], start: int) -> None:
        self.text, self.start = text, start

    def draft(self, hidden_mH: torch.Tensor, tokens: list[int], count: int, pick: Any) -> Draft:
        place = len(tokens) - self.start
        right = self.text[place : place + count]
        chosen = [token if (place + n) % 4 else (token + 1) % 2048 for n, token in enumerate(right)]
        return Draft(chosen, [None] * len(chosen))


def test_an_end_token_inside_a_draft_ends_the_text(runs: dict[str, Any]) -> None:
    _, head, model = runs["with"]
    plain = speculator(model, head.head, count=0, max_new_tokens=12)
    (text,) = plain.generate(PROMPTS[:1])
    writer = Speculator(model, lambda: _Oracle(text[1:]), count=8, max_new_tokens=12, measured=False)
    writer.ends = {text[4]}
    first = text.index(text[4]) + 1
    assert writer.generate(PROMPTS[:1]) == [text[:first]]


def test_sampled_text_has_the_models_own_distribution(runs: dict[str, Any]) -> None:
    """Two tokens drawn many times, after drafts from a wrong distribution, against the exact probabilities."""
    _, _, model = runs["with"]
    base = model.get_base_model()
    base.generation_config.top_k = 4
    prompt, draws = PROMPTS[2], 250
    proposal = torch.zeros(2048)
    second = _two_tokens(model, prompt)
    likely = sorted({pair[1] for pair in second})[:3]
    proposal[likely] = torch.tensor([0.7, 0.2, 0.1])[: len(likely)] / float(sum([0.7, 0.2, 0.1][: len(likely)]))

    class _Wrong:
        def draft(self, hidden_mH: torch.Tensor, tokens: list[int], count: int, pick: Any) -> Draft:
            token = int(torch.multinomial(proposal, 1, generator=writer.random))
            return Draft([token][:count], [proposal][:count])

    writer = Speculator(model, _Wrong, count=1, max_new_tokens=3, temperature=1.0, measured=False, seed=0)
    found = [tuple(text[:2]) for text in writer.generate([prompt] * draws)]
    base.generation_config.top_k = 50
    statistic = sum((found.count(pair) - draws * p) ** 2 / (draws * p) for pair, p in second.items() if draws * p >= 5)
    rare = draws * sum(p for p in second.values() if draws * p < 5)
    cells = sum(draws * p >= 5 for p in second.values())
    assert sum(found.count(pair) for pair in second if draws * second[pair] >= 5) >= draws - 3 * rare - 10
    # The chi-square statistic of c cells has mean c - 1 and variance 2(c - 1); five sigmas.
    assert statistic < (cells - 1) + 5 * (2 * (cells - 1)) ** 0.5
    assert 0 < writer.counts.accepted[1] < writer.counts.proposed[1]


@torch.no_grad()
def _two_tokens(model: PeftModel, prompt: list[int]) -> dict[tuple[int, int], float]:
    """The probability of every pair of next tokens under top-k 4."""
    model.eval()
    first = model(input_ids=torch.tensor([prompt])).logits[0, -1].topk(4)
    pairs = {}
    for token, share in zip(first.indices.tolist(), first.values.softmax(-1).tolist(), strict=True):
        then = model(input_ids=torch.tensor([[*prompt, token]])).logits[0, -1].topk(4)
        for after, rest in zip(then.indices.tolist(), then.values.softmax(-1).tolist(), strict=True):
            pairs[token, after] = share * rest
    return pairs


def test_drafts_that_do_not_pay_are_switched_off(runs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, head, model = runs["with"]
    clock = iter(range(10_000))
    monkeypatch.setattr("toolkit.mtp.decode.time.perf_counter", lambda: float(next(clock)))
    writer = Speculator(model, lambda: _Oracle([2047, 2047]), count=2, max_new_tokens=40)
    plain = speculator(model, head.head, count=0, max_new_tokens=40)
    assert writer.generate(PROMPTS[:3]) == plain.generate(PROMPTS[:3])
    assert not writer.counts.switched_off  # equally many tokens in equally long rounds: a gain of exactly one
    writer.counts.drafted_seconds *= 2
    writer.generate(PROMPTS[3:4])
    assert writer.counts.switched_off


def test_a_written_head_comes_back_and_others_are_refused(tmp_path: Path, runs: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    _, head, model = runs["with"]
    base = model.get_base_model()
    state = head_state(head.head, base)
    file = tmp_path / "mtp_head.safetensors"
    save_file(state, file)
    assert all(torch.equal(t, head_state(read_head(tmp_path, base, None), base)[n]) for n, t in state.items())
    save_file({**state, "model.layers.4.eh_proj.weight": torch.zeros(8, 16)}, file)
    with pytest.raises(ModelError, match="is not a head of this base"):
        read_head(tmp_path, base, None)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ModelError, match="damaged"):
        read_head(tmp_path, base, None)
    with pytest.raises(ModelError, match=r"mtp\.enabled=false"):
        read_head(tmp_path / "nowhere", base, None)


def test_looking_back_drafts_where_there_is_no_head(runs: dict[str, Any]) -> None:
    _, _, model = runs["with"]
    prompts = [[7, 8, 9, 10, 11, 7, 8, 9, 10, 11, 7, 8]]
    found = measure_drafts(model, None, prompts, count=3, max_new_tokens=12)
    assert found.identical
    assert found.tau >= 1.0


@pytest.mark.parametrize(("depth", "implementation"), [(1, "sdpa"), (3, "sdpa"), (3, "eager")])
def test_rows_without_a_target_change_nothing(depth: int, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents, few labels: loss, hits and gradients over all rows and over those that count."""
    model = adapted().eval()
    base, inputs = model.get_base_model(), batch(adapted())
    inputs["labels"] = torch.where(torch.arange(30) % 17 > 9, inputs["input_ids"], -100)
    head, trunk, hidden = new_head(base), Trunk.of(base), hidden_of(model, inputs)
    head.follow_attention(implementation)
    found = []
    for share in (0.75, 0.0):
        monkeypatch.setattr("toolkit.mtp.loss._NEARLY_ALL", share)
        head.zero_grad()
        loss, figures = head_loss(head, trunk, hidden, Rows.of(inputs), depth=depth, kind="kl")
        loss.backward()
        found.append((loss, [f.hits for f in figures], [p.grad.clone() for _, p in head.parts()]))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for few, every in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(few, every, rtol=1e-4, atol=1e-5)
