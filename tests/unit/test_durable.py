"""Staged folders and files: whole or not at all, one writer, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

import toolkit.durable
from toolkit.durable import staged_folder, write_text
from toolkit.errors import RecipeError, ResourceError


def fill(folder: Path, text: str) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text(text)


def fail_while_writing(target: Path) -> None:
    with staged_folder(target, replace=True) as staging:
        fill(staging, "new")
        raise KeyError


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a" / "target"
    with staged_folder(target) as staging:
        fill(staging, "new")
        assert not target.exists()
    assert (target / "inner" / "file").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_failed_block_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with staged_folder(target) as staging:
        fill(staging, "old")
    with pytest.raises(KeyError):
        fail_while_writing(target)
    assert (target / "inner" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("atomic", [True, False])
def test_replacing_leaves_only_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atomic: bool) -> None:
    if not atomic:  # a C library without renameat2
        monkeypatch.setattr(toolkit.durable.ctypes, "CDLL", lambda name: object())
    target = tmp_path / "target"
    for text in ("old", "new"):
        with staged_folder(target, replace=True) as staging:
            fill(staging, text)
    assert (target / "inner" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    fill(_made(tmp_path / ".target.partial"), "left")
    with staged_folder(tmp_path / "target") as staging:
        assert not list(staging.iterdir())


def test_a_replacement_cut_short_is_undone(tmp_path: Path) -> None:
    fill(_made(tmp_path / ".target.old"), "old")
    with pytest.raises(KeyError):
        fail_while_writing(tmp_path / "target")
    assert (tmp_path / "target" / "inner" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_two_writers_and_a_folder_made_meanwhile_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with staged_folder(target), pytest.raises(ResourceError, match="another onecard"), staged_folder(target):
        pass
    with pytest.raises(RecipeError, match="meanwhile"), staged_folder(tmp_path / "late"):
        _made(tmp_path / "late")


def test_text_replaces_text(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_text(tmp_path / "file", text)
    assert (tmp_path / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
