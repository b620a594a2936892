"""Optimizer and learning-rate schedule, the same for every stage."""

import math
from typing import Any

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import nn

from vqt2i.config import Config


class OptimizerConfig(Config):
    """AdamW with linear warm-up and cosine decay to `final_share` of the peak."""

    learning_rate: PositiveFloat = 1e-3
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    weight_decay: NonNegativeFloat = 0.05
    warmup_steps: NonNegativeInt = 50
    final_share: float = Field(0.02, ge=0, le=1)


def build_adamw(module: nn.Module, config: OptimizerConfig, *, cpu_adam: bool = False) -> torch.optim.Optimizer:
    """AdamW over the parameters that train; weight decay on matrices only (not on norms, biases and embeddings).

    cpu_adam: DeepSpeed's, for states that are offloaded to the CPU, instead of PyTorch's fused one.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in module.parameters() if p.requires_grad]
    # ZeRO 3 keeps the shape of a parameter that it has dealt out beside it
    matrices = {id(p) for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2} - embeddings
    decayed = [p for p in trained if id(p) in matrices]
    kept = [p for p in trained if id(p) not in matrices]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    settings = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
    if cpu_adam:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, **settings, adamw_mode=True)
    optimizer = torch.optim.AdamW(groups, **settings, fused=True)
    # Lightning clips no gradients that the optimizer would unscale by itself; without fp16 there is nothing to unscale
    optimizer._step_supports_amp_scaling = False
    return optimizer


def learning_rate_share(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Share of the peak learning rate used for the update number `step` (from 0)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    return config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * done))


def scheduled_adamw(
    module: nn.Module, config: OptimizerConfig, max_steps: int, *, cpu_adam: bool = False
) -> dict[str, Any]:
    """`build_adamw` with its learning rate for every step, as Lightning's `configure_optimizers` gives them."""
    optimizer = build_adamw(module, config, cpu_adam=cpu_adam)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(config, step, max_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def learning_rate_at(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Learning rate used for the update number `step` (from 0)."""
    return config.learning_rate * learning_rate_share(config, step, max_steps)
