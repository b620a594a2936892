"""Optimizer and learning-rate schedule, the same for every stage."""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from vqt2i.config import Config
from vqt2i.errors import ConfigError
from vqt2i.nn.transformer import Block

MUON_MOMENTUM = 0.95  # Jordan et al. 2024, https://kellerjordan.github.io/posts/muon


class OptimizerConfig(Config):
    """Linear warm-up, then cosine decay to `final_share` of the peak.

    kind: "muon" is Muon for the matrices of transformer blocks and AdamW for the rest, at the same learning rate: its
        steps are scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982, eq. 4). docs/scaling.md compares.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: PositiveFloat = 1e-3
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    weight_decay: NonNegativeFloat = 0.05
    warmup_steps: NonNegativeInt = 50
    final_share: float = Field(0.02, ge=0, le=1)


def _without_muon(config: OptimizerConfig) -> OptimizerConfig:
    if config.kind == "muon":
        raise ValueError("kind 'muon' is for the matrices of transformer blocks, and nothing that is trained here has "
                         "any; use 'adamw'")  # fmt: skip
    return config


AdamWConfig = Annotated[OptimizerConfig, AfterValidator(_without_muon)]
"""Of a stage without transformer blocks, told before its run begins."""


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers as one, for what knows one: Lightning, the schedule, checkpoints.

    found_inf: where it is set and true, a step changes nothing (as in PyTorch's fused AdamW, to which it is handed).
    """

    found_inf: Tensor | None = None

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self.muon, self.adamw = muon, adamw
        self._share()

    def _share(self) -> None:
        n = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:n], self.param_groups[n:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # puts new groups and a new state in place
        self._share()

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.found_inf is None:
            self.adamw.step()
            self.muon.step()
            return loss
        self.adamw.found_inf = self.found_inf
        self.adamw.step()
        # torch's Muon reads no flag, and asking for it here would make the host wait for the GPU: what it did is undone
        matrices = [p for group in self.muon.param_groups for p in group["params"] if p.grad is not None]
        for p in matrices:
            self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        changed = [x for p in matrices for x in (p.detach(), self.state[p]["momentum_buffer"])]
        before = [x.clone() for x in changed]
        self.muon.step()
        skipped = self.found_inf.bool()
        for x, old in zip(changed, before, strict=True):
            x.copy_(torch.where(skipped, old, x))
        return loss


GUARDED = (torch.optim.AdamW, MuonAndAdamW)  # optimizers that read `found_inf`


def build_optimizer(module: nn.Module, config: OptimizerConfig, *, cpu_adam: bool = False) -> torch.optim.Optimizer:
    """Over the parameters that train; weight decay on matrices only (not on norms, biases and embeddings).

    cpu_adam: DeepSpeed's AdamW, for states that are offloaded to the CPU, instead of PyTorch's fused one.

    Raises:
        ConfigError: Muon for a module without transformer blocks.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in module.parameters() if p.requires_grad]
    # ZeRO 3 keeps the shape of a parameter that it has dealt out beside it
    matrices = {id(p) for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2} - embeddings
    hidden = set()
    if config.kind == "muon":
        blocks = [block for block in module.modules() if isinstance(block, Block)]
        hidden = {id(p) for block in blocks for p in block.parameters() if id(p) in matrices}
        if not hidden:
            raise ConfigError("training.optimizer.kind is 'muon', which is for the matrices of transformer blocks, and "
                              "nothing that is trained here has any; use 'adamw'")  # fmt: skip
    decayed = [p for p in trained if id(p) in matrices - hidden]
    kept = [p for p in trained if id(p) not in matrices]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    settings = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
    if cpu_adam:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, **settings, adamw_mode=True)
    adamw = torch.optim.AdamW(groups, **settings, fused=True)
    # Lightning clips no gradients that the optimizer would unscale by itself; without fp16 there is nothing to unscale
    adamw._step_supports_amp_scaling = False
    if not hidden:
        return adamw
    muon = torch.optim.Muon(
        [p for p in trained if id(p) in hidden], lr=config.learning_rate, weight_decay=config.weight_decay,
        momentum=MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    return MuonAndAdamW(muon, adamw)


def learning_rate_share(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Share of the peak learning rate used for the update number `step` (from 0)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    return config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * done))


def scheduled_optimizer(
    module: nn.Module, config: OptimizerConfig, max_steps: int, *, cpu_adam: bool = False
) -> dict[str, Any]:
    """`build_optimizer` with its learning rate for every step, as Lightning's `configure_optimizers` gives them."""
    optimizer = build_optimizer(module, config, cpu_adam=cpu_adam)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(config, step, max_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def learning_rate_at(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Learning rate used for the update number `step` (from 0)."""
    return config.learning_rate * learning_rate_share(config, step, max_steps)
