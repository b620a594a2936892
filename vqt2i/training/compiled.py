"""torch.compile for the training step only: validation and sampling stay eager, for their shapes vary."""

import shutil

import lightning as L
import torch
from torch import nn

from vqt2i.runtime import say


def compile_for_training(*modules: nn.Module) -> None:
    """Compile each module's forward in place (about half a minute at the first step on a CPU).

    Without a C++ compiler, which PyTorch needs on CPUs, training goes on uncompiled, and that is said.
    """
    if not torch.cuda.is_available() and not (shutil.which("g++") or shutil.which("clang++")):
        say("compile: no C++ compiler (g++ or clang++) found; training without, about a third slower")
        return
    for module in modules:
        module.compile(dynamic=False)


class EagerValidation(L.Callback):
    """Runs validation uncompiled. It must come after the callbacks that sample."""

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        torch.compiler.set_stance("force_eager")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        torch.compiler.set_stance("default")
