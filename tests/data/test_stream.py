"""Streams: which samples they give, and what a server may do to them."""

import io
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from vqt2i.data.sampling import LaneSampler
from vqt2i.data.shards import encode_image
from vqt2i.data.stream import Stream, StreamConfig, read_shard
from vqt2i.errors import DataError
from vqt2i.training.batches import Batch, ImageSamples, training_loader

N_SHARDS = 6


def write_shard(path: Path, values: list[int], damaged: int | None = None) -> Path:
    """A tar of samples, each a picture of 4 px all of one value, named by it; one of them may be no picture."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for value in values:
            image = encode_image(np.full((4, 4, 3), value, np.uint8), "png")
            content = {"png": b"no picture" if value == damaged else image, "txt": f"number {value}".encode()}
            for suffix, data in content.items():
                info = tarfile.TarInfo(f"{value:03d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Six shards of five samples each, with values 0 to 29."""
    for shard in range(N_SHARDS):
        write_shard(tmp_path / f"x-{shard}.tar", list(range(5 * shard, 5 * shard + 5)))
    return tmp_path


def config_of(place: object, **more: object) -> StreamConfig:
    """Of the shards in a folder or on a server, two shuffled together."""
    values = {"urls": f"{place}/x-{{0..{N_SHARDS - 1}}}.tar", "samples_per_shard": 5, "shuffled_shards": 2}
    return StreamConfig(**values | {"attempts": 3, "first_wait_s": 0.01} | more)


def values_of(stream: Stream, positions: range) -> list[int]:
    pairs = [stream[position] for position in positions]
    assert all(pair.captions == {"en": (f"number {pair.image_HW3[0, 0, 0]}",)} for pair in pairs)
    return [int(pair.key) for pair in pairs]


def test_every_epoch_gives_every_sample_once_in_an_order_of_its_own(tars: Path) -> None:
    seen = values_of(Stream(config_of(tars), seed=0), range(90))
    epochs = [seen[i : i + 30] for i in (0, 30, 60)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3
    assert values_of(Stream(config_of(tars), seed=0), range(30)) == epochs[0]
    assert values_of(Stream(config_of(tars), seed=1), range(30)) != epochs[0]
    first_block = set(epochs[0][:10])
    assert len({value // 5 for value in first_block}) == 2 and epochs[0][:5] != sorted(epochs[0][:5])


def test_of_larger_shards_all_samples_come_in_time_and_of_smaller_ones_some_twice(tars: Path) -> None:
    larger = Counter(values_of(Stream(config_of(tars, samples_per_shard=3), seed=0), range(18 * 20)))
    assert set(larger) == set(range(30))
    smaller = [Counter(values_of(Stream(config_of(tars, samples_per_shard=7), seed=0), range(i, i + 14)))
               for i in range(0, 42, 14)]  # fmt: skip
    assert all(len(block) == 10 and set(block.values()) == {1, 2} for block in smaller)


def batches(config: StreamConfig, first_step: int, n_workers: int, rank: int = 0, n_ranks: int = 1) -> list[Batch]:
    source = ImageSamples(Stream(config, seed=4), 4, None, seed=4, variants="flip")
    return list(training_loader(source, batch_size=6, n_steps=12, first_step=first_step, seed=4, text_length=None,
                                n_workers=n_workers, rank=rank, n_ranks=n_ranks))  # fmt: skip


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("first_step", [1, 4, 7])
def test_a_resumed_run_reads_the_same_batches(tars: Path, n_workers: int, first_step: int) -> None:
    whole, rest = (batches(config_of(tars), first, n_workers) for first in (0, first_step))
    assert len(whole) == 12 and len(rest) == 12 - first_step
    for a, b in zip(whole[first_step:], rest, strict=True):
        assert torch.equal(a.image, b.image) and torch.equal(a.chance_B, b.chance_B)


def test_ranks_and_workers_read_shards_of_their_own(tars: Path) -> None:
    of_ranks = [batches(config_of(tars, shuffled_shards=1), 0, 2, rank, 2) for rank in (0, 1)]
    assert [[len(batch.image) for batch in rank] for rank in of_ranks] == [[3] * 12] * 2
    # each of the four lanes made 18 samples: three shards whole and the fourth begun
    seen = Counter(int(v) for rank in of_ranks for batch in rank for v in (batch.image[:, 0, 0, 0] + 1) * 127.5 + 0.5)
    assert sum(seen.values()) == 72 and set(seen) == set(range(30)) and set(seen.values()) <= {2, 3}


def test_a_resume_reads_the_present_block_and_the_next_alone(server: "Server") -> None:
    config = config_of(server.url)
    stream = Stream(config, seed=0)
    position = int(next(iter(LaneSampler(10, 4, 20, first_step=19, rank=0, n_ranks=1, n_workers=0))).index_B[0])
    assert position == 76  # of block 7
    assert stream[position] and server.wait_for(4)
    assert sorted(server.asked) == sorted(url.rpartition("/")[2] for n in (7, 8) for url in stream.shards_of(n))


# --- a server that misbehaves ---


class Server:
    """Serves a folder; `script[name]` says what to do at the first requests of a file, which is right from then on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.script, self.asked, self.over = folder, {}, [], threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                name = self.path.removeprefix("/")
                outer.asked.append(name)
                steps = outer.script.get(name, [])
                outer.answer(self, name, steps.pop(0) if steps else "well")

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, name: str, how: str) -> None:
        content = (self.folder / name).read_bytes() if (self.folder / name).is_file() else b""
        status = 404 if not content else 500 if how == "500" else 200
        request.send_response(status)
        if how != "cut without a length":
            request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if how == "damage":
            content = content[:2048] + b"\xff" * 512 + content[2560:]  # the header of the third member
        if how.startswith(("stall", "cut")):
            content = content[:2048]  # two members
        if status == 200:
            request.wfile.write(content)
            request.wfile.flush()
        if how == "stall":
            self.over.wait(10)

    def wait_for(self, n_requests: int) -> bool:
        deadline = time.monotonic() + 5
        while len(self.asked) < n_requests and time.monotonic() < deadline:
            time.sleep(0.01)
        return len(self.asked) == n_requests


@pytest.fixture
def server(tars: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(tars)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.over.set()
    server.http.shutdown()
    server.http.server_close()
    thread.join()


FAULTS = ["500", "stall", "cut", "cut without a length", "damage"]


def timeout_of(fault: str) -> dict[str, float]:
    """Short where it is waited for; else the default, lest a busy machine look like a stalled server."""
    return {"timeout_s": 0.5} if fault == "stall" else {}


def test_http_gives_what_files_give(tars: Path, server: Server) -> None:
    local, remote = (values_of(Stream(config_of(place), seed=0), range(60)) for place in (tars, server.url))
    assert local == remote


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_changes_nothing(fault: str, tars: Path, server: Server) -> None:
    expected = values_of(Stream(config_of(tars), seed=0), range(30))
    server.script = {"x-2.tar": [fault, fault], "x-4.tar": [fault]}
    assert values_of(Stream(config_of(server.url, **timeout_of(fault)), seed=0), range(30)) == expected
    assert server.asked.count("x-2.tar") >= 3


@pytest.mark.parametrize("fault", [*FAULTS, "missing"])
def test_a_lasting_fault_ends_the_run_with_the_shard_named(fault: str, tars: Path, server: Server) -> None:
    server.script = {"x-2.tar": [fault] * 100}
    if fault == "missing":
        (tars / "x-2.tar").unlink()
    with pytest.raises(DataError, match=rf"{server.url}/x-2\.tar: .*attempt 3 of 3.*unreadable=skip"):
        values_of(Stream(config_of(server.url, **timeout_of(fault)), seed=0), range(30))
    assert server.asked.count("x-2.tar") == 3


@pytest.mark.parametrize("fault", [*FAULTS, "missing"])
def test_a_shard_that_may_be_skipped_is_counted_and_others_take_its_place(
    fault: str, tars: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = {"x-2.tar": [fault] * 100}
    if fault == "missing":
        (tars / "x-2.tar").unlink()
    config = config_of(server.url, unreadable="skip", **timeout_of(fault))
    seen = Counter(values_of(Stream(config, seed=0), range(30)))
    assert sum(seen.values()) == 30 and set(seen) >= set(range(30)) - set(range(10, 15))
    told = capsys.readouterr().err
    assert f"skipped {server.url}/x-2.tar: " in told and "this process skipped 1 shards, 0 samples so far" in told


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_damaged_shard_ends_training_with_one_clear_line(tars: Path, n_workers: int) -> None:
    path = tars / "x-3.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=rf"\A{path}: damaged shard \(after 3 members: [^\n]*unreadable=skip\Z"):
        batches(config_of(tars), 0, n_workers)


def test_members_that_make_no_sample_are_told_and_passed_over(tars: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tars / "x-3.tar", "a") as tar:
        for name in ("README", "only.txt"):
            tar.addfile(tarfile.TarInfo(name))
    assert sorted(values_of(Stream(config_of(tars), seed=0), range(30))) == list(range(30))
    told = capsys.readouterr().err
    assert f"{tars}/x-3.tar README: unusable member (no suffix); passed over, and 1 more of this shard" in told


def test_files_are_not_tried_again(tars: Path) -> None:
    shard = read_shard(str(tars / "absent.tar"), config_of(tars, first_wait_s=1000))
    assert shard.items == [] and shard.failure.reason == "shard cannot be opened"


@pytest.mark.parametrize("unreadable", ["stop", "skip"])
def test_an_image_that_is_none_ends_the_run_or_is_replaced(
    unreadable: str, tars: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tars / "x-3.tar", list(range(15, 20)), damaged=17)
    stream = Stream(config_of(tars, unreadable=unreadable), seed=0)
    if unreadable == "stop":
        with pytest.raises(DataError, match=r"x-3\.tar 017: not an image"):
            values_of(stream, range(30))
        return
    seen = Counter(values_of(stream, range(60)))
    assert sum(seen.values()) == 60 and set(seen) == set(range(30)) - {17}
    assert "this process skipped 0 shards, 2 samples so far" in capsys.readouterr().err  # once in each epoch


def test_nothing_to_read_ends_the_run_even_where_shards_may_be_skipped(tars: Path) -> None:
    for path in tars.glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no shard of a block can be read: "):
        Stream(config_of(tars, unreadable="skip"), seed=0)[0]


def test_where_one_shard_is_in_memory_it_cannot_be_skipped(tars: Path) -> None:
    with pytest.raises(ValueError, match="skip needs shuffled_shards of 2 or more"):
        config_of(tars, unreadable="skip", shuffled_shards=1)


def test_a_shard_without_images_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(DataError, match=r"x\.tar: damaged shard \(it holds no image\)"):
        Stream(StreamConfig(urls=str(tmp_path / "x.tar")), seed=0)[0]


def test_a_pattern_that_does_not_close_is_told() -> None:
    with pytest.raises(DataError, match=r"x-\{0\.\.3\.tar: no pattern of addresses"):
        Stream(StreamConfig(urls="x-{0..3.tar"), seed=0)
