"""What a run was trained on is what `generate` and `chat` feed, and what ends its answers ends them everywhere.

Plain text goes through no chat template; a base whose end-of-sequence token is not the one that closes its turns
learns the same, and stops.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.faults.conftest import MODEL, Run, onecard
from toolkit.data import Dialogue

__all__ = ["onecard"]

WORDS = (
    "oak",
    "elm",
    "fox",
    "hen",
    "bee",
    "ant",
    "rose",
    "lily",
    "cat",
    "dog",
    "cow",
    "pig",
    "owl",
    "eel",
    "fig",
    "yew",
)
KINDS = ("plant", "plant", "animal", "animal", "animal", "animal", "plant", "plant")
ASKED = "Which category is it: {}?"
CLOSER = "<|im_end|>"

Heard = list[list[int]]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    """The prompts that the model is fed."""
    prompts: Heard = []
    prompt_ids = Dialogue.prompt_ids

    def told(self: Dialogue, *arguments: Any) -> list[int]:
        prompts.append(prompt_ids(self, *arguments))
        return prompts[-1]

    monkeypatch.setattr(Dialogue, "prompt_ids", told)
    return prompts


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Heard:
    """The answers that are read, as the model wrote them."""
    answers: Heard = []
    read = Dialogue.read

    def told(self: Dialogue, ids: Any, prompt: Any) -> Any:
        answers.append(list(ids))
        return read(self, ids, prompt)

    monkeypatch.setattr(Dialogue, "read", told)
    return answers


@pytest.fixture
def train(onecard: Run, tmp_path: Path) -> Callable[..., Path]:
    """Train on rows, made from a word and its kind; gives the run."""

    def trained(name: str, row: Callable[[str, str], Any], data: str = "", model: Path = MODEL) -> Path:
        pairs = [(word, KINDS[place % len(KINDS)]) for place, word in enumerate(WORDS)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row(*pair)) + "\n" for pair in pairs))
        (tmp_path / f"{name}.yaml").write_text(
            f"""\
model: {{model_name_or_path: {model}}}
lora: {{r: 8}}
data: {{train: {tmp_path}/rows.jsonl, validation: {tmp_path}/rows.jsonl{data}}}
training:
  {{output_dir: {tmp_path}/{name}, max_steps: 16, per_device_train_batch_size: 4, max_length: 64, learning_rate: 1e-2,
   use_cpu: true, gradient_checkpointing: false, packing: false}}
eval: {{max_samples: 4, max_new_tokens: 8}}
"""
        )
        status, _, err = onecard("train", tmp_path / f"{name}.yaml")
        assert status == 0, err
        return tmp_path / name

    return trained


def figures(run: Path) -> Any:
    return json.loads((run / "summary.json").read_text())["results"]


def test_plain_prompts_are_fed_as_plain_text(
    onecard: Run, train: Callable[..., Path], heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = ", format: prompt-completion, columns: {prompt: text, completion: label_text}"
    run = train("text", lambda word, kind: {"text": f"{ASKED.format(word)}\n", "label_text": kind}, columns)
    told = json.loads(onecard("eval", run, "--json")[1])
    assert told == {name: value for name, value in figures(run).items() if name != "training"}
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    hits = 0
    for word, kind in zip(WORDS[:4], KINDS, strict=False):
        prompt = f"{ASKED.format(word)}\n"
        answer = json.loads(onecard("generate", run, "--json", "--max-new-tokens", 8, "--prompt", prompt)[1])
        assert heard[-1] == tokenizer(prompt)["input_ids"]
        hits += answer["answer"] == kind
    assert hits / 4 == told["adapted"]["exact_match"] > 0.3 > told["base"]["exact_match"]
    assert json.loads((run / "adapter/manifest.json").read_text())["chat"]["form"] == "text"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{prompt}\n"))
    assert onecard("generate", run, "--prompt", "-", "--max-new-tokens", 8)[0] == 0
    assert heard[-1] == tokenizer(prompt)["input_ids"]
    lines = iter(["One.", "Two.", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert "each line is sent without the earlier ones" in onecard("chat", run, "--max-new-tokens", 2)[2]
    assert heard[-2:] == tokenizer(["One.", "Two."])["input_ids"]


def test_a_base_that_ends_elsewhere_learns_the_same_and_stops(
    onecard: Run, train: Callable[..., Path], written: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(MODEL, tmp_path / "other"))
    for name, key, value in (
        ("config.json", "eos_token_id", 0),
        ("generation_config.json", "eos_token_id", 0),
        ("tokenizer_config.json", "eos_token", "<|endoftext|>"),
    ):
        (other / name).write_text(json.dumps({**json.loads((other / name).read_text()), key: value}))

    def row(word: str, kind: str) -> Any:
        turns = [{"role": "user", "content": ASKED.format(word)}, {"role": "assistant", "content": kind}]
        return {"messages": turns}

    runs = train("own", row), train("elsewhere", row, model=other)
    assert figures(runs[0]) == figures(runs[1])
    assert figures(runs[1])["adapted"]["exact_match"] > 0.3
    question = ASKED.format(WORDS[0])
    generated = [onecard("generate", run, "--max-new-tokens", 30, "--prompt", question)[1] for run in runs]
    assert generated[0] == generated[1]
    assert generated[1].strip() in KINDS
    ended = written[-1]
    assert ended[-1] == 2
    lines = iter([question, ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert onecard("chat", runs[1], "--max-new-tokens", 30)[1].strip() == generated[1].strip()
    assert written[-1] == ended

    assert onecard("export", runs[1], "--format", "merged", "--out", tmp_path / "merged")[0] == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), AutoTokenizer.from_pretrained(other)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    texts = [
        model.generate(**ids, max_new_tokens=30, do_sample=False, **ends)[0, ids["input_ids"].shape[1] :]
        for ends in ({}, {"eos_token_id": 0})
    ]
    assert tokenizer.decode(texts[0]) == f"{generated[1].strip()}{CLOSER}"
    assert len(texts[1]) > len(texts[0])
