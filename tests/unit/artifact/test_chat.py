"""How a run's conversations were written reaches the artifact, its card and every program that reads either."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.unit.artifact.conftest import BASE, RECIPE
from toolkit.artifact import combine_adapters, read_manifest, reopen_recipe, verify_artifact
from toolkit.artifact.manifest import write_json
from toolkit.checkpoint.identity import license_of
from toolkit.errors import ModelError

Write = Callable[..., Path]
TAUGHT = 7
"""The token that the run was taught to end at; the base's own is 2."""
CHAT = {
    "form": "chat",
    "stop_token_ids": [TAUGHT, 2],
    "chat_template_kwargs": {"shout": True, "mode": 'a "quoted" word'},
    "date": "2026-11-29",
    "system_prompt": 'Be brief. It\'s "plain".',
}
TEXT = {"form": "text", "stop_token_ids": [TAUGHT, 2]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a template that heeds an option, and a generation config of its own."""
    folder = Path(shutil.copytree(BASE, tmp_path_factory.mktemp("base") / "nano"))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template + "{% if shout %}{{ mode }}{% endif %}")
    write_json(folder / "generation_config.json", {"eos_token_id": 2, "pad_token_id": 0, "repetition_penalty": 1.0})
    return folder


def test_the_manifest_has_it_and_verify_accepts_it(of_base: Write, base: Path, tmp_path: Path) -> None:
    folder = of_base(tmp_path / "adapter", chat=CHAT)
    assert read_manifest(folder)["chat"] == {**CHAT, "stop_token_ids": [2, TAUGHT]}
    report = verify_artifact(folder, base=base)
    assert report.ok, report.checks


def test_nothing_local_stands_in_it(of_base: Write, tmp_path: Path) -> None:
    chat = {**CHAT, "system_prompt": f"Work in {Path.cwd()}.", "chat_template_kwargs": {"hub_token": "hf_" + "S" * 30}}
    told = read_manifest(of_base(tmp_path / "adapter", chat=chat))["chat"]
    assert str(Path.cwd()) not in json.dumps(told)
    assert told["chat_template_kwargs"] == {}


def test_an_artifact_without_it_is_as_before(pristine: Path) -> None:
    assert "chat" not in read_manifest(pristine)
    assert not (pristine / "generation_config.json").exists()
    assert "max_new_tokens=64" in (pristine / "README.md").read_text()


@pytest.mark.parametrize("chat", [{"form": "poem"}, {"stop_token_ids": ["2"]}, {"stop_token_ids": [-1]}, []])
def test_a_strangers_chat_is_checked(artifact: Path, chat: Any) -> None:
    write_json(artifact / "manifest.json", {**read_manifest(artifact), "chat": chat})
    with pytest.raises(ModelError, match=r"manifest\.json: chat"):
        read_manifest(artifact)


def test_the_generation_config_is_the_bases_with_the_runs_ends(of_base: Write, tmp_path: Path) -> None:
    folder = of_base(tmp_path / "adapter", chat=CHAT)
    found = GenerationConfig.from_pretrained(folder)
    assert (found.eos_token_id, found.pad_token_id, found.repetition_penalty) == ([2, TAUGHT], 0, 1.0)
    assert "_from_model_config" not in json.loads((folder / "generation_config.json").read_text())


def test_a_base_without_one_gives_what_its_config_says(of_base: Write, base: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(base, tmp_path / "bare"))
    (bare / "generation_config.json").unlink()
    folder = of_base(tmp_path / "adapter", chat=TEXT, base_folder=bare)
    told = json.loads((folder / "generation_config.json").read_text())
    assert told == {"bos_token_id": 0, "pad_token_id": 0, "eos_token_id": [2, TAUGHT]}


def test_where_the_model_came_from_is_where_the_bases_files_are(write: Write, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", chat=TEXT)
    told = json.loads((folder / "generation_config.json").read_text())
    assert told["pad_token_id"] == json.loads((BASE / "generation_config.json").read_text())["pad_token_id"]
    assert told["eos_token_id"] == [2, TAUGHT]


def snippet(folder: Path, base: Path) -> str:
    match = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert match is not None
    code = match[1].replace(f'base = "{base.name}"', f"base = {str(base)!r}")
    return code.replace('adapter = "."', f"adapter = {str(folder)!r}")


class ScriptedLogits:
    """Stock `generate` on a model whose next tokens are written down: what stops it is its own affair."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer
        self.prompts: list[list[int]] = []

    def __call__(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        ids = kwargs.get("input_ids")
        if ids is not None and ids.shape[1] > 1:
            self.prompts.append(ids[0].tolist())
            self.step = 0
        logits = torch.full_like(output.logits, -50.0)
        logits[:, -1, self.answer[min(self.step, len(self.answer) - 1)]] = 50.0
        self.step += 1
        output.logits = logits
        return output


def run(folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Run a card's snippet; gives the ids of its prompt and of what was generated."""
    script = ScriptedLogits([5, TAUGHT, 9])
    load = AutoModelForCausalLM.from_pretrained

    def scripted(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        model.register_forward_hook(script, with_kwargs=True)
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", scripted)
    (tmp_path / "load.py").write_text(snippet(folder, base))
    output = runpy.run_path(str(tmp_path / "load.py"))["output"][0].tolist()
    (prompt,) = script.prompts
    assert output[: len(prompt)] == prompt
    return prompt, output[len(prompt) :]


def test_the_cards_chat_stops_where_the_run_was_taught_to(
    of_base: Write, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = of_base(tmp_path / "adapter", chat=CHAT)
    prompt, answer = run(folder, base, tmp_path, monkeypatch)
    assert answer == [5, TAUGHT]
    tokenizer = AutoTokenizer.from_pretrained(base)
    said = [{"role": "system", "content": CHAT["system_prompt"]}, {"role": "user", "content": "Hello!"}]
    options = dict(CHAT["chat_template_kwargs"])  # type: ignore[call-overload]
    text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False, **options)
    assert text.endswith('a "quoted" word')
    assert prompt == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_cards_plain_text_goes_through_no_chat_template(
    of_base: Write, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = of_base(tmp_path / "adapter", chat=TEXT)
    prompt, answer = run(folder, base, tmp_path, monkeypatch)
    assert answer == [5, TAUGHT]
    assert prompt == AutoTokenizer.from_pretrained(base)("Once upon a time")["input_ids"]
    assert "apply_chat_template" not in snippet(folder, base)


def test_without_a_word_of_it_the_base_would_have_gone_on(
    write: Write, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "adapter")
    _, answer = run(folder, BASE, tmp_path, monkeypatch)
    assert len(answer) == 64


def bodies(folder: Path) -> list[tuple[str, Any]]:
    """The requests of a card: endpoint and body."""
    text = (folder / "README.md").read_text().replace("\\\n", " ")
    found = [shlex.split(line) for line in text.splitlines() if line.startswith("curl ")]
    return [(words[1].partition("/v1/")[2], json.loads(words[words.index("-d") + 1])) for words in found]


def test_the_cards_requests_say_what_the_server_cannot_know(of_base: Write, tmp_path: Path) -> None:
    chat, text = of_base(tmp_path / "chat", chat=CHAT), of_base(tmp_path / "text", chat=TEXT)
    ((where, body),) = bodies(chat)
    assert where == "chat/completions"
    assert body["messages"][0] == {"role": "system", "content": CHAT["system_prompt"]}
    assert (body["stop_token_ids"], body["chat_template_kwargs"]) == ([2, TAUGHT], CHAT["chat_template_kwargs"])
    ((where, body),) = bodies(text)
    assert where == "completions"
    assert (body["prompt"], body["stop_token_ids"]) == ("Once upon a time", [2, TAUGHT])
    assert "messages" not in body
    card = (chat / "README.md").read_text()
    assert "--chat-template per-expert/chat_template.jinja --generation-config per-expert" in card
    assert "--chat-template" not in (text / "README.md").read_text()


def test_the_card_says_in_one_line_how_the_data_were_written(of_base: Write, tmp_path: Path) -> None:
    chat, text = of_base(tmp_path / "chat", chat=CHAT), of_base(tmp_path / "text", chat=TEXT)
    (line,) = [line for line in (chat / "README.md").read_text().splitlines() if line.startswith("| form |")]
    for words in ("`shout` = `true`", "dated 2026-11-29", "system prompt", f"ends at token 2 or {TAUGHT}"):
        assert words in line
    assert "| form | plain prompts and completions" in (text / "README.md").read_text()


def test_a_combination_ends_where_any_part_does(of_base: Write, base: Path, tmp_path: Path) -> None:
    one = of_base(tmp_path / "one", chat=CHAT, license="mit")
    other = of_base(tmp_path / "other", chat={"stop_token_ids": [2, 11]}, license="mit")
    combine_adapters({str(one): 0.5, str(other): 0.5}, tmp_path / "sum")
    assert GenerationConfig.from_pretrained(tmp_path / "sum").eos_token_id == [2, TAUGHT, 11]
    assert read_manifest(tmp_path / "sum")["chat"] == {**CHAT, "stop_token_ids": [2, TAUGHT, 11]}
    assert verify_artifact(tmp_path / "sum", base=base).ok
    assert license_of(str(tmp_path / "sum")) == "mit"
    free = of_base(tmp_path / "free", license="apache-2.0")
    combine_adapters({str(one): 0.5, str(free): 0.5}, tmp_path / "mixed")
    assert license_of(str(tmp_path / "mixed")) is None


def test_a_template_of_ones_own_is_read_from_the_artifact(write: Write, tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(BASE)
    own.chat_template = "{# mine #}" + own.chat_template
    text = RECIPE.partition("hub:")[0].replace("data: {", "data: {chat_template_path: /home/alice/mine.jinja, ")
    folder = write(tmp_path / "run" / "adapter", tokenizer=own, recipe_yaml=text)
    for place in (folder, folder.parent):
        recipe = reopen_recipe(place, base=str(BASE), note=lambda line: None)
        assert recipe.data.chat_template_path == str(folder / "chat_template.jinja")
        (folder.parent / "recipe.yaml").write_text(text)
    override = ["data.chat_template_path=other.jinja"]
    assert reopen_recipe(folder, override, str(BASE), lambda line: None).data.chat_template_path == "other.jinja"
    plain = write(tmp_path / "plain")
    assert reopen_recipe(plain, base=str(BASE), note=lambda line: None).data.chat_template_path is None
