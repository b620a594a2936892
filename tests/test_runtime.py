import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqt2i.runtime import (
    control_group_rooms,
    counter,
    fastest_precision,
    free_memory,
    keep_freed_memory,
    matmul_rate,
    measured_peak,
    memory_bandwidth,
    peak_memory,
    pick_device,
    progress,
    say,
    stream_seed,
)


def test_stream_seeds_depend_on_their_parts_alone() -> None:
    assert stream_seed("image", 0, 1, 2) == stream_seed("image", 0, 1, 2) == 2570260136363667107
    seeds = {stream_seed("image", a, b, c) for a in range(6) for b in range(6) for c in range(6)}
    assert len(seeds) == 6**3
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed("a", 12) != stream_seed("a", 1, 2)


def test_progress_yields_every_item_and_tells_the_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(iter("abc"), "reading", unit="letters")) == ["a", "b", "c"]
    assert "reading: 3 letters in " in capsys.readouterr().err
    with counter("drawing", None, unit="tokens") as advance:
        advance(2)
        advance(3)
    assert "drawing: 5 tokens in " in capsys.readouterr().err


def test_a_log_file_is_told_the_rate_and_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0, 40.0, 50.0, 60.0])
    monkeypatch.setattr("vqt2i.runtime.time.monotonic", lambda: next(clock))
    with counter("drawing", 1000, unit="images") as advance:
        for count in (0.5, 99.5, 100):
            advance(count)
    assert capsys.readouterr().err.splitlines() == [
        "drawing: 100 of 1,000 images (2.5 images/s, 0:06:00 left)", "drawing: 200 images in 60.0 s (3.3 images/s)",
    ]  # fmt: skip


def test_only_rank_0_speaks_and_only_on_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say("[red] is text, not markup")
    told = capsys.readouterr()
    assert told.err == "[red] is text, not markup\n" and told.out == ""
    monkeypatch.setenv("LOCAL_RANK", "1")
    say("nothing")
    assert capsys.readouterr().err == ""


def test_a_named_device_and_a_known_precision_are_picked() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert fastest_precision("cpu") in ("fp32", "bf16")
    assert fastest_precision("mps") == "fp32"


def test_the_peak_of_memory_is_in_bytes() -> None:
    assert 2**26 < peak_memory(torch.device("cpu")) < 2**38  # PyTorch alone takes more than 64 MiB


def test_the_peak_of_a_new_process_is_its_own() -> None:
    script = "from types import SimpleNamespace as S; import vqt2i.runtime as r; print(r.peak_memory(S(type='cpu')))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(out) < 2**27 < peak_memory(torch.device("cpu"))  # this one has loaded PyTorch


def test_the_matmul_rate_leaves_the_random_stream_where_it_is() -> None:
    before = torch.get_rng_state()
    matmul_rate("cpu", "fp32", (32, 32, 32))
    assert torch.equal(torch.get_rng_state(), before)


def test_rates_are_measured_at_each_call(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr("vqt2i.runtime.best_rate", lambda action, amount, kind: calls.append(amount) or action())
    assert matmul_rate("cpu", "fp32", (2, 3, 4)).shape == (2, 4)
    assert [memory_bandwidth("cpu", 2**10).item() for _ in range(2)] == [1, 1]
    assert calls == [2 * 2 * 3 * 4, 2**10 / 16, 2**10 / 16]


def test_free_memory_is_some_and_a_peak_is_seen_where_the_system_tells_it() -> None:
    device = torch.device("cpu")
    assert 0 < free_memory(device) < 2**50
    # so large that what else is freed meanwhile, some MB, makes no difference
    first, peak = measured_peak(device, lambda: torch.ones(2**26)[0].item())
    assert first == 1 and (peak is None or 0.9 * 2**28 < peak < 2**30)


def test_neither_garbage_nor_blocks_that_malloc_keeps_hide_a_peak() -> None:
    keep_freed_memory()
    gc.disable()
    try:
        cycle: list[object] = [torch.ones(2**26)]
        cycle.append(cycle)
        del cycle
        _, peak = measured_peak(torch.device("cpu"), lambda: (gc.collect(), torch.ones(2**26)))
    finally:
        gc.enable()
    assert peak is None or 0.9 * 2**28 < peak < 2**30


@pytest.mark.parametrize(
    ("line", "files", "rooms"),
    [
        ("0::/job/step", {"job/step/memory": ("max", 70, 0), "job/memory": ("1000", 400, 150)}, [750]),
        ("0::/elsewhere", {"memory": ("500", 600, 0)}, [0]),
        ("4:memory:/job", {"memory/job/memory": ("1000", 400, 0), "memory/memory": ("5000", 500, 100)}, [600, 4600]),
        ("3:cpuset:/", {}, []),
        ("0::/", {}, []),
    ],
)
def test_the_limits_of_every_control_group_above_count_without_what_files_take(
    line: str, files: dict[str, tuple[str, int, int]], rooms: list[int], tmp_path: Path
) -> None:
    (tmp_path / "membership").write_text(f"{line}\n")
    first = "memory" in line
    for name, (limit, used, cached) in files.items():
        folder = (tmp_path / "root" / name).parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(f"{limit}\n")
        (folder / ("memory.usage_in_bytes" if first else "memory.current")).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{'total_' if first else ''}inactive_file {cached}\n")
    assert list(control_group_rooms(tmp_path / "membership", tmp_path / "root")) == rooms
