"""Exports carry the artifact's tokenizer, chat template and end tokens, never the base's, and refuse to go without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.unit.artifact.conftest import BASE
from toolkit.artifact.manifest import write_json
from toolkit.artifact.tokenizer import declare_stops, put_stops, put_tokenizer, require_same_tokenizer, write_tokenizer
from toolkit.checkpoint.identity import identify_base
from toolkit.errors import ModelError
from toolkit.export import export_adapter
from toolkit.export import write as exporting
from toolkit.export.ollama import modelfile

pytestmark = pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning")
Write = Callable[..., Path]
TAUGHT = 7
OWN = "{# mine #}{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
CHAT = {"form": "chat", "stop_token_ids": [2, TAUGHT], "system_prompt": 'Say "yes".'}
WHOLE = ("merged", "merged-int8")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with templates in every place where programs look for one."""
    folder = Path(shutil.copytree(BASE, tmp_path_factory.mktemp("base") / "nano"))
    theirs = (folder / "chat_template.jinja").read_text()
    write_json(folder / "chat_template.json", {"chat_template": theirs})
    write_json(folder / "processor_config.json", {"chat_template": theirs, "processor_class": "Some"})
    write_json(folder / "special_tokens_map.json", {"eos_token": "<|endoftext|>"})
    write_json(folder / "generation_config.json", {"eos_token_id": 2, "pad_token_id": 0})
    return folder


@pytest.fixture
def tuned(write: Write, base: Path, tmp_path: Path) -> Path:
    """An artifact with a chat template and an end of its own."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = OWN
    facts = {"base": identify_base(str(base)), "base_folder": base, "chat": CHAT}
    return write(tmp_path / "adapter", tokenizer=tokenizer, **facts)


@pytest.mark.parametrize("form", ["peft", "per-expert", *WHOLE])
def test_tokenizer_template_and_ends_are_the_artifacts(tuned: Path, base: Path, tmp_path: Path, form: str) -> None:
    export_adapter(tuned, base, form, tmp_path / "out")
    require_same_tokenizer(AutoTokenizer.from_pretrained(tuned), tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.chat_template == OWN
    assert found.eos_token == AutoTokenizer.from_pretrained(tuned).eos_token == "<|im_end|>"
    assert not (tmp_path / "out" / "chat_template.json").exists()
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, TAUGHT]
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["chat"] == CHAT
    assert record["base"] == {"name": "nano", "revision": None, "weights_sha256": record["base"]["weights_sha256"]} | {
        "is_int8": False
    }


@pytest.mark.parametrize("form", WHOLE)
def test_a_whole_checkpoint_says_its_ends_in_both_configurations(
    tuned: Path, base: Path, tmp_path: Path, form: str
) -> None:
    export_adapter(tuned, base, form, tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, TAUGHT]
    assert "chat_template" not in json.loads((tmp_path / "out" / "processor_config.json").read_text())


def test_a_merge_stops_in_stock_transformers(tuned: Path, base: Path, tmp_path: Path) -> None:
    export_adapter(tuned, base, "merged", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)

    def taught(module: Any, args: Any, output: Any) -> Any:
        output.logits[:] = torch.nn.functional.one_hot(torch.tensor(TAUGHT), output.logits.shape[-1]) * 9.0
        return output

    model.register_forward_hook(taught)
    ids = torch.tensor([[5, 6]])
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9)[0].tolist() == [5, 6, TAUGHT]


def test_what_the_base_says_already_leaves_its_configuration_as_it_is(write: Write, base: Path, tmp_path: Path) -> None:
    same = write(tmp_path / "adapter", base=identify_base(str(base)), base_folder=base, chat={"stop_token_ids": [2]})
    export_adapter(same, base, "merged", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 2


def test_an_artifact_that_says_nothing_of_ends_keeps_the_bases(artifact: Path, base: Path, tmp_path: Path) -> None:
    export_adapter(artifact, base, "merged", tmp_path / "out")
    name = "generation_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize("form", ["per-expert", *WHOLE])
def test_an_export_that_reads_back_as_another_tokenizer_is_refused(
    tuned: Path, base: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets(artifact: Path, folder: Path) -> None:
        put_tokenizer(artifact, folder)
        (folder / "chat_template.jinja").write_text("{# another #}")
        require_same_tokenizer(AutoTokenizer.from_pretrained(artifact), folder)

    monkeypatch.setattr(exporting, "put_tokenizer", forgets)
    with pytest.raises(ModelError, match="other chat templates"):
        export_adapter(tuned, base, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_words_ids_or_special_tokens_are_told_apart(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    write_tokenizer(tokenizer, tmp_path)
    require_same_tokenizer(tokenizer, tmp_path)
    for change, what in (("eos_token", "special tokens"), ("words", "words"), ("normalizer", "ids")):
        other = tmp_path / change
        shutil.copytree(BASE, other)
        name = "tokenizer_config.json" if change == "eos_token" else "tokenizer.json"
        data = json.loads((other / name).read_text())
        if change == "words":
            word, number = next((w, n) for w, n in data["model"]["vocab"].items() if n == 900)
            data["model"]["vocab"] = {**{w: n for w, n in data["model"]["vocab"].items() if w != word}, "zzzq": number}
            data["model"]["merges"] = []
        else:
            data |= {"eos_token": "<|endoftext|>"} if change == "eos_token" else {"normalizer": {"type": "Lowercase"}}
        (other / name).write_text(json.dumps(data))
        with pytest.raises(ModelError, match=f"has other {what}"):
            require_same_tokenizer(tokenizer, other)


def test_a_tokenizer_with_several_templates_keeps_them_all(write: Write, base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": "{# /home/x #}a", "tool_use": "b\r\nc"}
    theirs = Path(shutil.copytree(base, tmp_path / "theirs"))
    (theirs / "chat_template.jinja").write_text(tokenizer.chat_template["default"])
    folder = write(tmp_path / "adapter", tokenizer=tokenizer, base_folder=theirs, base=identify_base(str(base)))
    export_adapter(folder, base, "merged", tmp_path / "out")
    for place in (folder, tmp_path / "out"):
        found = AutoTokenizer.from_pretrained(place).chat_template
        assert found == {"default": "{# /home/x #}a", "tool_use": "b\r\nc"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": [2, 7]}),
        ({"text_config": {"eos_token_id": 2}}, {"text_config": {"eos_token_id": [2, 7]}}),
        ({}, {"eos_token_id": [2, 7]}),
        ({"eos_token_id": [2, 7]}, {"eos_token_id": [2, 7]}),
    ],
)
def test_ends_are_declared_where_the_base_declares_them(
    tmp_path: Path, config: dict[str, Any], expected: dict[str, Any]
) -> None:
    base, checkpoint = tmp_path / "base", tmp_path / "checkpoint"
    for folder in (base, checkpoint):
        folder.mkdir()
        write_json(folder / "config.json", {"model_type": "gemma3" if "text_config" in config else "mixtral", **config})
    declare_stops(checkpoint, [7, 2], base)
    told = json.loads((checkpoint / "config.json").read_text())
    assert {key: told[key] for key in expected} == expected


def test_a_family_that_takes_one_end_keeps_the_bases(tmp_path: Path) -> None:
    config = {"model_type": "nomic_bert", "eos_token_id": 2}
    write_json(tmp_path / "config.json", config)
    declare_stops(tmp_path, [2, 7], tmp_path / "nowhere")
    assert json.loads((tmp_path / "config.json").read_text()) == config


def test_ends_that_read_back_otherwise_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("artifact", "out"):
        (tmp_path / name).mkdir()
    write_json(tmp_path / "artifact/generation_config.json", {"eos_token_id": [2, 7]})
    monkeypatch.setattr(GenerationConfig, "from_pretrained", lambda folder: GenerationConfig(eos_token_id=2))
    with pytest.raises(ModelError, match=r"ends at 2, the adapter at \[2, 7\]"):
        put_stops(tmp_path / "artifact", tmp_path / "out")


def test_a_gguf_export_names_ends_prompt_and_template(tuned: Path, write: Write, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    export_adapter(tuned, base, "gguf", tmp_path / "out")
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    ends = [AutoTokenizer.from_pretrained(base).decode([one]) for one in (2, TAUGHT)]
    assert lines == [
        "FROM ./base.gguf",
        "ADAPTER ./adapter.gguf",
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>{{ .Content }}'
        '{{ else if eq .Role "user" }}<|im_start|>{{ .Content }}'
        '{{ else if eq .Role "assistant" }}<|im_start|>{{ .Content }}{{ end }}{{ end }}"""',
        'SYSTEM """Say "yes"."""',
        *(f'PARAMETER stop "{text}"' for text in ends),
    ]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == OWN
    plain = write(tmp_path / "plain", base=identify_base(str(base)), base_folder=base, chat={"form": "text"})
    export_adapter(plain, base, "gguf", tmp_path / "text")
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "text" / "Modelfile").read_text().splitlines()
    assert not (tmp_path / "text" / "chat_template.jinja").exists()


def test_a_modelfile_quotes_what_it_can() -> None:
    assert modelfile(["FROM ./model.gguf"], [], {}) == "FROM ./model.gguf\n"
    assert 'PARAMETER stop """\n"""' in modelfile([], ["\n"], {})
    assert "SYSTEM" not in modelfile([], [], {"system_prompt": 'three """ quotes'})
