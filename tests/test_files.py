import os
from pathlib import Path

import pytest

from vqt2i.errors import UserError
from vqt2i.files import new_folder, sha256_of_file, sha256_of_parts, write_atomic, write_json


class StopError(Exception):
    pass


def test_write_atomic_makes_parents_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, "红")
    assert path.read_bytes() == "红".encode()
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(path.parent) == ["file"]


def test_a_failed_write_keeps_the_old_content_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_json_is_readable_utf8(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"prompt": "红色"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "prompt": "红色"\n}\n'


def test_a_folder_appears_only_when_its_block_ends_well(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert os.listdir(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep" / "out" / "a").read_text() == "1"


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_a_folder_leaves_nothing_after_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        raise error
    assert os.listdir(tmp_path) == []


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    with pytest.raises(StopError), new_folder(out, replace=True) as folder:
        (folder / "new").write_text("2")
        raise StopError
    assert os.listdir(out) == ["old"]
    with new_folder(out, replace=True) as folder:
        (folder / "new").write_text("2")
    assert os.listdir(out) == ["new"] and os.listdir(tmp_path) == ["out"]


def test_a_folder_that_is_not_empty_and_a_file_are_refused_and_an_empty_one_taken(tmp_path: Path) -> None:
    full, empty, file = tmp_path / "full", tmp_path / "empty", tmp_path / "file"
    full.mkdir()
    (full / "a").write_text("1")
    empty.mkdir()
    file.write_text("1")
    for taken in (full, file):
        with pytest.raises(UserError, match="exists already"), new_folder(taken):
            pytest.fail("the block must not run")
    with new_folder(empty) as folder:
        (folder / "b").write_text("2")
    assert os.listdir(empty) == ["b"]
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "full"]


def test_hashes_are_sha256_and_lists_of_parts_do_not_collide(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "a").startswith("ba7816bf8f01cfea")
    assert sha256_of_parts("ab", "c") != sha256_of_parts("a", "bc") != sha256_of_parts("abc")
    assert sha256_of_parts("红") == sha256_of_parts("红".encode())
