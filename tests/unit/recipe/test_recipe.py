"""The recipe: YAML 1.2, overrides, aliases, paths, and one line with file:line for whatever is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from toolkit.errors import RecipeError
from toolkit.recipe import ALIASES, Effect, Recipe, TrainSource, changes, dump, flat, load, parse, starter

BASE = "model: {model_name_or_path: a/b}\ndata: {train: rows.jsonl}\n"


def test_numbers_are_yaml_1_2() -> None:
    recipe = parse(BASE + "training: {learning_rate: 1e-4, warmup_steps: .5, max_length: 0x10}")
    assert recipe.training.learning_rate == 1e-4
    assert recipe.training.warmup_steps == 0.5
    assert recipe.training.max_length == 16
    with pytest.raises(RecipeError, match=r"recipe:3: training\.packing"):
        parse(BASE + "training: {packing: yes}")


def test_overrides_replace_and_add_and_are_yaml() -> None:
    recipe = parse(BASE, overrides=["training.learning_rate=3e-3", "lora.target_modules=[q_proj, k_proj]", "lora.r=4"])
    assert recipe.training.learning_rate == 3e-3
    assert recipe.lora.target_modules == ["q_proj", "k_proj"]
    assert recipe.lora.r == 4
    assert parse(BASE, overrides=["data.train=other.jsonl"]).data.train == "other.jsonl"


@pytest.mark.parametrize("override", ["lora.use_dora=true", "training.optim=schedule_free_adamw"])
def test_a_section_that_only_overrides_fill_is_placed_on_the_command_line(override: str) -> None:
    with pytest.raises(RecipeError, match=r"^command line: "):
        parse(BASE, overrides=[override])


@pytest.mark.parametrize("override", ["training.learning_rate", "=3", ".r=3", "model.a.b=2"])
def test_an_override_that_is_none_is_refused(override: str) -> None:
    with pytest.raises(RecipeError):
        parse(BASE, overrides=[override])


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_leads_to_a_field_and_says_so(alias: str) -> None:
    section, field = ALIASES[alias].split(".")
    assert field in Recipe.model_fields[section].annotation.model_fields  # type: ignore[union-attr]


def test_aliases_work_flat_and_in_sections() -> None:
    notes: list[str] = []
    text = "base_model: a/b\ndatas: {}\n"
    with pytest.raises(RecipeError, match="datas: unknown key; did you mean data"):
        parse(text)
    recipe = parse(
        "base_model: a/b\nsequence_len: 512\ndata:\n  train: x\n  val_set_size: 0.1\n  train_on_inputs: true\n"
        "training: {micro_batch_size: 2, num_epochs: 3}\nlora_r: 8",
        note=notes.append,
    )
    assert recipe.model.model_name_or_path == "a/b"
    assert (recipe.training.max_length, recipe.training.per_device_train_batch_size) == (512, 2)
    assert recipe.data.validation_size == 0.1
    assert recipe.data.assistant_only_loss is False
    assert recipe.lora.r == 8
    assert len(notes) == 7
    assert "recipe:2: sequence_len is called training.max_length here" in notes


def test_alias_and_name_together_are_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"recipe:3: num_epochs: means training\.num_train_epochs, which is given too"
    ):
        parse(BASE + "training: {num_train_epochs: 1, num_epochs: 2}")


WRONG = {
    "": "recipe: empty",
    "[]": "recipe:1: a recipe is a mapping",
    BASE + "trainin: {}": "recipe:3: trainin: unknown key; did you mean training?",
    BASE
    + "training:\n  learning_rat: 1": r"recipe:4: training\.learning_rat: unknown key; did you mean learning_rate?",
    BASE
    + "training:\n  learning_rate: fast": r"recipe:4: training\.learning_rate: should be a valid number \(got 'fast'",
    BASE + "lora:\n  r: 0": r"recipe:4: lora\.r: should be greater than or equal to 1; or should be 'auto' \(got 0\)",
    BASE + "lora:\n  r: true": r"recipe:4: lora\.r: should be a valid integer",
    BASE + "lora:\n  r: 1\n  r: 2": "recipe:5: r: given twice",
    BASE + "lora: {target_modules: 3}": r"recipe:3: lora\.target_modules:",
    BASE + "learning_rate: 1": r"recipe:3: learning_rate: belongs in a section: write it as training\.learning_rate",
    BASE + "training: 5": "recipe:3: training: should be a valid dictionary",
    BASE + "lora: {lora_dropout: 0.1}": "recipe:3: lora: lora_dropout must be 0",
    BASE + "lora: {experts: false, router: false, target_modules: none}": "nothing would be trained",
    BASE + "a: &x 1\nb: *x": r"YAML aliases \(\*name\)",
    BASE + "training: {a: [1, 2": "not valid YAML",
    BASE + "model:\n  trust_remote_code: true": "model: given twice",
    "model: {trust_remote_code: true, model_name_or_path: a}\ndata: {train: b}": "it is always off",
    "model: {model_name_or_path: a}": "recipe: data: required and missing",
    "model: {model_name_or_path: a}\ndata: {}": r"recipe:2: data\.train: required and missing",
    BASE + "hub: {push_to_hub: true}": "push_to_hub needs hub_model_id",
    BASE + "hub: {hub_token: hf_abc}": "never write a token into a recipe",
    BASE + "hub: {hub_token: '${NOT_SET_HERE}'}": "environment variable NOT_SET_HERE is not set",
    BASE + "tracking: {run_name: '${HOME}'}": "environment variables are read in the hub section only",
    BASE + "1: 2": "a key must be a string",
    BASE + "lora: {rank_pattern: {experts: 0}}": r"recipe:3: lora\.rank_pattern: should be greater than or equal to 1",
    "model: {model_name_or_path: a}\ndata: {train: b, validation: c, validation_size: 3}": "exclude each other",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_recipes_get_one_line_with_the_place(text: str) -> None:
    with pytest.raises(RecipeError, match=WRONG[text]) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=200))
def test_no_text_makes_anything_but_a_recipe_error(text: str) -> None:
    message = ""
    try:
        parse(text)
    except RecipeError as error:
        message = str(error)
    assert "\n" not in message


def test_ampersands_and_stars_in_text_are_text() -> None:
    assert parse(BASE.replace("}", ", system_prompt: a &b *c}", 2).replace("a/b, system_prompt: a &b *c", "a/b"))


def test_token_comes_from_the_environment_and_is_never_dumped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret")
    recipe = parse(BASE + "hub: {hub_token: '${MY_TOKEN}'}")
    assert recipe.hub.hub_token == "secret"
    assert "secret" not in dump(recipe)


def test_what_is_dumped_is_read_back_the_same() -> None:
    recipe = parse(
        BASE + "lora: {rank_pattern: {experts: 4}, target_modules: [q_proj]}\ntraining: {learning_rate: 1e-5}"
    )
    assert parse(dump(recipe)) == recipe


def test_a_recipe_cannot_be_changed() -> None:
    recipe = parse(BASE)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.training.learning_rate = 1.0  # type: ignore[misc]


def test_local_paths_are_found_from_here_or_from_the_recipes_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes" / "base").mkdir(parents=True)
    (tmp_path / "rows.jsonl").touch()
    recipe = tmp_path / "recipes" / "r.yaml"
    recipe.write_text("model: {model_name_or_path: ./base}\ndata: {train: rows.jsonl, validation: owner/name}\n")
    monkeypatch.chdir(tmp_path)
    found = load(recipe)
    assert found.model.model_name_or_path == str(tmp_path / "recipes" / "base")
    assert found.data.train == str(tmp_path / "rows.jsonl")
    assert found.data.validation == "owner/name"


SEVERAL = """\
model: {model_name_or_path: ./base}
data:
  train:
    - rows.jsonl
    - path: more.jsonl
      weight: 2
      columns: {prompt: question}
    - {path: owner/name, split: train_sft, max_samples: 10}
"""


def test_several_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rows.jsonl", "more.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "r.yaml").write_text(SEVERAL)
    recipe = load(tmp_path / "r.yaml")
    assert isinstance(recipe.data.train, list)
    assert [each.path for each in recipe.data.train] == [
        *(str(tmp_path / name) for name in ("rows.jsonl", "more.jsonl")),
        "owner/name",
    ]
    assert [each.weight for each in recipe.data.train] == [1, 2, 1]
    assert recipe.data.train[1].columns == {"prompt": "question"}
    assert parse(dump(recipe)) == recipe
    assert parse("base_model: a\ndatasets: [{path: x}]").data.train == [TrainSource(path="x")]
    assert parse(SEVERAL, overrides=["data.train=other.jsonl"]).data.train == "other.jsonl"
    found = changes(flat(parse(SEVERAL)), flat(parse(SEVERAL.replace("weight: 2", "weight: 3"))))
    assert [(change.field, change.effect) for change in found] == [("data.train", Effect.CONTENT)]


@pytest.mark.parametrize(
    ("written", "replaced", "said"),
    [
        ("weight: 2", "wieght: 2", r"r.yaml:6: data\.train\[1\]\.wieght: unknown key; did you mean weight\?"),
        ("weight: 2", "weight: 0", r"r.yaml:6: data\.train\[1\]\.weight: should be greater than 0 \(got 0\)"),
        ("path: more.jsonl", "format: text", r"r.yaml:5: data\.train\[1\]\.path: required and missing"),
        ("max_samples: 10", "max_samples: ten", r"r.yaml:8: data\.train\[2\]\.max_samples: should be a valid integer"),
        ("- rows.jsonl", "- 3", r"r.yaml:4: data\.train\[0\]: a data set is a name, or an item with a path, not 3"),
    ],
)
def test_an_item_of_data_train_is_held_to_its_fields(written: str, replaced: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse(SEVERAL.replace(written, replaced), "r.yaml")


def test_a_missing_recipe_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").touch()
    with pytest.raises(RecipeError, match=r"quickstar\.yaml: no such recipe; did you mean quickstart\.yaml"):
        load(tmp_path / "quickstar.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path)


def test_the_starter_parses_and_shows_every_field() -> None:
    text = starter("mine.yaml")
    assert parse(text).lora.r == 16
    everything = "\n".join(line.replace("# ", "", 1) if _is_field(line) else line for line in text.splitlines())
    recipe = parse("\n".join(line for line in everything.splitlines() if not line.lstrip().startswith("#")))
    assert recipe.training == parse(text).training
    for section, field in Recipe.model_fields.items():
        assert f"{section}:" in text
        assert all(f"{key}:" in text for key in field.annotation.model_fields)  # type: ignore[union-attr]


def _is_field(line: str) -> bool:
    key, colon, _ = line.lstrip().removeprefix("# ").partition(":")
    names = {*Recipe.model_fields}.union(*(f.annotation.model_fields for f in Recipe.model_fields.values()))  # type: ignore[union-attr]
    return bool(colon) and key in names and line.lstrip().startswith("#")


def test_the_schema_documents_every_field() -> None:
    schema = Recipe.model_json_schema()
    for definition in schema["$defs"].values():
        for name, field in definition["properties"].items():
            assert field.get("description"), name
    json.dumps(schema)
