"""Training of the image tokenizer: VQ-VAE, or VQGAN where the loss has an adversarial part."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from einops import rearrange
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel

from vqt2i.config import Config
from vqt2i.training.batches import Batch
from vqt2i.training.optim import OptimizerConfig, build_adamw, learning_rate_at
from vqt2i.training.run import DataConfig, StageData, TrainerConfig, fit, open_dataset, stage_card
from vqt2i.training.samples import image_samples
from vqt2i.training.start import Resume
from vqt2i.vq.autoencoder import ImageTokenizer
from vqt2i.vq.config import ImageTokenizerConfig
from vqt2i.vq.discriminator import PatchDiscriminator
from vqt2i.vq.losses import (
    ReconstructionLoss,
    VQGANLossConfig,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from vqt2i.vq.metrics import CodebookCounter, psnr, ssim


class VQGANTrainingConfig(Config):
    """optimizer: of the tokenizer and, with the same settings, of the critic.

    ema_decay: of the averaged weights that are validated and exported; shorter memory in the first steps.
    max_gradient_norm: gradients are scaled down to this norm; null leaves them.
    """

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-3, warmup_steps=100, weight_decay=0.0)
    loss: VQGANLossConfig = VQGANLossConfig()
    ema_decay: float = Field(0.995, ge=0, lt=1)
    max_gradient_norm: PositiveFloat | None = 1.0


class VQGANRunConfig(Config):
    """`configs/vqgan/NAME.yaml`."""

    name: str = "vqgan"
    data: DataConfig = DataConfig()
    model: ImageTokenizerConfig = ImageTokenizerConfig()
    training: VQGANTrainingConfig = VQGANTrainingConfig()
    trainer: TrainerConfig = TrainerConfig()


class VQGANModule(L.LightningModule):
    """Reads the images of a batch, float in [-1, 1]. Everything needed for an exact resume is in the checkpoint.

    `trainer.global_step` counts updates of the tokenizer: the critic is stepped past Lightning, which would otherwise
    count each batch twice and stop at half of `max_steps`. Under DDP with an adversarial loss, use
    `find_unused_parameters=True`: each of the two backward passes reaches a part of the parameters.
    """

    best_by = "val/loss"  # the checkpoint with the least is kept
    exported = "averaged.module"  # by this name the exported model is in a checkpoint

    def __init__(self, model: ImageTokenizer, config: VQGANTrainingConfig, max_steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.max_steps = max_steps
        self.model = model
        self.averaged = AveragedModel(model, multi_avg_fn=self._average).requires_grad_(False)
        self.reconstruction_loss = ReconstructionLoss(config.loss)
        adversarial = config.loss.adversarial
        self.discriminator = None if adversarial is None else PatchDiscriminator(adversarial)
        self.codes_seen = CodebookCounter(model.config.vocab_size)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        trained = [self.model] if self.discriminator is None else [self.model, self.discriminator]
        return [build_adamw(module, self.config.optimizer) for module in trained]

    @property
    def discriminator_started(self) -> bool:
        adversarial = self.config.loss.adversarial
        return adversarial is not None and self.global_step >= adversarial.start_share * self.max_steps

    def training_step(self, batch: Batch, batch_index: int) -> None:
        x = batch.image
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        learning_rate = learning_rate_at(self.config.optimizer, self.global_step, self.max_steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        logs = {"train/lr": learning_rate}
        adversarial_now = self.discriminator_started  # the tokenizer's update below advances global_step

        out = self.model(x)
        loss = self.reconstruction_loss(out.reconstruction_B3HW, x)
        logs |= {"train/reconstruction": loss.detach(), "train/quantizer": out.quantizer_loss.detach()}
        if adversarial_now:
            self.discriminator.requires_grad_(False)
            adversarial, weight = self._adversarial_loss(out.reconstruction_B3HW, loss)
            logs |= {"train/generator": adversarial.detach(), "train/adaptive_weight": weight}
            loss = loss + weight * adversarial
            self.discriminator.requires_grad_(True)
        self._update(optimizers[0], self.model, loss + out.quantizer_loss)
        self.averaged.update_parameters(self.model)

        if adversarial_now:
            logits_real = self.discriminator(x)
            logits_fake = self.discriminator(out.reconstruction_B3HW.detach())
            loss_critic = discriminator_loss(logits_real, logits_fake)
            logs |= {"train/discriminator": loss_critic.detach()}
            self._update(optimizers[1].optimizer, self.discriminator, loss_critic)
        self.log_dict(logs)
        self.log("train/loss", loss.detach(), prog_bar=True)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        x = batch.image
        out = self.export_model()(x)
        reconstruction = out.reconstruction_B3HW.clamp(-1, 1)
        self.codes_seen.update(out.ids_BHW)
        values = {
            "val/loss": self.reconstruction_loss(out.reconstruction_B3HW, x),
            "val/psnr": psnr(reconstruction, x).mean(),
            "val/ssim": ssim(reconstruction, x).mean(),
        }
        self.log_dict(values, on_epoch=True, sync_dist=True, batch_size=len(x))

    def on_validation_epoch_start(self) -> None:
        self.codes_seen.reset()

    def on_validation_epoch_end(self) -> None:
        seen = self.codes_seen.compute()
        values = {"val/usage": seen.usage, "val/perplexity": seen.perplexity, "val/dead_codes": float(seen.dead_codes)}
        self.log_dict(values)

    def export_model(self) -> ImageTokenizer:
        """The tokenizer with averaged weights, in evaluation mode. Not a copy: training moves it on."""
        return self.averaged.module.eval()

    @torch.no_grad()
    def sample_images(self, batch: Batch, max_images: int = 16) -> Tensor:
        """One picture (3, 2H, n * W) in [-1, 1]: inputs over their reconstructions by the averaged weights."""
        x = batch.image[:max_images]
        reconstruction = self.export_model()(x).reconstruction_B3HW.float().clamp(-1, 1)
        return rearrange([x, reconstruction], "row b c h w -> c (row h) (b w)")

    def _adversarial_loss(self, reconstruction_B3HW: Tensor, reconstruction_loss: Tensor) -> tuple[Tensor, Tensor]:
        """The unweighted loss, and its weight."""
        config = self.config.loss.adversarial
        loss = generator_loss(self.discriminator(reconstruction_B3HW))
        last_layer = self.model.decoder.conv_out.weight
        return loss, config.weight * adaptive_weight(reconstruction_loss, loss, last_layer, config.max_adaptive_weight)

    def _update(self, optimizer: Any, module: torch.nn.Module, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.config.max_gradient_norm is not None:
            clip_grad_norm_(module.parameters(), self.config.max_gradient_norm)
        optimizer.step()

    @torch.no_grad()
    def _average(self, averaged: list[Tensor], current: list[Tensor], n_averaged: Tensor) -> None:
        # the first steps forget faster, or the random start would weigh on a short run
        n = int(n_averaged)
        decay = min(self.config.ema_decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(averaged, current, 1 - decay)


def train_vqgan(config: VQGANRunConfig, runs: Path, *, resume: Resume) -> Path:
    """Train as configured and return the run's folder."""
    dataset = open_dataset(config.data)
    L.seed_everything(config.trainer.seed, verbose=False)
    samples = image_samples(config.data, dataset, config.model.image_size_px, None, config.trainer.seed)
    module = VQGANModule(ImageTokenizer(config.model), config.training, config.trainer.max_steps)
    return fit(
        module,
        StageData(*samples, config.trainer, None),
        run_config=config,
        model_config=config.model,
        card=stage_card("vqgan", dataset),
        runs=runs,
        name=config.name,
        resume=resume,
        find_unused_parameters=config.training.loss.adversarial is not None,
    )
