"""Processes that are one command; the launchers' own are in tests/training/test_launch.py."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore

from vqt2i import processes
from vqt2i.errors import ResourceError, UserError
from vqt2i.processes import PARENT, STOPPED, Place, Stopped, Tally, _watch, find_place, start_processes


def process(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code])


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch):
    """as_rank(0) and as_rank(1): which of two processes with one store we are from now on."""
    store = HashStore()
    monkeypatch.setattr(processes, "_meeting_point", lambda: store)
    monkeypatch.setattr(processes, "find_launcher", lambda: "torchrun")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")

    def become(rank: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))

    return become


def test_every_process_learns_what_all_have_counted(as_rank) -> None:
    counts: list[list[int]] = [[], []]
    first, second = (Tally(counted.append) for counted in counts)
    first.add(3)
    second.add(4)
    assert counts == [[], []]  # not at every call
    for tally in (first, second, first):
        tally.look()
    assert counts == [[3, 4], [7]]
    second.add(-4)
    second.look()
    assert counts[1] == [7, -4]


def test_alone_a_count_is_told_at_once() -> None:
    counted = []
    with pytest.raises(ZeroDivisionError), Tally(counted.append) as tally:
        tally.add(2)
        tally.wait()
        raise ZeroDivisionError
    assert counted == [2, 0]


@pytest.mark.parametrize(
    ("error", "found"), [(KeyboardInterrupt, KeyboardInterrupt), (Stopped, Stopped), (UserError, SystemExit)]
)
def test_what_ends_one_process_ends_the_others(error: type, found: type, as_rank) -> None:
    first, second = Tally(lambda n: None), Tally(lambda n: None)
    as_rank(1)
    with pytest.raises(error), second:
        raise error
    as_rank(0)
    with pytest.raises(found) as ended:
        first.look()
    if isinstance(ended.value, SystemExit):
        assert ended.value.code == (STOPPED if found is Stopped else 0)


def test_who_waits_in_vain_gives_up(as_rank, monkeypatch: pytest.MonkeyPatch) -> None:
    tally = Tally(lambda n: None)
    tally.wait()
    monkeypatch.setattr(processes, "SILENCE_S", 0.0)
    with pytest.raises(UserError, match="another process has done nothing"):
        tally.wait()


def test_a_process_whose_starter_is_gone_ends(as_rank, monkeypatch: pytest.MonkeyPatch) -> None:
    tally = Tally(lambda n: None)
    monkeypatch.setenv(PARENT, str(os.getppid()))
    tally.look()
    monkeypatch.setenv(PARENT, "1234567")
    with pytest.raises(SystemExit):
        tally.look()


def test_on_a_cpu_the_processes_of_a_machine_share_it(as_rank) -> None:
    as_rank(1)
    assert find_place(None) == find_place(2) == Place(1, 2, "cpu", 2)
    with pytest.raises(ResourceError, match="--devices 3, but torchrun started 2 processes"):
        find_place(3)


def test_the_first_exit_code_that_is_not_0_is_that_of_all() -> None:
    assert _watch([process(""), process("")], []) == 0
    sleeper = process("import time; time.sleep(60)")
    start = time.monotonic()
    assert _watch([sleeper, process("raise SystemExit(2)")], []) == 2
    sleeper.kill()
    assert time.monotonic() - start < 30


def test_a_second_signal_does_not_wait() -> None:
    deaf = process("import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)")
    assert _watch([deaf], [2, 2]) == 130
    deaf.kill()


def test_the_processes_run_this_code_and_not_what_is_called_so_in_the_current_folder(in_empty_folder: Path) -> None:
    Path("vqt2i").mkdir()
    Path("vqt2i/__init__.py").write_text("raise SystemExit(3)")
    assert start_processes(1, ["generate", "--help"]) == 0
