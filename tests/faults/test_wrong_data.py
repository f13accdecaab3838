"""Data, recipes and folders that cannot be used, by the way a person gives them: one line each."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.faults.conftest import MODEL, QUICKSTART, Run
from tests.faults.test_wrong_input import fails, own_model

GOOD = {"prompt": "say yes", "completion": "yes"}


def lines(*rows: object) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


ROWS: dict[str, tuple[bytes, str]] = {
    "wrong encoding": ("café\n".join(['{"prompt": "', '", "completion": "x"}']).encode("utf-16"), "rows.jsonl:1"),
    "latin-1": (lines(GOOD) + '\n{"prompt": "café", "completion": "x"}'.encode("latin-1"), "rows.jsonl:2"),
    "mixed types": (lines(GOOD, {"prompt": 3, "completion": ["x"]}), "rows.jsonl:2"),
    "not an object": (lines(GOOD, [1, 2]), "rows.jsonl:2"),
    "empty answer": (lines({"prompt": "a", "completion": ""}), "rows.jsonl:1"),
    "too long": (lines({"prompt": "word " * 900, "completion": "yes"}), "longer than"),
    "nothing but blanks": (b"\n\n  \n", "rows.jsonl"),
    "a number of thousands of digits": (b'{"prompt": ' + b"9" * 5000 + b', "completion": "x"}', "rows.jsonl:1"),
    "deep": (b'{"prompt": ' + b"[" * 100_000, "rows.jsonl:1"),
    "half a surrogate": (b'{"prompt": "\\ud800", "completion": "x"}', "rows.jsonl:1"),
}


@pytest.mark.parametrize(("content", "words"), ROWS.values(), ids=ROWS)
def test_rows_that_cannot_be_used(onecard: Run, recipe: Path, tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    fails(onecard("train", recipe, f"data.train={tmp_path}/rows.jsonl"), 3, words)
    assert not (tmp_path / "run").exists()


LEFT: dict[str, tuple[bytes, list[str], str]] = {
    "all filtered": (
        lines({"prompt": "a", "completion": ""}, {"prompt": 1, "completion": "b"}),
        ["data.on_invalid=drop"],
        "no usable example in 2 rows",
    ),
    "all too long": (lines(*[{"prompt": "word " * 90, "completion": "yes"}] * 3), ["training.max_length=64"], "longer"),
    "all masked": (
        lines(*[{"prompt": "word " * 90, "completion": "yes"}] * 3),
        ["training.max_length=64", "data.truncation=keep_start"],
        "answer beyond max_length: 3",
    ),
    "all cut before the end of turn": (
        lines(*[{"prompt": "a", "completion": "word " * 90}] * 3),
        ["training.max_length=64", "data.truncation=keep_start"],
        "every answer is cut before its end-of-turn token",
    ),
}


@pytest.mark.parametrize(("content", "overrides", "words"), LEFT.values(), ids=LEFT)
def test_data_of_which_nothing_is_left(
    onecard: Run, recipe: Path, tmp_path: Path, content: bytes, overrides: list[str], words: str
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    fails(onecard("train", recipe, f"data.train={tmp_path}/rows.jsonl", *overrides), 3, words)
    assert not (tmp_path / "run").exists()


TEMPLATES: dict[str, tuple[str, str]] = {
    "no end of turn": ("{% for m in messages %}{{ m.content }}{% endfor %}", "nothing ends turn 2"),
    "answers left out": (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}",
        "leaves out",
    ),
    "not Jinja": ("{% for %}", "not valid Jinja"),
    "a runaway": ("{{ 'a' * 10**10 }}", "chat template: "),
}


@pytest.mark.parametrize(("template", "words"), TEMPLATES.values(), ids=TEMPLATES)
def test_templates_that_cannot_be_used(onecard: Run, recipe: Path, tmp_path: Path, template: str, words: str) -> None:
    (tmp_path / "chat.jinja").write_text(template)
    fails(onecard("train", recipe, f"data.chat_template_path={tmp_path}/chat.jinja"), 3, words)


RECIPES: dict[str, tuple[str, str]] = {
    "a key given twice": (
        "model: {model_name_or_path: a/b}\nmodel: {}\ndata: {train: x}",
        "recipe.yaml:2: model: given twice",
    ),
    "depth": ("model: " + "[" * 5000, "nested more than 32 deep"),
    "size": ("# " + "x" * (1 << 20), "larger than 1 MiB"),
    "an alias bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "recipe.yaml:2: YAML aliases"),
    "a key that is a mapping": (
        "model: {model_name_or_path: a/b}\n? data: {train: x}\nlora: {r: 4}",
        "recipe.yaml:2: a key is a name",
    ),
    "a key that is a list": ("model: {a: b}\ndata: {x: [{[1, 2]: 3}]}", "recipe.yaml:2: a key is a name"),
    "code": ("model: !!python/object/apply:os.mkdir ['trace']\ndata: {train: x}", "model"),
    "NUL": ("model: {model_name_or_path: a\x00b}\ndata: {train: x}", "not valid YAML"),
}


@pytest.mark.parametrize(("text", "words"), RECIPES.values(), ids=RECIPES)
def test_recipes_that_are_none(onecard: Run, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    fails(onecard("train", tmp_path / "recipe.yaml"), 2, words)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_may_not_be_written(
    onecard: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    make: Callable[..., Any] = os.mkdir

    def refuse(path: Any, *arguments: Any, **options: Any) -> None:
        if str(path).startswith(str(tmp_path / "run")):
            raise OSError(number, os.strerror(number), str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", refuse)
    fails(onecard("train", recipe), 5, "training.output_dir", os.strerror(number))


def test_the_model_and_data_of_these_tests_are_there() -> None:
    assert (MODEL / "config.json").is_file()
    assert (QUICKSTART / "data").is_dir()


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("data.train", "in 1 of 12 training examples"),
        ("data.validation", "in 1 of 12 held-out examples"),
        ("eval.regression", "in 1 of "),
        ("pad", "and it pads shorter examples"),
    ],
)
def test_tokens_beyond_the_embedding_are_named_before_loading(
    onecard: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, words: str
) -> None:
    monkeypatch.setattr("toolkit.run.job.load", lambda plan: pytest.fail("the base was loaded"))
    model = own_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "<new>"}) if field == "pad" else tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)
    rows = (QUICKSTART / "data" / "category.train.jsonl").read_text().splitlines()[:12]
    text = (QUICKSTART.parent / "general" / "austen.txt").read_text().replace("the", "<new>", 1)
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:4], rows[4].replace("Which", "<new>"), *rows[5:]]))
    (tmp_path / "general.txt").write_text(text)
    given = {"eval.regression": [f"{field}={tmp_path}/general.txt"], "pad": []}.get(
        field, [f"{field}={tmp_path}/rows.jsonl", *(["data.max_samples=12"] if field == "data.validation" else [])]
    )
    status, _, err = onecard("train", recipe, f"model.model_name_or_path={model}", *given)
    assert status == 3, err
    assert "token 2048 ('<new>') has no row in the model's embedding, which has 2,048" in err.splitlines()[-1]
    assert words in err.splitlines()[-1]
