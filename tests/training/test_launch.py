"""Ranks that torchrun, the deepspeed launcher or Lightning start: processes of their own; srun by its variables."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from torch.distributed import HashStore

import vqt2i
from vqt2i import processes
from vqt2i.errors import ConfigError, UserError
from vqt2i.processes import Stopped, one_command
from vqt2i.training.launch import World, cluster_environment, find_world
from vqt2i.training.record import read_record

TRAIN_CLIP = Path(vqt2i.__file__).parents[1] / "tools" / "train_clip.py"
TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4"}
SRUN = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "123456",
}  # fmt: skip


@pytest.fixture
def started_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], None]]:
    """started_with(variables): as a process that begins with these in its environment, and no others of a launcher."""

    def start(variables: dict[str, str]) -> None:
        processes.find_launcher.cache_clear()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        for name in (*TORCHRUN, *DEEPSPEED, "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        monkeypatch.setattr(os, "environ", environment | variables)

    terminate = signal.getsignal(signal.SIGTERM)
    yield start
    signal.signal(signal.SIGTERM, terminate)  # a command under a launcher ends ignoring it
    monkeypatch.undo()
    processes.find_launcher.cache_clear()
    processes._meeting_point.cache_clear()


@pytest.fixture
def command(overrides: dict[str, list[str]], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """command(launcher, name, *settings): train the scorer, two steps, by its command under a launcher."""

    def run(launcher: list[object], name: str, *settings: str) -> subprocess.CompletedProcess:
        (tmp_path / "empty.yaml").touch()
        steps = ["trainer.max_steps=2", "trainer.validate_every_steps=2"]
        values = [*overrides["clip"], *steps, f"name={name}", *settings]
        words = [TRAIN_CLIP, "--config", tmp_path / "empty.yaml", "--runs", tmp_path / "runs"]
        words += [word for value in values for word in ("--set", value)]
        return subprocess.run(
            [str(word) for word in [sys.executable, *launcher, *words]], capture_output=True, text=True, timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    return run


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_every_launcher_trains_the_weights_of_lightnings_own_launch(command, weights, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    address = ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    launchers = {
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2],
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--hostfile", tmp_path / "hosts", "--no_ssh_check", *address],
    }
    ended = command([], "own", "trainer.devices=2")
    assert ended.returncode == 0, ended.stderr
    own = weights(tmp_path / "runs" / "own")
    for name, launcher in launchers.items():
        ended = command(launcher, name)
        assert ended.returncode == 0, ended.stderr
        found = weights(tmp_path / "runs" / name)
        assert [key for key in own if not torch.equal(found[key], own[key])] == [], name
        assert read_record(tmp_path / "runs" / name).starts[-1].devices == 2
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["deepspeed", "own", "torchrun"]


def test_an_error_of_both_ranks_is_told_once_with_the_exit_code_of_a_users_error(command) -> None:
    overflow = ["trainer.devices=2", "training.optimizer.learning_rate=1e30", "trainer.max_nonfinite_steps=1",
                "trainer.max_steps=9", "trainer.validate_every_steps=9"]  # fmt: skip
    ended = command([], "clip", *overflow)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("error: ") == 1 and "not finite in 1 steps in a row" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("variables", "launcher"), [(TORCHRUN, "torchrun"), (DEEPSPEED, "the deepspeed launcher"), (SRUN, "srun")]
)
def test_the_world_is_that_of_the_launcher(variables: dict[str, str], launcher: str, started_with) -> None:
    started_with(variables)
    assert find_world(None) == find_world(8) == World(2, 4, launcher)
    environment = cluster_environment(find_world(None))
    assert isinstance(environment, TorchElasticEnvironment)
    assert (environment.global_rank(), environment.local_rank(), environment.world_size()) == (5, 1, 8)
    with pytest.raises(ConfigError, match=rf"trainer\.devices is 2, but {launcher} started 8 processes .*start 2, or"):
        find_world(2)


def test_srun_gives_the_first_node_and_a_port_of_the_job_unless_they_are_given(started_with) -> None:
    started_with(SRUN)
    environment = cluster_environment(find_world(None))
    assert (environment.main_address, environment.main_port) == ("gpu07", 18456)
    started_with(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    environment = cluster_environment(find_world(None))
    assert (environment.main_address, environment.main_port) == ("10.0.0.1", 1234)


@pytest.mark.parametrize("variables", [{}, SRUN | {"SLURM_NTASKS": "1"}, {"SLURM_NTASKS": "8"}])
def test_without_a_launcher_of_several_the_settings_say_how_many(variables: dict[str, str], started_with) -> None:
    started_with(variables)
    assert find_world(None) == World(1, 1, None) and find_world(3) == World(1, 3, None)
    assert isinstance(cluster_environment(find_world(3)), LightningEnvironment)


def test_nodes_with_different_numbers_of_processes_are_refused(started_with) -> None:
    started_with(TORCHRUN | {"WORLD_SIZE": "7"})
    with pytest.raises(ConfigError, match=r"torchrun started 7 processes, 4 of them on this node"):
        find_world(None)


def test_other_devices_than_the_launcher_started_are_told_and_leave_no_run(
    overrides, started_with, fails, tmp_path: Path
) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started_with({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"} | place)
    (tmp_path / "empty.yaml").touch()
    words = [word for value in [*overrides["clip"], "trainer.devices=2"] for word in ("--set", value)]
    told = fails("train_clip", "--config", tmp_path / "empty.yaml", "--runs", tmp_path / "runs", *words)
    assert "trainer.devices is 2, but torchrun started 1 processes" in told
    assert not (tmp_path / "runs").exists()


def test_sigterm_before_the_first_step_ends_the_command_with_the_code_of_a_stop(started_with) -> None:
    started_with({})
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), one_command():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("rank", "left", "error", "code"),
    [
        (0, ["error", "ended/1"], UserError("both"), None),
        (1, ["error", "ended/0"], UserError("both"), 0),
        (0, [], UserError("alone"), None),
        (1, [], UserError("alone"), None),
        (0, ["error", "ended/1"], RuntimeError("connection closed"), 2),
        (1, [], RuntimeError("a bug"), None),
    ],
)
def test_an_error_is_told_by_the_first_of_those_that_have_it(
    rank: int, left: list[str], error: Exception, code: int | None, started_with, monkeypatch
) -> None:
    started_with(TORCHRUN | {"RANK": str(rank), "WORLD_SIZE": "2"})
    store = HashStore()
    for key in left:
        store.set(key, "")
    monkeypatch.setattr(processes, "_meeting_point", lambda: store)
    monkeypatch.setattr(processes, "MEETING_S", 0.1)
    with pytest.raises(type(error) if code is None else SystemExit) as raised, one_command():
        raise error
    assert code is None or raised.value.code == code
