"""How a run is spread over processes: one process, DDP, or DeepSpeed ZeRO, on GPUs or CPUs."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vqt2i.config import Config
from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.files import PARTIAL_PREFIX
from vqt2i.runtime import is_first_process, say
from vqt2i.training.checkpoints import disk_errors
from vqt2i.training.deepspeed_checkpoint import n_shards, only_data_is_loaded, write_universal
from vqt2i.training.optim import OptimizerConfig

Offload = Literal["cpu", "nvme"]


class DeepSpeedConfig(Config):
    """What DeepSpeed's JSON is generated from.

    zero_stage: 0 shards nothing, 1 the optimizer's state, 2 the gradients too, 3 the parameters too.
    offload_optimizer, offload_parameters: where what is sharded lies between its uses, instead of on the GPU.
    nvme_path: the folder for what goes to "nvme".
    """

    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: Offload | None = None
    offload_parameters: Offload | None = None
    nvme_path: Path | None = None

    @model_validator(mode="after")
    def _offload_fits_the_stage(self) -> "DeepSpeedConfig":
        least = {"cpu": 1, "nvme": 3}
        if self.offload_optimizer and self.zero_stage < least[self.offload_optimizer]:
            raise ValueError(f"offload_optimizer '{self.offload_optimizer}' needs zero_stage "
                             f"{least[self.offload_optimizer]} or more, found {self.zero_stage}")  # fmt: skip
        if self.offload_parameters and self.zero_stage < 3:
            raise ValueError(f"offload_parameters needs zero_stage 3, found {self.zero_stage}")
        if ("nvme" in (self.offload_optimizer, self.offload_parameters)) != (self.nvme_path is not None):
            raise ValueError("nvme_path: give a folder with offload to 'nvme', and none without")
        return self


class ResumingDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeed that goes on from a checkpoint of any number of ranks, and executes nothing that is in its files."""

    def __init__(self, checkpoint: Path | None, **settings: Any) -> None:
        super().__init__(**settings)
        self.checkpoint = checkpoint

    def setup(self, trainer: L.Trainer) -> None:
        if self.checkpoint is not None and n_shards(self.checkpoint) not in (0, self.world_size):
            self.config.setdefault("checkpoint", {})["load_universal"] = True
        if self.zero_stage_3:
            self._deal_out_parameters()
        super().setup(trainer)

    def _deal_out_parameters(self) -> None:
        """Leave each rank only its part of every parameter, as the first rank has initialised it.

        One after the other: DeepSpeed itself would first move the whole model to each GPU.
        """
        import deepspeed

        self._init_config_if_needed()
        dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        dtype = dtypes.get(self.precision_plugin.precision, torch.float32)
        for parameter in self.model.parameters():
            # the first rank's values are broadcast; on the others they would only take up memory
            whole = parameter.data.to(dtype) if self.is_global_zero else torch.empty(parameter.shape, dtype=dtype)
            parameter.data = whole
        deepspeed.zero.Init(module=self.model, config_dict_or_path=self.config)
        self.model.to(self.root_device)  # its buffers

    def load_checkpoint(self, checkpoint_path: Path, weights_only: bool | None = None) -> dict[str, Any]:
        with only_data_is_loaded():
            if not self.deepspeed_engine.load_universal_checkpoint():
                return super().load_checkpoint(checkpoint_path, weights_only)
            optimizer = self.optimizers[0]
            decays = [group["weight_decay"] for group in optimizer.param_groups]
            with self._universal(Path(checkpoint_path)) as universal:
                checkpoint = super().load_checkpoint(universal, weights_only)
            # At ZeRO 3 DeepSpeed 0.19.8 gives all groups the settings of the first, and the same tensor as the count of
            # steps, which each of them would then advance.
            for group, decay in zip(optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay
            for state in optimizer.state.values():
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].clone()
            return checkpoint

    @contextmanager
    def _universal(self, checkpoint: Path) -> Iterator[Path]:
        """The checkpoint for any number of ranks, in a folder beside it, and there only within."""
        folder = checkpoint.with_name(f"{PARTIAL_PREFIX}universal-{checkpoint.name}")  # removed after a kill
        failure = None
        if self.is_global_zero:
            say(f"{checkpoint}: of {n_shards(checkpoint)} ranks, and now there are {self.world_size}: "
                "bringing its parts together (DeepSpeed's universal checkpoint)")  # fmt: skip
            try:
                with disk_errors(folder, RuntimeError):
                    write_universal(checkpoint, folder)
            except CheckpointError as error:
                failure = str(error)
        failure = self.broadcast(failure)
        try:
            if failure is not None:
                raise CheckpointError(failure)
            yield folder
            self.barrier()  # all have read it
        finally:
            if self.is_global_zero:
                shutil.rmtree(folder, ignore_errors=True)


class CPUDeepSpeedStrategy(ResumingDeepSpeedStrategy):
    """DeepSpeed on CPU ranks over gloo. DeepSpeed runs there; only Lightning's checks for CUDA stand in the way."""

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # DeepSpeed asks for the index


def wants_cpu_adam(deepspeed: dict[str, Any] | None) -> bool:
    """Whether the optimizer's states lie in the CPU's memory and the gradients on a GPU.

    DeepSpeed's CPU Adam (compiled at first use) then updates where the states are.
    """
    offloads = deepspeed is not None and "offload_optimizer" in deepspeed.get("zero_optimization", {})
    return offloads and torch.cuda.is_available()


def keeps_states_on_nvme(deepspeed: dict[str, Any]) -> bool:
    """Whether each rank's part of the optimizer's state lies in files of its own."""
    return deepspeed.get("zero_optimization", {}).get("offload_optimizer", {}).get("device") == "nvme"


def is_sharded(module: nn.Module) -> bool:
    """Whether ZeRO 3 has dealt the parameters out to the ranks. Using them is then work for all ranks at once."""
    return any(hasattr(p, "ds_id") for p in module.parameters())


@contextmanager
def valued_by_first_rank(deepspeed: dict[str, Any] | None) -> Iterator[None]:
    """Within it the further ranks of a ZeRO 3 run build modules whose parameters have no values and take up no memory.

    Each gets its part of the first rank's when those are dealt out.
    """
    sharded = deepspeed is not None and deepspeed.get("zero_optimization", {}).get("stage") == 3
    with nullcontext() if is_first_process() or not sharded else _WithoutValues():
        yield


class _WithoutValues(TorchFunctionMode):
    """Leaves out what `torch.nn.init` would do."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Within it every rank holds all parameters that ZeRO 3 has dealt out, to be read. For all ranks at once."""
    if is_sharded(module):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            yield
    else:
        yield


def choose_deepspeed(
    asked: bool | Path, config: DeepSpeedConfig, optimizer: OptimizerConfig, micro_batch_size: int
) -> dict[str, Any] | None:
    """DeepSpeed's own configuration: a user's JSON, or for true one from the settings; None where it is not asked for.

    Raises:
        ConfigError: the user's JSON cannot be read, or says otherwise than the settings; Muon, whose step needs whole
            matrices where ZeRO flattens and deals them out.
    """
    if asked is False:
        return None
    if optimizer.kind == "muon":
        raise ConfigError("training.optimizer.kind 'muon' does not train under DeepSpeed; leave --deepspeed out "
                          "(several processes then train by DDP), or use 'adamw'")  # fmt: skip
    if asked is True:
        return deepspeed_json(config, micro_batch_size)
    values = read_deepspeed_json(asked)
    if "gradient_accumulation_steps" in values:
        raise ConfigError(f"{asked}: gradient_accumulation_steps follows from trainer.accumulate; set that instead")
    found = values.setdefault("train_micro_batch_size_per_gpu", micro_batch_size)
    if found != micro_batch_size:
        raise ConfigError(f"{asked}: train_micro_batch_size_per_gpu {found}, but the settings give {micro_batch_size} "
                          "(batch_size / devices / accumulate); leave it out")  # fmt: skip
    return values


def deepspeed_json(config: DeepSpeedConfig, micro_batch_size: int) -> dict[str, Any]:
    """DeepSpeed's own configuration from the settings. A new dictionary each time: Lightning edits the one given."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "zero_allow_untested_optimizer": True,
        # on CPU ranks offloaded states stay with PyTorch's AdamW: see `wants_cpu_adam`
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": config.zero_stage,
            **{
                key: {"device": place, "pin_memory": torch.cuda.is_available()}
                | ({"nvme_path": str(config.nvme_path)} if place == "nvme" else {})
                for key, place in (
                    ("offload_optimizer", config.offload_optimizer),
                    ("offload_param", config.offload_parameters),
                )
                if place is not None
            },
        },
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
    checkpoint: Path | None, find_unused_parameters: bool, timeout: timedelta,
) -> Strategy:  # fmt: skip
    """DeepSpeed where its configuration is given, else DDP for several devices, else one process.

    checkpoint: to go on from, if any. timeout: how long a rank waits for the others before it ends with an error.
    """
    if deepspeed is not None:
        kind = CPUDeepSpeedStrategy if device.type == "cpu" else ResumingDeepSpeedStrategy
        return kind(checkpoint, config=deepspeed, timeout=timeout)
    if n_devices > 1:
        return DDPStrategy(find_unused_parameters=find_unused_parameters, timeout=timeout)
    return SingleDeviceStrategy(device=torch.device("cuda", 0) if device.type == "cuda" else device)
