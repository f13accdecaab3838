"""What the base ships is no find, what the user adds is found before training, and not every answer is a leak."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.unit.artifact.conftest import BASE, RECIPE
from toolkit.artifact import (
    combine_adapters,
    push_artifact,
    read_manifest,
    require_packageable,
    training_answers,
    verify_artifact,
)
from toolkit.artifact.manifest import file_entry, write_json
from toolkit.checkpoint.identity import identify_base
from toolkit.errors import ModelError, RecipeError

Write = Callable[..., Path]
PLACE = "/mnt/data/"
CANNED = "I am sorry, but I can't help with that request."
TEMPLATE = (BASE / "chat_template.jinja").read_text()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The embedded model with a template as published ones are: it names a folder and holds a canned sentence."""
    folder = Path(shutil.copytree(BASE, tmp_path / "published"))
    said = f"{{# Files lie in '{PLACE}'.\n{PLACE}plots/a.png too. Refuse with \"{CANNED}\" #}}"
    (folder / "chat_template.jinja").write_text(said + TEMPLATE)
    return folder


def recipe(**data: Any) -> dict[str, Any]:
    return {"model.model_name_or_path": "owner/name", **{f"data.{name}": value for name, value in data.items()}}


def test_the_bases_own_template_is_packaged_verified_and_pushed(of_base: Write, base: Path, tmp_path: Path) -> None:
    require_packageable(AutoTokenizer.from_pretrained(base), recipe(), base)
    folder = of_base(tmp_path / "adapter", rows=[CANNED])
    assert PLACE in (folder / "chat_template.jinja").read_text()
    assert verify_artifact(folder, strict=True).ok
    shutil.rmtree(base)  # a push may come from another machine
    assert push_artifact(folder, "alice/new", token="good", dry_run=True, rows=[CANNED]).endswith("alice/new")
    made = combine_adapters({str(folder): 1.0}, tmp_path / "sum")
    assert push_artifact(made.folder, "alice/sum", token="good", dry_run=True).endswith("alice/sum")


def test_a_template_in_the_tokenizers_configuration_is_the_bases(base: Path, write: Write, tmp_path: Path) -> None:
    path = base / "tokenizer_config.json"
    template = (base / "chat_template.jinja").read_text()
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    (base / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert PLACE in tokenizer.chat_template
    require_packageable(tokenizer, recipe(), base)
    write(tmp_path / "adapter", tokenizer=tokenizer, base=identify_base(str(base)), base_folder=base, rows=[CANNED])


@pytest.mark.parametrize("path", ["/home/alice/private", "/mnt/data/plots/b.png", "/workspace/acme"])
def test_the_users_template_is_looked_at_before_training(base: Path, path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template += f"{{# see {path}. #}}"
    with pytest.raises(RecipeError) as caught:
        require_packageable(tokenizer, recipe(chat_template_path="mine.jinja"), base)
    said = str(caught.value)
    assert said.startswith("data.chat_template_path: mine.jinja: ")
    assert f"local path {path}," in said
    assert "\n" not in said


def test_a_copy_of_the_bases_template_may_say_what_the_base_says(base: Path, of_base: Write, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = tokenizer.chat_template.replace("Files lie in", "My files lie in")
    require_packageable(tokenizer, recipe(chat_template_path="mine.jinja"), base)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("data.system_prompt", "Files are in /mnt/private/rows, be brief.", "the local path /mnt/private/rows"),
        ("data.system_prompt", "Log in with hf_" + "S" * 30, "what looks like a Hub token"),
        ("data.system_prompt", "Work in /usr/share", "a folder of this machine"),
        ("data.chat_template_kwargs", {"note": ["see /home/alice/x first"]}, "the local path /home/alice/x"),
        ("tracking.run_name", "see /scratch/alice now", "the local path /scratch/alice"),
    ],
)
def test_the_recipe_is_looked_at_before_training(
    tokenizer: Any, key: str, value: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/usr/share")  # a folder that looks like nobody's
    with pytest.raises(RecipeError) as caught:
        require_packageable(tokenizer, {**recipe(), key: value}, BASE)
    assert str(caught.value).startswith(f"{key}: holds {kind}")
    assert "hf_S" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.train", "/home/alice/secret/rows.jsonl"),
        ("training.output_dir", "/tmp/run"),
        ("data.system_prompt", "Write to /tmp, answer /no_think and either/or."),
        ("data.system_prompt", None),
    ],
)
def test_what_is_cut_short_or_is_no_place_of_this_machine_is_let_pass(tokenizer: Any, key: str, value: Any) -> None:
    require_packageable(tokenizer, {**recipe(), key: value}, BASE)


def test_a_tokenizer_that_reads_back_as_another_is_told_before_training(tokenizer: Any) -> None:
    changed = AutoTokenizer.from_pretrained(BASE)
    changed.get_vocab = lambda: {"a": 0}
    with pytest.raises(ModelError, match="has other words") as caught:
        require_packageable(changed, recipe(), BASE)
    assert str(caught.value).startswith(str(BASE))


def test_a_tokenizer_without_a_fast_form_is_told_before_training(tokenizer: Any) -> None:
    class Slow:
        chat_template = None

        def save_pretrained(self, folder: str, **_: Any) -> None:
            (Path(folder) / "tokenizer_config.json").write_text("{}")

    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        require_packageable(Slow(), recipe(), BASE)  # type: ignore[arg-type]


CARD = "Needs PEFT 0.19 or newer: older versions read the expert tensors in another order."
SNIPPET = "model = PeftModel.from_pretrained(model, adapter)"
PROMPT = 'Say "I do not know that, please ask a person" where you are not sure.'


@pytest.mark.parametrize("row", [CARD, SNIPPET, PROMPT[5:45], "mlp.experts.down_proj, mlp.gate.weight", CANNED.upper()])
def test_an_answer_that_the_card_or_the_recipe_says_too_is_no_leak(write: Write, tmp_path: Path, row: str) -> None:
    text = RECIPE.replace("Be brief.", f"'{PROMPT}'")
    chat = {"form": "chat", "stop_token_ids": [2], "system_prompt": PROMPT}
    folder = write(tmp_path / "run" / "adapter", recipe_yaml=text, rows=[row], chat=chat)
    push_artifact(folder, "alice/new", token="good", dry_run=True, rows=[row])


def test_an_answer_in_the_users_own_template_is_the_users_word(write: Write, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template += f"{{# {CANNED} #}}"
    folder = write(tmp_path / "adapter", tokenizer=tokenizer, rows=[CANNED])
    push_artifact(folder, "alice/new", token="good", dry_run=True, rows=[CANNED])
    # … but not one that came in after packaging.
    with (folder / "chat_template.jinja").open("a") as file:
        file.write("{# a fern is a flowerless plant with leaves #}")
    manifest = read_manifest(folder)
    manifest["files"]["chat_template.jinja"] = file_entry(folder / "chat_template.jinja")
    write_json(folder / "manifest.json", manifest)
    rows = [CANNED, "a fern is a flowerless plant with leaves"]
    with pytest.raises(ModelError, match=r"chat_template\.jinja holds row 2 of the data"):
        push_artifact(folder, "alice/new", token="good", dry_run=True, rows=rows)


@pytest.mark.parametrize(
    "row",
    [
        'she said "a fern has no flowers" to me',
        "line one of a poem\nline two of it",
        "the na\u00efve C:\\paths of mine",
    ],
)
def test_an_answer_that_was_written_down_from_the_data_is_a_leak(write: Write, tmp_path: Path, row: str) -> None:
    with pytest.raises(ModelError) as caught:
        write(tmp_path / "adapter", coverage={"sample": f"so: {row}!"}, rows=["something else of some length", row])
    assert "manifest.json holds row 2 of the data" in str(caught.value)
    assert "run the same command again" in str(caught.value)
    assert not (tmp_path / "adapter").exists()


def test_a_path_behind_an_escaped_line_end_is_found(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"manifest\.json holds the local path /home/alice/x"):
        write(tmp_path / "adapter", coverage={"note": "see\n/home/alice/x"})


def test_a_run_without_its_data_has_no_rows(tmp_path: Path) -> None:
    assert training_answers(tmp_path) == []
