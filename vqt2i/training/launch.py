"""How many devices a run trains on, and what Lightning is told of the processes.

Lightning starts further processes by itself, on this machine; torchrun, the deepspeed launcher and srun start all of
them (`vqt2i.processes`).
"""

import os
from typing import NamedTuple

from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, TorchElasticEnvironment

from vqt2i.errors import ConfigError
from vqt2i.processes import find_launcher


class World(NamedTuple):
    """The processes of a run, one for each device. launcher: what started them; None where Lightning does."""

    n_nodes: int
    devices_per_node: int
    launcher: str | None

    @property
    def size(self) -> int:
        return self.n_nodes * self.devices_per_node


def find_world(devices: int | None) -> World:
    """The world of a run. `devices`: how many the settings ask for; None is as many as were started, else 1.

    Raises:
        ConfigError: a launcher has started another number, or not as many on every node.
    """
    launcher = find_launcher()
    if launcher is None:
        return World(1, devices or 1, None)
    n_processes, n_here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if n_processes % n_here:
        raise ConfigError(f"{launcher} started {n_processes} processes, {n_here} of them on this node; "
                          "start as many on every node")  # fmt: skip
    if devices not in (None, n_processes):
        raise ConfigError(f"trainer.devices is {devices}, but {launcher} started {n_processes} processes (over all "
                          f"nodes); start {devices}, or leave trainer.devices out")  # fmt: skip
    return World(n_processes // n_here, n_here, launcher)


def cluster_environment(world: World) -> ClusterEnvironment:
    """What tells Lightning about the world, whatever it would make of the environment by itself."""
    return LightningEnvironment() if world.launcher is None else TorchElasticEnvironment()
