"""Answers drawn in batches: the text of `generate`, the distribution of plain sampling, prompts that are read once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from tests.harness.families import build, tiny_config
from tests.parity.conftest import EMBEDDED
from tests.parity.test_mtp_edges import PROMPTS, adapted, made, plain
from toolkit.adapters import attach_lora
from toolkit.evaluate.generate import AnswerWriter
from toolkit.evaluate.sampler import Sampler, why_not_shared
from toolkit.mtp.batch_drafts import BatchDrafter
from toolkit.mtp.build import new_head
from toolkit.mtp.drafts import HeadDrafter
from toolkit.mtp.head import Trunk, capture_hidden
from toolkit.mtp.row_cache import RowCache
from toolkit.quant import load_int8
from toolkit.recipe import GrpoSection

THRICE = [prompt for prompt in PROMPTS for _ in range(3)]
SIZE = 2048
"""Tokens of the embedded model's vocabulary."""


class Told:
    """A drafter that proposes what it is told of each row's text; put in place of the head's."""

    def __init__(self, propose: Callable[[list[int], int], list[int]], shares_V: torch.Tensor | None = None) -> None:
        self.propose, self.shares_V = propose, shares_V

    def __call__(self, head: Any, trunk: Any, count: int) -> Told:
        self.count = count
        return self

    def begin(self, hidden_UWH: torch.Tensor, ids_UW: torch.Tensor, lengths_U: torch.Tensor) -> None:
        self.texts = [row[len(row) - length :] for row, length in zip(ids_UW.tolist(), lengths_U.tolist(), strict=True)]

    def pick(self, rows: torch.Tensor) -> None:
        self.texts = [list(self.texts[row]) for row in rows.tolist()]

    def draft(self, hidden: Any, tokens_Bm: Any, fresh_B: Any, count: int, draw: Any) -> Any:
        for text, tokens, fresh in zip(self.texts, tokens_Bm.tolist(), fresh_B.tolist(), strict=True):
            text += tokens[:fresh]
        drafts_Bk = torch.tensor([self.propose(text, min(count, self.count)) for text in self.texts])
        if self.shares_V is None:
            return drafts_Bk, [torch.nn.functional.one_hot(row, SIZE).float() for row in drafts_Bk.T]
        return drafts_Bk, [self.shares_V.expand(len(drafts_Bk), -1)] * drafts_Bk.shape[1]


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return adapted(EMBEDDED)


def drafting(model: PeftModel, drawn: Any, room: int, count: int) -> Sampler:
    return Sampler(model, drawn, room, head=new_head(model.get_base_model()).eval(), count=count)


def test_greedy_text_is_that_of_generate(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of prompts of several lengths, each answered thrice; drafts are right until they are not; rows leave in turn."""
    text_of = {tuple(prompt): plain(model, prompt) for prompt in PROMPTS}
    ends = {text_of[tuple(PROMPTS[0])][4], text_of[tuple(PROMPTS[1])][6]}
    expected = []
    for prompt in THRICE:
        text = text_of[tuple(prompt)]
        stop = next((place for place, token in enumerate(text) if token in ends), len(text))
        expected.append(text[: stop + 1])

    def propose(text: list[int], count: int) -> list[int]:
        prompt = next(prompt for prompt in map(list, text_of) if text[: len(prompt)] == prompt)
        place = len(text) - len(prompt)
        right = [*text_of[tuple(prompt)][place : place + count], *[7] * count][:count]
        return [token if (len(prompt) + place + n) % 4 else (token + 1) % SIZE for n, token in enumerate(right)]

    plainly, drafted = Sampler(model, None, 12), drafting(model, None, 12, 3)
    monkeypatch.setattr("toolkit.evaluate.sampler.BatchDrafter", Told(propose))
    for sampler in (plainly, drafted):
        sampler.drawing.ends = ends
        assert sampler.write(THRICE) == expected
    assert plainly.figures() == {}
    figures = drafted.figures()
    assert 0.3 < figures["drafts/accepted"] < 1.0
    assert figures["drafts/tokens_per_pass"] > 1.5
    assert drafted.figures() == {}


def test_drafts_of_many_rows_are_those_of_each_alone(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits that a draft is drawn from, whatever the lengths and however many of the drafts before were kept."""
    base = model.get_base_model()
    head, trunk = new_head(base).eval(), Trunk.of(base)
    random = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 900, (12 + 2 * row,), generator=random).tolist() for row in range(3)]
    hidden = [_hidden(model, text) for text in texts]
    asked = [4, 7, 3]  # tokens of the prompts; then 1, 3, 2 new ones, then 2, 1, 3
    alone = [HeadDrafter(head, trunk) for _ in texts]
    together = BatchDrafter(head, trunk, 3)
    width = max(asked)
    ids_UW = torch.tensor([[0] * (width - n) + text[:n] for text, n in zip(texts, asked, strict=True)])
    states = [torch.cat([h.new_zeros(width - n, h.shape[1]), h[:n]]) for h, n in zip(hidden, asked, strict=True)]
    together.begin(torch.stack(states), ids_UW, torch.tensor(asked))
    done = [n - 1 for n in asked]
    for new in ([1, 1, 1], [1, 3, 2], [2, 1, 3]):
        most = max(new)
        fresh = torch.stack(
            [
                torch.nn.functional.pad(h[d : d + n], (0, 0, 0, most - n))
                for h, d, n in zip(hidden, done, new, strict=True)
            ]
        )
        tokens = torch.tensor(
            [(text[d + 1 : d + 1 + n] + [9] * most)[:most] for text, d, n in zip(texts, done, new, strict=True)]
        )
        found: list[torch.Tensor] = []

        def draw(drafts_Bk: torch.Tensor, logits_BV: torch.Tensor, found: list[Any] = found) -> Any:
            found.append(logits_BV)
            return torch.full((3,), 40 + len(found)), logits_BV

        with torch.no_grad():
            together.draft(fresh, tokens, torch.tensor(new), 3, draw)
            for row, (drafter, text) in enumerate(zip(alone, texts, strict=True)):
                single: list[torch.Tensor] = []

                def pick(_: list[int], logits: torch.Tensor, single: list[Any] = single) -> tuple[int, None]:
                    single.append(logits)
                    return 40 + len(single), None

                start, stop = (0 if drafter.cache.get_seq_length() == 0 else done[row]), done[row] + new[row]
                drafter.draft(hidden[row][start:stop], text[: stop + 1], 3, pick)
                for ours, theirs in zip(found, single, strict=True):
                    torch.testing.assert_close(ours[row], theirs, rtol=1e-4, atol=1e-3)
        done = [d + n for d, n in zip(done, new, strict=True)]


@torch.no_grad()
def _hidden(model: PeftModel, text: list[int]) -> torch.Tensor:
    with capture_hidden(model.get_base_model()) as hidden:
        model(input_ids=torch.tensor([text]), use_cache=False)
    return hidden()[0]


def test_sampled_answers_have_the_models_own_distribution(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens drawn in one batch, after drafts from a wrong distribution, against the exact probabilities."""
    drawn, draws, prompt = {"temperature": 1.3, "top_k": 3, "top_p": 1.0}, 800, PROMPTS[2]
    exact = _three_tokens(model, prompt, 1.3, 3)
    likely = sorted({triple[place] for triple in exact for place in (1, 2)})
    proposal = torch.zeros(SIZE)
    proposal[likely] = torch.linspace(1.0, 3.0, len(likely))
    proposal /= proposal.sum()

    def propose(text: list[int], count: int) -> list[int]:
        return torch.multinomial(proposal, count, replacement=True).tolist()

    monkeypatch.setattr("toolkit.evaluate.sampler.BatchDrafter", Told(propose, proposal))
    torch.manual_seed(0)
    for sampler in (drafting(model, drawn, 4, 2), Sampler(model, drawn, 3)):
        sampler.drawing.ends = set()
        found = [tuple(text[:3]) for text in sampler.write([prompt] * draws)]
        assert set(found) <= set(exact)
        statistic = sum((found.count(triple) - draws * p) ** 2 / (draws * p) for triple, p in exact.items())
        # The chi-square statistic of c cells has mean c - 1 and a variance of about 2(c - 1); five sigmas.
        cells = len(exact)
        assert statistic < (cells - 1) + 5 * (2 * (cells - 1)) ** 0.5 + sum(p < 5 / draws for p in exact.values())
        figures = sampler.figures()
        assert not figures or 0.0 < figures["drafts/accepted"] < 0.9


@torch.no_grad()
def _three_tokens(model: PeftModel, prompt: list[int], temperature: float, top_k: int) -> dict[tuple[int, ...], float]:
    """The probability of every three next tokens."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        after: dict[tuple[int, ...], float] = {}
        texts = torch.tensor([[*prompt, *text] for text in found])
        best = (model(input_ids=texts, use_cache=False).logits[:, -1] / temperature).topk(top_k)
        for (text, share), tokens, shares in zip(
            found.items(), best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True
        ):
            after |= {(*text, token): share * more for token, more in zip(tokens, shares, strict=True)}
        found = after
    return found


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"sliding_window": 6}),
        ("gpt_oss", {"sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]}),
    ],
)
def test_rows_go_on_after_each_took_back_its_own_number(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Beyond a window, over and over: the logits are those of the kept tokens read alone."""
    model = made(family, tmp_path, **changes)
    sampler = Sampler(model, None, 4)
    sampler.head = object()  # type: ignore[assignment]  # only asks for a cache that gives tokens back
    kept, rows = [list(prompt) for prompt in PROMPTS[:3]], sampler.empty(3)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sampler.read(rows, *sampler.padded(kept))
        for back in ([0, 2, 1], [2, 0, 2], [1, 1, 1], [0, 0, 2]):
            more = torch.randint(5, 80, (3, 3), generator=random)
            logits = sampler.read(rows, more)
            for row, text in enumerate(kept):
                alone = model(input_ids=torch.tensor([[*text, *more[row].tolist()]]), use_cache=False).logits[0, -3:]
                torch.testing.assert_close(logits[row], alone, rtol=1e-3, atol=1e-3)
                text += more[row, : 3 - back[row]].tolist()
            rows.take_back(torch.tensor(back))
            assert rows.lengths_B.tolist() == list(map(len, kept))


@pytest.mark.parametrize(
    ("family", "shares", "takes_back"),
    [("qwen3_moe", True, True), ("qwen3_next", True, False), ("deepseek_v32", True, False), ("minimax", False, False)],
)
def test_what_a_family_allows_is_seen_by_trying(family: str, shares: bool, takes_back: bool, tmp_path: Path) -> None:
    build(tiny_config(family)).save_pretrained(tmp_path)
    model = attach_lora(load_int8(str(tmp_path))[0], r=2).eval()
    sampler = Sampler(model, None, 4)
    assert (why_not_shared(sampler) is None) == shares
    sampler.head = object()  # type: ignore[assignment]
    assert (why_not_shared(sampler) is None) == takes_back


def test_a_family_that_allows_nothing_is_told_and_written_by_generate(tmp_path: Path) -> None:
    build(tiny_config("minimax")).save_pretrained(tmp_path)
    model = attach_lora(load_int8(str(tmp_path))[0], r=2).eval()
    tokenizer, said = AutoTokenizer.from_pretrained(EMBEDDED), list[str]()
    tokenizer.pad_token_id = 0
    options = GrpoSection(max_completion_length=4).model_dump()
    head = SimpleNamespace(follow_attention=str)  # what it drafts is not asked for
    writer = AnswerWriter(model, tokenizer, options, head=head, note=said.append)  # type: ignore[arg-type]
    written = writer([[5, 6, 7], [5, 6, 7], [8, 9]])
    assert [0 < len(ids) <= 4 for ids in written] == [True] * 3
    assert [line.partition(":")[2].partition(":")[0] for line in said] == [
        " no drafts",
        " each answer reads its prompt",
    ]
    assert writer.figures() == {}


def test_a_cache_that_runs_out_of_memory_is_not_called_a_familys_fault(model: PeftModel) -> None:
    sampler = Sampler(model, None, 4)
    sampler.read = _without_memory  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="not enough memory"):
        why_not_shared(sampler)


def _without_memory(rows: RowCache, *args: Any, **kwargs: Any) -> torch.Tensor:
    raise RuntimeError(
        "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: not enough memory: you tried to allocate"
    )
