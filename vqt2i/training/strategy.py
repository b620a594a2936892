"""How a run is spread over processes: one process, DDP, or DeepSpeed ZeRO, on GPUs or CPUs."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from pydantic import PositiveInt

from vqt2i.config import Config
from vqt2i.errors import ConfigError


class DeepSpeedConfig(Config):
    """What DeepSpeed's JSON is generated from. zero_stage: 1 shards the optimizer's state, 2 the gradients too."""

    zero_stage: Literal[1, 2] = 2


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeed on CPU ranks over gloo. DeepSpeed runs there; only Lightning's checks for CUDA stand in the way."""

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # DeepSpeed asks for the index


def deepspeed_json(config: DeepSpeedConfig, batch_size_per_device: int) -> dict[str, Any]:
    """DeepSpeed's own configuration. A new dictionary each time: Lightning edits the one it is given."""
    return {
        "train_micro_batch_size_per_gpu": batch_size_per_device,
        "zero_allow_untested_optimizer": True,
        # our AdamW is PyTorch's; DeepSpeed's CPU Adam would be compiled at first use
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": config.zero_stage},
    }


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """A user's own DeepSpeed configuration.

    Raises:
        ConfigError: no such file, or not a JSON object.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; expected a DeepSpeed JSON file") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); expected a DeepSpeed configuration") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found a {type(values).__name__}")
    return values


def build_strategy(
    device: torch.device, n_devices: PositiveInt, deepspeed: dict[str, Any] | None, *,
    find_unused_parameters: bool, timeout: timedelta,
) -> Strategy:  # fmt: skip
    """DeepSpeed where its configuration is given, else DDP for several devices, else one process.

    timeout: how long a rank waits for the others before it ends with an error.
    """
    if deepspeed is not None:
        kind = CPUDeepSpeedStrategy if device.type == "cpu" else DeepSpeedStrategy
        return kind(config=deepspeed, timeout=timeout)
    if n_devices > 1:
        return DDPStrategy(find_unused_parameters=find_unused_parameters, timeout=timeout)
    return SingleDeviceStrategy(device=torch.device("cuda", 0) if device.type == "cuda" else device)
