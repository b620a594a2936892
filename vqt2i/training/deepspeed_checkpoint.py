"""DeepSpeed's checkpoint folders: read as data only, as whole weights, and for another number of ranks."""

import contextlib
import importlib
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TAG = "checkpoint"  # the folder in it where Lightning has DeepSpeed write
# What its files name beside tensors and plain values: seen with ZeRO 0 to 3 and offload on CPUs; the last is of fp16.
GLOBALS = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
)
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # PyTorch's, and wins over the weights_only=False in DeepSpeed's calls


@contextmanager
def only_data_is_loaded() -> Iterator[None]:
    """Within it torch.load, also when DeepSpeed calls it, executes nothing that a file names; `GLOBALS` are read.

    Not to be nested: PyTorch forgets what may be read at the end of the inner one.
    """
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([_attribute(name) for name in GLOBALS]):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def whole_weights(checkpoint: Path) -> dict[str, Tensor]:
    """All weights, of any number of ranks, in the precision that they were computed with, on the CPU."""
    whole = checkpoint / TAG / "mp_rank_00_model_states.pt"
    with only_data_is_loaded():
        if whole.is_file():  # ZeRO 0 to 2: the first rank has them all
            return torch.load(whole, map_location="cpu", mmap=True)["module"]
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        placeholders = torch.load(whole.with_name(f"zero_pp_rank_0_{whole.name}"), map_location="cpu")["module"]
        with _quiet():
            state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), TAG)
        return {name: value.to(placeholders[name].dtype) for name, value in state.items()}


def n_shards(checkpoint: Path) -> int:
    """Over how many ranks the optimizer's state is dealt out; 0 where it is whole, as without ZeRO."""
    return len(list((checkpoint / TAG).glob("*zero_pp_rank_*_optim_states.pt")))


def write_universal(checkpoint: Path, out: Path) -> None:
    """Write DeepSpeed's universal checkpoint: ZeRO's shards put together, for any number of ranks to load.

    To be called within `only_data_is_loaded`.
    """
    from deepspeed.checkpoint.ds_to_universal import main

    arguments = Namespace(
        input_folder=str(checkpoint / TAG),
        output_folder=str(out / TAG),
        num_extract_workers=1,  # in this process: a fork would not survive beside a GPU's or a communicator's threads
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # about model parallelism, of which there is none
    )
    with _quiet():
        main(arguments)


def _attribute(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@contextmanager
def _quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
