"""Tokens that the base never saw: rows of their own, trained, carried by the artifact, read by stock software."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import toolkit
from scripts.parity.token_families import judge
from tests.faults.conftest import MODEL, QUICKSTART, Run, onecard
from toolkit.adapters import adapter_coverage, check_start
from toolkit.artifact import combine_adapters, read_manifest, verify_artifact
from toolkit.checkpoint.config import skeleton as skeleton_of
from toolkit.errors import ModelError, RecipeError
from toolkit.evaluate import unsure_end
from toolkit.export import export_adapter
from toolkit.labels import IGNORED
from toolkit.plan import make_plan
from toolkit.recipe import Recipe, parse
from toolkit.run import check_tokens, load_tokenizer, reopen
from toolkit.run.vocabulary import token_rows

__all__ = ["onecard"]

NEW = ["<def>", "</def>", "<odd>"]


def recipe(folder: Path, **model: Any) -> Recipe:
    """Three steps on rows whose answers stand between two of the new tokens, in floats, so that stock can compare."""
    told = {"model_name_or_path": str(MODEL), "new_tokens": NEW, **model}
    return parse(
        f"model: {json.dumps(told)}\nlora: {{r: 2}}\nquantization: {{experts: none, linears: none}}\n"
        f"data: {{train: {folder}/train.jsonl, validation_size: 4}}\n"
        f"training: {{output_dir: {folder}/run, max_steps: 3, learning_rate: 1e-2, max_length: 128, use_cpu: true}}\n"
        "eval: {enabled: false}\n"
    )


def write_rows(folder: Path) -> None:
    lines = (QUICKSTART / "data" / "define.train.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    rows = [json.loads(line)["messages"] for line in lines]
    for _, answer in rows:
        answer["content"] = f"<def>{answer['content']}</def>"
    (folder / "train.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run's folder, and what it said."""
    folder, said = tmp_path_factory.mktemp("tokens"), io.StringIO()
    write_rows(folder)
    finished = toolkit.run_recipe(recipe(folder), console=Console(file=said, width=300))
    return finished.folder, said.getvalue()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


def test_they_are_trained_and_every_program_computes_the_same(trained: tuple[Path, str], tmp_path: Path) -> None:
    run, said = trained
    artifact = run / "adapter"
    assert "new tokens: 2 of 3 are in the training examples; not '<odd>'" in said
    assert read_manifest(artifact)["coverage"]["token rows moved"] == [3, 3]
    made = make_plan(recipe(run.parent), for_training=False)
    ours, tokenizer = reopen(made, artifact)
    ids = torch.tensor([tokenizer("a <def>word</def> and <odd> one")["input_ids"]])
    assert set(ids[0].tolist()) >= {2048, 2049, 2050}
    assert adapter_coverage(ours).tokens == 3
    wanted = logits(ours, ids)
    stock = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with pytest.raises(IndexError):
        PeftModel.from_pretrained(stock, artifact)
    stock = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    stock.resize_token_embeddings(read_manifest(artifact)["new_tokens"]["rows"], mean_resizing=False)
    assert torch.allclose(logits(PeftModel.from_pretrained(stock, artifact), ids), wanted, atol=1e-4)
    assert AutoTokenizer.from_pretrained(artifact).get_vocab() == tokenizer.get_vocab()
    export_adapter(artifact, MODEL, "merged", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    off = (logits(merged, ids) - wanted).abs().max() / wanted.abs().max()
    assert off < 1e-2, "as far as the base's own bf16 rounds"
    assert merged.config.vocab_size == 2051
    assert torch.equal(merged.lm_head.weight, merged.get_input_embeddings().weight)


def test_the_artifact_says_what_it_holds(trained: tuple[Path, str]) -> None:
    artifact = trained[0] / "adapter"
    checks = {check.name: check for check in verify_artifact(artifact, base=MODEL).checks}
    assert all(check.ok for check in checks.values())
    assert checks["token rows"].detail.startswith(
        "3 of 3 have rows in embed_tokens and a text in the tokenizer: '<def>'"
    )
    assert read_manifest(artifact)["new_tokens"] == {
        "ids": dict(zip(NEW, range(2048, 2051), strict=True)),
        "rows": 2051,
    }
    card = (artifact / "README.md").read_text(encoding="utf-8")
    assert "model.resize_token_embeddings(2051, mean_resizing=False)  # room for the new tokens" in card
    assert "`` </def> `` (2049)" in card
    assert "--format merged" in card
    assert "--format per-expert" not in card


def test_a_token_that_the_base_has_is_trained_from_where_it_is(tmp_path: Path) -> None:
    write_rows(tmp_path)
    told, said = recipe(tmp_path, new_tokens=[], trained_tokens=["<|im_end|>"]), io.StringIO()
    artifact = toolkit.run_recipe(told, console=Console(file=said, width=300)).adapter
    assert "tokens with trained rows: 1 of 1 are in the training examples" in said.getvalue()
    assert read_manifest(artifact)["coverage"]["token rows moved"] == [1, 1]
    assert read_manifest(artifact)["new_tokens"] == {"ids": {"<|im_end|>": 2}}
    ours, tokenizer = reopen(make_plan(told, for_training=False), artifact)
    ids = torch.tensor([tokenizer("one<|im_end|>two")["input_ids"]])
    stock = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    before = stock.get_input_embeddings().weight.detach().clone()
    assert torch.allclose(logits(PeftModel.from_pretrained(stock, artifact), ids), logits(ours, ids), atol=1e-4)
    export_adapter(artifact, MODEL, "merged", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    moved = (merged.get_input_embeddings().weight != before).any(1)
    assert moved.nonzero().flatten().tolist() == [2]
    check_start(artifact, skeleton_of(str(MODEL)), [2])
    for wanted, words in (([], r"tokens \(2\): list them in model.trained_tokens"), ([2, 3], "just the")):
        with pytest.raises(ModelError, match=words):
            check_start(artifact, skeleton_of(str(MODEL)), wanted)


def test_an_end_that_is_likeliest_and_rarely_drawn_is_told() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    told = 0
    for text in ("A word is", "The house", "It was then that he", "one two three"):
        ids = tokenizer(text)["input_ids"]
        chances = logits(model, torch.tensor([ids]))[0, -1].float().softmax(-1)
        likeliest, other = chances.topk(2).indices.tolist()
        for end in (likeliest, other):
            row = {"input_ids": [*ids, end], "labels": [IGNORED] * len(ids) + [end]}
            found = unsure_end(model, Dataset.from_list([row]), [end], 2)
            assert (found is not None) == (end == likeliest and bool(chances[end] <= 0.2)), (text, end)
            if found is not None:
                told += 1
                assert (found[0], round(found[1], 3)) == (end, round(float(chances[end]), 3))
    assert told
    assert unsure_end(model, Dataset.from_list([row]), [], 2) is None


def test_where_rows_have_no_place_they_are_refused(trained: tuple[Path, str], tmp_path: Path) -> None:
    artifact = trained[0] / "adapter"
    for layout in ("gguf", "per-expert", "merged-int8"):
        with pytest.raises(ModelError, match=f"--format {layout}: has no place for trained rows of tokens \\(3\\)"):
            export_adapter(artifact, MODEL, layout, tmp_path / "out")
    with pytest.raises(ModelError, match="cannot be added up"):
        combine_adapters({str(artifact): 1.0}, tmp_path / "sum", rank=1)


def test_they_begin_as_the_mean_of_their_pieces(trained: tuple[Path, str]) -> None:
    made = make_plan(recipe(trained[0].parent), for_training=False)
    tokenizer = load_tokenizer(made)
    tokens = token_rows(tokenizer, NEW)
    assert tokens.pieces[0] == tuple(AutoTokenizer.from_pretrained(MODEL)("<def>", add_special_tokens=False).input_ids)
    model, _ = toolkit.run.load(made)
    weight = model.get_input_embeddings().weight
    assert torch.equal(weight[2048], weight[list(tokens.pieces[0])].mean(0))


def test_their_bytes_are_planned(tmp_path: Path) -> None:
    write_rows(tmp_path)
    without, planned = (make_plan(recipe(tmp_path, new_tokens=new)).bytes for new in ([], NEW))
    hidden = 128
    assert planned.adapter - without.adapter == 4 * 3 * hidden
    assert planned.optimizer - without.optimizer == 8 * 3 * hidden
    assert planned.activations - without.activations >= 4 * 2048 * hidden, (
        "PEFT copies the table that it puts rows into"
    )


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (["<a>", "<a>"], "'<a>' is there twice"),
        ([" "], "is white space"),
        ([""], "at least 1 character"),
        (["the"], "'the' is a token of this tokenizer already"),
        (["<|im_end|>"], "is a special token of this tokenizer already"),
    ],
)
def test_what_is_no_new_token_is_refused(new: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words.replace("|", r"\|")):
        check_tokens(make_plan(recipe(tmp_path, new_tokens=new), for_training=False))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"new_tokens": [], "trained_tokens": ["<nothing>"]}, "'<nothing>' is no token of this tokenizer; list it in"),
        ({"new_tokens": ["<a>"], "trained_tokens": ["<a>"]}, "'<a>' is there twice"),
    ],
)
def test_what_is_no_token_of_the_base_is_refused(model: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        check_tokens(make_plan(recipe(tmp_path, **model), for_training=False))


def test_a_head_is_not_trained_beside_them() -> None:
    with pytest.raises(RecipeError, match="a head cannot be trained beside rows of tokens"):
        parse("model: {model_name_or_path: a/b, new_tokens: [<a>]}\ndata: {train: x.jsonl}\nmtp: {enabled: true}\n")


def test_tokens_that_no_example_has_are_refused(onecard: Run, tmp_path: Path) -> None:
    write_rows(tmp_path)
    path = tmp_path / "r.yaml"
    path.write_text(
        f"model: {{model_name_or_path: {MODEL}, new_tokens: [<odd>]}}\ndata: {{train: {tmp_path}/train.jsonl}}\n"
        f"training: {{output_dir: {tmp_path}/run, use_cpu: true}}\n"
    )
    status, _, err = onecard("train", path)
    assert status == 3
    assert "model.new_tokens: none of '<odd>' is in a training example" in err


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("qwen3_moe", ""),
        ("gpt_oss", ""),
        ("muse_spark", "a forward of its own"),
        ("gemma4_text", "a row for each token"),
    ],
)
def test_a_family_takes_them_or_is_refused_by_name(family: str, words: str, tmp_path: Path) -> None:
    found = judge(family, tmp_path)
    assert found.passes, str(found)
    assert words in found.refused
    assert bool(found.refused) == bool(words)
