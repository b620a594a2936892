"""torch.compile for the training step only: validation and sampling stay eager, for their shapes vary."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import lightning as L
import torch

from vqt2i.runtime import find_cpp_compiler, say

P, T = ParamSpec("P"), TypeVar("T")


def compile_for_training(function: Callable[P, T]) -> Callable[P, T]:
    """The function compiled (about half a minute at its first call on a CPU).

    Without a C++ compiler, which PyTorch needs on CPUs, it stays as it is, and that is said.
    """
    if not torch.cuda.is_available() and find_cpp_compiler() is None:
        say("compile: no C++ compiler (g++ or clang++) found; training without, about a third slower")
        return function
    return torch.compile(function, dynamic=False)


class EagerValidation(L.Callback):
    """Runs validation uncompiled. It must come after the callbacks that sample."""

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        torch.compiler.set_stance("force_eager")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        torch.compiler.set_stance("default")
