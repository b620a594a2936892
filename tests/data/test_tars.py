"""Webdataset tars: samples by webdataset's rule, damage named and never silent."""

import functools
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vqt2i.data.sources import Item, Rejection
from vqt2i.data.tars import expand, tar_items


def write_tar(path: Path, files: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(key: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", key.encode() * 200), (f"{key}.txt", b"a cat"), (f"{key}.zh.txt", "猫".encode())]


def read(*urls: str | Path, split: str | None = None) -> tuple[list[Item], list[Rejection]]:
    entries = list(tar_items(expand(map(str, urls)), language="en", split=split))
    return [e for e in entries if isinstance(e, Item)], [e for e in entries if isinstance(e, Rejection)]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_members_with_one_stem_are_one_sample(tmp_path: Path) -> None:
    texts = [("a/1.txt", b"one\ntwo"), ("a/1.zh.txt", b"z")]
    files = [("a/1.PNG", b"P"), *texts, ("a/1.json", b'{"k": [1]}'), ("b.jpg", b"J")]
    items, rejections = read(write_tar(tmp_path / "x.tar", files), split="val")
    assert not rejections
    assert items == [
        Item(f"{tmp_path}/x.tar a/1", "a/1", b"P", {"en": [b"one\ntwo"], "zh": [b"z"]}, {"k": [1]}, "val"),
        Item(f"{tmp_path}/x.tar b", "b", b"J", {}, {}, "val"),
    ]


def test_patterns_expand_in_order(tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / f"x-{i:02d}.tar", sample(f"k{i}"))
    items, _ = read(tmp_path / "x-{00..02}.tar")
    assert [item.key for item in items] == ["k0", "k1", "k2"]


def test_a_compressed_tar_reads_the_same(tmp_path: Path) -> None:
    plain = read(write_tar(tmp_path / "x.tar", sample("a") + sample("b")))[0]
    packed = read(write_tar(tmp_path / "x.tar.gz", sample("a") + sample("b"), "w:gz"))[0]
    assert [(i.key, i.image, i.captions) for i in plain] == [(i.key, i.image, i.captions) for i in packed]


def test_http_gives_the_same_samples(tmp_path: Path, server: str) -> None:
    for i in range(2):
        write_tar(tmp_path / f"x-{i}.tar", sample(f"k{i}"))
    local, over_http = read(tmp_path / "x-{0..1}.tar")[0], read(server + "/x-{0..1}.tar")[0]
    assert [(i.key, i.image, i.captions) for i in local] == [(i.key, i.image, i.captions) for i in over_http]


def test_a_missing_tar_is_named_and_the_others_are_read(tmp_path: Path, server: str) -> None:
    write_tar(tmp_path / "x.tar", sample("a"))
    missing = [str(tmp_path / "absent.tar"), f"{server}/absent.tar", "http://127.0.0.1:9/x.tar", "s3://bucket/x.tar"]
    items, rejections = read(*missing, tmp_path / "x.tar")
    assert [item.key for item in items] == ["a"]
    assert [(r.name, r.reason) for r in rejections] == [(url, "shard cannot be opened") for url in missing]


def test_no_address_starts_a_program(tmp_path: Path) -> None:
    _, rejections = read(f"pipe:touch {tmp_path}/made")
    assert len(rejections) == 1 and not (tmp_path / "made").exists()


def test_a_tar_cut_anywhere_keeps_what_came_before_and_is_named(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "x.tar", sample("a") + sample("b") + sample("c")).read_bytes()
    data = whole.rstrip(b"\0")
    for n_bytes in range(0, len(data) + 1, 256):
        (tmp_path / "cut.tar").write_bytes(whole[:n_bytes])
        items, rejections = read(tmp_path / "cut.tar")
        # a picture of 200 bytes and its two texts take two blocks each
        whole_samples = ["a", "b", "c"][: n_bytes // (6 * 512)]
        assert [item.key for item in items][: len(whole_samples)] == whole_samples
        assert [(r.name, r.reason) for r in rejections] == [(f"{tmp_path}/cut.tar", "damaged shard")]


def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", sample("a") + sample("b") + sample("c"))
    content = bytearray(path.read_bytes())
    content[6 * 512 : 6 * 512 + 100] = b"\xff" * 100  # the header of b.jpg
    path.write_bytes(content)
    items, rejections = read(path)
    assert [item.key for item in items] == ["a"]
    assert rejections[0].reason == "damaged shard" and "after 3 members" in rejections[0].detail


@pytest.mark.parametrize("content", [b"", b"<html>no</html>" * 100, b"\0" * 100])
def test_what_is_no_tar_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    items, rejections = read(tmp_path / "x.tar")
    assert not items and [r.reason for r in rejections] == ["damaged shard"]


def test_a_cut_compressed_tar_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar.gz", sample("a") + sample("b"), "w:gz")
    path.write_bytes(path.read_bytes()[:-30])
    assert [r.reason for r in read(path)[1]] == ["damaged shard"]


def test_members_that_make_no_sample_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        link = tarfile.TarInfo("a/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(folder)
        tar.addfile(link)
        for name in ("README", "only.txt"):
            tar.addfile(tarfile.TarInfo(name))
    items, rejections = read(path)
    assert not items
    assert [(r.name.rpartition(" ")[2], r.reason) for r in rejections] == [
        ("a/link.jpg", "unusable member"), ("README", "unusable member"), ("only", "missing image"),
    ]  # fmt: skip


def test_unused_and_damaged_side_files_are_told(tmp_path: Path) -> None:
    files = [("a.jpg", b"J"), ("a.cls", b"3"), ("a.json", b"{"), ("b.png", b"P"), ("b.json", b"[1]")]
    items, _ = read(write_tar(tmp_path / "x.tar", files))
    assert [(item.notes, item.meta) for item in items] == [
        (("unused member .cls", "json damaged: left out"), {}),
        ((), {"json": [1]}),
    ]


def test_a_repeated_key_in_a_tar_is_two_samples(tmp_path: Path) -> None:
    items, _ = read(write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("a.jpg", b"2")]))
    assert [item.image for item in items] == [b"1", b"2"]
