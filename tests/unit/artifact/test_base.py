"""`identify_base`: a name that is no path, the commit, and a hash that only the weights decide."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer

from tests.unit.artifact.conftest import BASE
from toolkit.artifact import require_packageable
from toolkit.checkpoint.identity import files_of, identify_base, license_of
from toolkit.errors import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_local_folder_has_a_name_and_no_revision(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "nano")
    identity, original = identify_base(str(tmp_path / "nano")), identify_base(str(BASE))
    assert (identity.name, identity.revision) == ("nano", None)
    assert identity.weights_sha256 == original.weights_sha256
    (tmp_path / "nano" / "config.json").write_text("{}")
    (tmp_path / "nano" / "extra.safetensors").write_bytes(b"not loaded by transformers")
    assert identify_base(f"{tmp_path}/nano/.") == identity
    with (tmp_path / "nano" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert identify_base(str(tmp_path / "nano")).weights_sha256 != identity.weights_sha256


def test_shards_come_from_the_index(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}))
    lines = [f"{n} {hashlib.sha256(n.encode()).hexdigest()}\n" for n in ("a.safetensors", "b.safetensors")]
    assert identify_base(str(tmp_path)).weights_sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize(
    "index",
    ["[]", "{", '{"weight_map": {"x": "../secret"}}', '{"weight_map": {"x": "gone"}}', '{"weight_map": {"x": 1}}'],
)
def test_a_bad_index_is_one_line(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError) as caught:
        identify_base(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_licence_is_read_off_the_bases_card(tmp_path: Path) -> None:
    assert license_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("# No metadata\n")
    assert license_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
    assert license_of(str(tmp_path)) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert license_of(str(tmp_path)) is None
    assert license_of("owner/never-cached") is None


def test_no_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        identify_base(str(tmp_path))


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with one model, its weights a link to a blob named by its SHA-256."""
    repository = tmp_path / "models--owner--nano"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    content = b"weights"
    blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    (snapshot / "model.safetensors").symlink_to(blob)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return snapshot


def test_a_cached_repository_has_its_commit(snapshot: Path, tmp_path: Path) -> None:
    by_name = identify_base("owner/nano")
    assert (by_name.name, by_name.revision) == ("owner/nano", COMMIT)
    assert identify_base("owner/nano", COMMIT) == identify_base(str(snapshot)) == by_name
    copy = tmp_path / "copy"
    shutil.copytree(snapshot, copy)
    assert identify_base(str(copy)).weights_sha256 == by_name.weights_sha256


@pytest.mark.parametrize("name", ["owner/absent", "a/b/c", "no such folder"])
def test_what_is_not_here_is_refused(snapshot: Path, name: str) -> None:
    with pytest.raises(ModelError, match="neither a folder nor in the Hub cache"):
        identify_base(name)


def test_the_files_of_a_base_are_where_it_lies(snapshot: Path, tmp_path: Path) -> None:
    assert files_of("owner/nano") == files_of("owner/nano", COMMIT) == snapshot
    assert files_of(str(tmp_path)) == tmp_path
    assert files_of("owner/absent") is None
    assert files_of("no such folder") is None


def test_what_a_cached_base_says_is_no_find(snapshot: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BASE / name, snapshot / name)
    (snapshot / "chat_template.jinja").write_text("{# '/mnt/data' #}")
    tokenizer = AutoTokenizer.from_pretrained(snapshot)
    require_packageable(tokenizer, {}, files_of("owner/nano"))
    with pytest.raises(ModelError, match=r"this base: chat_template\.jinja holds the local path /mnt/data"):
        require_packageable(tokenizer, {})


def test_an_unknown_revision_is_refused(snapshot: Path) -> None:
    with pytest.raises(ModelError, match="owner/nano@v2"):
        identify_base("owner/nano", "v2")
